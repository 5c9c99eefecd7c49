"""Cases of the tiled, vocabulary-parallel head, and their outcome by a float64 softmax over whole logits."""

from dataclasses import dataclass, replace
from itertools import product
from unittest import mock

import torch
from torch import Tensor

from megatron_rlvr.algo import head, tiles, tiles_triton
from megatron_rlvr.algo.head import (
    vocab_parallel_gradient_norm,
    vocab_parallel_likeliest,
    vocab_parallel_logp_entropy,
)
from megatron_rlvr.algo.tile_shape import TILE_SHAPE

POSITIONS, HIDDEN, PADDED_VOCAB = 24, 8, 64


WHOLE_TILES = TILE_SHAPE["cpu"]


TINY_TILES = (7, 5)  # rows, columns: neither divides a size


@dataclass(frozen=True)
class Case:
    """One call of the head over all ranks: whole inputs, and the upstream gradient."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    grad_logp: Tensor
    grad_entropy: Tensor | None  # None: the entropy is not differentiated
    valid_vocab: int | None = None
    temperature: float = 1.0
    rows: Tensor | None = None
    tiles: tuple[int, int] = WHOLE_TILES
    sequence_parallel: bool = False
    kernels: str = "torch"


KERNELS = {"torch": tiles, "triton": tiles_triton}


@dataclass(frozen=True)
class Outcome:
    """Results of one rank, and its part of the gradients."""

    logp: Tensor
    entropy: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor
    entropy_has_gradient: bool


def head_of(case: Case, group=None, device: str = "cpu") -> Outcome:
    """Run the head on one rank of ``group``, with its shard of the inputs, on ``device``."""
    rank, size = (torch.distributed.get_rank(group), group.size()) if group is not None else (0, 1)
    hidden = case.hidden.chunk(size)[rank] if case.sequence_parallel else case.hidden
    hidden = hidden.to(device, copy=True).requires_grad_()
    weight = case.weight.chunk(size)[rank].to(device, copy=True).requires_grad_()
    with (
        mock.patch.dict(TILE_SHAPE, {device: case.tiles}),
        mock.patch.object(head, "_kernels", return_value=KERNELS[case.kernels]),
    ):
        logp, entropy = vocab_parallel_logp_entropy(
            hidden,
            weight,
            case.targets.to(device),
            tp_group=group,
            sequence_parallel=case.sequence_parallel,
            valid_vocab=case.valid_vocab,
            temperature=case.temperature,
            rows=case.rows if case.rows is None else case.rows.to(device),
            entropy_grad=case.grad_entropy is not None,
        )
        outputs, grads = [logp], [case.grad_logp]
        if case.grad_entropy is not None:
            outputs, grads = [logp, entropy], [case.grad_logp, case.grad_entropy]
        torch.autograd.backward(outputs, [grad.to(device, logp.dtype) for grad in grads])
    assert hidden.grad is not None
    assert weight.grad is not None
    return Outcome(
        logp.detach().cpu(), entropy.detach().cpu(), hidden.grad.cpu(), weight.grad.cpu(), entropy.requires_grad
    )


def norms_of(case: Case, group=None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and gradient norm of the head on one rank of ``group``, with its shard of the inputs."""
    rank, size = (torch.distributed.get_rank(group), group.size()) if group is not None else (0, 1)
    with (
        mock.patch.dict(TILE_SHAPE, {"cpu": case.tiles}),
        mock.patch.object(head, "_kernels", return_value=KERNELS[case.kernels]),
    ):
        return vocab_parallel_gradient_norm(
            case.hidden.chunk(size)[rank] if case.sequence_parallel else case.hidden,
            case.weight.chunk(size)[rank],
            case.targets,
            tp_group=group,
            sequence_parallel=case.sequence_parallel,
            valid_vocab=case.valid_vocab,
            temperature=case.temperature,
            rows=case.rows,
        )


