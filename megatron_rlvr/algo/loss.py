"""The policy-gradient losses on compact vectors of the selected tokens: an unselected token cannot reach them.

A loss is a minimised sum over tokens, divided once by a global count, by the caller. With r = exp(logp - logp_old), the
advantage A, and sg for what is taken as a constant:

    dapo   -min(r A, clip(r, 1 - low, 1 + high) A), and for A < 0 never more than -dual_clip A
           DAPO, arXiv 2503.14476, eq. 8; dual-clip PPO, arXiv 1912.09729: bounds the pull of an exploded ratio.
    gspo   the same with s in place of r and without dual clip; s = exp(mean of logp - logp_old over the sequence's
           selected tokens) stands for each of them, written sg(s) exp(logp - sg(logp)).
           GSPO-token, arXiv 2507.18071: where the n tokens of a sequence share one A, the gradient is that of
           n min(s A, clip(s) A). The paper divides by n and averages over sequences; here tokens count alike, as above.
           A sequence that is cut over ranks needs a sum over them in the forward pass, and none in the backward.
    cispo  -sg(min(r, 1 + high)) A logp
           CISPO of MiniMax-M1, arXiv 2506.13585, which puts no lower bound on r either: every token keeps a gradient.

The engine that sampled computes a little differently than the policy before the update, or held older weights. A
rollout correction multiplies a token's loss by a constant made from w = exp(logp_old - logp_rollout) and a cap C:

    tis    min(w, C), truncated importance sampling
           Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"
    mis    w where 1 / C <= w <= C, else 0, masked importance sampling
           with free bounds: IcePop, arXiv 2510.18855. A masked token still counts in the divisor, as there.

Shapes: N selected tokens of a micro-batch, B its sequences.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlvr.config import LossSettings

# exp would overflow, and its backward turn 0 * inf into NaN; both ends are far beyond any clipping.
_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class SelectedTokens:
    """What a loss may look at for N tokens; tensors are [N], without gradient.

    Attributes:
        old_logp: under the policy before the update.
        rollout_logp: recorded at sampling.
        advantages: of each token's response.
        sequence: int64 in 0 .. sequences - 1, which of the micro-batch's sequences a token belongs to.
        sequences: how many sequences the micro-batch has, with or without selected tokens.
        context_group: ranks that hold parts of the same sequences, numbered alike; None where each is whole here.
    """

    old_logp: Tensor
    rollout_logp: Tensor
    advantages: Tensor
    sequence: Tensor
    sequences: int
    context_group: dist.ProcessGroup | None = None


LossAndMetrics = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class DapoLoss:
    """Each token's ratio clipped, with asymmetric bounds and dual clip."""

    settings: LossSettings

    def __call__(self, logp: Tensor, tokens: SelectedTokens) -> LossAndMetrics:
        """See `protocols.PolicyLoss`; logp is [N] fp32."""
        ratio = _bounded(logp - tokens.old_logp).exp()
        loss, clipped = _clipped_surrogate(ratio, tokens.advantages, self.settings)
        if self.settings.dual_clip is not None:
            bound = -self.settings.dual_clip * tokens.advantages
            loss = torch.where((tokens.advantages < 0) & (loss > bound), bound, loss)
        return _sums(loss, ratio, clipped, logp, tokens, self.settings)


@dataclass(frozen=True)
class GspoLoss:
    """Each sequence's ratio clipped. A collective over ``tokens.context_group``: every rank of it calls this."""

    settings: LossSettings

    def __call__(self, logp: Tensor, tokens: SelectedTokens) -> LossAndMetrics:
        """See `protocols.PolicyLoss`; logp is [N] fp32, and N may be 0 where other ranks have tokens."""
        mean = _mean_over_sequence(logp.detach() - tokens.old_logp, tokens)
        ratio = _bounded(mean).exp() * (logp - logp.detach()).exp()
        loss, clipped = _clipped_surrogate(ratio, tokens.advantages, self.settings)
        return _sums(loss, ratio, clipped, logp, tokens, self.settings)


@dataclass(frozen=True)
class CispoLoss:
    """REINFORCE with each token's ratio, cut above, as a constant weight."""

    settings: LossSettings

    def __call__(self, logp: Tensor, tokens: SelectedTokens) -> LossAndMetrics:
        """See `protocols.PolicyLoss`; logp is [N] fp32."""
        ratio = _bounded(logp.detach() - tokens.old_logp).exp()
        weight = ratio.clamp(max=1 + self.settings.clip_high)
        return _sums(-weight * tokens.advantages * logp, ratio, ratio > weight, logp, tokens, self.settings)


def make_loss(settings: LossSettings) -> DapoLoss | GspoLoss | CispoLoss:
    """The loss that the settings name."""
    match settings.objective:
        case "dapo":
            return DapoLoss(settings)
        case "gspo":
            return GspoLoss(settings)
        case "cispo":
            return CispoLoss(settings)


def rollout_weight(tokens: SelectedTokens, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """What `loss.rollout_correction` multiplies the token losses by, and where the cap decided it.

    Returns: ([N] weights >= 0, [N] bool: truncated by tis, masked by mis).
    """
    assert settings.correction_cap is not None
    log_weight, log_cap = _bounded(tokens.old_logp - tokens.rollout_logp), math.log(settings.correction_cap)
    if settings.rollout_correction == "tis":
        return log_weight.clamp(max=log_cap).exp(), log_weight > log_cap
    outside = log_weight.abs() > log_cap
    return log_weight.masked_fill(outside, -math.inf).exp(), outside


def _bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _clipped_surrogate(ratio: Tensor, advantages: Tensor, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r) A) and where it is the clipped side, each [N]."""
    assert settings.clip_low is not None
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    loss = torch.maximum(-ratio * advantages, -clipped * advantages)
    return loss, (ratio.detach() != clipped.detach()) & (loss.detach() > -ratio.detach() * advantages)


def _mean_over_sequence(values: Tensor, tokens: SelectedTokens) -> Tensor:
    """[N] for each token the mean of its sequence, over all ranks that hold a part of it."""
    # In float64, so that the cut of a sequence does not show: clip bounds of 3e-4 leave little room.
    sums = torch.zeros(2, tokens.sequences, dtype=torch.float64, device=values.device)
    sums.index_add_(1, tokens.sequence, torch.stack([values.double(), torch.ones_like(values, dtype=torch.float64)]))
    if tokens.context_group is not None:
        dist.all_reduce(sums, group=tokens.context_group)
    return (sums[0] / sums[1])[tokens.sequence].to(values.dtype)  # 0 / 0 where a sequence has no tokens to ask for it


def _sums(
    loss: Tensor, ratio: Tensor, clipped: Tensor, logp: Tensor, tokens: SelectedTokens, settings: LossSettings
) -> LossAndMetrics:
    """The corrected token losses and the metrics of the metrics, each summed over the N tokens."""
    with torch.no_grad():
        log_ratio = _bounded(logp - tokens.old_logp)
        metrics = {
            "clip_fraction": clipped.float().sum(),
            "ratio": ratio.sum(),
            # Non-negative estimate of KL(old || current) by samples of old: r - 1 - log r.
            "kl": (log_ratio.expm1() - log_ratio).sum(),
        }
    if settings.rollout_correction == "none":
        return loss.sum(), metrics
    weight, beyond_cap = rollout_weight(tokens, settings)
    metrics |= {"correction_weight": weight.sum(), "correction_clipped": beyond_cap.float().sum()}
    return (loss * weight).sum(), metrics
