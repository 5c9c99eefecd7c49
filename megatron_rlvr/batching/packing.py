"""How sequences are spread over ranks and cut into micro-batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlvr.batching.batch import MicroBatch, Sample, pack


@dataclass(frozen=True)
class Packing:
    """How sequences are cut into streams.

    Attributes:
        budget: tokens of a stream, padding included, at most; a longer sequence gets a stream of its own.
        pad_multiple: streams are padded to a multiple of it (tensor-parallel ranks share them evenly).
        sequence_multiple: so is every sequence (context-parallel ranks share each one evenly).
        micro_batch_multiple: of the number of micro-batches (interleaved pipelines run them in rounds).
        quadratic: cost of attention against the linear layers: a sequence of n tokens costs n + quadratic * n^2.
    """

    budget: int
    pad_multiple: int = 1
    sequence_multiple: int = 1
    micro_batch_multiple: int = 1
    quadratic: float = 0.0

    def pack(self, samples: Sequence[Sample]) -> MicroBatch:
        return pack(samples, self.pad_multiple, self.sequence_multiple)

    def padded(self, length: int) -> int:
        """Tokens that a sequence takes of a stream."""
        return length + -length % self.sequence_multiple

    @property
    def capacity(self) -> int:
        """The budget less what the stream's own padding may need: whole sequences up to this many tokens fit."""
        return self.budget - self.budget % math.lcm(self.pad_multiple, self.sequence_multiple)


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


def micro_batch_plan(lengths_by_rank: Sequence[Sequence[int]], packing: Packing) -> list[list[list[int]]]:
    """How each rank cuts its sequences into micro-batches: as many on every rank, and no more than the busiest needs.

    Returns: for each rank, for each micro-batch, positions in the rank's list; see `cut`.
    """
    count = max(micro_batches_needed(lengths, packing) for lengths in lengths_by_rank)
    return [cut(lengths, count, packing) for lengths in lengths_by_rank]


def micro_batches_needed(lengths: Sequence[int], packing: Packing) -> int:
    """Micro-batches into which sequences of these lengths fit; at least one, and a `Packing.micro_batch_multiple`."""
    count = max(1, len(_first_fit_decreasing(lengths, packing)))
    return count + -count % packing.micro_batch_multiple


def cut(lengths: Sequence[int], count: int, packing: Packing) -> list[list[int]]:
    """``count`` micro-batches of nearly equal cost, the most expensive first, so that pipelines do not wait.

    Sequences go, longest first, to the micro-batch with the least work among those with room. Where that does not
    come out, which takes streams filled nearly to the brim, they stay as they fitted (`micro_batches_needed`).

    Args:
        lengths: tokens of each sequence.
        count: of micro-batches, at least as many as are needed; those too many stay empty, at the end.
        packing: budget and costs.

    Returns: positions in ``lengths`` of each micro-batch, ascending.
    """
    cost = [n + packing.quadratic * n * n for n in lengths]
    parts: list[list[int]] = [[] for _ in range(count)]
    load, room = [0.0] * count, [packing.capacity] * count
    for i in _longest_first(lengths):
        needs = packing.padded(lengths[i])
        fitting = [m for m in range(count) if needs <= room[m] or not parts[m]]
        if not fitting:
            tight = _first_fit_decreasing(lengths, packing)
            parts = tight + [[] for _ in range(count - len(tight))]
            break
        least = min(fitting, key=lambda m: load[m])
        parts[least].append(i)
        load[least] += cost[i]
        room[least] -= needs
    return sorted((sorted(part) for part in parts), key=lambda part: -sum(cost[i] for i in part))


def _first_fit_decreasing(lengths: Sequence[int], packing: Packing) -> list[list[int]]:
    parts: list[list[int]] = []
    room: list[int] = []
    for i in _longest_first(lengths):
        needs = packing.padded(lengths[i])
        first = next((m for m in range(len(parts)) if needs <= room[m]), len(parts))
        if first == len(parts):
            parts.append([])
            room.append(packing.capacity)
        parts[first].append(i)
        room[first] -= needs
    return parts


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
