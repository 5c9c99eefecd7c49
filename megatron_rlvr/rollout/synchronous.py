"""Collecting in rounds, for an engine inside the trainer: the batch does not depend on the layout.

Prompts are drawn in rounds by every rank alike, and dealt to the replicas in turn. Each round draws as many prompts as
the share of informative groups lately seen suggests, and is sampled to its end.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from megatron_rlvr.distributed.collectives import gather
from megatron_rlvr.rollout.collector import MOST_OVERSAMPLING, Collector, Filled
from megatron_rlvr.rollout.group_buffer import BegunGroup, OrderedGroup
from megatron_rlvr.rollout.sampler import requests_for


class SynchronousCollector(Collector):
    """Collects the batch of a training step in rounds."""

    def _fill(self, step: int, on_finished: Callable[[int], None]) -> Filled:
        finished: list[OrderedGroup] = []
        rounds = drawn = total = informative = 0
        while self._kept_everywhere < self._prompts and rounds < self._settings.max_rounds:
            again = self._count(len(self._begun))
            # A step never draws more prompts than there are: sampling one twice would not make it informative.
            count = 0 if again else min(self._draw_count(informative, total), self._cursor.prompts - drawn)
            if not again and not count:
                break
            rounds += 0 if again else 1
            drawn += count
            groups = self._sample(self._take_begun() if again else self._draw(count), on_finished)
            found = self._count(sum(map(self._is_informative, groups)))
            self._keep(groups, found)
            finished += groups
            total, informative = total + self._count(len(groups)), informative + found
        if self._kept_everywhere < self._prompts:
            used_up = drawn == self._cursor.prompts
            self._warn(
                step, "the set has no other prompts" if used_up else f"rollout.max_rounds {rounds} found no more"
            )
        self._begun_here = len(self._begun)
        return Filled(finished, total, informative, float(rounds))

    def _draw_count(self, informative: int, total: int) -> int:
        missing = self._prompts - self._kept_everywhere
        if not self._settings.dynamic_sampling:
            return missing
        rate = max((self._informative + informative) / (self._seen + total), 1 / MOST_OVERSAMPLING)
        return math.ceil(missing / rate)

    def _draw(self, count: int) -> list[BegunGroup]:
        """This replica's share of new prompts."""
        orders = range(self._drawn, self._drawn + count)
        self._drawn += count
        ranks = self._ranks
        drawn = zip(orders, self._cursor.take(count), strict=True)
        return [BegunGroup(o, prompt) for o, prompt in drawn if o % ranks.data_size == ranks.data_rank]

    def _take_begun(self) -> list[BegunGroup]:
        """Groups of this replica that are to be sampled again, each prompt once: an engine tells them apart by it."""
        first: dict[str, BegunGroup] = {}
        for group in self._begun:
            first.setdefault(group.prompt.id, group)
        self._begun = [group for group in self._begun if first[group.prompt.id] is not group]
        return list(first.values())

    def _sample(self, mine: Sequence[BegunGroup], on_finished: Callable[[int], None]) -> list[OrderedGroup]:
        """Finished groups of this replica: those of its ranks that sample tell the others."""
        samples = self._settings.group_size
        requests = [r for g in mine for r in requests_for(g.prompt, samples, self._seed, f"train/{g.order}")]
        graded = self._sampler.run(
            self._sampler.part_of(requests, self._ranks),
            self._settings,
            overlong_buffer=self._reward.overlong_buffer,
            on_finished=on_finished,
        )
        graded = _interleave(gather(graded, self._ranks.replica_objects))
        for i, group in enumerate(mine):
            group.graded = dict(enumerate(graded[i * samples : (i + 1) * samples]))
        return [group.finished() for group in mine]


def _interleave(parts: list[list[Any]]) -> list[Any]:
    """Undoes dealing in turn to the ranks that got any: item i came from part i % n."""
    parts = [part for part in parts if part]
    total = sum(len(part) for part in parts)
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]
