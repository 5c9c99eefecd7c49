"""Statistics of accuracies: how good a model is, how sure that is, and whether two models differ. NumPy only.

Problems are the sample: a model has been asked P of the problems that it could have been asked, and answered each n
times. Completions of one problem are correlated, so that P x n of them are worth less than as many problems. Every
standard error, interval and test here is therefore over problems (clusters), which is right however strong the
correlation is.

P is the number of problems, n_i and c_i the numbers of completions and of correct ones of problem i.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

LEVEL = 0.95
"""Confidence level of intervals; tests call a difference significant at 1 - LEVEL."""
POWER = 0.8
"""Probability with which `PermutationTest.found` would be found significant."""
FEWEST_CHANGES = math.floor(1 - math.log2(1 - LEVEL)) + 1
"""Number of problems that must differ: with c of them, no p-value of the sign or permutation test is below 2 / 2^c."""

_CHUNK = 500
_EXACT_FLIPS = 14
_RANDOM_FLIPS = 20_000
# Sums in another order differ by rounding, and must count as equal to the observed one.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Estimate:
    """A mean over problems.

    Attributes:
        value: The mean.
        error: Its standard error over problems; NaN for fewer than two problems.
        problems: Number of problems.
    """

    value: float
    error: float
    problems: int


def mean_over_problems(values_P: np.ndarray) -> Estimate:
    """Return the mean of one value per problem, with s / sqrt(P) as its standard error (s^2 is divided by P - 1)."""
    problems = len(values_P)
    if not problems:
        return Estimate(math.nan, math.nan, 0)
    error = float(np.std(values_P, ddof=1)) / math.sqrt(problems) if problems > 1 else math.nan
    return Estimate(float(np.mean(values_P)), error, problems)


def pass_at_k(completions: int, correct: int, k: int) -> float:
    """Return the probability that k of a problem's completions, drawn without replacement, hold a correct one.

    pass@k = 1 - C(n - c, k) / C(n, k), the unbiased estimator (Chen et al., arXiv 2107.03374, equation 1). It is
    computed with ints, and rounded once.

    Args:
        completions: n, at least k.
        correct: c, from 0 to n.
        k: At least 1.

    Raises:
        ValueError: If k is not from 1 to n.
    """
    if not 1 <= k <= completions:
        raise ValueError(f"pass@{k} of {completions} completions; k must be from 1 to their number")
    draws = math.comb(completions, k)
    return (draws - math.comb(completions - correct, k)) / draws


def powers_of_two(most: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... up to ``most``, and ``most`` itself."""
    return tuple(sorted({*(2**i for i in range(most.bit_length())), most}))


def bootstrap_interval(values_P: np.ndarray, *, seed: int, resamples: int = 10_000) -> tuple[float, float]:
    """Return the percentile interval at `LEVEL` of the mean over problems, by resampling the problems.

    Values that are all equal, such as a single one, have an interval without width, which says nothing: resampling them
    does not show how far they could be from those of other problems.

    Args:
        values_P: [P] one value per problem, at least one.
        seed: Seed of the resampling; the same seed gives the same interval.
        resamples: Number of resamples.
    """
    random = np.random.Generator(np.random.Philox(seed))
    means = np.empty(resamples)
    for start in range(0, resamples, _CHUNK):
        chosen = random.integers(len(values_P), size=(min(_CHUNK, resamples - start), len(values_P)))
        means[start : start + len(chosen)] = values_P[chosen].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def sign_test(up: int, down: int) -> float:
    """Return the two-sided p-value of the exact sign test: ``up`` of ``up + down`` changes are up by chance alone.

    Problems without a change say nothing about the direction, and are left out.
    """
    changes = up + down
    tail = sum(math.comb(changes, i) for i in range(min(up, down) + 1))
    return min(1.0, 2 * tail / 2**changes)


