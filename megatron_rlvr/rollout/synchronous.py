"""Synchronous collector, for an engine inside the training processes: the batch does not depend on the layout.

Prompts are drawn in rounds, by every rank alike, and distributed over the data-parallel replicas in turn. Each round
draws as many prompts as the recent share of informative groups suggests, and is sampled to its end.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_rlvr.config import RolloutSettings
from megatron_rlvr.data.cursor import PromptCursor
from megatron_rlvr.data.tokenizer import Tokenizer
from megatron_rlvr.distributed.collectives import gather
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.rollout.collector import Rollout, finish_step
from megatron_rlvr.rollout.group_buffer import FinishedGroup, GroupBuffer, GroupInProgress
from megatron_rlvr.rollout.sampler import Sampler, requests_for


class SynchronousCollector:
    """Collects the batch of a training step in rounds; a `Collector`.

    Args:
        sampler: Sampler of this rank.
        cursor: Prompts to draw from, the same on every rank.
        ranks: Place of this rank.
        settings: Settings of the rollout.
        groups_per_batch: Number of groups in the batch of a training step, over all replicas.
        seed: Seed of the run.
    """

    def __init__(
        self,
        sampler: Sampler,
        cursor: PromptCursor,
        ranks: Ranks,
        settings: RolloutSettings,
        *,
        groups_per_batch: int,
        seed: int,
    ) -> None:
        self._sampler = sampler
        self._cursor = cursor
        self._ranks = ranks
        self._settings = settings
        self._seed = seed
        self._buffer = GroupBuffer(ranks, settings, groups_per_batch)
        self._step = 0

    @property
    def tokenizer(self) -> Tokenizer:
        """See `Collector`, as for all public methods."""
        return self._sampler.tokenizer

    def begin(self, step: int) -> None:
        self._step = step
        self._buffer.restart_stale(step)

    def collect(self, step: int, on_finished: Callable[[int], None] = lambda count: None) -> Rollout:
        if self._step != step:
            self.begin(step)
        buffer = self._buffer
        carried = buffer.total_ready
        rounds = drawn = finished = informative = 0
        while buffer.missing and rounds < self._settings.max_rounds:
            if buffer.count(len(buffer.in_progress)):
                groups = self._take_distinct()
            else:
                # A step never draws more prompts than there are: sampling one twice would not make it informative.
                count = min(self._groups_to_draw(informative, finished), self._cursor.prompts - drawn)
                if not count:
                    break
                groups = self._draw(count)
                rounds, drawn = rounds + 1, drawn + count
            new_finished, new_informative = buffer.add(self._sample(groups, on_finished))
            finished, informative = finished + new_finished, informative + new_informative
        return finish_step(
            step,
            buffer,
            self._ranks,
            carried=carried,
            in_progress=len(buffer.in_progress),
            rounds=float(rounds),
            set_used_up=drawn == self._cursor.prompts,
        )

    def state(self) -> dict[str, Any]:
        return self._buffer.state() | {"cursor": self._cursor.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._cursor.restore(state["cursor"])
        self._buffer.restore(state)

    def close(self) -> None:
        pass

    def _groups_to_draw(self, informative: int, finished: int) -> int:
        """Return the number of prompts for the next round, given the groups of the step so far."""
        if not self._settings.dynamic_sampling:
            return self._buffer.missing
        return math.ceil(self._buffer.rate.plus(informative, finished).groups_for(self._buffer.missing))

    def _draw(self, count: int) -> list[GroupInProgress]:
        """Draw prompts; return this replica's share of their groups."""
        orders = range(self._cursor.drawn, self._cursor.drawn + count)
        drawn = zip(orders, self._cursor.take(count), strict=True)
        ranks, size = self._ranks, self._settings.group_size
        return [GroupInProgress(o, prompt, size) for o, prompt in drawn if o % ranks.data_size == ranks.data_rank]

    def _take_distinct(self) -> list[GroupInProgress]:
        """Take one restarted group for each prompt, by whose id completions are assigned; leave the others."""
        first: dict[str, GroupInProgress] = {}
        groups = self._buffer.take_in_progress()
        for group in groups:
            first.setdefault(group.prompt.id, group)
        self._buffer.in_progress = [group for group in groups if first[group.prompt.id] is not group]
        return list(first.values())

    def _sample(self, groups: Sequence[GroupInProgress], on_finished: Callable[[int], None]) -> list[FinishedGroup]:
        """Sample and grade the groups of this replica to their end; all ranks of the replica return the same."""
        size = self._settings.group_size
        for group in groups:
            group.restart()  # the engine samples whole groups
            group.request()
        requests = [r for g in groups for r in requests_for(g.prompt, size, self._seed, f"train/{g.order}")]
        graded = self._sampler.run(
            self._sampler.share_of(requests, self._ranks),
            self._settings,
            overlong_penalty=True,
            on_finished=on_finished,
        )
        graded = _interleave(gather(graded, self._ranks.replica_objects))
        for i, group in enumerate(groups):
            for completion, grade in graded[i * size : (i + 1) * size]:
                group.arrive(completion)
                group.add_grade(completion, grade)
        return [group.finish() for group in groups]


def _interleave(parts: list[list[Any]]) -> list[Any]:
    """Undo a distribution in turn over n ranks that received any: item i is from part i % n."""
    parts = [part for part in parts if part]
    total = sum(len(part) for part in parts)
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]
