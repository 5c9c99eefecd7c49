"""Means over seeds and problems, which both are samples: other seeds could have been drawn, and other problems asked.

For values x[s, p] with S seeds and P problems, every seed being asked every problem (a crossed design):

    V_S = variance of the means of the seeds / S          V_P = variance of the means of the problems / P
    V_E = variance of the residuals x[s, p] - row mean - column mean + mean / (S P)
    error^2 = V_S + V_P - V_E, which is unbiased, but at least V_S and V_P

The interval is that of Student's t with Satterthwaite's degrees of freedom. A percentile bootstrap over both is too
narrow where a few seeds make most of the variance: resampling five of them understates it by a fifth, and knows nothing
of the heavy tails of t with four degrees of freedom.
"""

import math
from dataclasses import dataclass

import numpy as np

from megatron_rlvr.evaluation.statistics import LEVEL, student_quantile

_ROUNDING = 1e-12  # of values such as accuracies, whose size is 1


@dataclass(frozen=True)
class CrossedMean:
    """Mean over seeds and problems.

    Attributes:
        value: The mean.
        error: Its standard error; over problems only if there is one seed, over seeds only if there is one problem;
            NaN for a single value.
        freedom: Degrees of freedom of the standard error, at least 1.
    """

    value: float
    error: float
    freedom: int

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the interval that holds the true mean with this probability.

        NaN without a standard error, and with one of 0: values that are all equal say nothing of how far others vary.
        """
        if not math.isfinite(self.error) or self.error <= _ROUNDING:
            return math.nan, math.nan
        half = student_quantile((1 + level) / 2, self.freedom) * self.error
        return self.value - half, self.value + half


def crossed_mean(values_SP: np.ndarray) -> CrossedMean:
    """Return the mean of one value for each seed and problem, with its standard error over both.

    Args:
        values_SP: [S, P] values, at least one.
    """
    seeds, problems = values_SP.shape
    mean = float(values_SP.mean())
    rows, columns = values_SP.mean(axis=1), values_SP.mean(axis=0)
    by_seed = float(rows.var(ddof=1)) / seeds if seeds > 1 else math.nan
    by_problem = float(columns.var(ddof=1)) / problems if problems > 1 else math.nan
    if seeds == 1 or problems == 1:
        known = by_problem if seeds == 1 else by_seed
        return CrossedMean(mean, math.sqrt(known), max(1, seeds * problems - 1))
    residuals = values_SP - rows[:, None] - columns[None, :] + mean
    residual = float((residuals**2).sum()) / ((seeds - 1) * (problems - 1)) / (seeds * problems)
    variance = max(by_seed + by_problem - residual, by_seed, by_problem)
    spread = by_seed**2 / (seeds - 1) + by_problem**2 / (problems - 1) + residual**2 / ((seeds - 1) * (problems - 1))
    freedom = int(variance**2 / spread) if spread else seeds + problems - 2
    return CrossedMean(mean, math.sqrt(variance), max(min(seeds, problems) - 1, freedom))