@dataclass(frozen=True)
class PermutationTest:
    """Result of `permutation_test`.

    Attributes:
        p: Two-sided p-value.
        smallest: Smallest mean difference that this test would call significant at 1 - LEVEL, if the differences of
            the problems had the same sizes and other signs; NaN if there is none (`FEWEST_CHANGES`).
        found: True mean difference that would be found significant with probability `POWER`, if the problems'
            differences deviate from it as far as these do from 0: an approximation, and an upper bound where the
            observed mean is large. NaN if ``smallest`` is NaN, infinite if no difference would be found.
    """

    p: float
    smallest: float
    found: float

    @property
    def significant(self) -> bool:
        """True if the test finds a difference."""
        return self.p < 1 - LEVEL


def permutation_test(differences_P: np.ndarray, *, seed: int) -> PermutationTest:
    """Return the paired permutation test of the mean difference.

    If the two models were alike, each problem's difference would have either sign with equal probability. p is the
    share of sign patterns whose mean is at least as far from 0 as the observed one: of all patterns if there are at
    most 2^14, else of 20,000 random ones and the observed one.

    Args:
        differences_P: [P] difference of each problem.
        seed: Seed of the random patterns.
    """
    changed = differences_P[differences_P != 0]
    observed = abs(changed.sum())
    sums = np.sort(_sums_by_chance(changed, seed))
    p = float(_share_from(sums, observed))
    significant = sums[_share_from(sums, sums) < 1 - LEVEL]
    if not len(significant):
        return PermutationTest(p, math.nan, math.nan)
    problems = len(differences_P)
    smallest = float(significant[0]) / problems
    deviation = math.sqrt(float(np.sum(changed**2))) / problems  # of the mean, if signs are random
    # A true difference makes the differences themselves larger, and with them the threshold of the test. Student's t =
    # mean / error does not have this: of all differences with one sum of squares, it grows with the mean.
    rest = problems - (smallest / deviation) ** 2
    t = smallest / deviation * math.sqrt((problems - 1) / rest) if rest > _ROUNDING else math.inf
    return PermutationTest(p, smallest, (t + NormalDist().inv_cdf(POWER)) * deviation)


def _sums_by_chance(changed: np.ndarray, seed: int) -> np.ndarray:
    """Return the absolute sums of some differences whose signs are drawn by chance."""
    if len(changed) <= _EXACT_FLIPS:
        patterns = (np.arange(2 ** len(changed))[:, None] >> np.arange(len(changed))) & 1
        return np.abs((1 - 2 * patterns) @ changed)
    random = np.random.Generator(np.random.Philox(seed))
    sums = [np.abs(changed.sum(keepdims=True))]
    for _ in range(0, _RANDOM_FLIPS, _CHUNK):
        signs = 1 - 2 * random.integers(2, size=(_CHUNK, len(changed)), dtype=np.int8)
        sums.append(np.abs(signs @ changed))
    return np.concatenate(sums)


def _share_from(ascending: np.ndarray, least: Any) -> Any:
    """Return the share of some values that are at least ``least``, a number or an array, apart from rounding."""
    return 1 - np.searchsorted(ascending, least - _ROUNDING) / len(ascending)


def student_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution for a probability from 0.5 up to but not including 1.

    Args:
        probability: Probability of a smaller value.
        freedom: Degrees of freedom, at least 1.
    """
    import mpmath

    # Newton's method. For t > 0 the distribution function is concave, so that it approaches from below.
    scale = mpmath.beta(freedom / 2, 0.5) * math.sqrt(freedom)
    t, step = 0.0, math.inf
    while step > 1e-13 * t:
        tail = mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) / 2
        density = (1 + t * t / freedom) ** (-(freedom + 1) / 2) / scale
        step = float((probability - (1 - tail)) / density)
        t += step
    return t


def percentile(values: Sequence[int], share: float) -> float:
    """Return the linearly interpolated percentile, such as 0.95, of some values; NaN without any."""
    return float(np.quantile(np.asarray(values), share)) if len(values) else math.nan
