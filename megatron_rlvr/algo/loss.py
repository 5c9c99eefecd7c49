"""Policy-gradient losses on compact vectors of the selected tokens: an unselected token cannot reach them.

Each objective is one function and one equation; it returns the loss of every token. `policy_loss` multiplies these
by the rollout correction (`correction`) and returns their sum, which the caller divides once, by a global count. Losses
are minimized. docs/method.md has all formulas and their sources.

Notation: A is the advantage of a token's response, r = exp(logp - old_logp) the token's importance ratio, sg(x) the
value of x taken as a constant (stop-gradient). Log-probabilities are in nats: of the policy that is trained (logp), of
the policy before the update (old_logp), and as recorded at sampling (rollout_logp).

Shapes: N selected tokens of a micro-batch, B its sequences. All tensors but logp are without gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Beyond this, exp would overflow and its backward would turn 0 * inf into NaN; both ends are far outside any clipping.
_MAX_LOG_RATIO = 20.0

Objective = Literal["dapo", "gspo", "cispo", "dppo"]
KlEstimator = Literal["k1", "k2", "k3"]
LossAndMetrics = tuple[Tensor, dict[str, Tensor]]

# DPPO's code truncates the weight of a token at this ratio.
_MAX_DPPO_RATIO = 20.0


@dataclass(frozen=True)
class LossInputs:
    """Inputs of the loss that are known before the training pass, for n tokens.

    Attributes:
        old_logp: [n] float32 nats, log-probabilities under the policy before the update.
        advantages: [n] float32, the advantage of each token.
        weights: [n] float32, the rollout correction; None for none.
        limited: [n] bool, True where the correction's cap or veto decided the weight; None without a correction.
        scale: [n] float32, factors that make the sum over tokens a mean over sequences or prompts; None for 1.
        reference_logp: [n] float32 nats, log-probabilities under the reference; None without one.
    """

    old_logp: Tensor
    advantages: Tensor
    weights: Tensor | None = None
    limited: Tensor | None = None
    scale: Tensor | None = None
    reference_logp: Tensor | None = None

    @staticmethod
    def concatenated(parts: Sequence["LossInputs"]) -> "LossInputs":
        """Join the inputs of several lists of tokens, at least one; all of them have the same attributes."""
        columns: list[Any] = [[getattr(part, f.name) for part in parts] for f in fields(LossInputs)]
        joined: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
        return LossInputs(*joined)

    def __getitem__(self, which: Tensor) -> "LossInputs":
        """Return the inputs of the tokens that a mask or indices name."""
        return self._each(lambda column: column[which])

    def to(self, device: torch.device) -> "LossInputs":
        """Return the inputs on ``device``."""
        return self._each(lambda column: column.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "LossInputs":
        columns: list[Any] = [getattr(self, f.name) for f in fields(LossInputs)]
        changed: list[Any] = [None if column is None else change(column) for column in columns]
        return LossInputs(*changed)


@dataclass(frozen=True, kw_only=True)
class SelectedTokens(LossInputs):
    """Everything a `protocols.PolicyLoss` may read about the N selected tokens of a micro-batch, besides logp.

    Attributes:
        rollout_logp: [N] float32 nats, log-probabilities recorded at sampling.
        sequence: [N] int64 in 0 .. sequences - 1, the sequence of the micro-batch that each token belongs to.
        sequences: B, number of sequences in the micro-batch, with or without selected tokens.
        context_group: Ranks that hold other parts of the same sequences, numbered alike (context parallel); None if
            every sequence is whole on this rank.
    """

    rollout_logp: Tensor
    sequence: Tensor
    sequences: int
    context_group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, inputs: LossInputs, **others: Any) -> "SelectedTokens":
        """Add the other attributes to the inputs of the same tokens."""
        return cls(**{f.name: getattr(inputs, f.name) for f in fields(LossInputs)}, **others)


class TokenLosses(NamedTuple):
    """Result of an objective.

    Attributes:
        loss: [N], the loss of each token, differentiable in logp.
        ratio: [N], the importance ratio that the objective clips.
        clipped: [N] bool, True where clipping decided the loss (dual clip not counted).
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


# Objectives ---------------------------------------------------------------------------------------------------------


def dapo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> TokenLosses:
    """Clipped surrogate of each token's ratio, with asymmetric bounds and dual clip.

        L = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A),    and L <= -dual_clip A where A < 0

    DAPO (arXiv 2503.14476, eq. 8). Dual-clip PPO (arXiv 1912.09729) bounds the pull of an exploded ratio.

    Args:
        logp: [N] float32 nats, differentiable.
        old_logp: [N] float32 nats.
        advantages: [N] float32.
        clip_low: The ratio is clipped below at 1 - clip_low.
        clip_high: The ratio is clipped above at 1 + clip_high.
        dual_clip: Bound on the ratio where the advantage is negative, above 1; None for no bound.
    """
    ratio = _bounded(logp - old_logp).exp()
    loss, clipped = _clipped_surrogate(ratio, advantages, clip_low, clip_high)
    if dual_clip is not None:
        bound = -dual_clip * advantages
        loss = torch.where((advantages < 0) & (loss > bound), bound, loss)
    return TokenLosses(loss, ratio, clipped)


