"""Rollout corrections: importance weights for the mismatch between the policy and the engine that sampled.

The engine computes a little differently than the policy before the update, or held older weights. The ratio of their
probabilities, of a token or of a whole response, weighs the loss of the token:

    token      w = exp(old_logp - rollout_logp)
    sequence   w = exp(sum of old_logp - rollout_logp over the response)
    geometric  w = exp(mean of old_logp - rollout_logp over the response)

tis (truncated importance sampling) weighs by min(w, cap); mis (masked importance sampling) drops what is outside of
1 / cap .. cap. A veto drops every response in which some token's ratio is below a bound. Log-probabilities are in nats.

Shapes: R response tokens of a micro-batch, of whole responses.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# Beyond this, exp would overflow; both ends are far outside any cap.
_MAX_LOG_WEIGHT = 20.0

CorrectionLevel = Literal["token", "sequence", "geometric"]


class Correction(NamedTuple):
    """Result of a rollout correction.

    Attributes:
        weights: [R], the factor of each token's loss.
        limited: [R] bool, True where the cap or the veto decided the weight.
    """

    weights: Tensor
    limited: Tensor


def correction_weights(
    old_logp: Tensor,
    rollout_logp: Tensor,
    sequence: Tensor,
    sequences: int,
    *,
    correction: Literal["tis", "mis"],
    level: CorrectionLevel,
    cap: float,
    veto: float | None,
) -> Correction:
    """Weights of a rollout correction for all response tokens of a micro-batch.

    A masked token still counts in the divisor of the loss. Sources: docs/method.md.

    Args:
        old_logp: [R] nats, under the policy before the update.
        rollout_logp: [R] nats, as recorded at sampling.
        sequence: [R] int64 in 0 .. sequences - 1, the response that each token belongs to.
        sequences: Number of responses.
        correction: `truncated` or `masked` weights.
        level: Ratio that is compared with the cap. A geometric mean is no importance weight: with it, mis only drops
            responses and leaves the weight of the others at 1.
        cap: Largest weight, and with mis the inverse of the smallest, above 1.
        veto: Smallest ratio of a token, in (0, 1): a response with a token below it is dropped; None for no veto.
    """
    log_ratio = old_logp - rollout_logp
    log_weight = log_ratio
    if level != "token":
        sums = _sum_by_sequence(log_ratio, sequence, sequences)
        if level == "geometric":
            sums = sums / _sum_by_sequence(torch.ones_like(log_ratio), sequence, sequences)
        log_weight = sums[sequence].to(log_ratio.dtype)
    log_weight = log_weight.clamp(-_MAX_LOG_WEIGHT, _MAX_LOG_WEIGHT)
    found = truncated(log_weight, cap) if correction == "tis" else masked(log_weight, cap)
    if level == "geometric":
        # NaN stays NaN: the product with 0 is.
        found = Correction(torch.where(found.limited, 0.0, log_weight * 0.0 + 1.0), found.limited)
    if veto is None:
        return found
    below = _sum_by_sequence((log_ratio < math.log(veto)).to(log_ratio.dtype), sequence, sequences)[sequence] > 0
    return Correction(found.weights.masked_fill(below, 0.0), found.limited | below)


def truncated(log_weight: Tensor, cap: float) -> Correction:
    """Return min(w, cap): Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"."""
    log_cap = math.log(cap)
    return Correction(log_weight.clamp(max=log_cap).exp(), log_weight > log_cap)


def masked(log_weight: Tensor, cap: float) -> Correction:
    """Return w where 1 / cap <= w <= cap, else 0: IcePop (arXiv 2510.18855) with free bounds."""
    outside = log_weight.abs() > math.log(cap)
    return Correction(log_weight.masked_fill(outside, -math.inf).exp(), outside)


def _sum_by_sequence(values: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """Return [sequences] float64."""
    sums = torch.zeros(sequences, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, sequence, values.double())
