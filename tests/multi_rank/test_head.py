"""The tiled, vocabulary-parallel head against a float64 softmax over whole logits, differentiated by autograd.

On a CPU the Triton kernels run in Triton's interpreter, a thousand times slower, so they get every fifth case.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from head_cases import (
    ROWS,
    TINY_TILES,
    Case,
    Outcome,
    all_combinations,
    assert_close,
    expected,
    expected_likeliest,
    expected_norm,
    head_of,
    likeliest_of,
    norms_of,
    peaked_case,
    random_case,
    with_forbidden_tokens,
    with_nan_upstream,
)
from launcher import Ranks, joined_process_group


def on_ranks(cases: list[Case]) -> list[Outcome]:
    with joined_process_group() as group:
        return [head_of(case, group) for case in cases]


def joined(case: Case, outcomes: list[Outcome]) -> Outcome:
    """Outcome of all ranks from their parts; results that must be equal on every rank are compared bit by bit."""
    first = outcomes[0]
    for other in outcomes[1:]:
        assert torch.equal(other.logp, first.logp) or not first.logp.isfinite().all()
        assert torch.equal(other.entropy, first.entropy) or not first.entropy.isfinite().all()
        if not case.sequence_parallel:
            torch.testing.assert_close(other.grad_hidden, first.grad_hidden, rtol=0, atol=0, equal_nan=True)
    return replace(
        first,
        grad_hidden=torch.cat([o.grad_hidden for o in outcomes]) if case.sequence_parallel else first.grad_hidden,
        grad_weight=torch.cat([o.grad_weight for o in outcomes]),
    )


def with_hidden_states_that_are_not_finite() -> list[Case]:
    """Cases where such rows (20, 3) are requested but get no gradient, or (1, 2) are not requested."""
    cases = []
    for sequence_parallel in (False, True):
        case = random_case(3000, ROWS[1])
        assert case.grad_entropy is not None
        case.grad_logp[:2] = case.grad_entropy[:2] = 0.0
        case.hidden[[20, 1]], case.hidden[[3, 2]] = torch.nan, torch.inf
        cases.append(replace(case, sequence_parallel=sequence_parallel))
    return cases


def with_kernels(cases: list[Case], kernels: str) -> list[Case]:
    return [replace(case, kernels=kernels) for case in (cases[::5] if kernels == "triton" else cases)]


@pytest.mark.parametrize(("size", "kernels"), [(1, "torch"), (2, "torch"), (4, "torch"), (1, "triton")])
def test_values_and_gradients_are_those_of_a_float64_softmax_over_whole_logits(ranks: Ranks, size, kernels):
    cases = with_kernels(all_combinations() + with_forbidden_tokens() + with_nan_upstream(), kernels)
    by_rank = ranks.run(on_ranks, size, cases) if size > 1 else [[head_of(case) for case in cases]]
    for case, *outcomes in zip(cases, *by_rank, strict=True):
        actual = joined(case, outcomes)
        assert actual.logp.dtype == actual.entropy.dtype == torch.float64
        assert_close(actual, expected(case), tolerance=1e-10)


def norms_on_ranks(cases: list[Case]) -> list:
    with joined_process_group() as group:
        return [norms_of(case, group) for case in cases]


@pytest.mark.parametrize(("size", "kernels"), [(1, "torch"), (4, "torch"), (1, "triton")])
def test_gradient_norms_are_those_of_a_float64_softmax_over_whole_logits(ranks: Ranks, size, kernels):
    cases = with_kernels(all_combinations()[::3] + with_forbidden_tokens(), kernels)
    peaked = replace(peaked_case(), kernels=kernels)
    by_rank = (
        ranks.run(norms_on_ranks, size, [*cases, peaked]) if size > 1 else [[norms_of(c) for c in [*cases, peaked]]]
    )
    for case, *found in zip([*cases, peaked], *by_rank, strict=True):
        wanted, scores = expected_norm(case), expected(case)
        for logp, entropy, norm in found:
            assert torch.equal(norm, found[0][2]), "the same bits on every rank"
            # In fp32 the logits near 100 are off by 1e-5, which is relative to 1 - p, and 1 - p by the spacing near 1.
            rtol, atol = (1e-10, 0.0) if norm.dtype == torch.float64 else (1e-3, 5e-7)
            torch.testing.assert_close(norm.double(), wanted, rtol=rtol, atol=atol)
            torch.testing.assert_close(logp.double(), scores.logp, rtol=rtol, atol=1e-6)
            torch.testing.assert_close(entropy.double(), scores.entropy, rtol=rtol, atol=1e-6)
    # The usual formula is a hundred times worse, so the case discriminates.
    p = (peaked.hidden @ peaked.weight.t()).softmax(1)
    own = p.gather(1, peaked.targets.unsqueeze(1)).squeeze(1)
    usual = (1 - 2 * own + p.square().sum(1)).clamp_min(0).sqrt()
    assert (usual - wanted).abs().max() > 2e-5


@pytest.mark.parametrize("size", [1, 4])
def test_values_of_rows_without_gradient_cannot_reach_a_gradient(ranks: Ranks, size):
    cases = with_hidden_states_that_are_not_finite()
    by_rank = ranks.run(on_ranks, size, cases) if size > 1 else [[head_of(case) for case in cases]]
    for case, *outcomes in zip(cases, *by_rank, strict=True):
        actual = joined(case, outcomes)
        finite = replace(case, hidden=case.hidden.nan_to_num(0.0, 0.0, 0.0))
        assert_close(
            replace(actual, logp=actual.logp[2:], entropy=actual.entropy[2:]), without(expected(finite)), 1e-10
        )


def without(outcome: Outcome) -> Outcome:
    return replace(outcome, logp=outcome.logp[2:], entropy=outcome.entropy[2:])


@pytest.mark.parametrize(("size", "kernels"), [(1, "torch"), (4, "torch"), (1, "triton")])
def test_entropies_of_peaked_tokens_keep_their_digits_in_fp32(ranks: Ranks, size, kernels):
    case = replace(peaked_case(), kernels=kernels)
    by_rank = ranks.run(on_ranks, size, [case]) if size > 1 else [[head_of(case)]]
    actual, wanted = joined(case, [outcomes[0] for outcomes in by_rank]), expected(case)
    assert actual.entropy.dtype == torch.float32
    assert wanted.entropy.min() < 1e-6 < 1e-2 < wanted.entropy.max()
    error = (actual.entropy - wanted.entropy).abs()
    assert error.max() < 5e-7
    # The loss is ln(1 + p) for p below the fp32 epsilon, compared with -p ln p: less than a tenth of that.
    assert (error / wanted.entropy).max() < 0.1
    # The usual formula, log-sum-exp minus mean logit, is a hundred times worse, so the case discriminates.
    z = case.hidden @ case.weight.t()
    usual = z.logsumexp(1) - (z.softmax(1) * z).sum(1)
    assert (usual - wanted.entropy).abs().max() > 1e-5
    assert_close(actual, wanted, tolerance=1e-4)


@pytest.mark.parametrize("size", [1, 2])
def test_bfloat16_inputs_are_computed_in_fp32_and_have_bfloat16_gradients(ranks: Ranks, size):
    cases = [
        replace(random_case(5000, rows, 50, torch.bfloat16), temperature=0.7, sequence_parallel=sequence_parallel)
        for rows, sequence_parallel in product(ROWS, (False, True))
    ]
    by_rank = ranks.run(on_ranks, size, cases) if size > 1 else [[head_of(case) for case in cases]]
    for case, *outcomes in zip(cases, *by_rank, strict=True):
        actual, wanted = joined(case, outcomes), expected(case)
        assert (actual.logp.dtype, actual.grad_hidden.dtype) == (torch.float32, torch.bfloat16)
        torch.testing.assert_close(actual.logp.double(), wanted.logp, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(actual.entropy.double(), wanted.entropy, rtol=1e-5, atol=1e-5)
        assert_close(actual, wanted, tolerance=2**-8)


def likeliest_on_ranks(cases: list[Case]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    with joined_process_group() as group:
        return [likeliest_of(case, group) for case in cases]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_likeliest_tokens_are_those_of_a_sort_of_the_whole_logits_on_every_rank(ranks: Ranks, size):
    twins = replace(random_case(5000), tiles=TINY_TILES)
    twins.weight[32:] = twins.weight[:32]  # each token has an equally likely one, on another rank
    cases = [*all_combinations(), *with_forbidden_tokens()]
    by_rank = ranks.run(likeliest_on_ranks, size, cases) if size > 1 else [[likeliest_of(case) for case in cases]]
    for case, *found in zip(cases, *by_rank, strict=True):
        wanted_ids, wanted_logp = expected_likeliest(case)
        finite = wanted_logp.isfinite()
        for ids, logp in found:
            assert torch.equal(logp, found[0][1])
            assert torch.equal(ids[finite], wanted_ids[finite])
            torch.testing.assert_close(logp, wanted_logp, rtol=1e-10, atol=1e-10)
    ids, _ = likeliest_of(twins)
    assert torch.equal(ids[:, 1:6:2], ids[:, :6:2] + 32)