def gspo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    sequence: Tensor,
    *,
    sequences: int,
    clip_low: float,
    clip_high: float,
    context_group: dist.ProcessGroup | None = None,
) -> TokenLosses:
    """Clipped surrogate of each sequence's ratio. A collective over ``context_group``: each of its ranks calls this.

        s = exp(mean of logp - old_logp over the sequence's selected tokens)
        L = -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A),    s written as sg(s) exp(logp - sg(logp))

    GSPO-token (arXiv 2507.18071). Where the n tokens of a sequence share one A, the gradient of their sum is that of
    n min(s A, clip(s) A). The paper divides by n and averages over sequences; here all tokens count alike, as in
    `dapo_loss`. A sequence that is sharded over ranks needs a sum over them in the forward pass, none in the backward.

    Args:
        logp: [N] float32 nats, differentiable; N may be 0 on a rank while others have tokens.
        old_logp: [N] float32 nats.
        advantages: [N] float32.
        sequence: [N] int64 in 0 .. sequences - 1.
        sequences: B.
        clip_low: The ratio is clipped below at 1 - clip_low.
        clip_high: The ratio is clipped above at 1 + clip_high.
        context_group: Ranks that hold other parts of the same sequences; None if each is whole on this rank.
    """
    mean = _mean_over_sequence(logp.detach() - old_logp, sequence, sequences, context_group)
    ratio = _bounded(mean).exp() * (logp - logp.detach()).exp()
    loss, clipped = _clipped_surrogate(ratio, advantages, clip_low, clip_high)
    return TokenLosses(loss, ratio, clipped)


def cispo_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, *, clip_high: float) -> TokenLosses:
    """REINFORCE with each token's ratio, truncated above, as a constant weight: every token keeps a gradient.

        L = -sg(min(r, 1 + clip_high)) A logp

    CISPO of MiniMax-M1 (arXiv 2506.13585), which puts no lower bound on r either.

    Args:
        logp: [N] float32 nats, differentiable.
        old_logp: [N] float32 nats.
        advantages: [N] float32.
        clip_high: The ratio is truncated at 1 + clip_high.
    """
    ratio = _bounded(logp.detach() - old_logp).exp()
    weight = ratio.clamp(max=1 + clip_high)
    return TokenLosses(-weight * advantages * logp, ratio, ratio > weight)


def dppo_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> TokenLosses:
    """REINFORCE with each token's ratio as a constant weight, without tokens whose probability has moved too far.

        L = -M sg(min(r, 20)) A logp,    M = p - old_p <= clip_high if A > 0, else old_p - p <= clip_low

    DPPO with the binary total-variation divergence (arXiv 2602.04879): |p - old_p| is the total variation between the
    two policies' distributions over {this token, any other}. A token that moves back towards old_p is never dropped.

    Args:
        logp: [N] float32 nats, differentiable.
        old_logp: [N] float32 nats.
        advantages: [N] float32.
        clip_low: Largest fall of a token's probability, in (0, 1).
        clip_high: Largest rise of a token's probability, in (0, 1).
    """
    ratio = _bounded(logp.detach() - old_logp).exp()
    rise = logp.detach().exp() - old_logp.exp()
    dropped = torch.where(advantages > 0, rise > clip_high, -rise > clip_low)
    weight = ratio.clamp(max=_MAX_DPPO_RATIO) * ~dropped
    return TokenLosses(-weight * advantages * logp, ratio, dropped)


