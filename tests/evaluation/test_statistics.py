"""Statistics against SciPy, and against brute force where a count is possible."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats as scipy_stats

from megatron_rlvr.evaluation.statistics import (
    FEWEST_CHANGES,
    bootstrap_interval,
    mean_over_problems,
    pass_at_k,
    percentile,
    permutation_test,
    powers_of_two,
    sign_test,
    student_quantile,
)


def tables(count: int = 30):
    """Random tables [P, n] of verdicts whose problems differ in difficulty."""
    random = np.random.default_rng(3)
    for _ in range(count):
        problems, completions = random.integers(2, 40), random.integers(1, 17)
        yield random.random((problems, completions)) < random.beta(0.5, 0.5, size=(problems, 1))


def test_the_standard_error_is_that_of_the_mean_over_problems():
    for table in tables():
        shares = table.mean(axis=1)
        found = mean_over_problems(shares)
        assert found.value == pytest.approx(table.mean())
        assert found.error == pytest.approx(scipy_stats.sem(shares), rel=1e-12, abs=1e-15)
        assert found.problems == len(table)
    assert math.isnan(mean_over_problems(np.array([0.5])).error)
    assert math.isnan(mean_over_problems(np.array([])).value)


def test_the_standard_error_is_how_much_the_accuracy_varies_between_draws_of_problems():
    """A binomial error over all completions would be a third of it."""
    random = np.random.default_rng(0)
    accuracies, errors = [], []
    for _ in range(2000):
        rates = random.beta(0.3, 0.7, size=30)
        shares = random.binomial(16, rates) / 16
        accuracies.append(shares.mean())
        errors.append(mean_over_problems(shares).error)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(accuracies), rel=0.05)
    binomial = math.sqrt(0.3 * 0.7 / (30 * 16))
    assert np.std(accuracies) > 2.5 * binomial


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_completion():
    for completions in range(1, 9):
        for correct in range(completions + 1):
            verdicts = [i < correct for i in range(completions)]
            for k in range(1, completions + 1):
                subsets = [any(chosen) for chosen in itertools.combinations(verdicts, k)]
                assert pass_at_k(completions, correct, k) == pytest.approx(sum(subsets) / len(subsets), rel=1e-15)


def test_pass_at_k_is_unbiased_and_exact_for_many_completions():
    rate, random = 0.05, np.random.default_rng(1)
    estimates = [pass_at_k(64, int(c), 8) for c in random.binomial(64, rate, size=20_000)]
    assert np.mean(estimates) == pytest.approx(1 - (1 - rate) ** 8, abs=0.005)
    assert pass_at_k(1000, 1, 1) == 0.001
    assert pass_at_k(1000, 1, 999) == 0.999
    assert pass_at_k(20_000, 10, 10_000) == pytest.approx(
        1 - scipy_stats.hypergeom.pmf(0, 20_000, 10, 10_000), rel=1e-9
    )
    for completions, k in ((4, 5), (4, 0)):
        with pytest.raises(ValueError, match="k must be"):
            pass_at_k(completions, 1, k)


def test_values_of_k_are_powers_of_two_and_the_number_itself():
    assert [powers_of_two(n) for n in (1, 2, 3, 16, 20)] == [
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 4, 8, 16),
        (1, 2, 4, 8, 16, 20),
    ]


def test_the_sign_test_is_the_exact_binomial_test():
    for up, down in itertools.product(range(0, 25, 3), repeat=2):
        expected = scipy_stats.binomtest(up, up + down).pvalue if up + down else 1.0
        assert sign_test(up, down) == pytest.approx(expected, rel=1e-12)


def test_the_permutation_test_is_exact_for_few_changes_and_close_for_many():
    random = np.random.default_rng(5)
    for problems in (3, 8, 12):
        d = random.integers(-4, 6, size=problems) / 4
        flips = np.array(list(itertools.product((1, -1), repeat=problems)))
        expected = np.mean(np.abs(flips @ d) >= abs(d.sum()) - 1e-12)
        assert permutation_test(d, seed=0).p == pytest.approx(expected, rel=1e-12)
    for shift in (0.0, 0.1, 0.25):
        d = np.round((random.normal(shift, 0.5, size=60)) * 16) / 16
        expected = scipy_stats.permutation_test(
            (d,), np.mean, permutation_type="samples", n_resamples=10_000, random_state=np.random.default_rng(2)
        ).pvalue
        assert permutation_test(d, seed=0).p == pytest.approx(expected, abs=0.015)
    assert permutation_test(np.zeros(5), seed=0).p == 1.0
    assert permutation_test(d, seed=4) == permutation_test(d, seed=4)


def test_the_bootstrap_interval_is_scipys_and_repeatable():
    random = np.random.default_rng(7)
    for problems in (10, 60, 300):
        d = random.normal(0.1, 0.4, size=problems)
        low, high = bootstrap_interval(d, seed=0)
        expected = scipy_stats.bootstrap(
            (d,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(1)
        ).confidence_interval
        width = expected.high - expected.low
        assert low == pytest.approx(expected.low, abs=0.04 * width)
        assert high == pytest.approx(expected.high, abs=0.04 * width)
        assert bootstrap_interval(d, seed=0) == (low, high)
        assert bootstrap_interval(d, seed=1) != (low, high)


def test_students_quantile_is_scipys():
    for freedom in (1, 2, 29, 499):
        for probability in (0.6, 0.975, 0.995):
            expected = scipy_stats.t.ppf(probability, freedom)
            assert student_quantile(probability, freedom) == pytest.approx(expected, rel=1e-9)


def test_the_smallest_significant_difference_is_that_of_all_patterns_of_signs():
    random = np.random.default_rng(5)
    for problems in (1, 5, 6, 8, 10):
        d = random.choice([-1, -0.5, 0.25, 0.5], size=problems)
        d[problems - problems // 6 :] = 0
        means = [abs(np.dot(signs, d)) / problems for signs in itertools.product((1, -1), repeat=problems)]
        significant = [m for m in means if np.mean([other >= m - 1e-12 for other in means]) < 0.05]
        found = permutation_test(d, seed=0)
        assert bool(significant) == (np.count_nonzero(d) >= FEWEST_CHANGES)
        if significant:
            assert found.smallest == pytest.approx(min(significant), rel=1e-12)
            assert found.found > found.smallest
        else:
            assert math.isnan(found.smallest)
            assert math.isnan(found.found)
            assert not found.significant


def test_a_difference_is_significant_exactly_from_the_smallest_on():
    random, significant = np.random.default_rng(6), 0
    for _ in range(150):
        d = random.integers(-4, 7, size=random.integers(2, 40)) / 4
        found = permutation_test(d, seed=0)
        assert found.significant == (abs(d.mean()) >= found.smallest - 1e-9)  # NaN: never
        significant += found.significant
    assert 30 < significant < 120


def test_the_fewest_changes_are_those_with_which_a_sign_test_can_be_significant():
    assert scipy_stats.binomtest(FEWEST_CHANGES, FEWEST_CHANGES).pvalue < 0.05
    assert scipy_stats.binomtest(FEWEST_CHANGES - 1, FEWEST_CHANGES - 1).pvalue > 0.05


def test_a_difference_that_can_be_found_is_found_four_times_out_of_five():
    random = np.random.default_rng(11)
    population = random.normal(size=12)
    population -= population.mean()
    true = permutation_test(population, seed=0).found
    draws = random.normal(true, population.std(), size=(600, 12))
    assert np.mean([permutation_test(draw, seed=0).significant for draw in draws]) == pytest.approx(0.8, abs=0.05)


def test_percentiles_are_interpolated():
    assert percentile([1, 2, 3, 4], 0.95) == pytest.approx(3.85)
    assert math.isnan(percentile([], 0.5))
