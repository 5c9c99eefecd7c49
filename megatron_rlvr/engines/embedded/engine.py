"""Rollout engine that samples inside the trainer's process, with a transformers model and the project's own KV cache.

engine.py         holds the weights, validates requests, and decides which requests are sampled at the same time
running_batch.py  the sequences being sampled, and one decode step over them (continuous batching)
kv_cache.py       the KV cache and the attention over it
sampling.py       the choice of a token from logits
model.py          builds the transformers model and loads weights into it
"""

import copy
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig

from megatron_rlvr.engines.embedded.model import build_model, checkpoint_views, copy_weights, refuse_partial_attention
from megatron_rlvr.engines.embedded.running_batch import RunningBatch
from megatron_rlvr.protocols import Sampling
from megatron_rlvr.types import Completion, CompletionRequest


class EmbeddedEngine:
    """Rollout engine (protocols.RolloutEngine) that samples completions in this process.

    Args:
        config: Configuration of the model, or a Hugging Face folder to read it from (no weights are read).
        dtype: Data type of weights, activations and KV cache.
        device: Device that holds the model and the KV cache.
        stop_token_ids: Tokens that end a response; the stop token is the response's last token.
        pad_token_id: Token that pads the prompts of one prefill to equal length; attention never sees it.
        max_batch_tokens: Capacity of the KV cache in tokens (rows x columns). Each row takes the length of the
            longest prompt plus the response cap.
        max_batch_rows: Maximum number of sequences decoded at the same time.
        process_logits: Changes the logits [B, V] of each decode step, of which tokens are then sampled.

    Raises:
        ValueError: For a limit below 1, for a model with attention other than full attention (sliding window, linear,
            ...), and for a token id outside the vocabulary.
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
        process_logits: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        loaded = config if isinstance(config, PretrainedConfig) else AutoConfig.from_pretrained(config)
        self._config = copy.deepcopy(loaded)  # building the model writes its dtype and attention into the config
        refuse_partial_attention(self._config)
        for name, limit in (("max_batch_tokens", max_batch_tokens), ("max_batch_rows", max_batch_rows)):
            if limit < 1:
                raise ValueError(f"{name}={limit}: must be at least 1")
        vocabulary = self._config.vocab_size
        for token in (pad_token_id, *stop_token_ids):
            if not 0 <= token < vocabulary:
                raise ValueError(
                    f"token id {token} is outside the model's vocabulary of {vocabulary} tokens; "
                    "use the tokenizer that belongs to the model"
                )
        self._is_stop = np.zeros(vocabulary, dtype=bool)
        self._is_stop[list(stop_token_ids)] = True
        self._pad_token_id = pad_token_id
        self._dtype = dtype
        self._device = device
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_rows = max_batch_rows
        self._process_logits = process_logits
        self._model: Any = None
        self._views: dict[str, torch.Tensor] = {}
        self.weight_version: int | None = None
        """Version of the loaded weights; None before the first update and after a failed one."""

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Load the weights of the whole model, named as in a Hugging Face checkpoint.

        A tied output head may be omitted. After an error, sampling is refused until an update succeeds.

        Args:
            named_tensors: (name, tensor) pairs, in any order.
            version: Version of these weights, recorded with every token that they sample.

        Raises:
            RuntimeError: With the names of tensors that are missing, unknown, of the wrong shape, repeated, or tied but
                not equal.
        """
        self.weight_version = None
        if self._model is None:
            self._model = build_model(self._config, self._dtype, self._device)
            self._views = checkpoint_views(self._model)
        error_prefix = f"weights of version {version} do not fit {type(self._model).__name__}"
        copy_weights(self._views, named_tensors, error_prefix)
        self.weight_version = version

    def release_memory(self) -> None:
        """Do nothing: each `generate` frees its KV cache, and the weights are small next to training's memory."""

    def generate(self, requests: Sequence[CompletionRequest], sampling: Sampling) -> Iterator[Completion]:
        """Yield one completion per request, each in the decode step that finishes it.

        ``logprobs`` are log_softmax(logits / temperature) over the full vocabulary, before top-p, as SGLang reports
        them; temperature 0 takes the most likely token and reports log_softmax(logits). The iterator may be dropped
        at any point: all state of the sampling in progress belongs to it. Updating the weights while it runs makes
        its next step fail.

        Raises:
            ValueError: Before anything is sampled, for a request that does not fit the model or the KV cache.
            RuntimeError: If no weights are loaded, or if they produce logits that are not finite.
        """
        return self.completions(requests, sampling)

    def completions(
        self,
        requests: Sequence[CompletionRequest],
        sampling: Sampling,
        stop_wanted: Callable[[], bool] = lambda: False,
    ) -> Iterator[Completion]:
        """Yield the completions as `generate` does, and end early when asked to.

        Args:
            stop_wanted: Asked before each decode step; if it returns True, the iterator ends. Requests that are not
                finished by then can be made again: the same seed gives the same response.
        """
        if self.weight_version is None:
            raise RuntimeError("the embedded engine has no complete weights; call update_weights before generate")
        self._check(requests, sampling)
        return self._stream(deque(requests), sampling, self.weight_version, stop_wanted)

    def _stream(
        self,
        waiting: deque[CompletionRequest],
        sampling: Sampling,
        version: int,
        stop_wanted: Callable[[], bool],
    ) -> Iterator[Completion]:
        if not waiting:
            return
        columns = max(len(request.prompt.token_ids) for request in waiting) + sampling.max_response_tokens
        rows = min(len(waiting), self._max_batch_rows, self._max_batch_tokens // columns)
        batch = RunningBatch(
            *(self._model, rows, columns, sampling, self._is_stop, self._pad_token_id, version),
            process_logits=self._process_logits,
        )
        # Admitting rows one by one would cost a prefill forward each: wait until an eighth of the batch is free.
        refill_threshold = max(1, rows // 8)
        while (waiting or batch.size) and not stop_wanted():
            if self.weight_version != version:
                raise RuntimeError(
                    f"weights changed from version {version} to {self.weight_version} while sampling; "
                    "finish or drop the iterator before update_weights"
                )
            free = rows - batch.size
            if waiting and free >= min(len(waiting), refill_threshold):
                batch.admit([waiting.popleft() for _ in range(min(free, len(waiting)))])
            yield from batch.step()

    def _check(self, requests: Sequence[CompletionRequest], sampling: Sampling) -> None:
        response = sampling.max_response_tokens
        if response < 1:
            raise ValueError(f"max_response_tokens={response}: must be at least 1")
        if sampling.temperature < 0:
            raise ValueError(f"temperature={sampling.temperature}: must be at least 0")
        if not 0 < sampling.top_p <= 1:
            raise ValueError(f"top_p={sampling.top_p}: must be in (0, 1]")
        positions = self._config.max_position_embeddings
        for request in requests:
            prompt = len(request.prompt.token_ids)
            if prompt == 0:
                raise ValueError(f"prompt {request.prompt.id} has no tokens; remove it or give it text")
            needed = f"prompt {request.prompt.id} ({prompt} tokens) plus max_response_tokens={response}"
            if prompt + response > positions:
                raise ValueError(
                    f"{needed} exceeds the model's {positions} positions; "
                    "lower max_response_tokens or remove the prompt"
                )
            if prompt + response > self._max_batch_tokens:
                raise ValueError(
                    f"{needed} exceeds max_batch_tokens={self._max_batch_tokens}; "
                    "raise max_batch_tokens or lower max_response_tokens"
                )
