"""Sampling inside the trainer's process, with the model class of transformers and a key-value cache of our own.

The cache is a block of slots, [row, head, column, channel], in which the live sequences occupy rows 0 .. n-1 and each
sequence starts at column 0. One decode step feeds every live row its latest token; a row whose token ends it leaves
at once, and the last rows move into the holes, so that no step computes a dead row. A new row is prefilled with its
prompt less the last token, once for all samples of the prompt, and then joins the next step: every sampled token
comes from the same path, and neither left padding nor an end-of-prompt index is needed.

What is sampled for a request depends on its seed and on the weights, not on its neighbours: the request owns a
Philox stream, number j of which picks response token j by inverting the distribution function in float64.

The model is the one of transformers and not the policy's, on purpose: it is an independent implementation, against
which the policy's log-probabilities are checked in every step.
"""

import copy
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.initialization import no_init_weights
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from megatron_rlvr.protocols import Sampling
from megatron_rlvr.types import Completion, SampleRequest

# Positions in one prefill forward, padding included: bounds its activations.
_PREFILL_POSITIONS = 8192
# Uniforms drawn at a time for a row; a stream is the same however it is cut into blocks.
_UNIFORM_BLOCK = 128
# Names listed of each kind in an error about weights.
_NAMES_SHOWN = 4
_ATTENTION = "sdpa_grouped_decode"


