"""DAPO's loss against numbers worked out by hand, and against a token-by-token reference in float64."""

import math
import random
from dataclasses import fields

import pytest
import torch

from megatron_rlvr.algo.loss import DapoLoss, SelectedTokens
from megatron_rlvr.config import LossSettings

LOW, HIGH, DUAL = 0.2, 0.28, 10.0


def tokens_of(old_logp, advantages, dtype=torch.float64) -> SelectedTokens:
    old = torch.as_tensor(old_logp, dtype=dtype)
    return SelectedTokens(old, old, torch.as_tensor(advantages, dtype=dtype), torch.zeros(len(old), dtype=torch.int64))


def run(logp, old_logp, advantages, dtype=torch.float64, **settings):
    """(loss, gradient of each token's log-probability, figures)."""
    leaf = torch.as_tensor(logp, dtype=dtype).requires_grad_()
    loss, figures = DapoLoss(LossSettings(**settings))(leaf, tokens_of(old_logp, advantages, dtype))
    loss.backward()
    assert leaf.grad is not None
    assert all(not value.requires_grad for value in figures.values())
    return loss.item(), leaf.grad.tolist(), {name: float(value) for name, value in figures.items()}


# The ratio, the advantage, and by hand: the token's loss, its derivative by logp (r is its own derivative), clipped?
REGIONS = {
    "inside, A > 0": (1.1, 2.0, -2.2, -2.2, 0),
    "inside, A < 0": (0.9, -2.0, 1.8, 1.8, 0),
    "on policy": (1.0, 3.0, -3.0, -3.0, 0),
    "above, A > 0": (1.5, 2.0, -1.28 * 2, 0.0, 1),
    "below, A > 0": (0.5, 2.0, -1.0, -1.0, 0),
    "below, A < 0": (0.5, -2.0, 0.8 * 2, 0.0, 1),
    "above, A < 0": (4.0, -2.0, 8.0, 8.0, 0),
    "just below the dual clip, A < 0": (9.9, -2.0, 19.8, 19.8, 0),
    "beyond the dual clip, A < 0": (11.0, -2.0, 20.0, 0.0, 0),
    "beyond the dual clip, A > 0": (11.0, 2.0, -1.28 * 2, 0.0, 1),
    "no advantage": (3.0, 0.0, 0.0, 0.0, 0),
}


@pytest.mark.parametrize("region", REGIONS)
def test_each_region_has_the_loss_and_gradient_worked_out_by_hand(region):
    ratio, advantage, expected, gradient, clipped = REGIONS[region]
    loss, (slope,), figures = run([math.log(ratio) - 1.5], [-1.5], [advantage])
    assert loss == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert slope == pytest.approx(gradient, rel=1e-12, abs=1e-15)
    assert figures["clip_fraction"] == clipped
    assert figures["ratio"] == pytest.approx(ratio, rel=1e-12)
    assert figures["kl"] == pytest.approx(ratio - 1 - math.log(ratio), rel=1e-12, abs=1e-15)


def test_without_dual_clip_the_loss_of_an_exploded_ratio_is_not_bounded():
    loss, (slope,), _ = run([math.log(11.0)], [0.0], [-2.0], dual_clip=None)
    assert (loss, slope) == (pytest.approx(22.0), pytest.approx(22.0))


@pytest.mark.parametrize("dual_clip", [None, 10.0])
def test_a_ratio_that_overflows_leaves_loss_and_gradient_finite(dual_clip):
    logp, old = [0.0, 0.0, -1000.0, -1000.0, 0.0], [-1000.0, -1000.0, 0.0, 0.0, 0.0]
    loss, slopes, figures = run(logp, old, [1.0, -1.0, 1.0, -1.0, 1.0], torch.float32, dual_clip=dual_clip)
    assert all(math.isfinite(x) for x in (loss, *slopes, *figures.values()))
    assert slopes[4] == -1.0, "the other tokens learn as ever"


def reference(logp, old, advantage, low, high, dual):
    """One token by the formula: (loss, derivative by logp, clipped)."""
    ratio = math.exp(logp - old)
    clipped = min(max(ratio, 1 - low), 1 + high)
    surrogate = min(ratio * advantage, clipped * advantage)
    is_clipped = surrogate != ratio * advantage
    bounded = max(surrogate, dual * advantage) if dual is not None and advantage < 0 else surrogate
    return -bounded, 0.0 if bounded != ratio * advantage else -ratio * advantage, is_clipped


def random_tokens(seed, n=500):
    source = random.Random(seed)
    logp = [-source.expovariate(1.0) for _ in range(n)]
    old = [value + source.gauss(0.0, source.choice([0.01, 0.3, 3.0])) for value in logp]
    return logp, old, [source.choice([0.0, source.gauss(0, 1)]) for _ in range(n)]


@pytest.mark.parametrize(
    ("low", "high", "dual"),
    [(LOW, HIGH, DUAL), (LOW, HIGH, None), (0.2, 0.2, 3.0), (0.9, 5.0, 1.5), (3e-4, 4e-4, 10.0)],
)
def test_random_tokens_have_the_loss_and_gradient_of_the_formula(low, high, dual):
    logp, old, advantages = random_tokens(seed=int(high * 1e4))
    loss, slopes, figures = run(logp, old, advantages, clip_low=low, clip_high=high, dual_clip=dual)
    expected = [reference(*token, low, high, dual) for token in zip(logp, old, advantages, strict=True)]
    assert loss == pytest.approx(math.fsum(value for value, _, _ in expected), rel=1e-12)
    assert slopes == pytest.approx([slope for _, slope, _ in expected], rel=1e-12, abs=1e-14)
    assert figures["clip_fraction"] == sum(clipped for _, _, clipped in expected)
    assert len({(slope == 0, clipped) for _, slope, clipped in expected}) >= 2, "the cases reach several regions"


def test_no_token_knows_another():
    """The sum over parts is the sum over all, and a token's gradient is the same in any company and order."""
    logp, old, advantages = random_tokens(seed=1, n=40)
    loss, slopes, figures = run(logp, old, advantages)
    alone = [run([a], [b], [c]) for a, b, c in zip(logp, old, advantages, strict=True)]
    assert loss == pytest.approx(math.fsum(part for part, _, _ in alone), rel=1e-12)
    assert slopes == [slope for _, (slope,), _ in alone]
    for name, value in figures.items():
        assert value == pytest.approx(math.fsum(part[name] for _, _, part in alone), rel=1e-12)
    backwards = run(logp[::-1], old[::-1], advantages[::-1])
    assert backwards[1] == slopes[::-1]


def test_no_tokens_are_a_loss_of_zero_that_can_be_differentiated():
    assert run([], [], []) == (0.0, [], {"clip_fraction": 0.0, "ratio": 0.0, "kl": 0.0})


def test_an_advantage_that_is_not_a_number_is_not_hidden():
    loss, slopes, _ = run([0.0, 0.0], [0.0, 0.0], [math.nan, 1.0])
    assert math.isnan(loss)
    assert math.isnan(slopes[0])
    assert slopes[1] == -1.0


def test_a_loss_sees_vectors_of_selected_tokens_only():
    assert [field.name for field in fields(SelectedTokens)] == ["old_logp", "rollout_logp", "advantages", "sequence"]
