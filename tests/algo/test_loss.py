"""The losses against numbers computed by hand, and against a token-by-token reference in float64."""

import math
import random
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

import pytest
import torch

from megatron_rlvr.algo.correction import correction_weights
from megatron_rlvr.algo.loss import (
    KlEstimator,
    LossInputs,
    SelectedTokens,
    adapted_entropy_coefficient,
    cispo_loss,
    dapo_loss,
    dppo_loss,
    gspo_loss,
    policy_loss,
    reference_kl,
)
from megatron_rlvr.config import LossSettings

# Keys of `LossSettings` that `policy_loss` reads; the others decide its inputs.
OF_THE_LOSS = {"objective", "clip_low", "clip_high", "dual_clip", "kl_estimator", "kl_coefficient"}
OBJECTIVES = ("dapo", "gspo", "cispo", "dppo")
CORRECTIONS = ("none", "tis", "mis")


@dataclass(frozen=True)
class Token:
    """Input of one token; without a rollout log-probability, the engine is the policy before the update."""

    logp: float
    old: float
    advantage: float
    sequence: int = 0
    rollout: float | None = None
    reference: float | None = None
    scale: float | None = None


@dataclass(frozen=True)
class Outcome:
    """Loss, derivative by each token's log-probability, metrics."""

    loss: float
    slopes: list[float]
    metrics: dict[str, float]


def run(tokens: list[Token], dtype=torch.float64, sequences: int | None = None, **settings) -> Outcome:
    """Loss of tokens and its gradient; numbers that ``settings`` lacks are the defaults of `LossSettings`."""

    def vector(values):
        return torch.tensor(list(values), dtype=dtype)

    old, rollout = vector(t.old for t in tokens), vector(t.old if t.rollout is None else t.rollout for t in tokens)
    sequence = torch.tensor([t.sequence for t in tokens], dtype=torch.int64)
    sequences = sequences or 1 + max((t.sequence for t in tokens), default=0)
    numbers = LossSettings(**settings)
    weights = limited = None
    if numbers.rollout_correction != "none":
        assert numbers.correction_cap is not None
        weights, limited = correction_weights(
            old,
            rollout,
            sequence,
            sequences,
            correction=numbers.rollout_correction,
            level=numbers.correction_level,
            cap=numbers.correction_cap,
            veto=numbers.correction_veto,
        )
    with_reference, scaled = numbers.kl_coefficient > 0, any(t.scale is not None for t in tokens)
    selected = SelectedTokens(
        old_logp=old,
        advantages=vector(t.advantage for t in tokens),
        weights=weights,
        limited=limited,
        scale=vector(t.scale for t in tokens) if scaled else None,
        reference_logp=vector(t.old if t.reference is None else t.reference for t in tokens)
        if with_reference
        else None,
        rollout_logp=rollout,
        sequence=sequence,
        sequences=sequences,
    )
    logp = vector(t.logp for t in tokens).requires_grad_()
    loss, metrics = policy_loss(logp, selected, **numbers.model_dump(include=OF_THE_LOSS))
    loss.backward()
    assert logp.grad is not None
    assert all(not value.requires_grad for value in metrics.values())
    return Outcome(loss.item(), logp.grad.tolist(), {name: float(value) for name, value in metrics.items()})


def with_ratios(*ratios: float, advantage: float = 1.0, logp: float = -1.5) -> list[Token]:
    return [Token(logp, logp - math.log(ratio), advantage) for ratio in ratios]


def exactly(value):
    return pytest.approx(value, rel=1e-12, abs=1e-14)


# Computed by hand -------------------------------------------------------------------------------------------------