class EmbeddedEngine:
    """Samples completions in this process; see protocols.RolloutEngine.

    Args:
        config: of the model, or the Hugging Face folder (no weights are read from it).
        dtype: of weights, activations and cache.
        device: where all of it lives.
        stop_token_ids: sampling one of them ends a response, of which it stays the last token.
        pad_token_id: fills the prompts of one prefill up to the longest; never seen by a sampled token.
        max_batch_tokens: cells (rows x columns) of the cache; a row needs its prompt and the response cap.
        max_batch_rows: sequences decoded at the same time, at most.

    Raises: ValueError for a model with attention other than full attention (sliding window, linear, ...), and for
        a token id outside the vocabulary.
    """

    def __init__(
        self,
        config: PretrainedConfig | str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device,
        stop_token_ids: Sequence[int],
        pad_token_id: int,
        max_batch_tokens: int = 65536,
        max_batch_rows: int = 256,
    ) -> None:
        loaded = config if isinstance(config, PretrainedConfig) else AutoConfig.from_pretrained(config)
        self._config = copy.deepcopy(loaded)  # the model writes its dtype and attention into it
        _refuse_partial_attention(self._config)
        if min(max_batch_tokens, max_batch_rows) < 1:
            raise ValueError(f"max_batch_tokens {max_batch_tokens} and max_batch_rows {max_batch_rows} must be > 0")
        vocabulary = self._config.vocab_size
        for token in (pad_token_id, *stop_token_ids):
            if not 0 <= token < vocabulary:
                raise ValueError(f"token id {token} is outside the model's vocabulary of {vocabulary}")
        self._is_stop = np.zeros(vocabulary, dtype=bool)
        self._is_stop[list(stop_token_ids)] = True
        self._pad_token_id = pad_token_id
        self._dtype = dtype
        self._device = device
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_rows = max_batch_rows
        self._model: Any = None
        self._targets: dict[str, torch.Tensor] = {}
        self.weight_version: int | None = None
        """Version of the weights held; None before the first update and after one that failed."""

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Copies the whole model in, under the names of a Hugging Face checkpoint.

        A tied output head may be left out. After an error nothing can be sampled until an update succeeds.

        Raises: RuntimeError naming the tensors that are missing, unknown, of the wrong shape or given twice.
        """
        self.weight_version = None
        if self._model is None:
            self._model = _build_model(self._config, self._dtype, self._device)
            self._targets = _checkpoint_views(self._model)
        missing = dict.fromkeys(self._targets)
        filled: dict[int, str] = {}  # address -> name: tied parameters share theirs
        faults: dict[str, list[str]] = {"unknown": [], "of the wrong shape": [], "given twice": []}
        for name, tensor in named_tensors:
            target = self._targets.get(name)
            if target is None:
                faults["unknown"].append(name)
            elif name not in missing:
                faults["given twice"].append(name)
            elif target.shape != tensor.shape:
                faults["of the wrong shape"].append(f"{name} {list(tensor.shape)}, not {list(target.shape)}")
                del missing[name]
            else:
                del missing[name]
                first = filled.setdefault(target.data_ptr(), name)
                if first != name and not torch.equal(target, tensor.to(target)):
                    raise RuntimeError(f"{name} differs from {first}, to which the model's config ties it")
                target.copy_(tensor)
        faults["missing"] = [name for name in missing if self._targets[name].data_ptr() not in filled]
        if any(faults.values()):
            listing = "; ".join(f"{kind}: {_shortened(names)}" for kind, names in faults.items() if names)
            raise RuntimeError(f"weights of version {version} do not fit {type(self._model).__name__}: {listing}")
        self.weight_version = version

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Iterator[Completion]:
        """Yields one completion a request, each in the step that finishes it.

        ``logprobs`` are log_softmax(logits / temperature) over the full vocabulary, before top-p, as SGLang reports
        them; temperature 0 takes the likeliest token and reports log_softmax(logits). The iterator may be dropped at
        any point: it owns everything it has begun. Updating the weights while it runs makes its next step fail.

        Raises: ValueError, before anything is sampled, for a request that the model or the cache has no room for;
            RuntimeError if there are no weights, or if they give logits that are not finite.
        """
        if self.weight_version is None:
            raise RuntimeError("the embedded engine has no complete weights to sample from; call update_weights first")
        self._check(requests, sampling)
        return self._stream(deque(requests), sampling, self.weight_version)

    def _stream(self, waiting: deque[SampleRequest], sampling: Sampling, version: int) -> Iterator[Completion]:
        if not waiting:
            return
        columns = max(len(request.prompt.token_ids) for request in waiting) + sampling.max_response_tokens
        rows = min(len(waiting), self._max_batch_rows, self._max_batch_tokens // columns)
        batch = _Batch(self._model, rows, columns, sampling, self._is_stop, self._pad_token_id, version)
        # Prefilling rows one by one would cost a forward each, so holes are collected up to an eighth of the batch.
        worth_filling = max(1, rows // 8)
        while waiting or batch.live:
            if self.weight_version != version:
                raise RuntimeError(f"weights changed from version {version} to {self.weight_version} while sampling")
            free = rows - batch.live
            if waiting and free >= min(len(waiting), worth_filling):
                batch.admit([waiting.popleft() for _ in range(min(free, len(waiting)))])
            yield from batch.step()

    def _check(self, requests: Sequence[SampleRequest], sampling: Sampling) -> None:
        response = sampling.max_response_tokens
        if response < 1:
            raise ValueError(f"max_response_tokens {response} must be at least 1")
        if sampling.temperature < 0 or not 0 < sampling.top_p <= 1:
            raise ValueError(f"temperature {sampling.temperature} must be >= 0 and top_p {sampling.top_p} in (0, 1]")
        positions = self._config.max_position_embeddings
        for request in requests:
            prompt = len(request.prompt.token_ids)
            where = f"prompt {request.prompt.id} of {prompt} tokens"
            if prompt == 0:
                raise ValueError(f"{where} is empty; there is nothing to continue")
            if prompt + response > positions:
                raise ValueError(
                    f"{where} and max_response_tokens {response} exceed the model's {positions} positions; "
                    "lower max_response_tokens or drop the prompt"
                )
            if prompt + response > self._max_batch_tokens:
                raise ValueError(
                    f"{where} and max_response_tokens {response} exceed max_batch_tokens {self._max_batch_tokens}; "
                    "raise max_batch_tokens"
                )


class _Batch:
    """The live sequences of one ``generate`` call: rows 0 .. live-1 of every array and of the cache."""

    def __init__(
        self,
        model: Any,
        rows: int,
        columns: int,
        sampling: Sampling,
        is_stop: np.ndarray,
        pad_token_id: int,
        version: int,
    ) -> None:
        self.live = 0
        self._model = model
        self._sampling = sampling
        self._is_stop = is_stop
        self._pad_token_id = pad_token_id
        self._version = version
        self._device = model.device
        self._slots = _Slots(rows, columns)
        self._layers = [_SlotLayer(self._slots) for _ in range(model.config.num_hidden_layers)]
        self._cache = Cache(layers=list(self._layers))
        self._row_index = torch.arange(rows, device=self._device)
        self._column_index = torch.arange(columns, device=self._device)
        self._requests: list[SampleRequest] = []
        self._streams: list[np.random.Generator] = []
        self._latest = np.zeros(rows, dtype=np.int64)  # the token to feed next ...
        self._position = np.zeros(rows, dtype=np.int64)  # ... and its position, which is its column
        self._produced = np.zeros(rows, dtype=np.int64)
        self._uniforms = np.zeros((rows, _UNIFORM_BLOCK))
        self._tokens = np.zeros((rows, sampling.max_response_tokens), dtype=np.int32)
        self._logprobs = np.zeros((rows, sampling.max_response_tokens), dtype=np.float32)

    @torch.inference_mode()
    def admit(self, requests: list[SampleRequest]) -> None:
        """Appends rows for ``requests``, at most as many as are free, and prefills each distinct prompt once."""
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, request in enumerate(requests, start=self.live):
            prompt = request.prompt.token_ids
            self._requests.append(request)
            self._streams.append(np.random.Generator(np.random.Philox(key=request.seed)))
            self._latest[row] = prompt[-1]
            self._position[row] = len(prompt) - 1
            self._produced[row] = 0
            if len(prompt) > 1:
                rows_of.setdefault(tuple(prompt[:-1].tolist()), []).append(row)
        self.live += len(requests)
        by_length = sorted(rows_of, key=len)
        while by_length:
            # A batch is as long as its longest; taking the longest first makes the bound exact.
            count = max(1, _PREFILL_POSITIONS // len(by_length[-1]))
            by_length, batch = by_length[:-count], by_length[-count:]
            self._prefill(batch, [rows_of[prefix] for prefix in batch])

    def _prefill(self, prefixes: list[tuple[int, ...]], rows_of_prefix: list[list[int]]) -> None:
        """Fills the slots of all rows of each prefix. What padding leaves on the right is masked until overwritten."""
        longest = max(map(len, prefixes))
        padded = [prefix + (self._pad_token_id,) * (longest - len(prefix)) for prefix in prefixes]
        filled: Any = DynamicCache()
        self._model(
            input_ids=torch.tensor(padded, device=self._device),
            past_key_values=filled,
            use_cache=True,
            logits_to_keep=1,
        )
        source = torch.tensor([i for i, rows in enumerate(rows_of_prefix) for _ in rows], device=self._device)
        rows = torch.tensor([row for rows in rows_of_prefix for row in rows], device=self._device)
        for layer, prefilled in zip(self._layers, filled.layers, strict=True):
            layer.fill(rows, prefilled.keys[source], prefilled.values[source])

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Samples one token for every live row; returns the completions that this finished, and frees their rows."""
        live = self.live
        produced = self._produced[:live]
        for row in np.flatnonzero(produced % _UNIFORM_BLOCK == 0):
            self._uniforms[row] = self._streams[row].random(_UNIFORM_BLOCK)
        rows = np.arange(live)
        uniforms = self._uniforms[rows, produced % _UNIFORM_BLOCK]
        tokens_on_device, logprobs_on_device = sample_tokens(
            self._logits(live),
            torch.from_numpy(uniforms).to(self._device),
            self._sampling.temperature,
            self._sampling.top_p,
        )
        tokens, logprobs = tokens_on_device.cpu().numpy(), logprobs_on_device.cpu().numpy()
        if not np.isfinite(logprobs).all():
            raise RuntimeError(f"weights of version {self._version} give logits that are not finite")
        self._tokens[rows, produced] = tokens
        self._logprobs[rows, produced] = logprobs
        self._latest[:live] = tokens
        self._position[:live] += 1
        produced += 1
        stopped = self._is_stop[tokens]
        finished = stopped | (produced == self._sampling.max_response_tokens)
        if not finished.any():
            return []
        completions = [self._completion(row, bool(stopped[row])) for row in np.flatnonzero(finished).tolist()]
        self._remove(finished)
        return completions

    def _logits(self, live: int) -> torch.Tensor:
        """[live, V] logits after the latest token of every row, which enters the cache."""
        position = torch.from_numpy(self._position[:live]).to(self._device)
        span = int(self._position[:live].max()) + 1
        self._slots.rows, self._slots.position, self._slots.span = self._row_index[:live], position, span
        unseen = self._column_index[:span] > position[:, None]
        # A mask of floats: of a boolean one, every layer would make its own.
        mask = torch.zeros(unseen.shape, dtype=self._model.dtype, device=self._device).masked_fill_(unseen, -torch.inf)
        return self._model(
            input_ids=torch.from_numpy(self._latest[:live, None]).to(self._device),
            attention_mask=mask[:, None, None, :],
            position_ids=position[:, None],
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]

    def _completion(self, row: int, stopped: bool) -> Completion:
        request, produced = self._requests[row], self._produced[row]
        return Completion(
            prompt_id=request.prompt.id,
            sample=request.sample,
            token_ids=self._tokens[row, :produced].copy(),
            logprobs=self._logprobs[row, :produced].copy(),
            finish_reason="stop" if stopped else "length",
            weight_version=self._version,
        )

    def _remove(self, finished: np.ndarray) -> None:
        """Drops the rows marked in ``finished`` [live]; the last rows move into the holes they leave."""
        remaining = self.live - int(finished.sum())
        holes = np.flatnonzero(finished[:remaining])
        moved = remaining + np.flatnonzero(~finished[remaining:])
        for array in (self._latest, self._position, self._produced, self._uniforms, self._tokens, self._logprobs):
            array[holes] = array[moved]
        for hole, source in zip(holes, moved, strict=True):
            self._requests[hole], self._streams[hole] = self._requests[source], self._streams[source]
        del self._requests[remaining:], self._streams[remaining:]
        if len(holes) and remaining:
            to_rows, from_rows = torch.from_numpy(holes).to(self._device), torch.from_numpy(moved).to(self._device)
            for layer in self._layers:
                layer.move(to_rows, from_rows, int(self._position[:remaining].max()))
        self.live = remaining


