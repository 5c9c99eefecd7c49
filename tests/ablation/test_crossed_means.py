"""Means over seeds and problems: against loops, against scipy, and by how often the interval holds the truth."""

import math

import numpy as np
import pytest

from megatron_rlvr.ablation.statistics import crossed_mean

scipy_stats = pytest.importorskip("scipy.stats", reason="no scipy, the oracle")


def test_the_error_is_that_of_the_variance_components_computed_by_loops():
    values = np.random.default_rng(0).normal(size=(4, 7)) + np.arange(7)
    mean = sum(values[s, p] for s in range(4) for p in range(7)) / 28
    row = [sum(values[s]) / 7 for s in range(4)]
    column = [sum(values[:, p]) / 4 for p in range(7)]
    by_seed = sum((r - mean) ** 2 for r in row) / 3 / 4
    by_problem = sum((c - mean) ** 2 for c in column) / 6 / 7
    rest = sum((values[s, p] - row[s] - column[p] + mean) ** 2 for s in range(4) for p in range(7)) / 18 / 28
    found = crossed_mean(values)
    assert found.value == pytest.approx(mean)
    assert found.error**2 == pytest.approx(max(by_seed + by_problem - rest, by_seed, by_problem))
    freedom = found.error**4 / (by_seed**2 / 3 + by_problem**2 / 6 + rest**2 / 18)
    assert found.freedom == int(freedom)


@pytest.mark.parametrize("shape", [(1, 12), (6, 1)])
def test_with_one_seed_or_one_problem_the_interval_is_that_of_scipy_s_t_test(shape):
    values = np.random.default_rng(1).normal(0.3, 1.0, shape)
    for level in (0.95, 0.99):
        expected = scipy_stats.ttest_1samp(values.ravel(), 0.0).confidence_interval(level)
        np.testing.assert_allclose(crossed_mean(values).interval(level), expected)


@pytest.mark.parametrize("values", [[[0.5]], [[1.0, 1.0], [1.0, 1.0]], [[0.1] * 3] * 7, [[0.0] * 3] * 2, [[0.3] * 9]])
def test_one_value_and_equal_values_have_no_interval(values):
    assert all(math.isnan(bound) for bound in crossed_mean(np.array(values)).interval())


@pytest.mark.parametrize(("by_seed", "by_problem"), [(0.3, 0.02), (0.03, 0.3), (0.0, 0.0)])
def test_the_interval_holds_the_truth_at_its_level_where_a_bootstrap_over_five_seeds_may_not(by_seed, by_problem):
    random = np.random.default_rng(2)
    held = bootstrap_held = 0
    repetitions, seeds, problems = 300, 5, 40
    for _ in range(repetitions):
        values = (
            0.2
            + by_seed * random.normal(size=(seeds, 1))
            + by_problem * random.normal(size=(1, problems))
            + 0.3 * random.normal(size=(seeds, problems))
        )
        low, high = crossed_mean(values).interval()
        held += low <= 0.2 <= high
        rows, columns = random.integers(seeds, size=(200, seeds)), random.integers(problems, size=(200, problems))
        means = np.array([values[np.ix_(r, c)].mean() for r, c in zip(rows, columns, strict=True)])
        low, high = np.quantile(means, [0.025, 0.975])
        bootstrap_held += low <= 0.2 <= high
    assert held / repetitions > 0.925
    if by_seed > by_problem:  # seeds dominate
        assert bootstrap_held / repetitions < 0.92
