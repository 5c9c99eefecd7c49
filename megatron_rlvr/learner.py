"""What a training step does with its mini-batches: score all of them, then select and train one after the other."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_rlvr.algo.quantile import NonFiniteEntropyError
from megatron_rlvr.algo.selection import Selection, micro_batch_mask, select
from megatron_rlvr.batching.batch import MicroBatch, PolicyScores, sample_and_position
from megatron_rlvr.batching.mini_batches import MiniBatch
from megatron_rlvr.batching.trim import Work, trim
from megatron_rlvr.config import Settings
from megatron_rlvr.errors import FaultError
from megatron_rlvr.policy.policy import MaskOfEntropy, Policy
from megatron_rlvr.protocols import PolicyLoss


class Stopwatch(Protocol):
    """Times a phase of the step under a name."""

    def __call__(self, phase: str) -> AbstractContextManager[None]: ...


class LogprobGapError(FaultError):
    """The engine's log-probabilities are not the policy's: it sampled from other weights."""


class PolicyEntropyError(FaultError):
    """The policy's entropy at a response token is NaN or infinite: nothing can be selected by it."""


class SkippedStepsError(FaultError):
    """Too many optimizer steps in a row had a loss or gradient that is not finite.

    Attributes:
        mini_batch: number of the last one in its training step, from 0.
    """

    def __init__(self, message: str, mini_batch: int) -> None:
        super().__init__(message)
        self.mini_batch = mini_batch


class Learner:
    """Takes one optimizer step a mini-batch, on the tokens that the settings select.

    Attributes:
        skipped_in_a_row: optimizer steps since the last one that changed the weights.
    """

    def __init__(self, settings: Settings, policy: Policy, loss: PolicyLoss) -> None:
        self.skipped_in_a_row = 0
        self._settings = settings
        self._policy = policy
        self._loss = loss

    def learn(self, step: int, mini_batches: Sequence[MiniBatch], timed: Stopwatch) -> dict[str, float]:
        """Trains on all mini-batches of a step and returns its metrics, the same on every rank.

        Raises:
            LogprobGapError: sampling and policy disagree by more than `rollout.max_logprob_gap`.
            PolicyEntropyError: an entropy is not finite; on every rank, but see `_mask_of_current`.
            SkippedStepsError: the last `optimizer.max_skipped_steps` optimizer steps were skipped.
        """
        everything = [micro for mini in mini_batches for micro in mini.micro_batches]
        with timed("score"):
            scores = self._policy.score(everything)
        metrics = self._score_metrics(step, everything, scores)
        scored = self._sum(sum(batch.positions for batch in everything))
        with timed("train"):
            parts = _parts(mini_batches)
            selections = self._selections(step, everything, parts, scores.entropy)
            reports = []
            for number, (mini, part, selection) in enumerate(zip(mini_batches, parts, selections, strict=True)):
                reports.append(self._train(step, mini, Work(mini.micro_batches, selection.masks, scores.logp[part])))
                self._count_skipped(step, number, reports[-1])
        scopes = selections[:1] if self._settings.selection.scope == "rollout_batch" else selections
        return metrics | _selection_metrics(scopes) | _train_metrics(reports, scored)

    def _selections(
        self, step: int, batches: Sequence[MicroBatch], parts: Sequence[slice], entropies: Sequence[torch.Tensor]
    ) -> list[Selection]:
        """One selection a mini-batch; with scope rollout_batch they share one threshold."""
        if self._settings.selection.scope == "rollout_batch":
            whole = self._select(step, batches, entropies)
            return [replace(whole, masks=whole.masks[part]) for part in parts]
        return [self._select(step, batches[part], entropies[part]) for part in parts]

    def _select(self, step: int, batches: Sequence[MicroBatch], entropies: Sequence[torch.Tensor]) -> Selection:
        with _naming_the_token(step):
            return select(
                self._settings.selection,
                entropies,
                [batch.token_ids.to(self._policy.device) for batch in batches],
                seed=self._random_seed(step),
                group=self._policy.ranks.data_group,
            )

    def _train(self, step: int, mini: MiniBatch, whole: Work) -> dict[str, float]:
        """One optimizer step and its metrics, over all ranks; `tokens`: positions that it needed, without padding."""
        count = mini.response_tokens
        if self._settings.loss.normalizer == "selected_tokens":
            count = self._sum(sum(int(mask.sum()) for mask in whole.masks))
        # Where current entropies decide, they do so inside the pass and among all tokens: nothing can be left out.
        old = self._settings.selection.entropy == "old"
        work = trim(whole, mini.packing, self._largest) if old else whole
        masks = work.masks if old else self._mask_of_current(step)
        metrics = self._policy.train_step(work.batches, masks, work.old_logp, self._loss, max(1, count))
        return metrics | {"tokens": float(self._sum(sum(batch.positions for batch in work.batches)))}

    def _count_skipped(self, step: int, mini_batch: int, report: dict[str, float]) -> None:
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if report["skipped"] else 0
        if self.skipped_in_a_row >= self._settings.optimizer.max_skipped_steps:
            raise SkippedStepsError(
                f"step {step}: loss {report['loss']:g} and gradient norm {report['grad_norm']:g} of mini-batch "
                f"{mini_batch + 1} are not finite, nor were those of the {self.skipped_in_a_row} optimizer steps up to "
                "it (optimizer.max_skipped_steps); lower optimizer.learning_rate, or look at what was trained on",
                mini_batch,
            )

    def _mask_of_current(self, step: int) -> MaskOfEntropy:
        settings, seed = self._settings.selection, self._random_seed(step)

        def mask(batch: MicroBatch, entropy: torch.Tensor) -> torch.Tensor:
            # An entropy that is not finite stops this replica's last stage alone: in the middle of a pipeline there is
            # no point at which all ranks could agree. The others wait until the launcher ends them, as after a crash.
            with _naming_the_token(step):
                return micro_batch_mask(settings, entropy, batch.token_ids, seed=seed)

        return mask

    def _random_seed(self, step: int) -> int:
        return self._settings.run.seed * 1_000_003 + step

    def _sum(self, here: int) -> int:
        return self._reduced(here, dist.ReduceOp.SUM)

    def _largest(self, here: int) -> int:
        return self._reduced(here, dist.ReduceOp.MAX)

    def _reduced(self, here: int, operation: dist.ReduceOp.RedOpType) -> int:
        value = torch.tensor(here, device=self._policy.device)
        dist.all_reduce(value, op=operation, group=self._policy.ranks.data_group)
        return int(value)

    def _largest_of(self, values: torch.Tensor) -> float:
        """Over all ranks; a rank may have none."""
        value = values.max() if len(values) else values.new_full((), -torch.inf)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._policy.ranks.data_group)
        return float(value)

    def _score_metrics(self, step: int, batches: Sequence[MicroBatch], scores: PolicyScores) -> dict[str, float]:
        logp, entropy = torch.cat(scores.logp).double(), torch.cat(scores.entropy).double()
        rollout_logp = torch.cat([batch.rollout_logp for batch in batches]).to(logp.device)
        staleness = (step - 1 - torch.cat([batch.weight_versions for batch in batches])).double().to(logp.device)
        # Older tokens differ by what the policy has learned since, and say nothing about the engine.
        least, most = (self._largest_of(values) for values in (-staleness, staleness))
        gap = (logp - rollout_logp).abs()[staleness == -least]
        counts = gap.new_tensor([float(len(gap)), float(len(logp))])
        sums = torch.cat([torch.stack([gap.sum(), entropy.sum(), staleness.sum()]), counts])
        dist.all_reduce(sums, group=self._policy.ranks.data_group)
        gap_sum, entropy_sum, staleness_sum, fresh_count, count = sums.tolist()
        mean_gap, limit = gap_sum / max(1.0, fresh_count), self._settings.rollout.max_logprob_gap
        if mean_gap > limit:
            reason = "the engine sampled from other weights"
            if -least > (self._settings.rollout.overlap == "one_step"):
                reason = f"the newest tokens are {-least:g} steps old; lower rollout.max_staleness or the learning rate"
            raise LogprobGapError(
                f"step {step}: log-probabilities at sampling differ from the policy's by {mean_gap:.3g} nats on "
                f"average, above rollout.max_logprob_gap {limit:g}: {reason}"
            )
        return {
            "rollout/logprob_gap_mean": mean_gap,
            "rollout/logprob_gap_max": self._largest_of(gap),
            "rollout/staleness_mean": staleness_sum / count,
            "rollout/staleness_min": -least,
            "rollout/staleness_max": most,
            "entropy/mean": entropy_sum / count,
        }