@dataclass
class _Slots:
    """The size of the cache, and which cells of it the current step writes and reads; shared by all layers."""

    row_count: int
    column_count: int
    rows: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    position: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    span: int = 0


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [row, head, column, channel], written in place."""

    is_sliding = False
    keys: Any
    values: Any

    def __init__(self, slots: _Slots) -> None:
        super().__init__()
        self._slots = slots

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, columns = self._slots.row_count, self._slots.column_count
        # Zeros, because a masked cell is multiplied by zero, which a stray NaN would survive.
        self.keys = key_states.new_zeros(rows, key_states.shape[1], columns, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], columns, value_states.shape[3])
        self.is_initialized = True

    def fill(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes the first columns of ``rows``; keys and values are [len(rows), head, columns, channel]."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys[rows, :, : keys.shape[2]] = keys
        self.values[rows, :, : values.shape[2]] = values

    def move(self, to_rows: torch.Tensor, from_rows: torch.Tensor, columns: int) -> None:
        """Copies the first ``columns`` of some rows over others."""
        for cells in (self.keys, self.values):
            cells[to_rows, :, :columns] = cells[from_rows, :, :columns]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the model: stores one column a row, and returns views of all that the step may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots = self._slots
        self.keys[slots.rows, :, slots.position] = key_states[:, :, 0]
        self.values[slots.rows, :, slots.position] = value_states[:, :, 0]
        live = len(slots.rows)
        return self.keys[:live, :, : slots.span], self.values[:live, :, : slots.span]

    def get_seq_length(self) -> int:
        return self._slots.span

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._slots.span, 0

    def get_max_length(self) -> int:
        return self._slots.column_count


def sample_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens at which the distribution functions pass the uniforms, in the order of the vocabulary.

    Args:
        logits: [B, V].
        uniforms: [B] float64 in [0, 1), one a row.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: keeps the fewest likeliest tokens that together reach this probability.

    Returns: [B] tokens, and [B] float32 log-probabilities under softmax(logits / temperature) without top_p.
    """
    scaled = logits.double()
    if temperature > 0:
        scaled = scaled / temperature
    shifted = scaled - scaled.amax(-1, keepdim=True)
    weights = shifted.exp()
    log_total = weights.sum(-1, keepdim=True).log()
    if temperature > 0:
        if top_p < 1:
            weights = _nucleus(weights, top_p)
        cumulative = weights.cumsum(-1)
        # The first entry *above* the threshold: a token of weight zero has no such entry of its own.
        tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
        tokens = tokens.clamp_(max=logits.shape[-1] - 1)  # past the end only where logits are NaN
    else:
        tokens = shifted.argmax(-1, keepdim=True)
    return tokens[:, 0], (shifted.gather(-1, tokens) - log_total)[:, 0].float()


