"""Policy-gradient losses on compact vectors of the selected tokens: an unselected token cannot reach them.

Each objective is one function and one equation; it returns the loss of every token. `policy_loss` multiplies these
by the rollout correction and returns their sum, which the caller divides once, by a global count. Losses are minimized.

Notation: A is the advantage of a token's response, r = exp(logp - old_logp) the token's importance ratio, sg(x) the
value of x taken as a constant (stop-gradient). Log-probabilities are in nats: of the policy that is trained (logp), of
the policy before the update (old_logp), and as recorded at sampling (rollout_logp).

Shapes: N selected tokens of a micro-batch, B its sequences. All tensors but logp are without gradient.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Beyond this, exp would overflow and its backward would turn 0 * inf into NaN; both ends are far outside any clipping.
_MAX_LOG_RATIO = 20.0

Objective = Literal["dapo", "gspo", "cispo"]
RolloutCorrection = Literal["none", "tis", "mis"]
LossAndMetrics = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class SelectedTokens:
    """Everything a `protocols.PolicyLoss` may read about the N selected tokens of a micro-batch, besides logp.

    Attributes:
        old_logp: [N] float32 nats, log-probabilities under the policy before the update.
        rollout_logp: [N] float32 nats, log-probabilities recorded at sampling.
        advantages: [N] float32, the advantage of each token's response.
        sequence: [N] int64 in 0 .. sequences - 1, the sequence of the micro-batch that each token belongs to.
        sequences: B, number of sequences in the micro-batch, with or without selected tokens.
        context_group: Ranks that hold other parts of the same sequences, numbered alike (context parallel); None if
            every sequence is whole on this rank.
    """

    old_logp: Tensor
    rollout_logp: Tensor
    advantages: Tensor
    sequence: Tensor
    sequences: int
    context_group: dist.ProcessGroup | None = None


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


# Rollout corrections ------------------------------------------------------------------------------------------------


def truncated_weights(old_logp: Tensor, rollout_logp: Tensor, *, cap: float) -> tuple[Tensor, Tensor]:
    """Truncated importance sampling (tis): weights for the mismatch between the policy and the engine that sampled.

        min(w, cap),    w = exp(old_logp - rollout_logp)

    Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training". The engine computes a
    little differently than the policy before the update, or held older weights.

    Args:
        old_logp: [N] float32 nats.
        rollout_logp: [N] float32 nats.
        cap: Largest weight, above 1.

    Returns: ([N] weights, [N] bool: True where the weight is truncated).
    """
    log_weight, log_cap = _bounded(old_logp - rollout_logp), math.log(cap)
    return log_weight.clamp(max=log_cap).exp(), log_weight > log_cap


def masked_weights(old_logp: Tensor, rollout_logp: Tensor, *, cap: float) -> tuple[Tensor, Tensor]:
    """Masked importance sampling (mis): as `truncated_weights`, but a token beyond the cap on either side is dropped.

        w where 1 / cap <= w <= cap, else 0,    w = exp(old_logp - rollout_logp)

    IcePop (arXiv 2510.18855) with free bounds. A masked token still counts in the divisor, as there.

    Args:
        old_logp: [N] float32 nats.
        rollout_logp: [N] float32 nats.
        cap: Largest weight, and the inverse of the smallest, above 1.

    Returns: ([N] weights, [N] bool: True where the token is masked).
    """
    log_weight, log_cap = _bounded(old_logp - rollout_logp), math.log(cap)
    outside = log_weight.abs() > log_cap
    return log_weight.masked_fill(outside, -math.inf).exp(), outside


# The whole loss -----------------------------------------------------------------------------------------------------


def policy_loss(
    logp: Tensor,
    tokens: SelectedTokens,
    *,
    objective: Objective,
    clip_low: float | None,
    clip_high: float,
    dual_clip: float | None,
    rollout_correction: RolloutCorrection,
    correction_cap: float | None,
) -> LossAndMetrics:
    """Sum of an objective's token losses, each times its rollout-correction weight.

    With the keyword arguments bound, it is a `protocols.PolicyLoss`.

    Args:
        logp: [N] float32 nats, differentiable.
        tokens: Everything else about the N tokens.
        objective: Name of the objective: `dapo_loss`, `gspo_loss` or `cispo_loss`.
        clip_low: See the objectives; None only with cispo, which has no lower bound.
        clip_high: See the objectives.
        dual_clip: See `dapo_loss`; read by no other objective.
        rollout_correction: none: every weight is 1; tis: `truncated_weights`; mis: `masked_weights`.
        correction_cap: Cap of the rollout correction; None only with none.

    Returns:
        The scalar sum, differentiable, and these metrics, each a scalar sum over the N tokens: ``clip_fraction``,
        ``ratio``, ``kl`` (a non-negative estimate of KL(old || current)), and with a rollout correction
        ``correction_weight`` and ``correction_clipped``.
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
    metrics = _sums_of(losses, logp.detach() - tokens.old_logp)
    if rollout_correction == "none":
        return losses.loss.sum(), metrics
    assert correction_cap is not None
    weights_of = truncated_weights if rollout_correction == "tis" else masked_weights
    weight, beyond_cap = weights_of(tokens.old_logp, tokens.rollout_logp, cap=correction_cap)
    metrics |= {"correction_weight": weight.sum(), "correction_clipped": beyond_cap.float().sum()}
    return (losses.loss * weight).sum(), metrics


def _sums_of(losses: TokenLosses, log_ratio: Tensor) -> dict[str, Tensor]:
    bounded = _bounded(log_ratio)
    return {
        "clip_fraction": losses.clipped.float().sum(),
        "ratio": losses.ratio.detach().sum(),
        # Estimates KL(old || current) from samples of old, by r - 1 - log r >= 0.
        "kl": (bounded.expm1() - bounded).sum(),
    }
