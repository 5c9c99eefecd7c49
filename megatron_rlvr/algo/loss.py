"""The policy-gradient loss on compact vectors of the selected tokens: an unselected token cannot reach it.

DAPO (arXiv 2503.14476, eq. 8), a minimised sum over tokens, divided once by a global count:

    r = exp(logp - logp_old)        L = -sum min(r A, clip(r, 1 - low, 1 + high) A) / count

and for A < 0 never more than -dual_clip A (dual-clip PPO, arXiv 1912.09729), which bounds the pull of a token whose
ratio has exploded. Shapes: N selected tokens of a micro-batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlvr.config import LossSettings

_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class SelectedTokens:
    """What a loss may look at for N tokens; each [N], without gradient."""

    old_logp: Tensor
    rollout_logp: Tensor
    advantages: Tensor
    sequence: Tensor


class DapoLoss:
    """Clipped policy gradient with asymmetric bounds and dual clip."""

    def __init__(self, settings: LossSettings) -> None:
        self.settings = settings

    def __call__(self, logp: Tensor, tokens: SelectedTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the token losses, and sums of per-token figures for the metrics.

        Args:
            logp: [N] fp32, differentiable.
            tokens: the other vectors.

        Returns: (scalar, {name: detached scalar sum over the N tokens}).
        """
        settings, advantages = self.settings, tokens.advantages
        # exp would overflow, and its backward turn 0 * inf into NaN; both ends are far beyond any clipping.
        log_ratio = (logp - tokens.old_logp).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        loss = torch.maximum(-ratio * advantages, -clipped * advantages)
        is_clipped = (ratio.detach() != clipped.detach()) & (loss.detach() > -ratio.detach() * advantages)
        if settings.dual_clip is not None:
            bound = -settings.dual_clip * advantages
            loss = torch.where((advantages < 0) & (loss > bound), bound, loss)
        with torch.no_grad():
            figures = {
                "clip_fraction": is_clipped.float().sum(),
                "ratio": ratio.sum(),
                # Non-negative estimate of KL(old || current) by samples of old: r - 1 - log r.
                "kl": (log_ratio.expm1() - log_ratio).sum(),
            }
        return loss.sum(), figures