def expected_norm(case: Case) -> Tensor:
    """|1[y] - p| by definition: whole logits in float64."""
    hidden = case.hidden.double() if case.rows is None else case.hidden.double()[case.rows]
    targets = case.targets if case.rows is None else case.targets[case.rows]
    p = torch.softmax(hidden @ case.weight.double()[: case.valid_vocab].t() / case.temperature, dim=1)
    return (torch.nn.functional.one_hot(targets, p.shape[1]) - p).norm(dim=1)


def expected(case: Case) -> Outcome:
    """Outcome by definition: whole logits in float64. A forbidden token (logit -inf) adds 0 ln 0 = 0 to the entropy."""
    hidden = case.hidden.double().requires_grad_()
    weight = case.weight.double().requires_grad_()
    every = hidden if case.rows is None else hidden[case.rows]
    targets = case.targets if case.rows is None else case.targets[case.rows]
    log_p = torch.log_softmax(every @ weight[: case.valid_vocab].t() / case.temperature, dim=1)
    logp = log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(1)
    grad_entropy = torch.zeros_like(entropy) if case.grad_entropy is None else case.grad_entropy.double()
    torch.autograd.backward([logp, entropy], [case.grad_logp.double(), grad_entropy])
    assert hidden.grad is not None
    assert weight.grad is not None
    return Outcome(logp.detach(), entropy.detach(), hidden.grad, weight.grad, case.grad_entropy is not None)


def assert_close(actual: Outcome, wanted: Outcome, tolerance: float) -> None:
    assert actual.entropy_has_gradient == wanted.entropy_has_gradient
    for name in ("logp", "entropy", "grad_hidden", "grad_weight"):
        found, oracle = getattr(actual, name).double(), getattr(wanted, name)
        assert found.shape == oracle.shape
        assert torch.equal(found.isnan(), oracle.isnan()), name
        assert torch.equal(found.isinf(), oracle.isinf()), name
        found, oracle = found.nan_to_num(0, 0, 0), oracle.nan_to_num(0, 0, 0)
        # Relative to the largest of a column: columns of a hidden state may differ by hundreds of orders of magnitude.
        scale = oracle.abs().amax(0).clamp_min(1.0) if oracle.numel() else 1.0
        worst = float(((found - oracle).abs() / scale).max()) if oracle.numel() else 0.0
        assert worst <= tolerance, f"{name} differs by {worst:.2e}"


def random_case(seed: int, rows: Tensor | None = None, vocab: int = PADDED_VOCAB, dtype=torch.float64) -> Case:
    """A case with entropies from peaked to flat, and an upstream gradient that is zero for about half of the rows."""
    random = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.1, 4.0, POSITIONS, dtype=torch.float64).unsqueeze(1)
    n = POSITIONS if rows is None else len(rows)
    grads = torch.randn(2, n, generator=random, dtype=torch.float64)
    grads *= torch.rand(2, n, generator=random) < 0.5
    return Case(
        hidden=(torch.randn(POSITIONS, HIDDEN, generator=random, dtype=torch.float64) * spread).to(dtype),
        weight=torch.randn(PADDED_VOCAB, HIDDEN, generator=random, dtype=torch.float64).to(dtype),
        targets=torch.randint(vocab, (POSITIONS,), generator=random),
        grad_logp=grads[0],
        grad_entropy=grads[1],
        valid_vocab=vocab,
        rows=rows,
    )


# Of 4 ranks with 16 columns each, the last one has 16, 2 or no real columns; no length is a multiple of another.
VOCABS = (64, 50, 40)


ROWS = (None, torch.tensor([20, 3, 4, 17, 0, 23, 11, 12, 13]), torch.tensor([], dtype=torch.int64))


def all_combinations() -> list[Case]:
    """All combinations of layout, vocabulary padding, rows, temperature and entropy gradient; mostly tiny tiles."""
    axes = product(VOCABS, ROWS, (1.0, 0.7), (True, False), (False, True))
    cases = []
    for seed, (vocab, rows, temperature, entropy_grad, sequence_parallel) in enumerate(axes):
        case = random_case(seed, rows, vocab)
        cases.append(
            replace(
                case,
                temperature=temperature,
                tiles=TINY_TILES if seed % 5 else WHOLE_TILES,
                grad_entropy=case.grad_entropy if entropy_grad else None,
                sequence_parallel=sequence_parallel,
            )
        )
    return cases


