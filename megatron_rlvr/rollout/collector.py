"""Dynamic sampling: groups that are all right or all wrong carry no gradient, so they are dropped and replaced.

A step's batch is the first ``batch.prompts`` informative groups in the order in which their prompts were drawn. Prompts
are drawn in rounds by every rank alike, and dealt to the replicas in turn, so the batch does not depend on the layout.
Each round draws as many prompts as the share of informative groups lately seen suggests; groups beyond the batch are
kept for the next step.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_rlvr.config import RewardSettings, RolloutSettings
from megatron_rlvr.data.cursor import PromptCursor
from megatron_rlvr.data.tokenizer import Tokenizer
from megatron_rlvr.policy.ranks import Ranks
from megatron_rlvr.rollout.sampler import Sampler, requests_for
from megatron_rlvr.types import Completion, Grade, Group, Prompt

logger = logging.getLogger(__name__)

# Even when almost no group is informative, a round draws at most this many times the prompts still needed.
_MOST_OVERSAMPLING = 4.0


@dataclass(frozen=True)
class OrderedGroup:
    """A group with its place in the order of drawing; held by all ranks of one replica."""

    order: int
    group: Group


@dataclass(frozen=True)
class Rollout:
    """What a step has to train on.

    Attributes:
        groups: this replica's part of the batch; ``order`` counts from 0 over all replicas.
        size: groups in the whole batch; 0 when dynamic sampling found none.
        figures: metrics of everything that was sampled in this step, the same on every rank.
        sampled: this replica's groups of the step before any was dropped, for the log of sampled text.
    """

    groups: list[OrderedGroup]
    size: int
    figures: dict[str, float]
    sampled: list[Group]


class Collector:
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
        self._surplus: list[OrderedGroup] = []
        self._surplus_size = 0
        # Informative and all groups lately seen; half forgotten each step.
        self._informative, self._seen = 1.0, 1.0

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the sampled text."""
        return self._sampler.tokenizer

    def collect(self, step: int, on_finished: Callable[[int], None] = lambda count: None) -> Rollout:
        """Samples, grades and filters until the batch is full or `rollout.max_rounds` is reached.

        A collective over the world. ``on_finished`` is called for each completion this rank has sampled.
        """
        kept, size = self._surplus, self._surplus_size
        carried = size
        sampled: list[Group] = []
        rounds = total = informative = 0
        while size < self._prompts and rounds < self._settings.max_rounds:
            # A step never draws more prompts than there are: sampling one twice would not make it informative.
            count = min(self._draw_count(self._prompts - size), self._cursor.prompts - total)
            if count == 0:
                break
            rounds += 1
            prompts = self._cursor.take(count)
            groups = self._sample(prompts, on_finished)
            sampled += [g.group for g in groups]
            found = [g for g in groups if g.group.informative or not self._settings.dynamic_sampling]
            found_everywhere = self._count(len(found))
            kept, size = kept + found, size + found_everywhere
            total, informative = total + len(prompts), informative + found_everywhere
            self._informative += found_everywhere
            self._seen += len(prompts)
        if size < self._prompts and self._ranks.is_main:
            used_up = total == self._cursor.prompts
            reason = "the set has no other prompts" if used_up else f"rollout.max_rounds {rounds} found no more"
            logger.warning("step %d goes on with %d of %d groups: %s", step, size, self._prompts, reason)
        self._informative, self._seen = self._informative / 2, self._seen / 2
        batch = self._split_off_surplus(kept, size)
        figures = self._figures(sampled) | {
            "rollout/rounds": float(rounds),
            "rollout/groups": float(min(size, self._prompts)),
            "rollout/groups_sampled": float(total),
            "rollout/groups_dropped": float(total - informative),
            "rollout/groups_carried": float(carried),
            "rollout/groups_surplus": float(self._surplus_size),
        }
        return Rollout(batch, min(size, self._prompts), figures, sampled)

    def _draw_count(self, missing: int) -> int:
        if not self._settings.dynamic_sampling:
            return missing
        rate = max(self._informative / self._seen, 1 / _MOST_OVERSAMPLING)
        return math.ceil(missing / rate)

    def _sample(self, prompts: Sequence[Prompt], on_finished: Callable[[int], None]) -> list[OrderedGroup]:
        """This replica's groups among ``prompts``: those of its ranks that sample tell the others."""
        ranks, samples = self._ranks, self._settings.samples_per_prompt
        orders = range(self._drawn, self._drawn + len(prompts))
        self._drawn += len(prompts)
        mine = [(o, p) for o, p in zip(orders, prompts, strict=True) if o % ranks.data_size == ranks.data_rank]
        requests = [r for order, p in mine for r in requests_for(p, samples, self._seed, f"train/{order}")]
        graded = self._sampler.run(
            self._sampler.part_of(requests, ranks),
            self._settings,
            overlong_buffer=self._reward.overlong_buffer,
            on_finished=on_finished,
        )
        graded = _interleave(gather(graded, ranks.replica_objects))
        return [
            OrderedGroup(order, _group(prompt, graded[i * samples : (i + 1) * samples]))
            for i, (order, prompt) in enumerate(mine)
        ]

    def _split_off_surplus(self, kept: list[OrderedGroup], size: int) -> list[OrderedGroup]:
        """The batch with orders counted anew from 0; the rest stays here for the next step."""
        kept = sorted(kept, key=lambda g: g.order)
        parts = gather([g.order for g in kept], self._ranks.data_objects)
        everywhere = sorted(order for part in parts for order in part)
        place = {order: i for i, order in enumerate(everywhere)}
        batch = [OrderedGroup(place[g.order], g.group) for g in kept if place[g.order] < self._prompts]
        self._surplus = [g for g in kept if place[g.order] >= self._prompts]
        self._surplus_size = max(0, size - self._prompts)
        return batch

    def _count(self, here: int) -> int:
        return sum(gather(here, self._ranks.data_objects))

    def _figures(self, sampled: list[Group]) -> dict[str, float]:
        completions = [c for group in sampled for c in group.completions]
        grades = [g for group in sampled for g in group.grades]
        sums = {
            "count": len(completions),
            "reward": sum(g.reward for g in grades),
            "correct": sum(g.correct for g in grades),
            "failures": sum(g.failure is not None for g in grades),
            "tokens": sum(len(c.token_ids) for c in completions),
            "truncated": sum(c.finish_reason == "length" for c in completions),
        }
        parts = gather(sums, self._ranks.data_objects)
        world = {key: sum(part[key] for part in parts) for key in sums}
        figures = {"reward/failures": float(world["failures"]), "rollout/response_tokens": float(world["tokens"])}
        if world["count"]:  # a step that the surplus fills samples nothing, and has no means
            figures |= {
                "reward/mean": world["reward"] / world["count"],
                "reward/accuracy": world["correct"] / world["count"],
                "rollout/response_tokens_mean": world["tokens"] / world["count"],
                "rollout/truncated_fraction": world["truncated"] / world["count"],
            }
        return figures


def gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's ``value``, in rank order."""
    if dist.get_world_size(group) == 1:
        return [value]
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, value, group=group)
    return parts


def _interleave(parts: list[list[Any]]) -> list[Any]:
    """Undoes dealing in turn to the ranks that got any: item i came from part i % n."""
    parts = [part for part in parts if part]
    total = sum(len(part) for part in parts)
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]


def _group(prompt: Prompt, graded: list[tuple[Completion, Grade]]) -> Group:
    return Group(prompt, [completion for completion, _ in graded], [mark for _, mark in graded])
