"""Running batch of the embedded engine: the sequences that are being sampled, with continuous batching.

Continuous batching: sequences enter and leave the batch between decode steps, so that no step computes a finished
sequence. The batch occupies rows 0 .. size-1 of every array and of the KV cache. One step feeds each row its latest
token. A finished row leaves at once, and the last rows move into the holes. A new row is prefilled with its prompt
except the last token, once for all completions of the prompt, and takes part in the next step: all sampled tokens are
computed the same way, and neither left padding nor an end-of-prompt index is needed.

The response to a request depends on its seed and on the weights, not on the other rows: each request has its own
Philox stream, whose uniform number j picks response token j.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from megatron_rlvr.engines.embedded.kv_cache import KVCache
from megatron_rlvr.engines.embedded.sampling import sample_tokens
from megatron_rlvr.errors import FaultError
from megatron_rlvr.protocols import Sampling
from megatron_rlvr.types import Completion, CompletionRequest

_PREFILL_POSITIONS = 8192
"""Maximum positions in one prefill forward, padding included; bounds the memory of its activations."""


class RunningBatch:
    """Sequences in progress of one ``generate`` call.

    Args:
        model: transformers model with the attention of kv_cache.py.
        rows, columns: Size of the KV cache: sequences, and tokens per sequence.
        sampling: Temperature, top_p and the response cap.
        is_stop: [V] bool, true for tokens that end a response.
        pad_token_id: Token that pads the prompts of one prefill to equal length.
        version: Version of the weights, recorded in the completions.
        process_logits: Changes the logits [B, V] of a step before a token is sampled of each row.

    Attributes:
        size: Number of sequences in progress.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        columns: int,
        sampling: Sampling,
        is_stop: np.ndarray,
        pad_token_id: int,
        version: int,
        process_logits: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.size = 0
        self._model = model
        self._sampling = sampling
        self._is_stop = is_stop
        self._pad_token_id = pad_token_id
        self._version = version
        self._process_logits = process_logits
        self._device = model.device
        self._kv_cache = KVCache(model.config.num_hidden_layers, rows, columns, model.device)
        self._requests: list[CompletionRequest] = []
        self._latest = np.zeros(rows, dtype=np.int64)  # the token to feed next ...
        self._position = np.zeros(rows, dtype=np.int64)  # ... and its position, which is its column
        self._produced = np.zeros(rows, dtype=np.int64)
        self._uniforms = np.zeros((rows, sampling.max_response_tokens))
        self._tokens = np.zeros((rows, sampling.max_response_tokens), dtype=np.int32)
        self._logprobs = np.zeros((rows, sampling.max_response_tokens), dtype=np.float32)

    @torch.inference_mode()
    def admit(self, requests: Sequence[CompletionRequest]) -> None:
        """Append one row per request and prefill each distinct prompt once; that many rows must be free."""
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, request in enumerate(requests, start=self.size):
            prompt = request.prompt.token_ids
            stream = np.random.Generator(np.random.Philox(key=request.seed))
            self._uniforms[row] = stream.random(self._sampling.max_response_tokens)
            self._latest[row] = prompt[-1]
            self._position[row] = len(prompt) - 1
            self._produced[row] = 0
            if len(prompt) > 1:
                rows_of.setdefault(tuple(prompt[:-1].tolist()), []).append(row)
        self._requests += requests
        self.size += len(requests)
        by_length = sorted(rows_of, key=len)
        while by_length:
            # Padding makes all prompts of a prefill as long as its longest one, so take the longest first: the count
            # that fits is then exact.
            count = max(1, _PREFILL_POSITIONS // len(by_length[-1]))
            by_length, batch = by_length[:-count], by_length[-count:]
            self._prefill(batch, [rows_of[prefix] for prefix in batch])

    def _prefill(self, prefixes: list[tuple[int, ...]], rows_of_prefix: list[list[int]]) -> None:
        """Prefill each prefix once and copy it to all of its rows; padding cells are masked until overwritten."""
        longest = max(map(len, prefixes))
        padded = [prefix + (self._pad_token_id,) * (longest - len(prefix)) for prefix in prefixes]
        prefilled = DynamicCache()
        # Without the output head, whose logits are not needed. On a CPU it would also copy its weight once per prompt,
        # as PyTorch multiplies a strided [B, 1, H] by broadcasting the matrix.
        self._model.base_model(
            input_ids=torch.tensor(padded, device=self._device), past_key_values=prefilled, use_cache=True
        )
        source = torch.tensor([i for i, rows in enumerate(rows_of_prefix) for _ in rows], device=self._device)
        rows = torch.tensor([row for rows in rows_of_prefix for row in rows], device=self._device)
        self._kv_cache.fill(rows, prefilled, source)

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Sample one token for every row, free the rows that finish, and return their completions.

        Raises:
            RuntimeError: If the weights produce logits that are not finite.
        """
        rows = np.arange(self.size)
        produced = self._produced[: self.size]
        logits = self._logits()
        if self._process_logits is not None:
            logits = self._process_logits(logits.double())
        tokens_on_device, logprobs_on_device = sample_tokens(
            logits,
            torch.from_numpy(self._uniforms[rows, produced]).to(self._device),
            self._sampling.temperature,
            self._sampling.top_p,
        )
        tokens, logprobs = tokens_on_device.cpu().numpy(), logprobs_on_device.cpu().numpy()
        if not np.isfinite(logprobs).all():
            raise FaultError(f"weights of version {self._version} produce logits that are not finite; check model.path")
        self._tokens[rows, produced] = tokens
        self._logprobs[rows, produced] = logprobs
        self._latest[rows] = tokens
        self._position[rows] += 1
        produced += 1
        stopped = self._is_stop[tokens]
        finished = stopped | (produced == self._sampling.max_response_tokens)
        if not finished.any():
            return []
        completions = [self._completion(row, bool(stopped[row])) for row in np.flatnonzero(finished).tolist()]
        self._remove(finished)
        return completions

    def _logits(self) -> torch.Tensor:
        """Feed the latest token of every row, which enters the KV cache, and return logits [size, V]."""
        position = torch.from_numpy(self._position[: self.size]).to(self._device)
        span = int(self._position[: self.size].max()) + 1
        return self._model(
            input_ids=torch.from_numpy(self._latest[: self.size, None]).to(self._device),
            attention_mask=self._kv_cache.begin_step(position, span, self._model.dtype),
            position_ids=position[:, None],
            past_key_values=self._kv_cache.past_key_values,
            use_cache=True,
        ).logits[:, -1]

    def _completion(self, row: int, stopped: bool) -> Completion:
        request, produced = self._requests[row], self._produced[row]
        return Completion(
            prompt_id=request.prompt.id,
            index=request.index,
            token_ids=self._tokens[row, :produced].copy(),
            logprobs=self._logprobs[row, :produced].copy(),
            finish_reason="stop" if stopped else "length",
            weight_versions=np.full(produced, self._version, dtype=np.int32),
        )

    def _remove(self, finished: np.ndarray) -> None:
        """Remove the rows marked in ``finished`` [size] and move the last rows into the holes."""
        remaining = self.size - int(finished.sum())
        holes = np.flatnonzero(finished[:remaining])
        moved = remaining + np.flatnonzero(~finished[remaining:])
        for array in (self._latest, self._position, self._produced, self._uniforms, self._tokens, self._logprobs):
            array[holes] = array[moved]
        for hole, source in zip(holes, moved, strict=True):
            self._requests[hole] = self._requests[source]
        del self._requests[remaining:]
        if len(holes):
            to_rows, from_rows = torch.from_numpy(holes).to(self._device), torch.from_numpy(moved).to(self._device)
            self._kv_cache.move(to_rows, from_rows, int(self._position[:remaining].max()))
        self.size = remaining
