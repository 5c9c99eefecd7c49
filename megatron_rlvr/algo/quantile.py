"""The exact top fraction of values that are spread over ranks, with a tie policy that no sharding can change.

Of N values on all ranks, k = ceil(fraction * N) are kept: the largest ones, and among equals those of the smallest
token id. Every rank decides for its own values, from the k-th pair in this order.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class QuantileInfo:
    """What was decided, the same on every rank.

    Attributes:
        threshold: the smallest kept value; inf where there is none to keep.
        total: N, values on all ranks.
        kept: k, values kept on all ranks.
        ties: values equal to the threshold on all ranks.
    """

    threshold: float
    total: int
    kept: int
    ties: int


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
    all_values, all_ids = _gather(values.float(), token_ids, group)
    bad = (~all_values.isfinite()).nonzero()
    if len(bad):
        at = int(bad[0])
        raise ValueError(f"entropy {float(all_values[at])} of token id {int(all_ids[at])} is not finite")
    total = len(all_values)
    kept = ceil_fraction(fraction, total)
    if kept == 0:
        return torch.zeros_like(values, dtype=torch.bool), QuantileInfo(math.inf, total, 0, 0)
    by_id = all_ids.argsort()
    order = by_id[all_values[by_id].argsort(descending=True, stable=True)]
    threshold, last_id = all_values[order[kept - 1]], all_ids[order[kept - 1]]
    mask = (values > threshold) | ((values == threshold) & (token_ids <= last_id))
    ties = int((all_values == threshold).sum())
    return mask, QuantileInfo(float(threshold), total, kept, ties)


def _gather(values: Tensor, token_ids: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Values and ids of all ranks. Ranks hold different numbers of them, so each pads to the largest."""
    if group is None or dist.get_world_size(group) == 1:
        return values, token_ids
    size = dist.get_world_size(group)
    count = torch.tensor([len(values)], device=values.device)
    counts = [torch.empty_like(count) for _ in range(size)]
    dist.all_gather(counts, count, group=group)
    longest = max(int(c) for c in counts)
    gathered = []
    for tensor in (values, token_ids):
        padded = tensor.new_zeros(longest)
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(size)]
        dist.all_gather(parts, padded, group=group)
        gathered.append(torch.cat([part[: int(c)] for part, c in zip(parts, counts, strict=True)]))
    return gathered[0], gathered[1]
