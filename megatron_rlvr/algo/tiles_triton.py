"""The two functions of `tiles` as Triton kernels: a tile of logits is read once, and dz is written once.

The matrix products are left to the library, which is faster than a product fused into a kernel would be. The remaining
work is bound by reading the tile, which at 32 MiB stays in an H100's cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_FAR_BELOW = tl.constexpr(-1e30)  # as in `tiles`
_COLUMNS_AT_ONCE = 2048


def fold_statistics_(stats: Tensor, z: Tensor, targets: Tensor) -> None:
    """`tiles.fold_statistics_` as a kernel; the tile is not overwritten."""
    rows, columns = z.shape
    _fold[(rows,)](
        stats,
        z,
        targets,
        columns,
        stats.stride(0),
        z.stride(0),
        SQUARES=len(stats) == 5,
        BLOCK=_block(columns),
        num_warps=8,
    )


def logits_gradient_(
    z: Tensor,
    targets: Tensor,
    log_sum_exp: Tensor,
    entropy: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`tiles.logits_gradient_` as a kernel; the logits are overwritten only if they already have ``dtype``."""
    rows, columns = z.shape
    out = z if z.dtype == dtype else torch.empty_like(z, dtype=dtype)
    block = _block(columns)
    _gradient[(rows, triton.cdiv(columns, block))](
        out,
        z,
        targets,
        log_sum_exp,
        entropy,
        grad_logp,
        grad_logp if grad_entropy is None else grad_entropy,
        columns,
        z.stride(0),
        WITH_ENTROPY=grad_entropy is not None,
        BLOCK=block,
        num_warps=8,
    )
    return out


def _block(columns: int) -> int:
    return min(_COLUMNS_AT_ONCE, triton.next_power_of_2(columns))


@triton.jit
def _fold(stats, z, targets, columns, stats_stride, row_stride, SQUARES: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row, which carries the row's statistics over blocks of columns."""
    row = tl.program_id(0)
    maximum = tl.load(stats + row)
    total = tl.load(stats + stats_stride + row)
    weighted = tl.load(stats + 2 * stats_stride + row)
    target = tl.load(targets + row)
    if SQUARES:
        squares = tl.load(stats + 4 * stats_stride + row)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        x = tl.load(z + row * row_stride + offsets, mask=offsets < columns, other=-float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(x, 0))
        shift = tl.maximum(maximum - new_maximum, _FAR_BELOW)
        scale = tl.exp(shift)
        d = x - new_maximum
        exp = tl.exp(d)
        weighted = (weighted + total * shift) * scale + tl.sum(tl.where(exp > 0, exp * d, 0.0), 0)
        total = total * scale + tl.sum(exp, 0)
        if SQUARES:
            squares = squares * scale * scale + tl.sum(tl.where(offsets == target, 0.0, exp * exp), 0)
        maximum = new_maximum
    tl.store(stats + row, maximum)
    tl.store(stats + stats_stride + row, total)
    tl.store(stats + 2 * stats_stride + row, weighted)
    if SQUARES:
        tl.store(stats + 4 * stats_stride + row, squares)
    if (target >= 0) & (target < columns):
        logit = tl.load(stats + 3 * stats_stride + row) + tl.load(z + row * row_stride + target)
        tl.store(stats + 3 * stats_stride + row, logit)


@triton.jit
def _gradient(
    out,
    z,
    targets,
    log_sum_exp,
    entropy,
    grad_logp,
    grad_entropy,
    columns,
    row_stride,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row and block of columns; ``out`` has the strides of ``z`` and may be the same tensor."""
    row = tl.program_id(0)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    upstream = tl.load(grad_logp + row)
    log_p = tl.load(z + row * row_stride + offsets, mask=inside, other=-float("inf")) - tl.load(log_sum_exp + row)
    p = tl.exp(log_p)
    pull = upstream
    if WITH_ENTROPY:
        pull += tl.load(grad_entropy + row) * (tl.maximum(log_p, _FAR_BELOW) + tl.load(entropy + row))
    dz = tl.where(offsets == tl.load(targets + row), upstream, 0.0) - p * pull
    tl.store(out + row * row_stride + offsets, dz.to(out.dtype.element_ty), mask=inside)
