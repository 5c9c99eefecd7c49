"""Learning in one training step: score all mini-batches, then select tokens of each and take an optimizer step."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_rlvr.algo.loss import adapted_entropy_coefficient
from megatron_rlvr.algo.quantile import NonFiniteError
from megatron_rlvr.algo.selection import Candidates, Rule, Selection, scheduled_fraction, select, selected_tokens
from megatron_rlvr.batching.batch import MicroBatch, PolicyScores, sequence_and_position
from megatron_rlvr.batching.mini_batches import MiniBatch
from megatron_rlvr.batching.trim import MaskedBatches, trim
from megatron_rlvr.config import Settings
from megatron_rlvr.errors import FaultError
from megatron_rlvr.loss_inputs import loss_inputs
from megatron_rlvr.policy.policy import MaskOfEntropy, Policy
from megatron_rlvr.protocols import PolicyLoss
from megatron_rlvr.recording.files import LIKELIEST
from megatron_rlvr.recording.tokens import TokenRecorder


class Stopwatch(Protocol):
    """Measures the duration of a phase of the step, under its name."""

    def __call__(self, phase: str) -> AbstractContextManager[None]: ...


class LogprobGapError(FaultError):
    """The engine's log-probabilities differ too much from the policy's: it sampled from other weights."""


class PolicyEntropyError(FaultError):
    """The policy's entropy at a response token, or another signal, is NaN or infinite: tokens cannot be compared."""


class SkippedStepsError(FaultError):
    """Too many consecutive optimizer steps had a loss or gradient that is not finite.

    Attributes:
        mini_batch: Index of the last such mini-batch in its training step, from 0.
    """

    def __init__(self, message: str, mini_batch: int) -> None:
        super().__init__(message)
        self.mini_batch = mini_batch


