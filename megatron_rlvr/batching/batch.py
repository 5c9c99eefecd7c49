"""From graded completions to packed micro-batches: spreading over ranks, packing, and the only shift by one.

A sequence is prompt + response. Its input is all of it but the last token; the entry at input position t predicts
token t + 1. Response token j of a prompt of P tokens is therefore predicted at input position P - 1 + j: these
positions, in the packed stream, are a micro-batch's ``rows``, and every per-token vector here is aligned with them.

Shapes: S packed positions, B sequences in the stream, R response tokens (rows) of a micro-batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A token id holds the sample's number above the position in its response: 24 + 20 bits.
_POSITION_BITS = 20


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion with its advantage.

    Attributes:
        number: its number in the training step, the same in every layout; below 2^24.
        prompt_ids: [P] int32.
        response_ids: [T] int32, T >= 1.
        rollout_logp: [T] float32, recorded at sampling.
        advantage: of every token of the response.
        weight_versions: [T] int32, of the weights that sampled each token.
    """

    number: int
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    rollout_logp: np.ndarray
    advantage: float
    weight_versions: np.ndarray

    @property
    def input_length(self) -> int:
        """Tokens that enter the model: the last one is only predicted."""
        return len(self.prompt_ids) + len(self.response_ids) - 1


@dataclass(frozen=True)
class MicroBatch:
    """A packed stream of sequences, on the CPU until `to` moves it.

    Attributes:
        tokens: [S] int64, the input. A sequence may end in padding, which attention cannot see from before it, and the
            tail of the stream may be padding, a sequence of its own without rows.
        targets: [S] int64, the token predicted at each position.
        cu_seqlens: [B + 1] int32, where sequences begin and end, their padding included.
        lengths: of the sequences, as numbers; their padding and that of the tail included.
        rows: [R] int64, positions in the stream that predict response tokens.
        token_ids: [R] int64, unique over the training step and the same in every layout.
        sequence: [R] int64, which of the stream's sequences a row belongs to.
        rollout_logp: [R] float32.
        advantages: [R] float32.
        weight_versions: [R] int32, of the weights that sampled a token.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    rows: Tensor
    token_ids: Tensor
    sequence: Tensor
    rollout_logp: Tensor
    advantages: Tensor
    weight_versions: Tensor

    @property
    def max_length(self) -> int:
        """The longest sequence."""
        return max(self.lengths)

    @property
    def positions(self) -> int:
        """Positions of the stream that are no padding: each sequence's, up to its last row."""
        last = torch.bincount(self.sequence).cumsum(0) - 1
        return int((self.rows[last] + 1 - self.cu_seqlens[: len(last)]).sum())

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class PolicyScores:
    """Log-probability and entropy of every response token of a list of micro-batches, each [R] float32 nats."""

    logp: list[Tensor]
    entropy: list[Tensor]


def pack(samples: Sequence[Sample], pad_multiple: int = 1, sequence_multiple: int = 1) -> MicroBatch:
    """Packs samples into one stream.

    Every sequence is padded at its end to a multiple of ``sequence_multiple``, then the stream to one of
    ``pad_multiple`` too. Without samples the stream is padding only: a rank that has run out of work still takes part
    in the collectives.
    """
    tokens: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    lengths: list[int] = []
    offset = 0
    for sample in samples:
        whole = np.concatenate([sample.prompt_ids, sample.response_ids]).astype(np.int64)
        padding = np.zeros(-sample.input_length % sequence_multiple, dtype=np.int64)
        tokens += [whole[:-1], padding]
        targets += [whole[1:], padding]
        first = offset + len(sample.prompt_ids) - 1
        rows.append(np.arange(first, first + len(sample.response_ids)))
        lengths.append(sample.input_length + len(padding))
        offset += lengths[-1]
    multiple = math.lcm(pad_multiple, sequence_multiple)
    tail = -offset % multiple if offset else multiple
    if tail:
        tokens.append(np.zeros(tail, dtype=np.int64))
        targets.append(np.zeros(tail, dtype=np.int64))
        lengths.append(tail)
    counts = [len(sample.response_ids) for sample in samples]
    return MicroBatch(
        tokens=torch.from_numpy(np.concatenate(tokens)),
        targets=torch.from_numpy(np.concatenate(targets)),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        lengths=tuple(lengths),
        rows=_concatenated(rows, np.int64),
        token_ids=_concatenated([_token_ids(sample) for sample in samples], np.int64),
        sequence=torch.from_numpy(np.repeat(np.arange(len(samples), dtype=np.int64), counts)),
        rollout_logp=_concatenated([sample.rollout_logp for sample in samples], np.float32),
        advantages=torch.from_numpy(np.repeat(np.array([s.advantage for s in samples], dtype=np.float32), counts)),
        weight_versions=_concatenated([sample.weight_versions for sample in samples], np.int32),
    )


def _token_ids(sample: Sample) -> np.ndarray:
    if len(sample.response_ids) >= 2**_POSITION_BITS or sample.number >= 2**24:
        raise ValueError(
            f"sample {sample.number} of {len(sample.response_ids)} tokens cannot be numbered; "
            "use fewer than 2^24 samples of fewer than 2^20 tokens"
        )
    return (np.int64(sample.number) << _POSITION_BITS) + np.arange(len(sample.response_ids), dtype=np.int64)


def sample_and_position(token_id: int) -> tuple[int, int]:
    """The sample's number in the training step, and the place in its response, of a token."""
    return token_id >> _POSITION_BITS, token_id & (2**_POSITION_BITS - 1)


def _concatenated(parts: Sequence[np.ndarray], dtype: type) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False))
