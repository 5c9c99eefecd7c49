"""Asynchronous collector: the leader of each data-parallel replica keeps servers busy until the batch is full.

Leaders sample in the background (group_sampler.py). The other ranks wait outside of collectives, which could time out,
until all leaders have finished. Then all ranks learn how many prompts were drawn, and the ranks of a replica receive
its groups.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch.distributed as dist

from megatron_rlvr.config import RolloutSettings
from megatron_rlvr.data.cursor import PromptCursor
from megatron_rlvr.data.tokenizer import Tokenizer
from megatron_rlvr.distributed.collectives import gather, raise_on_all_ranks
from megatron_rlvr.distributed.counters import Counters
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.protocols import EngineError, WeightsMissingError
from megatron_rlvr.rollout.collector import CollectionStoppedError, Rollout, finish_step
from megatron_rlvr.rollout.difficulty import remember
from megatron_rlvr.rollout.group_buffer import FinishedGroup, GroupBuffer
from megatron_rlvr.rollout.group_sampler import GroupSampler, SampledGroups, StepDemand
from megatron_rlvr.rollout.sampler import Sampler


class AsynchronousCollector:
    """Collects the batch of a training step from a streaming engine; a `Collector`.

    Args:
        sampler: Sampler of this rank.
        cursor: Prompts to draw from, the same on every rank.
        ranks: Place of this rank.
        settings: Settings of the rollout.
        groups_per_batch: Number of groups in the batch of a training step, over all replicas.
        seed: Seed of the run.
        store: Store for the counters, shared by all ranks; used by no other thread.
        sync: Pushes the policy's weights to the servers again; a collective over the world.
        stop_wanted: Returns whether `collect` should stop before the batch is full.
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
        store: dist.Store,
        sync: Callable[[], None],
        stop_wanted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._sampler = sampler
        self._cursor = cursor
        self._ranks = ranks
        self._settings = settings
        self._seed = seed
        self._store = store
        self._sync = sync
        self._stop_wanted = stop_wanted
        self._world = cast(dist.ProcessGroup, dist.group.WORLD)
        self._buffer = GroupBuffer(ranks, settings, groups_per_batch, leaders_only=True)
        self._step = 0
        self._drawn_in_step = 0
        self._attempts = 0
        """Number of group samplers so far, on every rank; each has counters of its own."""
        self._sampling = False
        """True while leaders sample, from `_start` to `_take_in`; the same on every rank."""
        self._group_sampler: GroupSampler | None = None
        """Group sampler of a leader while leaders sample."""
        self._in_progress_here = 0
        """Number of groups in progress of this replica, on every rank of it."""
        self._weights_missing = False
        self._stopped = False
        self._failure: Exception | None = None
        """Failure of this rank's last group sampler; raised when a step needs the groups that it did not finish."""

    @property
    def tokenizer(self) -> Tokenizer:
        """See `Collector`, as for all public methods."""
        return self._sampler.tokenizer

    def begin(self, step: int) -> None:
        self._step = step
        self._buffer.restart_stale(step)
        self._drawn_in_step = 0
        self._start()

    def collect(self, step: int, on_finished: Callable[[int], None] = lambda count: None) -> Rollout:
        if self._step != step:
            self.begin(step)
        buffer = self._buffer
        carried = buffer.total_ready
        self._take_in_or_raise(on_finished)
        while self._weights_missing and not self._stopped:
            self._sync()
            self._start()
            self._take_in_or_raise(on_finished)
        if self._stopped and buffer.missing:
            raise CollectionStoppedError(f"sampling for step {step} was stopped")
        rollout = finish_step(
            step,
            buffer,
            self._ranks,
            carried=carried,
            in_progress=self._in_progress_here,
            rounds=self._drawn_in_step / buffer.groups_per_batch,
            set_used_up=self._drawn_in_step >= self._cursor.most_in_a_step(self._buffer.groups_per_batch),
        )
        return remember(self._cursor, step, rollout, self._ranks)

    def state(self) -> dict[str, Any]:
        """See `Collector`. Sampling in the background is stopped for it, and restarted for what is still missing.

        A failure in the background fails the step that needs its groups, not the checkpoint of the step before it.
        """
        sampling = self._sampling
        self.close()
        if sampling:
            self._take_in(lambda count: None)
            if isinstance(self._failure, EngineError):
                self._failure = None  # servers are tried once more
        state = self._buffer.state() | {"cursor": self._cursor.state()}
        if sampling:
            self._start()
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        self._cursor.restore(state["cursor"])
        self._buffer.restore(state)

    def close(self) -> None:
        if self._group_sampler is not None:
            self._group_sampler.cancel()

    def _start(self) -> None:
        """Start group samplers on the leaders, for the groups that the batch lacks. A collective over the world."""
        self._attempts += 1
        self._sampling = True
        self._counters = Counters(self._store, str(self._attempts))
        buffer = self._buffer
        # A step never draws more prompts than there are: sampling one twice would not make it informative.
        most = self._cursor.most_in_a_step(buffer.groups_per_batch)
        most = min(self._settings.max_rounds * buffer.groups_per_batch, most) if buffer.missing else 0
        demand = StepDemand(
            missing=buffer.missing,
            in_progress=buffer.count(len(buffer.in_progress)),
            prompts=self._cursor.peek(max(0, most - self._drawn_in_step)),
            first_order=self._cursor.drawn,
            rate=buffer.rate,
            leaders=self._ranks.data_size,
        )
        self._most_drawn = len(demand.prompts)
        if self._ranks.replica_rank == 0:
            self._group_sampler = GroupSampler(
                self._sampler,
                self._settings,
                self._counters,
                demand,
                buffer.take_in_progress(),
                is_informative=buffer.is_informative,
                seed=self._seed,
            )

    def _take_in_or_raise(self, on_finished: Callable[[int], None]) -> None:
        """Collect the results. A failure on any rank is raised on all, except missing weights, which need a re-sync."""
        self._take_in(on_finished)
        failure, self._failure = self._failure, None
        raise_on_all_ranks(failure)

    def _take_in(self, on_finished: Callable[[int], None]) -> None:
        """Wait for all leaders and move their groups into the buffers. A collective over the world."""
        failure = self._finish_sampling(on_finished)
        weights_missing = isinstance(failure, WeightsMissingError)
        self._failure = self._failure or (None if weights_missing else failure)
        flags = gather((weights_missing, self._stop_wanted()), self._world)
        self._weights_missing, self._stopped = (any(column) for column in zip(*flags, strict=True))

    def _finish_sampling(self, on_finished: Callable[[int], None]) -> Exception | None:
        """Wait for all leaders; add the groups of this replica on all of its ranks, and take the drawn prompts.

        Returns: the failure of this rank's group sampler.
        """
        result = SampledGroups()
        if self._group_sampler is not None:
            result = self._wait(self._group_sampler, on_finished)
            self._group_sampler = None
            self._buffer.in_progress = result.in_progress
        self._sampling = False
        self._counters.wait_for_all(self._ranks.data_size)
        drawn = min(self._counters.counts().drawn, self._most_drawn)
        self._cursor.take(drawn)
        self._drawn_in_step += drawn
        leaders: tuple[list[FinishedGroup], int] = gather(
            (result.finished, len(result.in_progress)), self._ranks.replica_objects
        )[0]
        finished, self._in_progress_here = leaders
        self._buffer.add(finished)
        return result.failure

    def _wait(self, group_sampler: GroupSampler, on_finished: Callable[[int], None]) -> SampledGroups:
        """Wait for this leader's group sampler, reporting completions; stop it if a stop is wanted."""
        reported = 0

        def poll() -> None:
            nonlocal reported
            sampled = group_sampler.sampled
            on_finished(sampled - reported)
            reported = sampled
            if self._stop_wanted():
                group_sampler.request_stop()

        result = group_sampler.wait(poll)
        poll()
        return result