class Learner:
    """Takes one optimizer step per mini-batch, on the tokens that the settings select.

    Attributes:
        skipped_in_a_row: Number of optimizer steps since the last one that changed the weights.
        entropy_coefficient: Coefficient of the entropy term as adapted so far.
    """

    def __init__(self, settings: Settings, policy: Policy, loss: PolicyLoss, reference: Policy | None = None) -> None:
        """Create a learner.

        Args:
            settings: Settings of the run.
            policy: Policy to train.
            loss: Loss over the selected tokens.
            reference: Policy that the trained one is kept close to; None without a KL term.
        """
        self.skipped_in_a_row = 0
        self.entropy_coefficient = 0.0
        self._reference = reference
        self._settings = settings
        self._policy = policy
        self._loss = loss

    def learn(
        self, step: int, mini_batches: Sequence[MiniBatch], timed: Stopwatch, recorder: TokenRecorder | None = None
    ) -> dict[str, float]:
        """Train on all mini-batches of a step. A collective over the world.

        Args:
            step: Number of the training step, from 1.
            mini_batches: This rank's mini-batches.
            timed: Measures the phases "score" and "train", and "record" with a recorder.
            recorder: Takes the values of chosen responses. None on every rank to record none.

        Returns: Metrics of the step, the same on every rank.
        Raises:
            LogprobGapError: The train-inference mismatch is above `rollout.max_logprob_gap`.
            PolicyEntropyError: An entropy is not finite. Raised on every rank, except as in `_mask_by_current_entropy`.
            SkippedStepsError: The last `optimizer.max_skipped_steps` optimizer steps were skipped.
        """
        all_batches = [micro for mini in mini_batches for micro in mini.micro_batches]
        with timed("score"):
            reference = self._reference.score(all_batches).logp if self._reference is not None else None
            scores = self._policy.score(
                all_batches,
                gradient=self._settings.selection.signal == "gradient",
                likeliest=LIKELIEST,
                wanted=recorder.rows(all_batches) if recorder is not None else None,
            )
        metrics = self._score_metrics(step, all_batches, scores)
        scored = self._sum(sum(batch.positions for batch in all_batches))
        with timed("train"):
            parts = _parts(mini_batches)
            settings = self._settings
            inputs = loss_inputs(mini_batches, scores, reference, settings.loss, settings.advantage)
            selections = self._selections(step, self._candidates(all_batches, scores), parts)
            entropy_coefficient = self._adapt_entropy_coefficient(selections)
            if recorder is not None:
                recorder.before_update(all_batches, scores, [mask for s in selections for mask in s.masks])
            reports = []
            for number, (mini, part, selection) in enumerate(zip(mini_batches, parts, selections, strict=True)):
                whole = MaskedBatches(mini.micro_batches, selection.masks, inputs[part])
                reports.append(self._train(step, mini, whole, entropy_coefficient))
                self._count_skipped(step, number, reports[-1])
        if recorder is not None:
            with timed("record"):
                recorder.after_update(all_batches, self._policy.score, mini_batches[0].packing, self._maximum)
        scopes = selections[:1] if self._settings.selection.scope == "rollout_batch" else selections
        guard = self._settings.selection.guard_probability > 0
        return metrics | _selection_metrics(scopes, guard) | _train_metrics(reports, scored)

    def _candidates(self, batches: Sequence[MicroBatch], scores: PolicyScores) -> list[Candidates]:
        """Return the tokens of each micro-batch, with what selection may read of them."""
        device = self._policy.device
        return [
            Candidates(batch.token_ids.to(device), entropy, logp, batch.advantages.to(device), gradient)
            for batch, entropy, logp, gradient in zip(
                batches, scores.entropy, scores.logp, scores.gradient, strict=True
            )
        ]

    def _selections(self, step: int, candidates: Sequence[Candidates], parts: Sequence[slice]) -> list[Selection]:
        """One selection per mini-batch; with `selection.scope` rollout_batch they share their thresholds."""
        if self._settings.selection.scope == "rollout_batch":
            whole = self._select(step, candidates)
            return [replace(whole, masks=whole.masks[part]) for part in parts]
        return [self._select(step, candidates[part]) for part in parts]

    def _select(self, step: int, candidates: Sequence[Candidates]) -> Selection:
        with _explaining_non_finite(step):
            return select(
                candidates,
                self._rule(step),
                per_micro_batch=self._settings.selection.scope == "micro_batch",
                group=self._policy.ranks.data_group,
            )

    def _rule(self, step: int) -> Rule:
        settings = self._settings.selection
        fraction: float | Fraction = settings.fraction
        if settings.fraction_end is not None and settings.fraction_steps is not None:
            fraction = scheduled_fraction(fraction, settings.fraction_end, settings.fraction_steps, step)
        return Rule(
            keep=settings.keep,
            fraction=fraction,
            band=None if settings.band is None else (settings.band[0], settings.band[1]),
            signal=settings.signal,
            by_sign=settings.by_sign,
            guard_probability=settings.guard_probability,
            guard_quantile=settings.guard_quantile,
            seed=self._settings.run.seed * 1_000_003 + step,
        )

    def _adapt_entropy_coefficient(self, selections: Sequence[Selection]) -> float:
        """Return the coefficient of the entropy term in this step, and keep that of the next one."""
        loss = self._settings.loss
        if loss.entropy_target is None:
            return 0.0
        kept = sum(selection.kept for selection in selections)
        entropy = sum(selection.entropy_kept for selection in selections) / max(1, kept)
        applied, self.entropy_coefficient = adapted_entropy_coefficient(
            self.entropy_coefficient,
            entropy,
            target=loss.entropy_target,
            step=loss.entropy_step,
            maximum=loss.entropy_max,
        )
        return applied

    def _count(self, mini: MiniBatch, masks: Sequence[torch.Tensor]) -> int:
        """Divisor of the loss of a mini-batch, by `loss.normalizer`."""
        match self._settings.loss.normalizer:
            case "all_tokens":
                return mini.response_tokens
            case "selected_tokens":
                return self._sum(sum(int(mask.sum()) for mask in masks))
            case "sequence_mean":
                return mini.sequences
            case "prompt_mean":
                return mini.prompts

    def _train(self, step: int, mini: MiniBatch, whole: MaskedBatches, entropy_coefficient: float) -> dict[str, float]:
        """Take one optimizer step; return its metrics over all ranks, with ``tokens``, its input without padding."""
        count = self._count(mini, whole.masks)
        regularized = entropy_coefficient != 0 or self._reference is not None
        # Current entropies select inside the pass, among all tokens: then nothing can be trimmed before it.
        old = self._settings.selection.entropy == "old"
        needed = trim(whole, mini.packing, self._maximum, regularized=regularized) if old else whole
        masks = needed.masks if old else self._mask_by_current_entropy(step)
        metrics = self._policy.train_step(
            needed.batches,
            masks,
            needed.inputs,
            self._loss,
            max(1, count),
            entropy_coefficient=entropy_coefficient,
        )
        if self._settings.loss.entropy_target is not None:
            metrics["entropy_coefficient"] = entropy_coefficient
        return metrics | {"tokens": float(self._sum(sum(batch.positions for batch in needed.batches)))}

    def _count_skipped(self, step: int, mini_batch: int, report: dict[str, float]) -> None:
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if report["skipped"] else 0
        if self.skipped_in_a_row >= self._settings.optimizer.max_skipped_steps:
            raise SkippedStepsError(
                f"step {step}: loss {report['loss']:g} and gradient norm {report['grad_norm']:g} of mini-batch "
                f"{mini_batch + 1} are not finite, nor were those of the {self.skipped_in_a_row} optimizer steps up to "
                "it (optimizer.max_skipped_steps); lower optimizer.learning_rate, or inspect the mini-batch",
                mini_batch,
            )

    def _mask_by_current_entropy(self, step: int) -> MaskOfEntropy:
        """Return a function that selects tokens of a micro-batch inside the training pass, by its current entropies.

        An entropy that is not finite stops only the last stage of this data-parallel replica: in the middle of a
        pipeline there is no point at which all ranks could agree. The other ranks wait until the launcher ends them,
        as after a crash.
        """
        rule = self._rule(step)

        def mask(batch: MicroBatch, entropy: torch.Tensor) -> torch.Tensor:
            unknown = torch.full_like(entropy, torch.nan)  # a rule with current entropies reads nothing else
            with _explaining_non_finite(step):
                return selected_tokens(
                    Candidates(batch.token_ids, entropy, unknown, batch.advantages, unknown), rule
                ).mask

        return mask

    def _sum(self, value: int) -> int:
        return int(self._reduce(torch.tensor(value), dist.ReduceOp.SUM))

    def _maximum(self, value: int) -> int:
        return int(self._reduce(torch.tensor(value), dist.ReduceOp.MAX))

    def _maximum_of(self, values: torch.Tensor) -> float:
        """Largest of the values of all ranks, of which some may have none."""
        largest = values.max() if len(values) else values.new_full((), -torch.inf)
        return float(self._reduce(largest, dist.ReduceOp.MAX))

    def _reduce(self, value: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
        value = value.to(self._policy.device)
        dist.all_reduce(value, op=operation, group=self._policy.ranks.data_group)
        return value

    def _score_metrics(self, step: int, batches: Sequence[MicroBatch], scores: PolicyScores) -> dict[str, float]:
        """Metrics of the score pass over all ranks: train-inference mismatch, staleness and entropy."""
        logp, entropy = torch.cat(scores.logp).double(), torch.cat(scores.entropy).double()
        rollout_logp = torch.cat([batch.rollout_logp for batch in batches]).to(logp.device)
        staleness = (step - 1 - torch.cat([batch.weight_versions for batch in batches])).double().to(logp.device)
        least, most = -self._maximum_of(-staleness), self._maximum_of(staleness)
        # Log-probabilities of older tokens also differ by the updates since then, so only the newest judge the engine.
        gap = (logp - rollout_logp).abs()[staleness == least]
        counts = gap.new_tensor([float(len(gap)), float(len(logp))])
        sums = torch.cat([torch.stack([gap.sum(), entropy.sum(), staleness.sum()]), counts])
        dist.all_reduce(sums, group=self._policy.ranks.data_group)
        gap_sum, entropy_sum, staleness_sum, fresh_count, count = sums.tolist()
        mean_gap, limit = gap_sum / max(1.0, fresh_count), self._settings.rollout.max_logprob_gap
        if mean_gap > limit:
            reason = "the engine sampled from other weights or in another precision; check sync and model.dtype"
            if least > (self._settings.rollout.overlap == "one_step"):
                reason = f"the newest tokens are {least:g} steps old; lower rollout.max_staleness or the learning rate"
            raise LogprobGapError(
                f"step {step}: log-probabilities at sampling differ from the policy's by {mean_gap:.3g} nats on "
                f"average, above rollout.max_logprob_gap={limit:g}: {reason}"
            )
        return {
            "rollout/logprob_gap_mean": mean_gap,
            "rollout/logprob_gap_max": self._maximum_of(gap),
            "rollout/staleness_mean": staleness_sum / count,
            "rollout/staleness_min": least,
            "rollout/staleness_max": most,
            "entropy/mean": entropy_sum / count,
        }


@contextmanager
def _explaining_non_finite(step: int) -> Iterator[None]:
    """Translate the token id of an entropy that is not finite into a response and a position in it."""
    try:
        yield
    except NonFiniteError as error:
        sequence, position = sequence_and_position(error.token_id)
        raise PolicyEntropyError(
            f"step {step}: the policy's {error.quantity} at token {position} of response {sequence} of the batch is "
            "not finite: its weights or activations have overflowed; lower optimizer.learning_rate, or check the "
            "weights in model.path if this is the first step"
        ) from error


def _parts(mini_batches: Sequence[MiniBatch]) -> list[slice]:
    """Slice of each mini-batch's micro-batches in the list of all micro-batches."""
    ends = list(accumulate(len(mini.micro_batches) for mini in mini_batches))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _selection_metrics(scopes: Sequence[Selection], guard: bool) -> dict[str, float]:
    """Metrics over the tokens of all selections of the step; a threshold is the plain mean of their thresholds.

    Args:
        scopes: Selections of the step, one for each set of tokens that shares thresholds.
        guard: Whether a guard drops tokens.
    """
    total, kept = sum(s.total for s in scopes), sum(s.kept for s in scopes)
    metrics = {
        "selection/tokens": float(kept),
        "selection/fraction": kept / max(1, total),
        "entropy/selected_mean": sum(s.entropy_kept for s in scopes) / max(1, kept),
        "entropy/dropped_mean": sum(s.entropy_dropped for s in scopes) / max(1, total - kept),
    }
    if guard:
        metrics["selection/guarded"] = float(sum(s.guarded for s in scopes))
    for name in {name: None for s in scopes for name in s.thresholds}:
        found = [s.thresholds[name] for s in scopes if name in s.thresholds]
        metrics[f"selection/{name}"] = sum(found) / len(found)
    return metrics


def _train_metrics(reports: Sequence[dict[str, float]], scored: int) -> dict[str, float]:
    """Means of the metrics over the step's mini-batches, and totals of skipped optimizer steps and input tokens.

    Args:
        reports: Metrics of each mini-batch.
        scored: Input tokens of the score pass without padding, over all ranks.
    """
    metrics = {f"train/{name}": sum(r[name] for r in reports) / len(reports) for name in reports[0]}
    tokens = sum(report["tokens"] for report in reports)
    return metrics | {
        "train/skipped": sum(report["skipped"] for report in reports),
        "train/tokens": tokens,
        "train/tokens_dropped_fraction": 1 - tokens / scored,
    }
