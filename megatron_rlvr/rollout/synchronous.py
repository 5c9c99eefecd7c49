"""Synchronous collector, for an engine inside the training processes: the batch does not depend on the layout.

Prompts are drawn in rounds, by every rank alike, and distributed over the data-parallel replicas in turn. Each round
draws as many prompts as the recent share of informative groups suggests, and is sampled to its end, unless the run is
to stop: then what has been sampled is kept for a checkpoint, and only the completions that are missing are sampled when
the run resumes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_rlvr.config import RolloutSettings
from megatron_rlvr.data.cursor import PromptCursor
from megatron_rlvr.data.tokenizer import Tokenizer
from megatron_rlvr.distributed.collectives import gather
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.rollout.collector import CollectionStoppedError, Rollout, finish_step
from megatron_rlvr.rollout.difficulty import remember
from megatron_rlvr.rollout.group_buffer import FinishedGroup, GroupBuffer, GroupInProgress, GroupState
from megatron_rlvr.rollout.sampler import Generate, Sampler, requests_for


@dataclass
class _SoFar:
    """Counts of a step over all replicas, which a checkpoint keeps if the step was stopped.

    Attributes:
        step: Training step.
        carried: Groups that were ready when the step began.
        rounds: Rounds in which prompts were drawn.
        drawn: Prompts drawn.
        finished: Groups finished.
        informative: Informative groups among them.
    """

    step: int
    carried: int
    rounds: int = 0
    drawn: int = 0
    finished: int = 0
    informative: int = 0


class SynchronousCollector:
    """Collects the batch of a training step in rounds; a `Collector`.

    Args:
        sampler: Sampler of this rank.
        cursor: Prompts to draw from, the same on every rank.
        ranks: Place of this rank.
        settings: Settings of the rollout.
        groups_per_batch: Number of groups in the batch of a training step, over all replicas.
        seed: Seed of the run.
        generate: Samples completions, and may end early; by default the sampler's engine.
        stop_wanted: Returns whether `collect` should stop before it trains on what it has.
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
        generate: Generate | None = None,
        stop_wanted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._sampler = sampler
        self._cursor = cursor
        self._ranks = ranks
        self._settings = settings
        self._seed = seed
        self._generate = generate
        self._stop_wanted = stop_wanted
        self._buffer = GroupBuffer(ranks, settings, groups_per_batch)
        self._step = 0
        self._so_far: _SoFar | None = None
        """Counts of a step that was stopped."""

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
        if self._so_far is None or self._so_far.step != step:
            self._so_far = _SoFar(step, carried=buffer.total_ready)
        so_far, most = self._so_far, self._cursor.most_in_a_step(buffer.groups_per_batch)
        while buffer.missing:
            if buffer.count(len(buffer.in_progress)):
                groups = self._take_distinct()
            elif so_far.rounds == self._settings.max_rounds:
                break
            else:
                # A step never draws more prompts than there are: sampling one twice would not make it informative.
                wanted = self._groups_to_draw(so_far.informative, so_far.finished)
                count = min(wanted, most - so_far.drawn)
                if count < 1:  # below 0 if the files of a resumed run have changed
                    break
                groups = self._draw(count)
                so_far.rounds, so_far.drawn = so_far.rounds + 1, so_far.drawn + count
            finished, informative = buffer.add(self._sample(groups, on_finished))
            so_far.finished, so_far.informative = so_far.finished + finished, so_far.informative + informative
            if self._stop_is_wanted():
                raise CollectionStoppedError(f"sampling for step {step} was stopped")
        self._so_far = None
        rollout = finish_step(
            step,
            buffer,
            self._ranks,
            carried=so_far.carried,
            in_progress=len(buffer.in_progress),
            rounds=float(so_far.rounds),
            set_used_up=so_far.drawn >= most,
        )
        return remember(self._cursor, step, rollout, self._ranks)

    def state(self) -> dict[str, Any]:
        so_far = None if self._so_far is None else asdict(self._so_far)
        return self._buffer.state() | {"cursor": self._cursor.state(), "so_far": so_far}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._cursor.restore(state["cursor"])
        so_far = state.get("so_far")
        self._so_far = None if so_far is None else _SoFar(**so_far)
        self._buffer.restore(state)

    def close(self) -> None:
        pass

    def _stop_is_wanted(self) -> bool:
        """Return on every rank whether any of them is to stop. A collective over the world."""
        in_replica = any(gather(self._stop_wanted(), self._ranks.replica_objects))
        return any(gather(in_replica, self._ranks.data_objects))

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
        """Sample and grade the completions that the groups of this replica lack; return the groups that it finishes.

        Groups that are not finished, as the run is to stop, go to the buffer. All ranks of the replica do the same.
        """
        requests = []
        for group in groups:
            every = requests_for(group.prompt, group.size, self._seed, f"train/{group.order}")
            requests += [every[index] for index in group.request()]
        graded = self._sampler.run(
            self._sampler.share_of(requests, self._ranks),
            self._settings,
            overlong_penalty=True,
            on_finished=on_finished,
            generate=self._generate,
        )
        group_of = {group.prompt.id: group for group in groups}
        for completion, grade in (pair for part in gather(graded, self._ranks.replica_objects) for pair in part):
            group_of[completion.prompt_id].arrive(completion)
            group_of[completion.prompt_id].add_grade(completion, grade)
        for group in groups:
            group.interrupt()
        finished = [group for group in groups if group.state is GroupState.FINISHED]
        self._buffer.in_progress += [group for group in groups if group.state is not GroupState.FINISHED]
        self._buffer.in_progress.sort(key=lambda group: group.order)
        return [group.finish() for group in finished]
