"""Arithmetic of a tile of logits, in plain torch and in Triton's kernels, against the formulas in float64."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from megatron_rlvr.algo import tiles, tiles_triton

ROWS, COLUMNS = 6, 2500  # more columns than a block of a Triton program, and not a multiple of it
BOTH = pytest.mark.parametrize("kernels", [tiles, tiles_triton], ids=["torch", "triton"])
# On a machine with a GPU, Triton's interpreter is off and its kernels are tested on the GPU.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def logits(seed: int) -> Tensor:
    """[ROWS, COLUMNS] float64: flat, peaked, far from zero, with forbidden tokens, and with 1000 columns of those."""
    z = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z[1] *= 8
    z[2] += 900
    z[3, 7] += 30
    z[4, ::3] = -torch.inf
    z[5, :1000] = -torch.inf
    return z


TARGETS = torch.tensor([0, COLUMNS - 1, 1000, 7, 3, 2000])


def statistics_of(kernels: ModuleType, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Statistics of the tiles, folded one after the other."""
    stats = tiles.empty_statistics(ROWS, dtype, torch.device(DEVICE))
    first = 0
    for z in parts:
        kernels.fold_statistics_(stats, z.to(DEVICE, dtype, copy=True), (TARGETS - first).to(DEVICE))
        first += z.shape[1]
    return stats.cpu().double()


def assert_statistics(stats: Tensor, z: Tensor, relative: float) -> None:
    maximum, total, weighted, target = stats
    d = z - z.amax(1, keepdim=True)
    torch.testing.assert_close(maximum, z.amax(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(total, d.exp().sum(1), rtol=relative, atol=0)
    torch.testing.assert_close(weighted, torch.xlogy(d.exp(), d.exp()).sum(1), rtol=relative, atol=1e-12)
    torch.testing.assert_close(target, z.gather(1, TARGETS.unsqueeze(1)).squeeze(1), rtol=1e-6, atol=0)


@BOTH
@pytest.mark.parametrize("widths", [[COLUMNS], [1000, COLUMNS - 1000], [1, 999, 1300, 200]])
def test_statistics_do_not_depend_on_how_the_columns_are_split(kernels, widths):
    z = logits(seed=1)
    assert_statistics(statistics_of(kernels, list(z.split(widths, dim=1)), torch.float32), z, relative=2e-4)
    assert_statistics(statistics_of(kernels, list(z.split(widths, dim=1)), torch.float64), z, relative=1e-12)


def test_merged_statistics_of_ranks_are_those_of_all_their_tiles():
    z = logits(seed=2)
    parts = []
    for first, part in zip((0, 1000, 1700), z.split([1000, 700, 800], dim=1), strict=True):
        stats = tiles.empty_statistics(ROWS, torch.float64, z.device)
        tiles.fold_statistics_(stats, part.clone(), TARGETS - first)
        parts.append(stats)
    parts.insert(1, tiles.empty_statistics(ROWS, torch.float64, z.device))  # a rank whose columns are all padding
    assert_statistics(tiles.merge_statistics(parts), z, relative=1e-12)


@BOTH
def test_the_squares_of_the_others_do_not_depend_on_how_the_columns_are_split(kernels):
    z = logits(seed=6)
    squares = (2 * (z - z.amax(1, keepdim=True))).exp()
    wanted = squares.sum(1) - squares.gather(1, TARGETS.unsqueeze(1)).squeeze(1)
    ranks = []
    for first, part in zip((0, 900), z.split([900, 1600], dim=1), strict=True):
        stats = tiles.empty_statistics(ROWS, torch.float64, torch.device(DEVICE), squares=True)
        for at, piece in zip((0, 700), part.split([700, part.shape[1] - 700], dim=1), strict=True):
            kernels.fold_statistics_(stats, piece.to(DEVICE, copy=True), (TARGETS - first - at).to(DEVICE))
        ranks.append(stats.cpu())
    merged = tiles.merge_statistics(ranks)
    assert_statistics(merged[:4], z, relative=1e-12)
    torch.testing.assert_close(merged[4], wanted, rtol=1e-10, atol=1e-15)


@BOTH
def test_a_logit_that_is_not_a_number_reaches_the_statistics(kernels):
    z = logits(seed=3)
    z[0, 5], z[1, 6] = torch.nan, torch.inf
    _, total, weighted, _ = statistics_of(kernels, [z], torch.float32)
    assert (total + weighted).isnan().tolist() == [True, True, False, False, False, False]


@BOTH
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_tile_is_autograds(kernels, with_entropy, dtype):
    whole = logits(seed=4).requires_grad_()
    upstream = torch.randn(2, ROWS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    upstream[:, 1] = 0.0
    log_p = whole.log_softmax(1)
    logp = log_p.gather(1, TARGETS.unsqueeze(1)).squeeze(1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p.isinf(), 0.0)).sum(1)
    (logp @ upstream[0] + with_entropy * (entropy @ upstream[1])).backward()
    assert whole.grad is not None
    first, last = 900, 2300
    z = whole.detach()[:, first:last]
    vectors = [whole.detach().logsumexp(1), entropy.detach(), upstream[0], upstream[1]]
    log_sum_exp, h, grad_logp, grad_entropy = (v.to(DEVICE, torch.float32) for v in vectors)
    dz = kernels.logits_gradient_(
        z.to(DEVICE, torch.float32, copy=True),
        (TARGETS - first).to(DEVICE),
        log_sum_exp,
        h,
        grad_logp,
        grad_entropy if with_entropy else None,
        dtype,
    )
    assert dz.dtype == dtype
    # 900 + z in fp32 has an error of 6e-5, which is relative to p.
    expected = whole.grad[:, first:last]
    tolerance = 2e-4 if dtype == torch.float32 else 2**-7
    assert ((dz.cpu().double() - expected).abs() <= tolerance * expected.abs() + 1e-6).all()
