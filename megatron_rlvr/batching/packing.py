"""Planning of micro-batches: sequences are distributed over data-parallel ranks and balanced over packed streams.

The cost of a sequence of n tokens is n + quadratic * n^2: linear layers and attention. All functions are deterministic,
so ranks that know the same lengths make the same plan.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlvr.batching.batch import MicroBatch, TrainingSequence, pack


@dataclass(frozen=True)
class Packing:
    """Constraints and costs of packed streams.

    Attributes:
        budget: Most tokens of a stream, padding included; a longer sequence gets a stream of its own.
        pad_multiple: Streams are padded to a multiple of it (tensor-parallel ranks share them evenly).
        sequence_multiple: Sequences are padded to a multiple of it (context-parallel ranks share each one evenly).
        micro_batch_multiple: The number of micro-batches is a multiple of it (interleaved pipelines need that).
        quadratic: Cost of attention relative to the linear layers.
    """

    budget: int
    pad_multiple: int = 1
    sequence_multiple: int = 1
    micro_batch_multiple: int = 1
    quadratic: float = 0.0

    @property
    def capacity(self) -> int:
        """Budget without the most that the stream's own padding may need: padded sequences of this total fit."""
        return self.budget - self.budget % math.lcm(self.pad_multiple, self.sequence_multiple)

    def padded(self, length: int) -> int:
        """Return the number of tokens that a sequence occupies in a stream."""
        return length + -length % self.sequence_multiple

    def cost(self, length: int) -> float:
        """Return the cost of a sequence, in units of a token's linear layers."""
        return length + self.quadratic * length * length

    def pack(self, sequences: Sequence[TrainingSequence]) -> MicroBatch:
        """Pack sequences into one stream with the required padding."""
        return pack(sequences, self.pad_multiple, self.sequence_multiple)


def distribute(lengths: Sequence[int], ranks: int, packing: Packing) -> list[list[int]]:
    """Distribute sequences over data-parallel ranks: the longest first, each to the rank with the least cost so far.

    Args:
        lengths: Input tokens of each sequence.
        ranks: Number of data-parallel ranks.
        packing: Costs.

    Returns: Indices in ``lengths`` of each rank's sequences, ascending; together a partition.
    """
    cost = [packing.cost(n) for n in lengths]
    load = [0.0] * ranks
    owned: list[list[int]] = [[] for _ in range(ranks)]
    for i in _longest_first(lengths):
        rank = min(range(ranks), key=lambda r: (load[r], len(owned[r]), r))
        load[rank] += cost[i]
        owned[rank].append(i)
    return [sorted(part) for part in owned]


def plan_micro_batches(lengths_by_rank: Sequence[Sequence[int]], packing: Packing) -> list[list[list[int]]]:
    """Assign each rank's sequences to micro-batches: as many on every rank, and no more than the busiest rank needs.

    Args:
        lengths_by_rank: Input tokens of each rank's sequences.
        packing: Budget and costs.

    Returns: For each rank and each micro-batch, indices in the rank's list; see `balance`.
    """
    count = max(micro_batches_needed(lengths, packing) for lengths in lengths_by_rank)
    return [balance(lengths, count, packing) for lengths in lengths_by_rank]


def micro_batches_needed(lengths: Sequence[int], packing: Packing) -> int:
    """Return the number of micro-batches into which sequences fit, at least one.

    Args:
        lengths: Input tokens of each sequence.
        packing: Budget; its ``micro_batch_multiple`` divides the result.
    """
    count = max(1, len(_first_fit_decreasing(lengths, packing)))
    return count + -count % packing.micro_batch_multiple


def balance(lengths: Sequence[int], count: int, packing: Packing) -> list[list[int]]:
    """Assign sequences to ``count`` micro-batches of nearly equal cost, the most expensive first.

    With equal costs the stages of a pipeline do not wait. Sequences are assigned, longest first, to the micro-batch of
    least cost among those with room. If that leaves one without room, which takes streams that are almost full, the
    assignment falls back to that of first fit, by which they were counted (`micro_batches_needed`).

    Args:
        lengths: Input tokens of each sequence.
        count: Number of micro-batches, at least as many as needed; superfluous ones stay empty, at the end.
        packing: Budget and costs.

    Returns: Indices in ``lengths`` for each micro-batch, ascending.
    """
    cost = [packing.cost(n) for n in lengths]
    parts: list[list[int]] = [[] for _ in range(count)]
    load, room = [0.0] * count, [packing.capacity] * count
    for i in _longest_first(lengths):
        needs = packing.padded(lengths[i])
        fitting = [m for m in range(count) if needs <= room[m] or not parts[m]]
        if not fitting:
            first_fit = _first_fit_decreasing(lengths, packing)
            parts = first_fit + [[] for _ in range(count - len(first_fit))]
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
