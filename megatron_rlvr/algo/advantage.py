"""Advantages of a group's rewards: how much better than its siblings a completion did.

grpo     (R - mean) / std      the paper's, arXiv 2402.03300; std with n in the denominator
dr_grpo  R - mean              without the division that favours groups of small spread, arXiv 2503.20783
rloo     R - mean of others    leave-one-out baseline, arXiv 2402.14740
"""

import numpy as np

_EPSILON = 1e-6


def group_advantages(rewards: np.ndarray, estimator: str) -> np.ndarray:
    """[G] float32 advantages from [G] rewards; zeros where all rewards are equal."""
    rewards = rewards.astype(np.float64)
    if np.all(rewards == rewards[0]):  # their rounded mean may differ from them
        return np.zeros(len(rewards), dtype=np.float32)
    centered = rewards - rewards.mean()
    if estimator == "grpo":
        centered = centered / (rewards.std() + _EPSILON)
    elif estimator == "rloo":
        centered = centered * len(rewards) / (len(rewards) - 1)
    elif estimator != "dr_grpo":
        raise ValueError(f"unknown advantage estimator {estimator!r}")
    return centered.astype(np.float32)