def with_forbidden_tokens() -> list[Case]:
    """Cases with logits of -inf (1e200 * -1e200): scattered, a whole tile, a whole rank, a target."""
    cases = []
    for seed, shape, sequence_parallel in product(range(3), (WHOLE_TILES, TINY_TILES), (False, True)):
        case = random_case(1000 + seed)
        forbidden = torch.rand(PADDED_VOCAB, generator=torch.Generator().manual_seed(seed)) < 0.3
        forbidden[:10] = forbidden[48:] = True
        if seed == 1:
            forbidden[:16] = True  # the first rank of four, with which the merge starts
        allowed = (~forbidden).nonzero().squeeze(1)
        case.hidden[:, 0] = 1e200
        case.weight[:, 0] = forbidden.double() * -1e200
        targets = allowed[torch.arange(POSITIONS) % len(allowed)]
        targets[5] = 2  # forbidden: its log-probability is -inf, its gradient is not
        cases.append(replace(case, targets=targets, tiles=shape, sequence_parallel=sequence_parallel))
    return cases


def with_nan_upstream() -> list[Case]:
    cases = []
    for which, sequence_parallel in product((0, 1), (False, True)):
        case = random_case(2000 + which, ROWS[1])
        assert case.grad_entropy is not None
        case.grad_logp[4] = case.grad_entropy[4] = 0.0
        (case.grad_logp, case.grad_entropy)[which][4] = torch.nan
        cases.append(replace(case, sequence_parallel=sequence_parallel))
    return cases


def peaked_case() -> Case:
    """A case of fp32 logits near 100 whose largest leads by 10 to 20: entropies from 1e-2 down to 1e-7."""
    random = torch.Generator().manual_seed(7)
    case = random_case(4000, dtype=torch.float32)
    hidden = torch.zeros(POSITIONS, HIDDEN)
    weight = torch.randn(PADDED_VOCAB, HIDDEN, generator=random) * 0.5
    weight[:, 0] = 1.0
    weight[:, 1] = torch.arange(PADDED_VOCAB) == 9
    hidden[:, 0], hidden[:, 1] = 100.0, torch.linspace(10, 26, POSITIONS)
    hidden[:, 2:] = torch.randn(POSITIONS, HIDDEN - 2, generator=random)
    return replace(case, hidden=hidden, weight=weight, targets=torch.full((POSITIONS,), 9))


LIKELIEST = 7  # more than a tile of TINY_TILES has columns


def likeliest_of(case: Case, group=None) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of the likeliest tokens, by the head of one rank of ``group``."""
    rank, size = (torch.distributed.get_rank(group), group.size()) if group is not None else (0, 1)
    with mock.patch.dict(TILE_SHAPE, {"cpu": case.tiles}):
        return vocab_parallel_likeliest(
            case.hidden.chunk(size)[rank] if case.sequence_parallel else case.hidden,
            case.weight.chunk(size)[rank],
            LIKELIEST,
            tp_group=group,
            sequence_parallel=case.sequence_parallel,
            valid_vocab=case.valid_vocab,
            temperature=case.temperature,
            rows=case.rows,
        )


def expected_likeliest(case: Case) -> tuple[Tensor, Tensor]:
    """The same by definition: a stable sort of the whole log-probabilities in float64."""
    every = case.hidden.double() if case.rows is None else case.hidden.double()[case.rows]
    log_p = torch.log_softmax(every @ case.weight.double()[: case.valid_vocab].t() / case.temperature, dim=1)
    logp, ids = log_p.sort(dim=1, descending=True, stable=True)
    return ids[:, :LIKELIEST], logp[:, :LIKELIEST]
