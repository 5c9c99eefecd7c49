"""Advantages: how much better a completion did than the others of its group.

Each estimator is one function and one equation over the rewards R of a group of G completions, in float64.
"""

from collections.abc import Callable

import numpy as np

_EPSILON = 1e-6


def group_advantages(rewards: np.ndarray, estimator: str) -> np.ndarray:
    """Advantages of a group by the named estimator.

    Args:
        rewards: [G], one for each completion.
        estimator: A key of `ESTIMATORS`.

    Returns: [G] float32; exactly zero if all rewards are equal.
    Raises: ValueError for an unknown estimator.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown advantage estimator {estimator!r}; choose one of {', '.join(ESTIMATORS)}")
    if np.all(rewards == rewards[0]):  # their rounded mean may differ from them
        return np.zeros(len(rewards), dtype=np.float32)
    return ESTIMATORS[estimator](rewards.astype(np.float64)).astype(np.float32)


def grpo_advantages(rewards: np.ndarray) -> np.ndarray:
    """(R - mean) / std, std with G in the denominator, plus 1e-6: the paper's choice (GRPO, arXiv 2402.03300)."""
    return (rewards - rewards.mean()) / (rewards.std() + _EPSILON)


def dr_grpo_advantages(rewards: np.ndarray) -> np.ndarray:
    """R - mean, without the division that favours groups of small spread (Dr. GRPO, arXiv 2503.20783)."""
    return rewards - rewards.mean()


def rloo_advantages(rewards: np.ndarray) -> np.ndarray:
    """R - mean of the other rewards: a leave-one-out baseline (RLOO, arXiv 2402.14740)."""
    return (rewards - rewards.mean()) * len(rewards) / (len(rewards) - 1)


ESTIMATORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "grpo": grpo_advantages,
    "dr_grpo": dr_grpo_advantages,
    "rloo": rloo_advantages,
}
