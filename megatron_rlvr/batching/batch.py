"""Training sequences and packed micro-batches. The shift by one between input and target tokens is only made here.

A training sequence is prompt + response. Its input is all of it but the last token; the entry at input position t
predicts token t + 1. Response token j of a prompt of P tokens is therefore predicted at input position P - 1 + j: these
positions, in the packed stream, are a micro-batch's ``rows``, and every per-token vector here is aligned with them.

Shapes: P prompt tokens and T response tokens of a sequence; S packed positions, B sequences and R response tokens
(rows) of a micro-batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rlvr.algo.loss import LossInputs

# A token id holds the sequence's number in the upper 24 bits and the position in its response in the lower 20.
_NUMBER_BITS, _POSITION_BITS = 24, 20


@dataclass(frozen=True, slots=True)
class TrainingSequence:
    """A prompt and one completion of it, with its advantage.

    Attributes:
        number: Number of the sequence in the training step, the same in every layout; below 2^24.
        prompt_ids: [P] int32 token ids.
        response_ids: [T] int32 token ids, T >= 1.
        rollout_logp: [T] float32 nats, log-probabilities recorded at sampling.
        advantage: Advantage of every token of the response.
        weight_versions: [T] int32, version of the weights that sampled each token.
    """

    number: int
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    rollout_logp: np.ndarray
    advantage: float
    weight_versions: np.ndarray

    @property
    def input_length(self) -> int:
        """Number of tokens that enter the model; the last one is only predicted."""
        return len(self.prompt_ids) + len(self.response_ids) - 1


@dataclass(frozen=True)
class MicroBatch:
    """A packed stream of sequences, on the CPU until `to` moves it.

    Attributes:
        tokens: [S] int64, the input. A sequence may end in padding, which attention cannot see from before it, and the
            tail of the stream may be padding, a sequence of its own without rows.
        targets: [S] int64, the token predicted at each position.
        cu_seqlens: [B + 1] int32, boundaries of the sequences, each with its padding.
        lengths: Length of each sequence with its padding, as an int; the padding of the tail is the last one.
        rows: [R] int64, positions in the stream that predict response tokens.
        token_ids: [R] int64, unique over the training step and the same in every layout.
        sequence: [R] int64, index of the sequence in the stream that each row belongs to.
        rollout_logp: [R] float32 nats, log-probabilities recorded at sampling.
        advantages: [R] float32, advantage of each row's response.
        weight_versions: [R] int32, version of the weights that sampled each token.
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
        """Length of the longest sequence, padding included."""
        return max(self.lengths)

    @property
    def positions(self) -> int:
        """Number of positions without padding: those of each sequence up to its last row."""
        last = torch.bincount(self.sequence).cumsum(0) - 1
        return int((self.rows[last] + 1 - self.cu_seqlens[: len(last)]).sum())

    def responses(self) -> list[tuple[int, slice]]:
        """Number in the training step, and rows, of each sequence of the stream."""
        ends = [0, *torch.bincount(self.sequence).cumsum(0).tolist()]
        numbers = (self.token_ids >> _POSITION_BITS)[ends[:-1]].tolist() if len(ends) > 1 else []
        return [(number, slice(*rows)) for number, rows in zip(numbers, pairwise(ends), strict=True)]

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the micro-batch with its tensors on ``device``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class PolicyScores:
    """Scores of every response token of a list of micro-batches under one set of weights.

    Attributes:
        logp: [R] float32 nats for each micro-batch, log-probabilities.
        entropy: [R] float32 nats for each micro-batch.
        gradient: [R] float32 for each micro-batch, norm of the gradient of ``logp`` by the logits, or NaN.
        likeliest: For each micro-batch, of the n rows that were asked for: (token ids [n, k] int64, log-probabilities
            [n, k] float32 nats, highest first). Empty if none were asked for.
    """

    logp: list[Tensor]
    entropy: list[Tensor]
    gradient: list[Tensor]
    likeliest: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def plain_inputs(self, batches: Sequence[MicroBatch]) -> list[LossInputs]:
        """Return the inputs of a loss without correction, shaping or reference, from the old policy's scores."""
        return [LossInputs(logp, b.advantages.to(logp.device)) for logp, b in zip(self.logp, batches, strict=True)]


def pack(sequences: Sequence[TrainingSequence], pad_multiple: int = 1, sequence_multiple: int = 1) -> MicroBatch:
    """Pack sequences into one stream.

    Args:
        sequences: B sequences. If there are none, the stream is padding only: a rank that has run out of work still
            takes part in the collectives.
        pad_multiple: The stream is padded at its end to a multiple of it.
        sequence_multiple: Each sequence is padded at its end to a multiple of it, and so is the stream.

    Raises: ValueError for a sequence whose tokens cannot be given ids.
    """
    tokens: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    lengths: list[int] = []
    offset = 0
    for sequence in sequences:
        whole = np.concatenate([sequence.prompt_ids, sequence.response_ids]).astype(np.int64)
        padding = np.zeros(-sequence.input_length % sequence_multiple, dtype=np.int64)
        tokens += [whole[:-1], padding]
        targets += [whole[1:], padding]
        first = offset + len(sequence.prompt_ids) - 1
        rows.append(np.arange(first, first + len(sequence.response_ids)))
        lengths.append(sequence.input_length + len(padding))
        offset += lengths[-1]
    multiple = math.lcm(pad_multiple, sequence_multiple)
    tail = -offset % multiple if offset else multiple
    if tail:
        tokens.append(np.zeros(tail, dtype=np.int64))
        targets.append(np.zeros(tail, dtype=np.int64))
        lengths.append(tail)
    counts = [len(sequence.response_ids) for sequence in sequences]
    advantages = np.array([sequence.advantage for sequence in sequences], dtype=np.float32)
    return MicroBatch(
        tokens=torch.from_numpy(np.concatenate(tokens)),
        targets=torch.from_numpy(np.concatenate(targets)),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        lengths=tuple(lengths),
        rows=_concatenated(rows, np.int64),
        token_ids=_concatenated([_token_ids(sequence) for sequence in sequences], np.int64),
        sequence=torch.from_numpy(np.repeat(np.arange(len(sequences), dtype=np.int64), counts)),
        rollout_logp=_concatenated([sequence.rollout_logp for sequence in sequences], np.float32),
        advantages=torch.from_numpy(np.repeat(advantages, counts)),
        weight_versions=_concatenated([sequence.weight_versions for sequence in sequences], np.int32),
    )


def _token_ids(sequence: TrainingSequence) -> np.ndarray:
    length = len(sequence.response_ids)
    if length >= 2**_POSITION_BITS or sequence.number >= 2**_NUMBER_BITS:
        raise ValueError(
            f"the {length} response tokens of sequence {sequence.number} cannot be given ids; use fewer than "
            f"2^{_NUMBER_BITS} sequences a step, with responses of fewer than 2^{_POSITION_BITS} tokens"
        )
    return (np.int64(sequence.number) << _POSITION_BITS) + np.arange(length, dtype=np.int64)


def sequence_and_position(token_id: int) -> tuple[int, int]:
    """Return the number of a token's sequence in the training step, and the token's position in the response."""
    return token_id >> _POSITION_BITS, token_id & (2**_POSITION_BITS - 1)


def _concatenated(parts: Sequence[np.ndarray], dtype: type) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False))
