"""Advantages: how much better a completion did than the others of its group.

Each estimator is one function and one equation over the rewards R of a group of G completions, in float64. The
estimator batch is that of Dr. GRPO, divided by the standard deviation over the whole batch instead of the group
(ScaleRL, arXiv 2510.13786, section 3.2).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

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


def batch_scale(advantages: np.ndarray, estimator: str) -> float:
    """Factor of all advantages of a training step: 1 / (std + 1e-6) of them for the estimator batch, else 1.

    Args:
        advantages: [n], of all completions of the step, in an order that does not depend on the ranks.
        estimator: A key of `ESTIMATORS`.
    """
    if estimator != "batch" or not len(advantages):
        return 1.0
    return 1.0 / (float(advantages.astype(np.float64).std()) + _EPSILON)


def entropy_shaped(advantages: Tensor, entropy: Tensor, *, bonus: float, bound: float) -> Tensor:
    """Advantages of tokens with a bonus for their entropy that never outweighs them: A + min(bonus H, |A| / bound).

    Cheng et al., "Reasoning with Exploration" (arXiv 2506.14758), with alpha = bonus and kappa = bound. The sign of an
    advantage does not change, and one of zero stays zero.

    Args:
        advantages: [n] float32.
        entropy: [n] float32 nats, without gradient.
        bonus: Advantage per nat, at least 0.
        bound: Above 1.

    Returns: [n] float32.
    """
    return advantages + torch.minimum(bonus * entropy, advantages.abs() / bound)


ESTIMATORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "grpo": grpo_advantages,
    "dr_grpo": dr_grpo_advantages,
    "rloo": rloo_advantages,
    "batch": dr_grpo_advantages,  # and then `batch_scale`
}
