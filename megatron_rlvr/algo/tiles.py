"""What is done to one tile of logits while it is in cache, in plain torch: fold its statistics, or turn it into dz.

Statistics of a row over the columns seen so far: the maximum m, s = sum exp(z - m), u = sum (z - m) exp(z - m), and the
target's logit. They start at `empty_statistics` and take tile after tile; when the maximum rises by -shift, what was
summed before moves along: u <- (u + s shift) e^shift, s <- s e^shift.

`tiles_triton` holds the same two functions as GPU kernels. Shapes: n rows, c columns of a tile.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# exp of it is 0 and so is its product with 0, which -inf would turn into NaN.
_FAR_BELOW = -1e30


def empty_statistics(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[4, n]: maximum, s, u and target logit of no column at all."""
    stats = torch.zeros(4, rows, dtype=dtype, device=device)
    stats[0] = torch.finfo(dtype).min
    return stats


def fold_statistics_(stats: Tensor, z: Tensor, targets: Tensor) -> None:
    """Takes a tile into the statistics of its rows; the tile is used up.

    Args:
        stats: [4, n], changed in place.
        z: [n, c] logits, overwritten.
        targets: [n] int64, column of the target in this tile; outside 0 .. c-1 where another tile has it.
    """
    maximum, total, weighted, target_logit = stats
    rows = torch.arange(len(targets), device=z.device)
    owned = (targets >= 0) & (targets < z.shape[1])
    target_logit += torch.where(owned, z[rows, targets.clamp(0, z.shape[1] - 1)], 0.0)
    risen = torch.maximum(maximum, z.amax(1))
    _move(total, weighted, maximum - risen)
    maximum.copy_(risen)
    d = z.sub_(risen.unsqueeze(1))
    exp = d.exp()
    total += exp.sum(1)
    products = exp.mul_(d).sum(1)
    if products.isnan().any():  # rare: 0 * -inf of a forbidden token; the product is taken again with care
        products = d.clamp_min_(_FAR_BELOW).exp().mul_(d).sum(1)
    weighted += products


def merge_statistics(parts: Sequence[Tensor]) -> Tensor:
    """[4, n] over all columns, from the ranks' [4, n] in rank order: every rank gets the same bits."""
    merged = parts[0].clone()
    maximum, total, weighted, target_logit = merged
    for part in parts[1:]:
        risen = torch.maximum(maximum, part[0])
        other_total, other_weighted = part[1].clone(), part[2].clone()
        _move(total, weighted, maximum - risen)
        _move(other_total, other_weighted, part[0] - risen)
        maximum.copy_(risen)
        total += other_total
        weighted += other_weighted
        target_logit += part[3]
    return merged


def _move(total: Tensor, weighted: Tensor, shift: Tensor) -> None:
    """Moves s and u, in place, to a maximum that is higher by -shift."""
    shift = shift.clamp_min(_FAR_BELOW)
    scale = shift.exp()
    weighted.add_(total * shift).mul_(scale)
    total.mul_(scale)


def logits_gradient_(
    z: Tensor,
    targets: Tensor,
    log_sum_exp: Tensor,
    entropy: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """dz = g_logp (1[y] - p) - g_H p (log p + H) of a tile, in place of its logits.

    Args:
        z: [n, c] logits, overwritten.
        targets: [n] int64, as in `fold_statistics_`.
        log_sum_exp, entropy, grad_logp: [n] over all columns.
        grad_entropy: [n]; None: the entropy has no gradient.
        dtype: precision of the result.

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
