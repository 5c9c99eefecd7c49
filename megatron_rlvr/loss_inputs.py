"""Inputs of the loss that depend on whole responses, on the mini-batch or on other policies, for every response token.

A training pass sees the selected tokens of a trimmed micro-batch only. Importance weights of responses, means over
sequences and prompts, shaped advantages and the reference's log-probabilities are therefore computed before it, and
travel with the rows (docs/method.md).
"""

from collections.abc import Sequence

from torch import Tensor

from megatron_rlvr.algo.advantage import entropy_shaped
from megatron_rlvr.algo.correction import Correction, correction_weights
from megatron_rlvr.algo.loss import LossInputs
from megatron_rlvr.batching.batch import MicroBatch, PolicyScores
from megatron_rlvr.batching.mini_batches import MiniBatch
from megatron_rlvr.config import AdvantageSettings, LossSettings


def loss_inputs(
    mini_batches: Sequence[MiniBatch],
    scores: PolicyScores,
    reference_logp: Sequence[Tensor] | None,
    loss: LossSettings,
    advantage: AdvantageSettings,
) -> list[LossInputs]:
    """Return the inputs of the loss for every micro-batch, on the device of the scores.

    Args:
        mini_batches: This rank's mini-batches of a step.
        scores: Scores of all their micro-batches, in order, under the policy before the update.
        reference_logp: Log-probabilities under the reference, [R] nats for each micro-batch; None without one.
        loss: Rollout correction and normalizer.
        advantage: Shaping by entropy.
    """
    found: list[LossInputs] = []
    for mini in mini_batches:
        for micro in mini.micro_batches:
            number = len(found)
            logp, entropy = scores.logp[number], scores.entropy[number]
            batch = micro.to(logp.device)
            correction = _correction(batch, logp, loss)
            found.append(
                LossInputs(
                    old_logp=logp,
                    advantages=entropy_shaped(
                        batch.advantages, entropy, bonus=advantage.entropy_bonus, bound=advantage.entropy_bound
                    ),
                    weights=correction.weights if correction is not None else None,
                    limited=correction.limited if correction is not None else None,
                    scale=_scale(mini, micro, logp, loss),
                    reference_logp=reference_logp[number] if reference_logp is not None else None,
                )
            )
    return found


def _correction(batch: MicroBatch, logp: Tensor, loss: LossSettings) -> Correction | None:
    if loss.rollout_correction == "none":
        return None
    assert loss.correction_cap is not None
    return correction_weights(
        logp,
        batch.rollout_logp,
        batch.sequence,
        len(batch.lengths),
        correction=loss.rollout_correction,
        level=loss.correction_level,
        cap=loss.correction_cap,
        veto=loss.correction_veto,
    )


def _scale(mini: MiniBatch, micro: MicroBatch, logp: Tensor, loss: LossSettings) -> Tensor | None:
    sequences = {"sequence_mean": 1, "prompt_mean": mini.group_size}.get(loss.normalizer)
    return None if sequences is None else 1.0 / mini.tokens_around(micro, sequences).to(logp.device)