# Ratio and advantage; by hand: the token's loss, its derivative by logp (r is its own derivative), 1 if clipped.
DAPO = {
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


@pytest.mark.parametrize("region", DAPO)
def test_dapo_has_the_loss_and_gradient_computed_by_hand_in_each_region(region):
    ratio, advantage, expected, slope, clipped = DAPO[region]
    outcome = run(with_ratios(ratio, advantage=advantage))
    assert (outcome.loss, outcome.slopes) == (exactly(expected), exactly([slope]))
    assert outcome.metrics == {
        "clip_fraction": clipped,
        "ratio": exactly(ratio),
        "kl": exactly(ratio - 1 - math.log(ratio)),
    }


def test_without_dual_clip_the_loss_of_an_exploded_ratio_is_not_bounded():
    outcome = run(with_ratios(11.0, advantage=-2.0), dual_clip=None)
    assert (outcome.loss, outcome.slopes) == (exactly(22.0), exactly([22.0]))


# Ratios of a sequence's tokens, whose geometric mean is easy, and the advantage; by hand: loss and derivative of each
# token, and how many are clipped. Bounds 0.8 .. 1.28.
GSPO = {
    "inside, A > 0": ((1.21, 1.0), 2.0, -2.2, -2.2, 0),
    "inside, though each token is outside": ((2.0, 0.5), 2.0, -2.0, -2.0, 0),
    "above, A > 0, with a token that is inside": ((4.0, 1.0), 2.0, -1.28 * 2, 0.0, 2),
    "above, A < 0": ((4.0, 1.0), -2.0, 4.0, 4.0, 0),
    "below, A > 0": ((0.25, 1.0), 2.0, -1.0, -1.0, 0),
    "below, A < 0": ((0.25, 1.0), -2.0, 0.8 * 2, 0.0, 2),
    "far above, A < 0: no dual clip": ((8000.0, 1.0, 1.0), -1.0, 20.0, 20.0, 0),
    "one token": ((1.1,), 2.0, -2.2, -2.2, 0),
    "no advantage": ((4.0, 1.0), 0.0, 0.0, 0.0, 0),
}


@pytest.mark.parametrize("region", GSPO)
def test_gspo_has_the_loss_and_gradient_computed_by_hand_in_each_region(region):
    ratios, advantage, expected, slope, clipped = GSPO[region]
    outcome = run(with_ratios(*ratios, advantage=advantage), objective="gspo", clip_low=0.2, clip_high=0.28)
    n = len(ratios)
    assert (outcome.loss, outcome.slopes) == (exactly(n * expected), exactly(n * [slope]))
    assert outcome.metrics == {
        "clip_fraction": clipped,
        "ratio": exactly(n * math.prod(ratios) ** (1 / n)),
        "kl": exactly(sum(r - 1 - math.log(r) for r in ratios)),
    }


# Ratio and advantage; by hand, for logp = -1.5: loss, derivative, 1 if truncated at 5.
CISPO = {
    "below the bound, A > 0": (3.0, 2.0, 9.0, -6.0, 0),
    "below the bound, A < 0": (3.0, -2.0, -9.0, 6.0, 0),
    "above, A > 0: truncated, with a gradient": (6.0, 2.0, 15.0, -10.0, 1),
    "above, A < 0: truncated, with a gradient": (6.0, -2.0, -15.0, 10.0, 1),
    "far below: no lower bound": (0.01, -2.0, -0.03, 0.02, 0),
    "no advantage": (3.0, 0.0, 0.0, 0.0, 0),
}


@pytest.mark.parametrize("region", CISPO)
def test_cispo_has_the_loss_and_gradient_computed_by_hand_in_each_region(region):
    ratio, advantage, expected, slope, truncated = CISPO[region]
    outcome = run(with_ratios(ratio, advantage=advantage, logp=-1.5), objective="cispo", clip_high=4.0)
    assert (outcome.loss, outcome.slopes) == (exactly(expected), exactly([slope]))
    assert (outcome.metrics["clip_fraction"], outcome.metrics["ratio"]) == (truncated, exactly(ratio))


# p and old p, and the advantage; by hand: weight min(p / old p, 20), and 1 if the token is dropped. Bounds 0.2 each.
DPPO = {
    "inside, A > 0": (0.5, 0.4, 2.0, 1.25, 0),
    "inside, A < 0": (0.5, 0.6, -2.0, 5 / 6, 0),
    "risen too far, A > 0": (0.7, 0.4, 2.0, 1.75, 1),
    "risen too far, A < 0: it moves back": (0.7, 0.4, -2.0, 1.75, 0),
    "fallen too far, A < 0": (0.4, 0.7, -2.0, 4 / 7, 1),
    "fallen too far, A > 0: it moves back": (0.4, 0.7, 2.0, 4 / 7, 0),
    "a rare token at four times its probability": (0.04, 0.01, 2.0, 4.0, 0),
    "an exploded ratio": (0.1, 0.001, 2.0, 20.0, 0),
    "no advantage": (0.5, 0.4, 0.0, 1.25, 0),
}


@pytest.mark.parametrize("region", DPPO)
def test_dppo_has_the_loss_and_gradient_computed_by_hand_in_each_region(region):
    p, old, advantage, weight, dropped = DPPO[region]
    outcome = run([Token(math.log(p), math.log(old), advantage)], objective="dppo")
    slope = 0.0 if dropped else -weight * advantage
    assert (outcome.loss, outcome.slopes) == (exactly(slope * math.log(p)), exactly([slope]))
    assert (outcome.metrics["clip_fraction"], outcome.metrics["ratio"]) == (dropped, exactly(p / old))


# Ratios of a response's tokens; by hand: weight of the response, cap 2 (geometric: 1.5), and how many of its
# tokens are limited.
LEVELS: dict[tuple[str, str], list[tuple[tuple[float, ...], float, int]]] = {
    ("tis", "sequence"): [((1.2, 1.5), 1.8, 0), ((2.0, 3.0), 2.0, 2), ((0.1, 0.5), 0.05, 0), ((1.5,), 1.5, 0)],
    ("mis", "sequence"): [((1.2, 1.5), 1.8, 0), ((2.0, 3.0), 0.0, 2), ((0.1, 0.5), 0.0, 2), ((4.0, 0.25), 1.0, 0)],
    ("mis", "geometric"): [((1.2, 1.5), 1.0, 0), ((4.0, 1.0), 0.0, 2), ((0.25, 1.0), 0.0, 2), ((4.0, 0.25), 1.0, 0)],
}


@pytest.mark.parametrize(("correction", "level"), LEVELS)
@pytest.mark.parametrize("veto", [None, 0.2])
def test_a_correction_of_responses_has_the_weights_computed_by_hand(correction, level, veto):
    cases = LEVELS[correction, level]
    tokens = [
        Token(-1.0, -1.0, 2.0, sequence, rollout=-1.0 - math.log(w))
        for sequence, (ratios, *_) in enumerate(cases)
        for w in ratios
    ]
    outcome = run(
        tokens,
        rollout_correction=correction,
        correction_level=level,
        correction_cap=1.5 if level == "geometric" else 2.0,
        correction_veto=veto,
    )
    vetoed = [veto is not None and min(ratios) < veto for ratios, *_ in cases]
    weights = [0.0 if no else w for no, (ratios, w, _) in zip(vetoed, cases, strict=True) for _ in ratios]
    assert outcome.slopes == exactly([-2.0 * w for w in weights])
    assert outcome.metrics["correction_weight"] == exactly(sum(weights))
    limited = [len(ratios) if no else n for no, (ratios, _, n) in zip(vetoed, cases, strict=True)]
    assert outcome.metrics["correction_clipped"] == sum(limited)


def test_the_estimates_of_the_divergence_and_their_gradients_are_those_computed_by_hand():
    """With ln p = -2 and ln p(reference) = -1, d is 1, and its derivative by ln p is -1."""
    cases: list[tuple[KlEstimator, float, float]] = [
        *(("k1", -1.0, 1.0), ("k2", 0.5, -1.0), ("k3", math.e - 2, 1 - math.e)),
    ]
    for estimator, value, slope in cases:
        logp = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
        kl = reference_kl(logp, torch.tensor([-1.0], dtype=torch.float64), estimator=estimator)
        kl.sum().backward()
        assert (kl.item(), logp.grad.item()) == (exactly(value), exactly(slope))  # type: ignore[union-attr]
        token = Token(-2.0, -2.0, 3.0, reference=-1.0)
        outcome = run([token], kl_coefficient=0.1, kl_estimator=estimator)
        assert (outcome.loss, outcome.slopes) == (exactly(-3.0 + 0.1 * value), exactly([-3.0 + 0.1 * slope]))
        assert outcome.metrics["reference_kl"] == exactly(value)


def test_the_estimates_have_the_mean_of_the_divergence_over_all_tokens():
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    divergence = float((p * (p / q).log()).sum())
    names: tuple[KlEstimator, ...] = ("k1", "k2", "k3")
    means = {name: float((p * reference_kl(p.log(), q.log(), estimator=name)).sum()) for name in names}
    assert (means["k1"], means["k3"]) == (exactly(divergence), exactly(divergence))
    assert means["k2"] == pytest.approx(divergence, rel=0.1)


def test_a_scale_multiplies_everything_that_is_summed():
    tokens = [Token(-2.0, -2.0, 3.0, reference=-1.0, scale=0.25), Token(-1.0, -1.0, -1.0, reference=-1.0, scale=2.0)]
    outcome = run(tokens, kl_coefficient=0.1, kl_estimator="k2")
    assert outcome.loss == exactly(0.25 * (-3.0 + 0.1 * 0.5) + 2.0)
    assert outcome.slopes == exactly([0.25 * (-3.0 - 0.1), 2.0])


def test_the_entropy_coefficient_follows_the_target():
    """Target 0.5: three steps below it, one on it, two above it; the largest is 0.0025."""
    coefficient, applied = 0.0, []
    for entropy in (0.1, 0.2, 0.3, 0.5, 0.6, 0.4):
        now, coefficient = adapted_entropy_coefficient(coefficient, entropy, target=0.5, step=1e-3, maximum=2.5e-3)
        applied.append(now)
    assert applied == exactly([0.0, 1e-3, 2e-3, 2.5e-3, 0.0, 0.5e-3])
    assert coefficient == exactly(1.5e-3)
    assert adapted_entropy_coefficient(0.0, 0.6, target=0.5, step=1e-3, maximum=1.0) == (0.0, 0.0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("correction", "cap", "weights", "beyond"),
    [
        ("tis", 2.0, [1.0, 1.5, 2.0, 0.6, 0.4], 1),
        ("mis", 2.0, [1.0, 1.5, 0.0, 0.6, 0.0], 2),
        ("tis", 1.2, [1.0, 1.2, 1.2, 0.6, 0.4], 2),
        ("mis", 4.0, [1.0, 1.5, 3.0, 0.6, 0.4], 0),
    ],
)
def test_a_correction_multiplies_loss_and_gradient_by_the_weight_computed_by_hand(
    objective, correction, cap, weights, beyond
):
    on_policy = [Token(-1.0, -1.0, 2.0, rollout=-1.0 - math.log(w)) for w in (1.0, 1.5, 3.0, 0.6, 0.4)]
    outcome = run(on_policy, objective=objective, rollout_correction=correction, correction_cap=cap)
    # On policy every objective has the slope -A; the loss is -A, and with cispo and dppo -A logp.
    assert outcome.slopes == exactly([-2.0 * w for w in weights])
    assert outcome.loss == exactly((2.0 if objective in ("cispo", "dppo") else -2.0) * sum(weights))
    assert outcome.metrics["correction_weight"] == exactly(sum(weights))
    assert outcome.metrics["correction_clipped"] == beyond
    uncorrected = run(on_policy, objective=objective).metrics
    assert {name: outcome.metrics[name] for name in uncorrected} == uncorrected


# Against the formula ------------------------------------------------------------------------------------------------


def weight_of(token: Token, correction: str, cap: float) -> tuple[float, bool]:
    """Weight of one token, and True if the cap decided it."""
    if correction == "none" or token.rollout is None:
        return 1.0, False
    weight = math.exp(token.old - token.rollout)
    if correction == "tis":
        return min(weight, cap), weight > cap
    inside = 1 / cap <= weight <= cap
    return weight if inside else 0.0, not inside


def reference(tokens: list[Token], objective="dapo", low=0.2, high=0.28, dual=None, correction="none", cap=2.0):
    """Outcome, computed token by token."""
    differences = defaultdict(list)
    for t in tokens:
        differences[t.sequence].append(t.logp - t.old)
    losses, slopes = [], []
    sums: dict[str, float] = defaultdict(float)
    for t in tokens:
        own = t.logp - t.old
        ratio = math.exp(
            math.fsum(differences[t.sequence]) / len(differences[t.sequence]) if objective == "gspo" else own
        )
        if objective == "dppo":
            rise = math.exp(t.logp) - math.exp(t.old)
            is_clipped = rise > high if t.advantage > 0 else -rise > low
            slope = 0.0 if is_clipped else -min(ratio, 20.0) * t.advantage
            loss = slope * t.logp
        elif objective == "cispo":
            slope, is_clipped = -min(ratio, 1 + high) * t.advantage, ratio > 1 + high
            loss = slope * t.logp
        else:
            clipped = min(max(ratio, 1 - low), 1 + high)
            surrogate = min(ratio * t.advantage, clipped * t.advantage)
            bounded = max(surrogate, dual * t.advantage) if dual is not None and t.advantage < 0 else surrogate
            loss, is_clipped = -bounded, surrogate != ratio * t.advantage
            slope = 0.0 if bounded != ratio * t.advantage else -ratio * t.advantage
        weight, beyond = weight_of(t, correction, cap)
        losses.append(weight * loss)
        slopes.append(weight * slope)
        sums["clip_fraction"] += is_clipped
        sums["ratio"] += ratio
        sums["kl"] += math.exp(own) - 1 - own
        if correction != "none":
            sums["correction_weight"] += weight
            sums["correction_clipped"] += beyond
    return Outcome(math.fsum(losses), slopes, dict(sums))


def random_tokens(seed: int, n: int = 500, sequences: int = 40, spread: float = 1.0) -> list[Token]:
    """Tokens with ratios from on policy to far off policy, differently in each sequence, in random order."""
    source = random.Random(seed)
    width = [spread * source.choice([0.01, 0.3, 3.0]) for _ in range(sequences)]
    shift = [source.gauss(0.0, w) for w in width]
    tokens = []
    for _ in range(n):
        sequence = source.randrange(sequences)
        logp = -source.expovariate(1.0)
        old = logp - shift[sequence] - source.gauss(0.0, width[sequence])
        advantage = source.choice([0.0, source.gauss(0, 1)])
        tokens.append(Token(logp, old, advantage, sequence, rollout=old + source.gauss(0.0, 0.7)))
    return tokens


@pytest.mark.parametrize(
    ("objective", "low", "high", "dual"),
    [
        ("dapo", 0.2, 0.28, 10.0),
        ("dapo", 0.2, 0.28, None),
        ("dapo", 0.2, 0.2, 3.0),
        ("dapo", 0.9, 5.0, 1.5),
        ("dapo", 3e-4, 4e-4, 10.0),
        ("gspo", 3e-4, 4e-4, None),
        ("gspo", 0.2, 0.28, None),
        ("cispo", None, 4.0, None),
        ("cispo", None, 0.28, None),
        ("dppo", 0.2, 0.2, None),
        ("dppo", 0.05, 0.1, None),
    ],
)
@pytest.mark.parametrize(("correction", "cap"), [("none", None), ("tis", 2.0), ("mis", 2.0), ("mis", 1.3)])
def test_random_tokens_have_the_loss_gradient_and_metrics_of_the_formula(objective, low, high, dual, correction, cap):
    tokens = random_tokens(seed=int(high * 1e4))
    outcome = run(
        tokens,
        objective=objective,
        clip_low=low,
        clip_high=high,
        dual_clip=dual,
        rollout_correction=correction,
        correction_cap=cap,
    )
    expected = reference(tokens, objective, low, high, dual, correction, cap)
    assert outcome.loss == exactly(expected.loss)
    assert outcome.slopes == exactly(expected.slopes)
    assert outcome.metrics == exactly(expected.metrics)
    assert 20 < outcome.metrics["clip_fraction"] < 480, "the cases reach several regions"
    assert correction == "none" or 20 < outcome.metrics["correction_clipped"] < 480


def test_with_one_advantage_a_sequence_gspo_has_the_gradient_of_the_clipped_sequence_ratio():
    """The oracle is n min(s A, clip(s) A) for each sequence, differentiated by autograd through the whole mean."""
    tokens = [replace(t, advantage=math.cos(t.sequence)) for t in random_tokens(seed=3)]
    logp = torch.tensor([t.logp for t in tokens], dtype=torch.float64, requires_grad=True)
    objective = torch.zeros((), dtype=torch.float64)
    for sequence in {t.sequence for t in tokens}:
        places = [i for i, t in enumerate(tokens) if t.sequence == sequence]
        s = torch.stack([logp[i] - tokens[i].old for i in places]).mean().exp()
        a = math.cos(sequence)
        objective = objective + len(places) * torch.minimum(s * a, s.clamp(1 - 0.2, 1 + 0.28) * a)
    (-objective).backward()
    assert logp.grad is not None
    outcome = run(tokens, objective="gspo", clip_low=0.2, clip_high=0.28)
    assert outcome.loss == exactly(-objective.item())
    assert outcome.slopes == exactly(logp.grad.tolist())
    assert len({slope == 0 for slope in outcome.slopes}) == 2


def test_at_float32_the_default_bounds_of_gspo_decide_as_at_float64():
    """Long sequences have ratios within 1e-5 of a bound on either side, and tokens that scatter by 0.1."""
    source, tokens, expected = random.Random(0), [], []
    for sequence, (s, clipped) in enumerate([(1 + 3.9e-4, 0), (1 + 4.1e-4, 1), (1 - 2.9e-4, 0), (1 - 3.1e-4, 1)]):
        noise = [source.gauss(0.0, 0.1) for _ in range(5000)]
        centre = math.fsum(noise) / len(noise)
        advantage = 1.0 if s > 1 else -1.0
        tokens += [Token(-2.0, -2.0 - math.log(s) - x + centre, advantage, sequence) for x in noise]
        expected += [0.0 if clipped else -s * advantage] * len(noise)
    outcome = run(tokens, torch.float32, objective="gspo")
    assert outcome.slopes == pytest.approx(expected, rel=1e-5)


# What holds for every loss ------------------------------------------------------------------------------------------


EVERY_LOSS = [{"objective": o, "rollout_correction": c} for o, c in product(OBJECTIVES, CORRECTIONS)]
every_loss = pytest.mark.parametrize("settings", EVERY_LOSS, ids=lambda settings: "-".join(settings.values()))


@every_loss
def test_ratios_and_weights_that_overflow_leave_loss_and_gradient_finite(settings):
    far = [
        Token(logp, old, advantage, sequence, rollout)
        for sequence, (logp, old, rollout, advantage) in enumerate(
            product((0.0, -1000.0), (0.0, -1000.0), (0.0, -1000.0), (-1.0, 0.0, 1.0))
        )
    ]
    outcome = run([*far, Token(-1.0, -1.0, 1.0, len(far))], torch.float32, **settings)
    assert all(math.isfinite(x) for x in (outcome.loss, *outcome.slopes, *outcome.metrics.values()))
    assert outcome.slopes[-1] == -1.0, "the gradient of other tokens is unaffected"


def test_without_dual_clip_an_overflow_is_finite_as_well():
    outcome = run([Token(0.0, -1000.0, -1.0), Token(-1.0, -1.0, 1.0)], torch.float32, dual_clip=None)
    assert math.isfinite(outcome.loss)
    assert math.isfinite(outcome.slopes[0])
    assert outcome.slopes[1] == -1.0


@every_loss
def test_loss_and_gradients_do_not_depend_on_how_sequences_fall_into_micro_batches(settings):
    """The sum over parts is the sum over all, and a token's gradient does not depend on other sequences or on order."""
    tokens = random_tokens(seed=1, n=60, sequences=7)
    whole = run(tokens, **settings)
    slope_of = dict(zip(tokens, whole.slopes, strict=True))
    for partition in ([{0, 1, 2}, {3, 4, 5, 6}], [{6}, {0, 2, 4}, {1, 3, 5}], [{i} for i in range(7)]):
        parts = [[t for t in reversed(tokens) if t.sequence in part] for part in partition]
        outcomes = [run(part, sequences=9, **settings) for part in parts]
        assert whole.loss == exactly(math.fsum(o.loss for o in outcomes))
        for part, outcome in zip(parts, outcomes, strict=True):
            assert outcome.slopes == exactly([slope_of[t] for t in part])
        for name, value in whole.metrics.items():
            assert value == exactly(math.fsum(o.metrics[name] for o in outcomes))


@pytest.mark.parametrize("objective", ["dapo", "cispo"])
def test_with_a_ratio_per_token_the_gradient_of_a_token_does_not_depend_on_others(objective):
    tokens = random_tokens(seed=2, n=40, sequences=3)
    assert run(tokens, objective=objective).slopes == [run([t], objective=objective).slopes[0] for t in tokens]


@every_loss
def test_without_tokens_the_loss_is_a_differentiable_zero(settings):
    outcome = run([], sequences=3, **settings)
    assert (outcome.loss, outcome.slopes) == (0.0, [])
    assert set(outcome.metrics.values()) == {0.0}
    assert outcome.metrics.keys() == run([Token(-1.0, -1.0, 1.0)], **settings).metrics.keys()


@every_loss
def test_an_advantage_that_is_not_a_number_is_not_hidden(settings):
    masked = Token(-1.0, -1.0, math.nan, rollout=-100.0)
    outcome = run([masked, Token(-1.0, -1.0, 1.0)], **settings)
    assert math.isnan(outcome.loss)
    assert math.isnan(outcome.slopes[0])
    assert outcome.slopes[1] == -1.0


@pytest.mark.parametrize("correction", ["tis", "mis"])
def test_a_rollout_log_probability_that_is_not_a_number_is_not_hidden(correction):
    outcome = run([Token(-1.0, -1.0, 1.0, rollout=math.nan)], rollout_correction=correction)
    assert math.isnan(outcome.loss)
    assert math.isnan(outcome.slopes[0])


def test_a_loss_sees_vectors_of_selected_tokens_only():
    names = [field.name for field in fields(LossInputs)] + ["rollout_logp", "sequence", "sequences", "context_group"]
    assert [field.name for field in fields(SelectedTokens)] == names


def test_every_objective_is_a_function_of_tensors_and_numbers():
    """Two tokens of one sequence with ratios 2 and 1/2, against bounds of 0.8 and 1.28."""
    old_logp = torch.zeros(2, dtype=torch.float64)
    logp = torch.tensor([2.0, 0.5], dtype=torch.float64).log()
    advantages, sequence = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    bounds: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}
    dapo = dapo_loss(logp, old_logp, advantages, dual_clip=None, **bounds)
    gspo = gspo_loss(logp, old_logp, advantages, sequence, sequences=1, **bounds)
    cispo = cispo_loss(logp, old_logp, advantages, clip_high=0.28)
    dppo = dppo_loss(logp.log_softmax(0), logp.log_softmax(0) - 0.1, advantages, clip_low=0.2, clip_high=0.2)
    assert dppo.ratio.tolist() == exactly([math.exp(0.1)] * 2)
    assert dapo.loss.tolist() == exactly([-1.28, -0.5])
    assert gspo.loss.tolist() == exactly([-1.0, -1.0])
    assert cispo.loss.tolist() == exactly([-1.28 * math.log(2.0), -0.5 * math.log(0.5)])
    assert [losses.clipped.tolist() for losses in (dapo, gspo, cispo)] == [[True, False], [False, False], [True, False]]
    assert [losses.ratio.tolist() for losses in (dapo, gspo, cispo)] == [
        exactly([2.0, 0.5]),
        exactly([1.0, 1.0]),
        exactly([2.0, 0.5]),
    ]
