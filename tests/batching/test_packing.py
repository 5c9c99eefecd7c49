"""Distribution over ranks and balance over micro-batches, against their guarantees."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import PACKINGS, training_sequence

from megatron_rlvr.batching.packing import Packing, balance, distribute, micro_batches_needed, plan_micro_batches


def long_tailed_lengths(count, seed):
    """Lengths as in practice: a median of about 4,000 tokens, some at the cap of 20,480."""
    lengths = np.random.default_rng(seed).lognormal(8.3, 0.9, count)
    return np.clip(lengths, 200, 20_480).astype(int).tolist()


# Relative cost of attention: about 2e-5 in models of 32 and 8 billion parameters, 1.3e-4 in one of 0.6 billion.
QUADRATICS = (0.0, 2e-5, 1.3e-4, 1e-3)


def costs(lengths, quadratic):
    return [n + quadratic * n**2 for n in lengths]


@pytest.mark.parametrize("quadratic", QUADRATICS)
def test_the_slowest_rank_is_within_a_tenth_of_the_mean_for_long_tailed_lengths(quadratic):
    """If the longest sequence alone costs more than a rank's share, the limit is a tenth above that sequence."""
    divisible = 0
    for seed in range(5):
        lengths = long_tailed_lengths(512, seed)
        cost = costs(lengths, quadratic)
        for ranks in (2, 4, 8, 16, 32, 64):
            parts = distribute(lengths, ranks, Packing(1, quadratic=quadratic))
            mean = sum(cost) / ranks
            assert max(sum(cost[i] for i in part) for part in parts) <= 1.1 * max(mean, *cost)
            assert sorted(i for part in parts for i in part) == list(range(512))
            divisible += max(cost) <= mean
    assert divisible > 25, "of 30; in most cases the longest sequence is no limit"
    naive = [sum(cost[r::8]) for r in range(8)]
    assert max(naive) > 1.1 * sum(naive) / 8, "taking turns would not be enough"


@given(lengths=st.lists(st.integers(1, 100), max_size=40), ranks=st.integers(1, 8), quadratic=st.floats(0, 1))
def test_a_distribution_is_a_partition_that_no_move_to_the_least_loaded_rank_would_improve(lengths, ranks, quadratic):
    parts = distribute(lengths, ranks, Packing(1, quadratic=quadratic))
    assert len(parts) == ranks
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(part == sorted(part) for part in parts)
    cost = [n + quadratic * n * n for n in lengths]
    work = [sum(cost[i] for i in part) for part in parts]
    for part, load in zip(parts, work, strict=True):
        assert not part or load - min(cost[i] for i in part) <= min(work) + 1e-9 * load
    if len(lengths) >= ranks:
        assert all(parts), "no rank is idle"


@given(lengths=st.lists(st.lists(st.integers(1, 50), max_size=20), min_size=1, max_size=5), packing=PACKINGS)
def test_padded_streams_keep_the_budget_and_are_as_many_on_every_rank(lengths, packing):
    plans = plan_micro_batches(lengths, packing)
    (count,) = {len(plan) for plan in plans}
    assert count == max(micro_batches_needed(here, packing) for here in lengths)
    assert count >= 1
    assert count % packing.micro_batch_multiple == 0
    for plan, here in zip(plans, lengths, strict=True):
        assert sorted(i for micro in plan for i in micro) == list(range(len(here)))
        cost = costs(here, packing.quadratic)
        work = [sum(cost[i] for i in micro) for micro in plan]
        assert work == sorted(work, reverse=True), "most expensive first, empty ones last"
        for micro in plan:
            stream = packing.pack([training_sequence(i, [1] * here[i], [2]) for i in micro])
            assert len(stream.tokens) <= packing.budget or len(micro) <= 1


def fewest(lengths, room):
    """Smallest number of bins, by exhaustive search."""
    best = len(lengths)

    def place(i, bins):
        nonlocal best
        if len(bins) >= best:
            return
        if i == len(lengths):
            best = len(bins)
            return
        for b in range(len(bins)):
            if bins[b] + lengths[i] <= room:
                place(i + 1, bins[:b] + [bins[b] + lengths[i]] + bins[b + 1 :])
        place(i + 1, [*bins, lengths[i]])

    place(0, [])
    return best


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=8), room=st.integers(30, 60))
def test_micro_batches_are_no_more_than_the_proven_bound_of_first_fit_decreasing(lengths, room):
    """The bound is 11/9 of the fewest + 6/9 (Dosa, 2007)."""
    needed = micro_batches_needed(lengths, Packing(room))
    assert max(1, fewest(lengths, room)) <= needed <= max(1, (11 * fewest(lengths, room) + 6) // 9)


@pytest.mark.parametrize("quadratic", QUADRATICS[:2])
def test_micro_batches_cost_nearly_the_same_on_all_ranks_and_within_a_rank(quadratic):
    """512 long-tailed sequences on 8 and 16 ranks: stages of a pipeline do not wait, nor do ranks for each other."""
    for seed in range(3):
        lengths = long_tailed_lengths(512, seed)
        for ranks in (8, 16):
            parts = [[lengths[i] for i in part] for part in distribute(lengths, ranks, Packing(1, quadratic=quadratic))]
            plans = plan_micro_batches(parts, Packing(32_768, quadratic=quadratic))
            work = np.array(
                [
                    [sum(costs([here[i] for i in micro], quadratic)) for micro in plan]
                    for here, plan in zip(parts, plans, strict=True)
                ]
            )
            assert work.max(axis=0).sum() <= 1.05 * work.sum(axis=1).mean(), "ranks in step at every micro-batch"
            assert work.max() <= 1.15 * work.mean()


def test_a_sequence_longer_than_the_budget_gets_a_micro_batch_of_its_own():
    assert plan_micro_batches([[4, 25, 3, 3]], Packing(10)) == [[[1], [0, 2, 3]]]
    assert plan_micro_batches([[25], [], [3]], Packing(10)) == [[[0]], [[]], [[0]]]
    assert plan_micro_batches([[3, 4], [3]], Packing(3, pad_multiple=4)) == [[[1], [0]], [[0], []]]


def test_streams_that_fit_only_without_balancing_are_assigned_by_first_fit():
    """Balanced, 6 + 3 | 5 + 4 would leave no room for the last 2, which needs 6 + 4 | 5 + 3 + 2."""
    assert balance([6, 5, 4, 3, 2], 2, Packing(10)) == [[0, 2], [1, 3, 4]]
    assert balance([6, 5, 4, 3, 2], 2, Packing(11)) == [[0, 3, 4], [1, 2]]
