"""Dynamic sampling: groups that are all right or all wrong carry no gradient, so they are dropped and replaced.

A step's batch is the first ``batch.prompts`` informative groups in the order in which their prompts were drawn; those
beyond it are kept for the next step, unless they become older than `rollout.max_staleness` and are sampled again. How
groups come about is left to two kinds of collectors: rounds.py (all ranks alike, the same batch in every layout) and
streaming.py (servers that are kept busy).
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rlvr.config import RewardSettings, RolloutSettings
from megatron_rlvr.data.cursor import PromptCursor
from megatron_rlvr.data.tokenizer import Tokenizer
from megatron_rlvr.distributed.collectives import gather, gather_on_first
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.rollout.group_buffer import BegunGroup, OrderedGroup
from megatron_rlvr.rollout.sampler import Sampler
from megatron_rlvr.types import Group

logger = logging.getLogger(__name__)

# Even when almost no group is informative, no more than this many times the missing groups are sampled at once.
MOST_OVERSAMPLING = 4.0


class CollectionStoppedError(RuntimeError):
    """`Collector.collect` was told to stop before the batch was full; the collector's state has what there is."""


@dataclass(frozen=True)
class Rollout:
    """What a step has to train on.

    Attributes:
        groups: this replica's part of the batch; ``order`` counts from 0 over all replicas.
        size: groups in the whole batch; 0 when dynamic sampling found none.
        metrics: metrics of everything that was finished in this step, the same on every rank.
        sampled: this replica's groups of the step before any was dropped, for the log of sampled text.
    """

    groups: list[OrderedGroup]
    size: int
    metrics: dict[str, float]
    sampled: list[Group]


@dataclass(frozen=True)
class Filled:
    """What was sampled for a step.

    Attributes:
        finished: this replica's groups.
        total, informative: groups over all replicas, and those of them that can be trained on.
        rounds: in which prompts were drawn.
    """

    finished: list[OrderedGroup]
    total: int
    informative: int
    rounds: float