@contextmanager
def _naming_the_token(step: int) -> Iterator[None]:
    """Says where an entropy is not finite, in terms that a user can look up."""
    try:
        yield
    except NonFiniteEntropyError as error:
        sample, position = sample_and_position(error.token_id)
        raise PolicyEntropyError(
            f"step {step}: the policy's entropy at token {position} of the response of sample {sample} is not finite: "
            "its weights or activations have overflowed; lower optimizer.learning_rate, or check the weights in "
            "model.path if this is the first step"
        ) from error


def _parts(mini_batches: Sequence[MiniBatch]) -> list[slice]:
    """Where each mini-batch's micro-batches stand in the list of all."""
    ends = list(accumulate(len(mini.micro_batches) for mini in mini_batches))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _selection_metrics(scopes: Sequence[Selection]) -> dict[str, float]:
    """Figures over the tokens of all scopes of the step; the threshold is the plain mean of theirs."""
    total, kept = sum(s.total for s in scopes), sum(s.kept for s in scopes)
    metrics = {
        "selection/tokens": float(kept),
        "selection/fraction": kept / max(1, total),
        "entropy/selected_mean": sum(s.entropy_kept for s in scopes) / max(1, kept),
        "entropy/dropped_mean": sum(s.entropy_dropped for s in scopes) / max(1, total - kept),
    }
    thresholds = [s.threshold for s in scopes if s.threshold is not None]
    if thresholds:
        metrics["selection/threshold"] = sum(thresholds) / len(thresholds)
    return metrics


def _train_metrics(reports: Sequence[dict[str, float]], scored: int) -> dict[str, float]:
    """Means over the step's mini-batches; skipped optimizer steps and tokens are counted.

    Args:
        reports: of each mini-batch.
        scored: positions that the score pass needed, over all ranks.
    """
    metrics = {f"train/{name}": sum(r[name] for r in reports) / len(reports) for name in reports[0]}
    tokens = sum(report["tokens"] for report in reports)
    return metrics | {
        "train/skipped": sum(report["skipped"] for report in reports),
        "train/tokens": tokens,
        "train/tokens_dropped_fraction": 1 - tokens / scored,
    }
