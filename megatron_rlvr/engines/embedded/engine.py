"""Sampling inside the trainer's process, with the model class of transformers and a key-value cache of our own.

The engine holds the weights and decides which requests are sampled at the same time; one decode step and what it
leaves behind are live_rows.py's, the cache and the attention over it slots.py's, the choice of a token sampling.py's.
"""

import copy
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig

from megatron_rlvr.engines.embedded.model import build_model, checkpoint_views, copy_weights, refuse_partial_attention
from megatron_rlvr.engines.embedded.running_batch import RunningBatch
from megatron_rlvr.protocols import Sampling
from megatron_rlvr.types import Completion, CompletionRequest


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
        refuse_partial_attention(self._config)
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
        self._views: dict[str, torch.Tensor] = {}
        self.weight_version: int | None = None
        """Version of the weights held; None before the first update and after one that failed."""

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Copies the whole model in, under the names of a Hugging Face checkpoint.

        A tied output head may be left out. After an error nothing can be sampled until an update succeeds.

        Raises: RuntimeError naming the tensors that are missing, unknown, of the wrong shape, given twice, or tied and
            not equal.
        """
        self.weight_version = None
        if self._model is None:
            self._model = build_model(self._config, self._dtype, self._device)
            self._views = checkpoint_views(self._model)
        complaint = f"weights of version {version} do not fit {type(self._model).__name__}"
        copy_weights(self._views, named_tensors, complaint)
        self.weight_version = version

    def release_memory(self) -> None:
        """Nothing: the cache is gone with each `generate`, and the weights are small beside training's."""

    def generate(self, requests: Sequence[CompletionRequest], sampling: Sampling) -> Iterator[Completion]:
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

    def _stream(self, waiting: deque[CompletionRequest], sampling: Sampling, version: int) -> Iterator[Completion]:
        if not waiting:
            return
        columns = max(len(request.prompt.token_ids) for request in waiting) + sampling.max_response_tokens
        rows = min(len(waiting), self._max_batch_rows, self._max_batch_tokens // columns)
        batch = RunningBatch(self._model, rows, columns, sampling, self._is_stop, self._pad_token_id, version)
        # Prefilling rows one by one would cost a forward each, so holes are collected up to an eighth of the batch.
        worth_filling = max(1, rows // 8)
        while waiting or batch.live:
            if self.weight_version != version:
                raise RuntimeError(f"weights changed from version {version} to {self.weight_version} while sampling")
            free = rows - batch.live
            if waiting and free >= min(len(waiting), worth_filling):
                batch.admit([waiting.popleft() for _ in range(min(free, len(waiting)))])
            yield from batch.step()

    def _check(self, requests: Sequence[CompletionRequest], sampling: Sampling) -> None:
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
