"""Dynamic sampling: groups whose answers all have the same score carry no gradient, so they are dropped and replaced.

The batch of a step is the first ``batch.prompts`` informative groups in the order in which their prompts were drawn;
further ones are carried over to the next step (group_buffer.py). Two collectors sample them: synchronous.py on all
ranks alike, with the same batch in every layout, and asynchronous.py on servers that are kept busy. Both end a step
with `finish_step`.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_rlvr.data.tokenizer import Tokenizer
from megatron_rlvr.distributed.collectives import gather
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.errors import InputError
from megatron_rlvr.rollout.group_buffer import FinishedGroup, GroupBuffer
from megatron_rlvr.types import Completion, Grade, Group

logger = logging.getLogger(__name__)


class RewardFunctionError(InputError):
    """The reward function has failed on every response of a step, so that there is nothing to learn from."""


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
    if sums["completions"] and sums["failures"] == sums["completions"]:
        raise RewardFunctionError(
            f"reward.function: it has failed on all {sums['completions']:g} responses of step {step}, first with: "
            f"{sums['first_failure']}; correct it, or raise reward.timeout_seconds if it needs more time"
        )
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


def _sums(sampled: Sequence[Group], informative: int, in_progress: int, ranks: Ranks) -> dict[str, Any]:
    """Return sums over the groups of all replicas, and ``first_failure``, a text. A collective over the world."""
    completions = [c for group in sampled for c in group.completions]
    grades = [g for group in sampled for g in group.grades]
    sums = {
        "groups": len(sampled),
        "informative": informative,
        "in_progress": in_progress,
        "completions": len(completions),
        "left_out": sum(group.left_out for group in sampled),
        "score": sum(g.score for g in grades),
        "failures": sum(g.failure is not None for g in grades),
        **_sums_over_groups(sampled),
    }
    for name in {name for grade in grades for name in grade.parts}:
        values = [grade.parts[name] for grade in grades if name in grade.parts]
        sums |= {f"part/{name}": sum(values), f"part_count/{name}": len(values)}
    failure = next((g.failure for g in grades if g.failure is not None), None)
    gathered = gather((sums, failure), ranks.data_objects)
    keys = dict.fromkeys(key for part, _ in gathered for key in part)
    total: dict[str, Any] = {key: sum(part.get(key, 0) for part, _ in gathered) for key in keys}
    return total | {"first_failure": next((text for _, text in gathered if text is not None), None)}


_WITH_ERROR: dict[str, tuple[str, Callable[[Completion, Grade], float]]] = {
    "reward": ("reward/mean", lambda completion, grade: grade.reward),
    "correct": ("reward/accuracy", lambda completion, grade: grade.correct),
    "tokens": ("rollout/response_tokens_mean", lambda completion, grade: len(completion.token_ids)),
    "truncated": ("rollout/truncated_fraction", lambda completion, grade: completion.finish_reason == "length"),
}
"""{name of a quantity x of a response: (metric that is its mean, x)}, of those that get a standard error."""


def _sums_over_groups(sampled: Sequence[Group]) -> dict[str, float]:
    """Return the sums over groups of x, x n, x x and n n for each quantity x, n completions: see `_standard_error`."""
    n = np.array([len(group.completions) for group in sampled], np.float64)
    sums = {"n n": float(n @ n)}
    for name, (_, of) in _WITH_ERROR.items():
        by_group = [sum(map(of, group.completions, group.grades)) for group in sampled]
        x = np.array(by_group, np.float64)
        sums |= {name: sum(by_group), f"{name} n": float(x @ n), f"{name} {name}": float(x @ x)}
    return sums


def _standard_error(sums: Mapping[str, Any], name: str) -> float:
    """Standard error of a mean over the responses of at least two groups; those of a group are not independent.

    Of a ratio m = sum(x_g) / sum(n_g) over G groups it is sqrt(G / (G - 1) * sum((x_g - m n_g)^2)) / sum(n_g).
    """
    mean, groups = sums[name] / sums["completions"], sums["groups"]
    square = sums[f"{name} {name}"] - 2 * mean * sums[f"{name} n"] + mean**2 * sums["n n"]
    return math.sqrt(max(0.0, square) * groups / (groups - 1)) / sums["completions"]


def _metrics(sums: Mapping[str, Any]) -> dict[str, float]:
    metrics = {
        **({"reward/left_out": float(sums["left_out"])} if sums["left_out"] else {}),
        "reward/failures": float(sums["failures"]),
        "rollout/response_tokens": float(sums["tokens"]),
        "rollout/groups_in_progress": float(sums["in_progress"]),
        "rollout/groups_sampled": float(sums["groups"]),
        "rollout/groups_dropped": float(sums["groups"] - sums["informative"]),
    }
    if sums["completions"]:  # a batch of carried-over groups samples nothing, and has no means
        metrics |= {
            **{metric: sums[name] / sums["completions"] for name, (metric, _) in _WITH_ERROR.items()},
            "reward/score": sums["score"] / sums["completions"],
        }
        if sums["groups"] > 1:
            metrics |= {
                f"{metric}_standard_error": _standard_error(sums, name) for name, (metric, _) in _WITH_ERROR.items()
            }
    for key in sorted(sums):
        if key.startswith("part/"):
            name = key.removeprefix("part/")
            metrics[f"reward/{name}"] = sums[key] / sums[f"part_count/{name}"]
    return metrics
