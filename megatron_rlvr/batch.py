"""From graded completions to packed micro-batches: spreading over ranks, packing, and the only shift by one.

A sequence is prompt + response. Its input is all of it but the last token; the entry at input position t predicts
token t + 1. Response token j of a prompt of P tokens is therefore predicted at input position P - 1 + j: these
positions, in the packed stream, are a micro-batch's ``rows``, and every per-token vector here is aligned with them.

Shapes: S packed positions, B sequences in the stream, R response tokens (rows) of a micro-batch.
"""

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
        weight_version: of the weights that sampled it.
    """

    number: int
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    rollout_logp: np.ndarray
    advantage: float
    weight_version: int = 0

    @property
    def input_length(self) -> int:
        """Tokens that enter the model: the last one is only predicted."""
        return len(self.prompt_ids) + len(self.response_ids) - 1


@dataclass(frozen=True)
class MicroBatch:
    """A packed stream of sequences, on the CPU until `to` moves it.

    Attributes:
        tokens: [S] int64, the input; the tail may be padding, a sequence of its own without rows.
        targets: [S] int64, the token predicted at each position.
        cu_seqlens: [B + 1] int32, where sequences begin and end.
        max_length: the longest sequence.
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
    max_length: int
    rows: Tensor
    token_ids: Tensor
    sequence: Tensor
    rollout_logp: Tensor
    advantages: Tensor
    weight_versions: Tensor

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


def pack(samples: Sequence[Sample], pad_multiple: int = 1) -> MicroBatch:
    """Packs samples into one stream, padded to a multiple of ``pad_multiple`` (tensor-parallel ranks share it evenly).

    Without samples the stream is padding only: a rank that has run out of work still takes part in the collectives.
    """
    tokens: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    lengths: list[int] = []
    offset = 0
    for sample in samples:
        whole = np.concatenate([sample.prompt_ids, sample.response_ids]).astype(np.int64)
        tokens.append(whole[:-1])
        targets.append(whole[1:])
        first = offset + len(sample.prompt_ids) - 1
        rows.append(np.arange(first, first + len(sample.response_ids)))
        lengths.append(len(whole) - 1)
        offset += len(whole) - 1
    padding = -offset % pad_multiple if offset else pad_multiple
    if padding:
        tokens.append(np.zeros(padding, dtype=np.int64))
        targets.append(np.zeros(padding, dtype=np.int64))
        lengths.append(padding)
    counts = [len(sample.response_ids) for sample in samples]
    return MicroBatch(
        tokens=torch.from_numpy(np.concatenate(tokens)),
        targets=torch.from_numpy(np.concatenate(targets)),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        max_length=max(lengths),
        rows=_concatenated(rows, np.int64),
        token_ids=_concatenated([_token_ids(sample) for sample in samples], np.int64),
        sequence=torch.from_numpy(np.repeat(np.arange(len(samples), dtype=np.int64), counts)),
        rollout_logp=_concatenated([sample.rollout_logp for sample in samples], np.float32),
        advantages=torch.from_numpy(np.repeat(np.array([s.advantage for s in samples], dtype=np.float32), counts)),
        weight_versions=torch.from_numpy(np.repeat(np.array([s.weight_version for s in samples], np.int32), counts)),
    )


def _token_ids(sample: Sample) -> np.ndarray:
    if len(sample.response_ids) >= 2**_POSITION_BITS or sample.number >= 2**24:
        raise ValueError(
            f"sample {sample.number} of {len(sample.response_ids)} tokens cannot be numbered; "
            "use fewer than 2^24 samples of fewer than 2^20 tokens"
        )
    return (np.int64(sample.number) << _POSITION_BITS) + np.arange(len(sample.response_ids), dtype=np.int64)


def _concatenated(parts: Sequence[np.ndarray], dtype: type) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False))


def spread(lengths: Sequence[int], ranks: int, quadratic: float) -> list[list[int]]:
    """Which sequences each data-parallel rank gets: the longest first, each to the rank with the least work so far.

    Args:
        lengths: tokens of each sequence.
        ranks: number of data-parallel ranks.
        quadratic: cost of attention against the linear layers: a sequence of n tokens costs n + quadratic * n^2.

    Returns: numbers of the sequences of each rank, ascending; together a partition.
    """
    cost = [n + quadratic * n * n for n in lengths]
    load = [0.0] * ranks
    owned: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(lengths)), key=lambda i: (-cost[i], i)):
        rank = min(range(ranks), key=lambda r: (load[r], len(owned[r]), r))
        load[rank] += cost[i]
        owned[rank].append(i)
    return [sorted(part) for part in owned]


def micro_batch_plan(lengths_by_rank: Sequence[Sequence[int]], budget: int, multiple: int = 1) -> list[list[list[int]]]:
    """How each rank cuts its sequences into micro-batches, the same number on every rank.

    Sequences go, longest first, into the first micro-batch with room (first-fit decreasing); one longer than
    ``budget`` gets a micro-batch of its own. Ranks that need fewer than the others get empty ones at the end.

    Args:
        lengths_by_rank: tokens of each sequence of each rank.
        budget: tokens a micro-batch, at most.
        multiple: the number of micro-batches is rounded up to a multiple of this (interleaved pipelines).

    Returns: for each rank, for each micro-batch, positions in the rank's list.
    """
    plans = [_first_fit_decreasing(lengths, budget) for lengths in lengths_by_rank]
    count = max(1, *(len(plan) for plan in plans))
    count += -count % multiple
    return [plan + [[] for _ in range(count - len(plan))] for plan in plans]


def _first_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for b in range(len(bins)):
            if lengths[i] <= room[b]:
                bins[b].append(i)
                room[b] -= lengths[i]
                break
        else:
            bins.append([i])
            room.append(budget - lengths[i])
    return [sorted(b) for b in bins]
