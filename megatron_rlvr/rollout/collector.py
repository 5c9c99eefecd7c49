"""Dynamic sampling: groups that are all correct or all incorrect carry no gradient, so they are dropped and replaced.

The batch of a step is the first ``batch.prompts`` informative groups in the order in which their prompts were drawn;
further ones are carried over to the next step (group_buffer.py). Two collectors sample them: synchronous.py on all
ranks alike, with the same batch in every layout, and asynchronous.py on servers that are kept busy. Both end a step
with `finish_step`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_rlvr.data.tokenizer import Tokenizer
from megatron_rlvr.distributed.collectives import gather
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.rollout.group_buffer import FinishedGroup, GroupBuffer
from megatron_rlvr.types import Group

logger = logging.getLogger(__name__)


class CollectionStoppedError(RuntimeError):
    """A stop was requested before the batch was full; the collector's state holds what was sampled."""


@dataclass(frozen=True)
class Rollout:
    """Groups to train on in one step.

    Attributes:
        groups: This replica's part of the batch; ``order`` counts from 0 over all replicas.
        size: Number of groups in the whole batch; 0 if dynamic sampling found none.
        metrics: Metrics of all groups that were finished for this step, the same on every rank.
        sampled: This replica's groups of the step before any was dropped, for the log of sampled text.
    """

    groups: list[FinishedGroup]
    size: int
    metrics: dict[str, float]
    sampled: list[Group]


class Collector(Protocol):
    """Collects the batch of each training step. Every method but ``close`` is a collective over the world."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the sampled text."""

    def begin(self, step: int) -> None:
        """Start sampling for a step in the background, if the collector can; `collect` does so otherwise."""

    def collect(self, step: int, on_finished: Callable[[int], None] = lambda count: None) -> Rollout:
        """Sample, grade and filter groups until the batch is full or no more prompts may be drawn.

        Args:
            step: Training step, counted from 1.
            on_finished: Called with the number of completions that this rank has sampled since the last call.

        Raises:
            CollectionStoppedError: on every rank, if a stop was requested.
            EngineError: on every rank, if the engine failed.
        """

    def state(self) -> dict[str, Any]:
        """Return the prompt cursor and all groups, complete on the main rank only, for `restore`."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state` of this layout or another. DataError if the prompts differ."""

    def close(self) -> None:
        """Stop sampling in the background."""


def finish_step(
    step: int,
    buffer: GroupBuffer,
    ranks: Ranks,
    *,
    carried: int,
    in_progress: int,
    rounds: float,
    set_used_up: bool,
) -> Rollout:
    """Split the batch off the buffer and measure all groups that were finished for it. A collective over the world.

    Args:
        step: Training step.
        buffer: Groups that are ready.
        ranks: Place of this rank.
        carried: Number of groups that were ready when collecting started, over all replicas.
        in_progress: Number of groups of this replica that are still in progress.
        rounds: Number of rounds in which prompts were drawn.
        set_used_up: Whether all prompts of the set were drawn; if not and the batch is not full, ``rounds`` has
            reached ``rollout.max_rounds``.
    """
    sampled = buffer.take_unreported()
    sums = _sums(sampled, sum(map(buffer.is_informative, sampled)), in_progress, ranks)
    size = min(buffer.total_ready, buffer.groups_per_batch)
    if buffer.missing and ranks.is_main:
        reason = "the set has no other prompts" if set_used_up else f"rollout.max_rounds={rounds:g} is reached"
        logger.warning("step %d trains on %d of %d groups: %s", step, size, buffer.groups_per_batch, reason)
    buffer.rate = buffer.rate.after_step(sums["informative"], sums["groups"])
    batch = buffer.split_off_batch()
    metrics = _metrics(sums) | {
        "rollout/rounds": rounds,
        "rollout/groups": float(size),
        "rollout/groups_carried": float(carried),
        "rollout/groups_surplus": float(buffer.total_ready),
    }
    return Rollout(batch, size, metrics, sampled)


def _sums(sampled: Sequence[Group], informative: int, in_progress: int, ranks: Ranks) -> dict[str, float]:
    """Return sums over the groups of all replicas. A collective over the world."""
    completions = [c for group in sampled for c in group.completions]
    grades = [g for group in sampled for g in group.grades]
    sums = {
        "groups": len(sampled),
        "informative": informative,
        "in_progress": in_progress,
        "completions": len(completions),
        "reward": sum(g.reward for g in grades),
        "correct": sum(g.correct for g in grades),
        "failures": sum(g.failure is not None for g in grades),
        "tokens": sum(len(c.token_ids) for c in completions),
        "truncated": sum(c.finish_reason == "length" for c in completions),
    }
    parts = gather(sums, ranks.data_objects)
    return {key: sum(part[key] for part in parts) for key in sums}


def _metrics(sums: Mapping[str, float]) -> dict[str, float]:
    metrics = {
        "reward/failures": float(sums["failures"]),
        "rollout/response_tokens": float(sums["tokens"]),
        "rollout/groups_in_progress": float(sums["in_progress"]),
        "rollout/groups_sampled": float(sums["groups"]),
        "rollout/groups_dropped": float(sums["groups"] - sums["informative"]),
    }
    if sums["completions"]:  # a batch of carried-over groups samples nothing, and has no means
        metrics |= {
            "reward/mean": sums["reward"] / sums["completions"],
            "reward/accuracy": sums["correct"] / sums["completions"],
            "rollout/response_tokens_mean": sums["tokens"] / sums["completions"],
            "rollout/truncated_fraction": sums["truncated"] / sums["completions"],
        }
    return metrics
