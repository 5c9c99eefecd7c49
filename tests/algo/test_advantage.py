"""Advantages against numbers computed by hand."""

import numpy as np
import pytest
import torch

from megatron_rlvr.algo.advantage import batch_scale, entropy_shaped, group_advantages

# Rewards, their mean and standard deviation (n in the denominator), and R - mean.
ONE_OF_FOUR = (np.array([1.0, -1.0, -1.0, -1.0]), 0.8660254037844386, [1.5, -0.5, -0.5, -0.5])
SHAPED = (np.array([1.0, 0.5, -1.0, -2.0, -1.0]), 1.0954451150103322, [1.5, 1.0, -0.5, -1.5, -0.5])


@pytest.mark.parametrize(("rewards", "deviation", "centered"), [ONE_OF_FOUR, SHAPED])
def test_advantages_are_those_of_the_formulas(rewards, deviation, centered):
    n = len(rewards)
    others = [(rewards.sum() - r) / (n - 1) for r in rewards]
    expected = {
        "grpo": np.array(centered) / deviation,
        "dr_grpo": np.array(centered),
        "rloo": rewards - np.array(others),
        "batch": np.array(centered),
    }
    for estimator, values in expected.items():
        advantages = group_advantages(rewards, estimator)
        assert advantages.dtype == np.float32
        np.testing.assert_allclose(advantages, values, rtol=3e-6)
    np.testing.assert_allclose(group_advantages(ONE_OF_FOUR[0], "rloo"), [2, -2 / 3, -2 / 3, -2 / 3], rtol=1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "batch"])
@pytest.mark.parametrize("reward", [-1.0, 0.0, 0.1, 1 / 3, 1e6])
def test_a_group_of_equal_rewards_has_no_advantage(estimator, reward):
    for size in (2, 3, 7, 16):
        assert group_advantages(np.full(size, reward), estimator).tolist() == [0.0] * size


def test_only_known_estimators_are_accepted():
    with pytest.raises(ValueError, match="gae"):
        group_advantages(ONE_OF_FOUR[0], "gae")


def test_only_the_batch_estimator_divides_by_the_deviation_over_the_step():
    """Two groups: R - mean is 1.5 and three times -0.5, and 1, 1, -1, -1; the sum of squares is 7 of 8."""
    advantages = np.array([1.5, -0.5, -0.5, -0.5, 1.0, 1.0, -1.0, -1.0])
    assert batch_scale(advantages, "batch") == pytest.approx((8 / 7) ** 0.5, rel=2e-6)
    assert batch_scale(advantages, "dr_grpo") == batch_scale(np.array([]), "batch") == 1.0
    assert (advantages * batch_scale(advantages, "batch")).std() == pytest.approx(1.0, rel=2e-6)


def test_entropy_raises_an_advantage_by_a_bounded_share_of_it():
    """By hand, bonus 0.4 and bound 2: 0.4 H, but at most |A| / 2; no advantage stays none."""
    advantages, entropy = torch.tensor([2.0, 2.0, -2.0, -2.0, 0.0]), torch.tensor([1.0, 5.0, 1.0, 5.0, 5.0])
    shaped = entropy_shaped(advantages, entropy, bonus=0.4, bound=2.0)
    torch.testing.assert_close(shaped, torch.tensor([2.4, 3.0, -1.6, -1.0, 0.0]))
    assert torch.equal(entropy_shaped(advantages, entropy, bonus=0.0, bound=2.0), advantages)