def _nucleus(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """[B, V] weights, zero outside the fewest largest that reach ``top_p`` of the sum."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    cumulative = ordered.cumsum(-1)
    ordered[cumulative - ordered >= top_p * cumulative[:, -1:]] = 0
    # Back in the order of the vocabulary: two nearly equal tokens that swap ranks must not swap what a uniform picks.
    return torch.zeros_like(weights).scatter_(-1, order, ordered)


def _grouped_decode_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA that reads each key-value head once in a decode step, where transformers' copies it for every query head.

    query is [B, query head, T, D], key and value [B, key-value head, columns, D]. With one query token, the query
    heads that share a key-value head can stand where query positions do, since the mask is the same for all of them.
    """
    batch, query_heads, length, channels = query.shape
    if length > 1 or query_heads == key.shape[1] or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    grouped = query.reshape(batch, key.shape[1], -1, channels)
    output = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    return output.reshape(batch, 1, query_heads, -1), None


def _build_model(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """The model with its buffers computed and its parameters tied, but uninitialised."""
    AttentionInterface.register(_ATTENTION, _grouped_decode_attention)
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_ATTENTION)
    model.tie_weights()  # part of the initialisation that was skipped
    return model.eval().requires_grad_(False)


def _checkpoint_views(model: Any) -> dict[str, torch.Tensor]:
    """Name in a Hugging Face checkpoint -> the part of ``model`` that it fills.

    transformers fuses the experts of a layer into two parameters, [expert, 2 * intermediate, hidden] (gate above up)
    and [expert, hidden, intermediate], where checkpoints have three for each expert.
    """
    views: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        prefix, _, kind = name.rpartition(".experts.")
        if kind == "gate_up_proj":
            for expert, gate_up in enumerate(tensor):
                gate, up = gate_up.chunk(2)
                views[f"{prefix}.experts.{expert}.gate_proj.weight"] = gate
                views[f"{prefix}.experts.{expert}.up_proj.weight"] = up
        elif kind == "down_proj":
            for expert, down in enumerate(tensor):
                views[f"{prefix}.experts.{expert}.down_proj.weight"] = down
        else:
            views[name] = tensor
    return views


def _refuse_partial_attention(config: PretrainedConfig) -> None:
    """Raises ValueError unless every layer attends to all earlier positions, as the cache and its mask do."""
    partial = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention"})
    for key in ("sliding_window", "attention_chunk_size"):
        if getattr(config, "layer_types", None) is None and getattr(config, key, None) is not None:
            partial.append(f"{key} {getattr(config, key)}")
    if partial:
        raise ValueError(f"the embedded engine has full attention only, and the model has {', '.join(partial)}")


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