class Collector(ABC):
    """Collects the batch of a training step from a prompt cursor.

    Args:
        sampler: of this rank.
        cursor: the same on every rank.
        prompts: groups in a batch.
        seed: of the run.
    """

    def __init__(
        self,
        sampler: Sampler,
        cursor: PromptCursor,
        ranks: Ranks,
        rollout: RolloutSettings,
        reward: RewardSettings,
        *,
        prompts: int,
        seed: int,
    ) -> None:
        self._sampler = sampler
        self._cursor = cursor
        self._ranks = ranks
        self._settings = rollout
        self._reward = reward
        self._prompts = prompts
        self._seed = seed
        self._drawn = 0
        self._step = 0
        self._kept: list[OrderedGroup] = []
        """Informative groups of this replica that no batch has had yet."""
        self._kept_everywhere = 0
        self._begun: list[BegunGroup] = []
        self._begun_here = 0
        """Begun groups of this replica."""
        # Informative and all groups lately seen; half forgotten each step.
        self._informative, self._seen = 1.0, 1.0

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the sampled text."""
        return self._sampler.tokenizer

    def begin(self, step: int) -> None:
        """Begins what can go on in the background for a step; `collect` begins it otherwise. A collective."""
        self._step = step
        self._send_back_stale(step)

    def collect(self, step: int, on_finished: Callable[[int], None] = lambda count: None) -> Rollout:
        """Samples, grades and filters until the batch is full or nothing more may be drawn.

        A collective over the world. ``on_finished`` is called with the number of completions this rank has sampled
        since the last call.

        Raises: CollectionStoppedError on every rank, from collectors that can be stopped.
        """
        if self._step != step:
            self.begin(step)
        carried = self._kept_everywhere
        filled = self._fill(step, on_finished)
        size = min(self._kept_everywhere, self._prompts)
        self._informative, self._seen = (self._informative + filled.informative) / 2, (self._seen + filled.total) / 2
        batch = self._split_off_batch()
        sampled = [ordered.group for ordered in filled.finished]
        metrics = self._metrics(sampled) | {
            "rollout/rounds": filled.rounds,
            "rollout/groups": float(size),
            "rollout/groups_sampled": float(filled.total),
            "rollout/groups_dropped": float(filled.total - filled.informative),
            "rollout/groups_carried": float(carried),
            "rollout/groups_surplus": float(self._kept_everywhere),
        }
        return Rollout(batch, size, metrics, sampled)

    def state(self) -> dict[str, Any]:
        """What `restore` goes on from, whole on the main rank: `restore` deals it anew. A collective over the world.

        Besides numbers there are groups, those begun with what is sampled of them.
        """
        mine = (self._kept, self._begun)
        # The main rank is the first of its replica, and this group holds the first of all.
        parts = gather_on_first(mine, self._ranks.data_objects) if self._ranks.replica_rank == 0 else []
        return {
            "cursor": self._cursor.state(),
            "drawn": self._drawn,
            "rate": (self._informative, self._seen),
            "kept": sorted((g for kept, _ in parts for g in kept), key=lambda g: g.order),
            "begun": sorted((g for _, begun in parts for g in begun), key=lambda g: g.order),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state`, on every rank, in this layout or another. DataError if the prompts differ."""
        self._cursor.restore(state["cursor"])
        self._drawn = state["drawn"]
        self._informative, self._seen = state["rate"]
        ranks = self._ranks
        self._kept = [group for group in state["kept"] if group.order % ranks.data_size == ranks.data_rank]
        self._kept_everywhere = len(state["kept"])
        self._begun = [group for group in state["begun"] if group.order % ranks.data_size == ranks.data_rank]

    def close(self) -> None:  # noqa: B027 (most have nothing in the background)
        """Ends what goes on in the background."""

    @abstractmethod
    def _fill(self, step: int, on_finished: Callable[[int], None]) -> Filled:
        """Samples until ``_kept_everywhere`` is enough, through `_keep`."""

    def _is_informative(self, ordered: OrderedGroup) -> bool:
        return ordered.group.informative or not self._settings.dynamic_sampling

    def _keep(self, finished: list[OrderedGroup], useful_everywhere: int) -> None:
        self._kept += [ordered for ordered in finished if self._is_informative(ordered)]
        self._kept_everywhere += useful_everywhere

    def _warn(self, step: int, reason: str) -> None:
        if self._ranks.is_main:
            logger.warning(
                "step %d goes on with %d of %d groups: %s", step, self._kept_everywhere, self._prompts, reason
            )

    def _send_back_stale(self, step: int) -> None:
        """Groups that training would be too far ahead of are sampled again from the start."""
        oldest = step - 1 - self._settings.max_staleness
        stale = [ordered for ordered in self._kept if ordered.oldest_version < oldest]
        self._kept = [ordered for ordered in self._kept if ordered.oldest_version >= oldest]
        self._kept_everywhere = self._count(len(self._kept))
        for group in self._begun:
            if group.oldest_version is not None and group.oldest_version < oldest:
                group.graded, group.partial = {}, {}
        self._begun += [BegunGroup(ordered.order, ordered.group.prompt) for ordered in stale]
        self._begun.sort(key=lambda group: group.order)

    def _split_off_batch(self) -> list[OrderedGroup]:
        """The batch with orders counted anew from 0; the rest stays here for the next step."""
        kept = sorted(self._kept, key=lambda g: g.order)
        parts = gather([g.order for g in kept], self._ranks.data_objects)
        everywhere = sorted(order for part in parts for order in part)
        place = {order: i for i, order in enumerate(everywhere)}
        batch = [OrderedGroup(place[g.order], g.group) for g in kept if place[g.order] < self._prompts]
        self._kept = [g for g in kept if place[g.order] >= self._prompts]
        self._kept_everywhere = max(0, len(everywhere) - self._prompts)
        return batch

    def _count(self, here: int) -> int:
        return sum(gather(here, self._ranks.data_objects))

    def _metrics(self, sampled: list[Group]) -> dict[str, float]:
        completions = [c for group in sampled for c in group.completions]
        grades = [g for group in sampled for g in group.grades]
        sums = {
            "count": len(completions),
            "reward": sum(g.reward for g in grades),
            "correct": sum(g.correct for g in grades),
            "failures": sum(g.failure is not None for g in grades),
            "tokens": sum(len(c.token_ids) for c in completions),
            "truncated": sum(c.finish_reason == "length" for c in completions),
            "begun": self._begun_here,
        }
        parts = gather(sums, self._ranks.data_objects)
        world = {key: sum(part[key] for part in parts) for key in sums}
        metrics = {
            "reward/failures": float(world["failures"]),
            "rollout/response_tokens": float(world["tokens"]),
            "rollout/groups_in_progress": float(world["begun"]),
        }
        if world["count"]:  # a step that the surplus fills samples nothing, and has no means
            metrics |= {
                "reward/mean": world["reward"] / world["count"],
                "reward/accuracy": world["correct"] / world["count"],
                "rollout/response_tokens_mean": world["tokens"] / world["count"],
                "rollout/truncated_fraction": world["truncated"] / world["count"],
            }
        return metrics
