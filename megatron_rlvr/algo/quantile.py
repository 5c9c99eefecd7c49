"""The exact top fraction of values that are spread over ranks, with a tie policy that no sharding can change.

Of N values on all ranks, k = ceil(fraction * N) are kept: the largest ones, and among equals those of the smallest
token id. The k-th is found by radix selection: values are mapped to 32-bit integers of the same order, and three rounds
(11 + 11 + 10 bits) each count digits locally, sum the counts over the ranks, and keep only the candidates that share
the digit in which the k-th lies. Where not all ties at the threshold fit, seven more rounds do the same with the token
ids. What travels does not depend on N: at most 11 collectives and 90 KB a rank.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor

# (shift, bits) of each digit, the largest first.
_VALUE_DIGITS = ((21, 11), (10, 11), (0, 10))
_ID_DIGITS = ((60, 4), (50, 10), (40, 10), (30, 10), (20, 10), (10, 10), (0, 10))


@dataclass(frozen=True)
class QuantileInfo:
    """What was decided, the same on every rank.

    Attributes:
        threshold: the smallest kept value; inf where there is none to keep.
        total: N, values on all ranks.
        kept: k, values kept on all ranks.
        ties: values equal to the threshold on all ranks.
        collectives: how many it took.
        bytes_sent: payload of these on a rank.
    """

    threshold: float
    total: int
    kept: int
    ties: int
    collectives: int
    bytes_sent: int


def ceil_fraction(fraction: float, total: int) -> int:
    """ceil(fraction * total), exact for a fraction as it is written: 0.2 means 1/5, not its binary neighbour."""
    return math.ceil(Fraction(str(fraction)) * total)


def global_top_fraction_mask(
    values: Tensor, fraction: float, *, token_ids: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, QuantileInfo]:
    """Marks the ceil(fraction * N) largest of the N values that all ranks of ``group`` hold.

    Args:
        values: [n] float32, finite; n may differ per rank and be 0.
        fraction: in (0, 1].
        token_ids: [n] int64, unique over the group; ties go to the smallest.
        group: ranks that share the values; None for this rank alone.

    Returns: ([n] bool, the mask of this rank's values; what was decided).
    Raises: ValueError on every rank, naming where a NaN or an infinity stood.
    """
    wire = Wire(group)
    refuse_non_finite(values, token_ids, wire)
    keys = _ordered_keys(values)
    counts = wire.sum(_count(keys, *_VALUE_DIGITS[0]))
    total = int(counts.sum())
    kept = ceil_fraction(fraction, total)
    if kept == 0:
        return torch.zeros_like(keys, dtype=torch.bool), QuantileInfo(math.inf, total, 0, 0, wire.calls, wire.bytes)

    # From the largest digit down: which one holds the k-th, and how many of those that share it are still wanted.
    wanted, key, candidates = kept, 0, keys
    for i, (shift, bits) in enumerate(_VALUE_DIGITS):
        if i:
            counts = wire.sum(_count(candidates, shift, bits))
        from_above, before = _find(counts.flip(0), wanted)
        digit = len(counts) - 1 - from_above
        wanted -= before
        key |= digit << shift
        candidates = candidates[_digits(candidates, shift, bits) == digit]
    ties = int(counts[digit])
    mask, tied = keys > key, keys == key
    if wanted < ties:
        tied &= token_ids <= _kth_smallest_id(token_ids[tied], wanted, wire)
    return mask | tied, QuantileInfo(_value_of(key), total, kept, ties, wire.calls, wire.bytes)


def refuse_non_finite(entropies: Tensor, token_ids: Tensor, wire: "Wire") -> None:
    """ValueError on every rank if one of them holds an entropy that is not finite, so that none is left waiting.

    Args:
        entropies: [n]; n may differ per rank and be 0.
        token_ids: [n] int64; the smallest at fault is named.
        wire: to the ranks.
    """
    nowhere = torch.iinfo(torch.int64).max
    first = int(wire.min(torch.cat([token_ids[~entropies.isfinite()], token_ids.new_tensor([nowhere])]).min()))
    if first != nowhere:
        raise ValueError(f"the entropy of token id {first} is not finite")


class Wire:
    """Sums and minima over the ranks of ``group`` (None: this rank alone), and what they cost."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group if group is not None and dist.get_world_size(group) > 1 else None
        self.calls = self.bytes = 0

    def sum(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.SUM).cpu()

    def min(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.MIN)

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.group is not None:
            self.calls += 1
            self.bytes += tensor.numel() * tensor.element_size()
            dist.all_reduce(tensor, op=operation, group=self.group)
        return tensor


def _ordered_keys(values: Tensor) -> Tensor:
    """[n] int64 in 0 .. 2^32 - 1 with the order of the values; -0.0 and 0.0 are one."""
    bits = (values.float() + 0.0).view(torch.int32).long() & 0xFFFFFFFF
    return torch.where(bits >= 2**31, 0xFFFFFFFF - bits, bits + 2**31)


def _value_of(key: int) -> float:
    bits = key - 2**31 if key >= 2**31 else 0xFFFFFFFF - key
    return float(torch.tensor([bits - 2**32 if bits >= 2**31 else bits], dtype=torch.int32).view(torch.float32))


def _digits(keys: Tensor, shift: int, bits: int) -> Tensor:
    return (keys >> shift) & (2**bits - 1)


def _count(keys: Tensor, shift: int, bits: int) -> Tensor:
    """[2^bits] how many keys have each digit."""
    return torch.bincount(_digits(keys, shift, bits), minlength=2**bits)


def _find(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The first bin with which the running sum reaches ``wanted``, and the sum before it."""
    running = counts.cumsum(0)
    found = int(torch.searchsorted(running, wanted))
    return found, int(running[found] - counts[found])


def _kth_smallest_id(ids: Tensor, wanted: int, wire: Wire) -> int:
    """The ``wanted``-th smallest of the ids that all ranks hold."""
    lowest = torch.iinfo(torch.int64).min
    ids = ids ^ lowest  # read without sign, these have the order of the ids
    found = 0
    for shift, bits in _ID_DIGITS:
        digit, before = _find(wire.sum(_count(ids, shift, bits)), wanted)
        wanted -= before
        found |= digit << shift
        ids = ids[_digits(ids, shift, bits) == digit]
    return found + lowest
