"""Arithmetic of one tile of logits while it is in cache, in plain torch: fold its statistics, or turn it into dz.

The statistics of a row over the columns seen so far are the maximum m, s = sum exp(z - m), u = sum (z - m) exp(z - m),
and the target's logit. They start as `empty_statistics` and fold in tile after tile; when the maximum rises by -shift,
the earlier sums are rescaled: u <- (u + s shift) e^shift, s <- s e^shift. A caller that asks for it gets a fifth
statistic, q = sum over all columns but the target's of exp(2 (z - m)), with q <- q e^(2 shift).

`tiles_triton` has the same two functions as GPU kernels. Shapes: n rows, c columns of a tile.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Stands in for -inf: its exp is 0 as well, but its product with 0 is 0, where that of -inf would be NaN.
_FAR_BELOW = -1e30


def empty_statistics(rows: int, dtype: torch.dtype, device: torch.device, *, squares: bool = False) -> Tensor:
    """Return [4, n]: maximum, s, u and target logit over no columns; [5, n] with ``squares``, the last being q."""
    stats = torch.zeros(5 if squares else 4, rows, dtype=dtype, device=device)
    stats[0] = torch.finfo(dtype).min
    return stats


def fold_statistics_(stats: Tensor, z: Tensor, targets: Tensor) -> None:
    """Fold a tile into the statistics of its rows.

    Args:
        stats: [4, n], or [5, n] with q, changed in place.
        z: [n, c] logits, overwritten.
        targets: [n] int64, column of the target in this tile; outside 0 .. c-1 if another tile has it.
    """
    maximum, total, weighted, target_logit = stats[:4]
    rows = torch.arange(len(targets), device=z.device)
    owned = (targets >= 0) & (targets < z.shape[1])
    target_logit += torch.where(owned, z[rows, targets.clamp(0, z.shape[1] - 1)], 0.0)
    new_maximum = torch.maximum(maximum, z.amax(1))
    _rescale_(stats, maximum - new_maximum)
    maximum.copy_(new_maximum)
    d = z.sub_(new_maximum.unsqueeze(1))
    exp = d.exp()
    total += exp.sum(1)
    if len(stats) == 5:
        squares = exp.square()
        squares[rows[owned], targets[owned]] = 0.0
        stats[4] += squares.sum(1)
    products = exp.mul_(d).sum(1)
    if products.isnan().any():  # rare: 0 * -inf of a forbidden token; take the product again without -inf
        products = d.clamp_min_(_FAR_BELOW).exp().mul_(d).sum(1)
    weighted += products


def merge_statistics(parts: Sequence[Tensor]) -> Tensor:
    """Merge the statistics of ranks that share the vocabulary; every rank gets the same bits.

    Args:
        parts: [4, n] or [5, n] of each rank, in rank order.

    Returns: the same statistics over all columns.
    """
    merged = parts[0].clone()
    for part in parts[1:]:
        other, new_maximum = part.clone(), torch.maximum(merged[0], part[0])
        _rescale_(merged, merged[0] - new_maximum)
        _rescale_(other, other[0] - new_maximum)
        merged[0] = new_maximum
        merged[1:] += other[1:]
    return merged


def empty_likeliest(rows: int, count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the ``count`` highest logits [n, k] and their token ids [n, k] over no columns: -inf, and -1."""
    return (
        torch.full((rows, count), -torch.inf, dtype=dtype, device=device),
        torch.full((rows, count), -1, dtype=torch.int64, device=device),
    )


def fold_likeliest_(logits: Tensor, ids: Tensor, z: Tensor, first: int) -> None:
    """Fold a tile into the highest logits of its rows.

    Args:
        logits: [n, k] highest logits so far, in any order, changed in place.
        ids: [n, k] int64 token ids of these logits, changed in place.
        z: [n, c] logits.
        first: Token id of the tile's column 0.
    """
    count = logits.shape[1]
    values, columns = z.topk(min(count, z.shape[1]), dim=1)
    values, places = torch.cat([logits, values], dim=1).topk(count, dim=1)
    ids.copy_(torch.cat([ids, columns + first], dim=1).gather(1, places))
    logits.copy_(values)


def sorted_likeliest(logits: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` highest of the logits [n, m] and their ids, highest first, equal ones by their ids."""
    by_id = ids.argsort(dim=1)
    logits, ids = logits.gather(1, by_id), ids.gather(1, by_id)
    places = logits.argsort(dim=1, descending=True, stable=True)[:, :count]
    return logits.gather(1, places), ids.gather(1, places)


def _rescale_(stats: Tensor, shift: Tensor) -> None:
    """Rescale s, u and q, in place, to a maximum that is higher by -shift."""
    total, weighted = stats[1], stats[2]
    shift = shift.clamp_min(_FAR_BELOW)
    scale = shift.exp()
    weighted.add_(total * shift).mul_(scale)
    total.mul_(scale)
    stats[4:].mul_(scale.square())


def logits_gradient_(
    z: Tensor,
    targets: Tensor,
    log_sum_exp: Tensor,
    entropy: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of a tile's logits: dz = g_logp (1[y] - p) - g_H p (log p + H).

    Args:
        z: [n, c] logits, overwritten.
        targets: [n] int64, as in `fold_statistics_`.
        log_sum_exp: [n], over all columns.
        entropy: [n] nats, over all columns.
        grad_logp: [n], g_logp.
        grad_entropy: [n], g_H; None if the entropy has no gradient.
        dtype: Data type of the result.

    Returns: [n, c].
    """
    log_p = z.sub_(log_sum_exp.unsqueeze(1))
    if grad_entropy is None:
        dz = log_p.exp_().mul_(-grad_logp.unsqueeze(1))
    else:
        p = log_p.exp()
        factor = log_p.clamp_min_(_FAR_BELOW).add_(entropy.unsqueeze(1)).mul_(-grad_entropy.unsqueeze(1))
        dz = factor.add_(-grad_logp.unsqueeze(1)).mul_(p)
    owned = ((targets >= 0) & (targets < z.shape[1])).nonzero().squeeze(1)
    dz[owned, targets[owned]] += grad_logp[owned]
    return dz.to(dtype)