def _bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return -min(r A, clip(r) A) and where the clipped side is the smaller one, each [N]."""
    clipped = ratio.clamp(1 - low, 1 + high)
    loss = torch.maximum(-ratio * advantages, -clipped * advantages)
    return loss, (ratio.detach() != clipped.detach()) & (loss.detach() > -ratio.detach() * advantages)


def _mean_over_sequence(
    values: Tensor, sequence: Tensor, sequences: int, context_group: dist.ProcessGroup | None
) -> Tensor:
    """Return for each of the N tokens the mean of its sequence, over all ranks that hold a part of it."""
    # In float64, so that sharding a sequence changes no decision: clip bounds of 3e-4 leave little room.
    sums = torch.zeros(2, sequences, dtype=torch.float64, device=values.device)
    sums.index_add_(1, sequence, torch.stack([values.double(), torch.ones_like(values, dtype=torch.float64)]))
    if context_group is not None:
        dist.all_reduce(sums, group=context_group)
    # A sequence without selected tokens has a mean of 0 / 0, which no token reads.
    return (sums[0] / sums[1])[sequence].to(values.dtype)


# Regularizers -------------------------------------------------------------------------------------------------------


def reference_kl(logp: Tensor, reference_logp: Tensor, *, estimator: KlEstimator) -> Tensor:
    """Estimates of KL(policy || reference) from log-probabilities of sampled tokens, d = reference_logp - logp.

        k1 = -d        k2 = d^2 / 2        k3 = exp(d) - d - 1

    Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html). All three have nearly the same mean,
    not the same gradient: that of k1 has mean 0 for tokens that the policy itself has sampled, and that of k2 has the
    mean of the divergence's. GRPO (arXiv 2402.03300) uses k3.

    Args:
        logp: [N] float32 nats, differentiable.
        reference_logp: [N] float32 nats.
        estimator: k1, k2 or k3.

    Returns: [N] nats, differentiable in logp; k2 and k3 are not negative.
    """
    d = reference_logp - logp
    match estimator:
        case "k1":
            return -d
        case "k2":
            return d.square() / 2
        case "k3":
            bounded = _bounded(d)
            return torch.expm1(bounded) - bounded


def adapted_entropy_coefficient(
    coefficient: float, entropy: float, *, target: float, step: float, maximum: float
) -> tuple[float, float]:
    """Coefficient of the entropy term in this training step, and what it is adapted to for the next one.

        applied = coefficient if entropy <= target, else 0
        next    = coefficient + step if entropy < target, else coefficient - step,    within 0 .. maximum

    Adaptive entropy control of Skywork-OR1 (arXiv 2505.22312, section 3.2.5).

    Args:
        coefficient: Result of the previous step; 0 in the first one.
        entropy: Mean entropy of the selected tokens in nats, under the policy before the update.
        target: Entropy in nats below which the term is active.
        step: Amount by which the coefficient changes in a training step.
        maximum: Largest coefficient.

    Returns: (applied, next).
    """
    applied = coefficient if entropy <= target else 0.0
    changed = coefficient + (step if entropy < target else -step)
    return applied, min(max(changed, 0.0), maximum)


# The whole loss -----------------------------------------------------------------------------------------------------


def policy_loss(
    logp: Tensor,
    tokens: SelectedTokens,
    *,
    objective: Objective,
    clip_low: float | None,
    clip_high: float,
    dual_clip: float | None,
    kl_estimator: KlEstimator = "k3",
    kl_coefficient: float = 0.0,
) -> LossAndMetrics:
    """Sum of an objective's token losses, each times its weights, plus the KL to a reference if there is one.

        sum of scale (weight L + kl_coefficient KL)

    With the keyword arguments bound, it is a `protocols.PolicyLoss`.

    Args:
        logp: [N] float32 nats, differentiable.
        tokens: Everything else about the N tokens.
        objective: Name of the objective: `dapo_loss`, `gspo_loss`, `cispo_loss` or `dppo_loss`.
        clip_low: See the objectives; None only with cispo, which has no lower bound.
        clip_high: See the objectives.
        dual_clip: See `dapo_loss`; read by no other objective.
        kl_estimator: See `reference_kl`.
        kl_coefficient: Factor of the KL to the reference; 0 without a reference.

    Returns:
        The scalar sum, differentiable, and these metrics, each a scalar sum over the N tokens: ``clip_fraction``,
        ``ratio``, ``kl`` (a non-negative estimate of KL(old || current)); with a rollout correction
        ``correction_weight`` and ``correction_clipped``, with a reference ``reference_kl``.
    """
    match objective:
        case "dapo":
            assert clip_low is not None
            losses = dapo_loss(
                logp,
                tokens.old_logp,
                tokens.advantages,
                clip_low=clip_low,
                clip_high=clip_high,
                dual_clip=dual_clip,
            )
        case "gspo":
            assert clip_low is not None
            losses = gspo_loss(
                logp,
                tokens.old_logp,
                tokens.advantages,
                tokens.sequence,
                sequences=tokens.sequences,
                clip_low=clip_low,
                clip_high=clip_high,
                context_group=tokens.context_group,
            )
        case "cispo":
            losses = cispo_loss(logp, tokens.old_logp, tokens.advantages, clip_high=clip_high)
        case "dppo":
            assert clip_low is not None
            losses = dppo_loss(logp, tokens.old_logp, tokens.advantages, clip_low=clip_low, clip_high=clip_high)
    metrics = _sums_of(losses, logp.detach() - tokens.old_logp)
    loss = losses.loss
    if tokens.weights is not None and tokens.limited is not None:
        loss = loss * tokens.weights
        metrics |= {"correction_weight": tokens.weights.sum(), "correction_clipped": tokens.limited.float().sum()}
    if tokens.reference_logp is not None:
        kl = reference_kl(logp, tokens.reference_logp, estimator=kl_estimator)
        loss = loss + kl_coefficient * kl
        metrics["reference_kl"] = kl.detach().sum()
    return (loss if tokens.scale is None else loss * tokens.scale).sum(), metrics


def _sums_of(losses: TokenLosses, log_ratio: Tensor) -> dict[str, Tensor]:
    bounded = _bounded(log_ratio)
    return {
        "clip_fraction": losses.clipped.float().sum(),
        "ratio": losses.ratio.detach().sum(),
        # Estimates KL(old || current) from samples of old, by r - 1 - log r >= 0.
        "kl": (bounded.expm1() - bounded).sum(),
    }
