"""Exact top fraction of values that are distributed over ranks, with a tie policy that no sharding can change.

Of N values on all ranks, k = ceil(fraction * N) are kept: the largest ones, and among equals those of the smallest
token id. The k-th is found by radix selection: values are read as 32-bit keys of the opposite order, and three passes
(11 + 11 + 10 bits) each count the keys by digit, sum the counts over the ranks, and continue with the candidates that
share the digit of the k-th. If not all ties at the threshold fit, seven more passes do the same with the token ids. The
traffic does not depend on N: 3 collectives and 41 KB a rank, or 10 and 90 KB with ties to split.

Keys are made a block at a time and dropped, so besides the mask only the candidates take memory. On an accelerator the
host waits for the counts and for the number of remaining candidates after a pass, and for nothing else.

Shapes: n values or candidates of this rank, N values of all ranks.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor

# (shift, bits) of each digit of a key, the largest first.
_VALUE_DIGITS = ((21, 11), (10, 11), (0, 10))
_ID_DIGITS = ((60, 4), (50, 10), (40, 10), (30, 10), (20, 10), (10, 10), (0, 10))
# NaN and infinity have all exponent bits set: 4 values of the first digit at either end, where nothing finite is.
_NON_FINITE_DIGITS = 4
# Sums of up to 2^32 values of this many bits fit into int64.
_SUM_BITS = 30
# On a CPU the keys and digits of a block of this size stay in the L2 cache; an accelerator takes everything at once.
_CPU_BLOCK = 2**18


class NonFiniteError(ValueError):
    """A value by which tokens are compared is NaN or infinite.

    Attributes:
        token_id: Smallest id of such a token on any rank.
        quantity: Name of the value, such as "entropy".
    """

    def __init__(self, token_id: int, quantity: str = "entropy") -> None:
        super().__init__(token_id, quantity)
        self.token_id = token_id
        self.quantity = quantity

    def __str__(self) -> str:
        return f"the {self.quantity} of token id {self.token_id} is not finite"


@dataclass(frozen=True)
class QuantileInfo:
    """The decision and its cost, the same on every rank.

    Attributes:
        threshold: Smallest kept value; inf if there is none to keep.
        total: N, number of values on all ranks.
        kept: k, number of values kept on all ranks.
        ties: Number of values on all ranks that equal the threshold.
        collectives: Number of collectives.
        bytes_sent: Payload of these collectives on one rank.
    """

    threshold: float
    total: int
    kept: int
    ties: int
    collectives: int
    bytes_sent: int


def as_written(number: float | Fraction) -> Fraction:
    """Return a number exactly as written: 0.2 means 1/5, not its binary neighbour."""
    return Fraction(str(number))


def ceil_fraction(fraction: float | Fraction, total: int) -> int:
    """Return ceil(fraction * total), exact for the fraction as written."""
    return math.ceil(as_written(fraction) * total)


def global_top_fraction_mask(
    values: Tensor, fraction: float | Fraction, *, token_ids: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, QuantileInfo]:
    """Mark the ceil(fraction * N) largest of the N values that all ranks of ``group`` hold. A collective.

    The marked values are the first ones of one total order: the set of a smaller fraction is part of that of a larger.

    Args:
        values: [n] float32, finite, of any sign; n may differ per rank and be 0.
        fraction: Share of the values to keep, in (0, 1].
        token_ids: [n] int64, unique over the group; ties go to the smallest.
        group: Ranks that share the values; None for this rank alone.

    Returns: ([n] bool, the mask of this rank's values; the decision).
    Raises: NonFiniteError on every rank, naming the token of a NaN or an infinity.
    """
    assert 0 < fraction <= 1, f"fraction {fraction} is not in (0, 1]"
    reductions = _Reductions(group)
    values = values.float()
    counts = reductions.sum(_count(values, *_VALUE_DIGITS[0]))
    if counts[:_NON_FINITE_DIGITS].any() or counts[-_NON_FINITE_DIGITS:].any():
        refuse_non_finite(values, token_ids, group)
    total = int(counts.sum())
    kept = ceil_fraction(fraction, total)
    if kept == 0:
        mask = torch.zeros_like(values, dtype=torch.bool)
        return mask, QuantileInfo(math.inf, total, 0, 0, reductions.calls, reductions.bytes)

    key, wanted, ties = _kth_smallest(values, _VALUE_DIGITS, kept, reductions, counts)
    threshold = _value_of(key)
    if wanted == ties:
        mask = values >= threshold
    else:
        mask, tied = values > threshold, (values == threshold).nonzero().flatten()
        ids = token_ids[tied]
        last, _, _ = _kth_smallest(ids, _ID_DIGITS, wanted, reductions)
        mask[tied] = ids <= _id_of(last)
    return mask, QuantileInfo(threshold, total, kept, ties, reductions.calls, reductions.bytes)


def refuse_non_finite(
    values: Tensor, token_ids: Tensor, group: dist.ProcessGroup | None = None, quantity: str = "entropy"
) -> None:
    """Raise on every rank if one of them holds a value that is not finite, so that none is left waiting.

    Args:
        values: [n]; n may differ per rank and be 0.
        token_ids: [n] int64.
        group: Ranks that call this together; None for this rank alone.
        quantity: Name of the values, for the error.

    Raises: NonFiniteError, naming the smallest token id at fault.
    """
    no_id = torch.iinfo(torch.int64).max
    first = torch.cat([token_ids[~values.isfinite()], token_ids.new_tensor([no_id])]).min()
    first_of_all = int(_Reductions(group).min(first))
    if first_of_all != no_id:
        raise NonFiniteError(first_of_all, quantity)


def exact_mean(values: Tensor, group: dist.ProcessGroup | None = None) -> float:
    """Mean of the values that all ranks of ``group`` hold, the same bits for any sharding. A collective.

    Values are rounded to multiples of 2^-30 of a power of two above the largest, and their sum is one of int64, which
    no order of summation changes.

    Args:
        values: [n] floating point, finite; n may differ per rank and be 0.
        group: Ranks that share the values; None for this rank alone.

    Returns: the mean; 0 if there is no value.
    """
    reductions = _Reductions(group)
    with_zero = torch.cat([values.double(), values.new_zeros(1, dtype=torch.float64)])
    largest = -float(reductions.min(-with_zero.abs().max()))
    unit = 2.0 ** (math.frexp(largest)[1] - _SUM_BITS)
    rounded = (with_zero / unit).round().long().sum()
    total, count = reductions.sum(torch.stack([rounded, torch.full_like(rounded, len(values))])).tolist()
    return total / max(1, count) * unit


class _Reductions:
    """Sums and minima over the ranks of ``group`` (None: this rank alone), and a count of their calls and bytes."""

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


def _kth_smallest(
    candidates: Tensor,
    digits: Sequence[tuple[int, int]],
    wanted: int,
    reductions: _Reductions,
    counts: Tensor | None = None,
) -> tuple[int, int, int]:
    """Return the ``wanted``-th smallest key on all ranks, its place among its equals (from 1), and their number.

    Args:
        candidates: [n] values or ids.
        digits: (shift, bits) of each digit of a key, the largest first.
        wanted: Place of the key in ascending order, from 1.
        reductions: Sums over the ranks.
        counts: Counts of the first digit over all ranks, if the caller has them.
    """
    # Each pass moves its remaining candidates to the front; on a CPU, pages that are never written take no memory.
    buffer = torch.empty_like(candidates)
    key = 0
    for shift, bits in digits:
        if counts is None:
            counts = reductions.sum(_count(candidates, shift, bits))
        running = counts.cumsum(0)
        digit = int(torch.searchsorted(running, wanted))
        equals = int(counts[digit])
        wanted -= int(running[digit]) - equals
        key |= digit << shift
        if shift > 0:
            candidates, counts = _narrow(candidates, shift, bits, digit, buffer), None
    return key, wanted, equals


def _count(candidates: Tensor, shift: int, bits: int) -> Tensor:
    """Return [2^bits] int64, the number of this rank's keys that have each digit."""
    # torch.bincount is a quarter faster on a CPU but makes the host wait for an accelerator twice in each call.
    counts = torch.zeros(2**bits, dtype=torch.int64, device=candidates.device)
    one = torch.ones_like(counts[:1])
    for block in _blocks(candidates):
        counts.index_add_(0, _digits(block, shift, bits), one.expand(len(block)))
    return counts


def _narrow(candidates: Tensor, shift: int, bits: int, digit: int, buffer: Tensor) -> Tensor:
    """Return the candidates with this digit, moved to the front of ``buffer``, which may already hold them."""
    size = 0
    for block in _blocks(candidates):
        remaining = block[_digits(block, shift, bits) == digit]
        buffer[size : size + len(remaining)] = remaining
        size += len(remaining)
    return buffer[:size]


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.split(_CPU_BLOCK if tensor.device.type == "cpu" else max(1, len(tensor)))


def _digits(block: Tensor, shift: int, bits: int) -> Tensor:
    keys = _value_keys(block) if block.is_floating_point() else _id_keys(block)
    return (keys >> shift) & (2**bits - 1)


def _value_keys(values: Tensor) -> Tensor:
    """[n] int32 keys that, read as unsigned, fall as the float32 values rise; -0.0 and 0.0 have the same key.

    The bits of a negative float already fall; those of a positive one are inverted below the sign.
    """
    bits = (values + 0.0).view(torch.int32)
    return bits ^ (~(bits >> 31) & 0x7FFFFFFF)


def _value_of(key: int) -> float:
    bits = key if key >= 2**31 else 0x7FFFFFFF - key
    return struct.unpack("=f", struct.pack("=I", bits))[0]


def _id_keys(ids: Tensor) -> Tensor:
    """[n] int64 keys that, read as unsigned, rise with the ids."""
    return ids ^ torch.iinfo(torch.int64).min


def _id_of(key: int) -> int:
    return key + torch.iinfo(torch.int64).min
