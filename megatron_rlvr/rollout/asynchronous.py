"""Collecting from servers: the leader of each replica keeps them busy until the batch is full (harvest.py).

The other ranks wait without a collective, which could time out, until all leaders have finished; then all ranks agree
on how many prompts were drawn, and the ranks of a replica learn its groups.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch.distributed as dist

from megatron_rlvr.distributed.collectives import gather, gather_on_first, raise_on_all_ranks
from megatron_rlvr.distributed.counters import Counters
from megatron_rlvr.protocols import EngineError, WeightsMissingError
from megatron_rlvr.rollout.collector import CollectionStoppedError, Collector, Filled
from megatron_rlvr.rollout.group_buffer import OrderedGroup
from megatron_rlvr.rollout.group_sampler import Harvest, Quota, Yield


class AsynchronousCollector(Collector):
    """Collects the batch of a training step from an engine that streams.

    Args:
        store: shared by all ranks, for counters; no other thread uses it.
        sync: hands the policy's weights to the servers once more; a collective over the world.
        stop_wanted: whether `collect` is to stop where it is.
    """

    def __init__(
        self,
        *,
        store: dist.Store,
        sync: Callable[[], None],
        stop_wanted: Callable[[], bool] = lambda: False,
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        self._store = store
        self._sync = sync
        self._stop_wanted = stop_wanted
        self._attempts = 0
        self._world = cast(dist.ProcessGroup, dist.group.WORLD)
        self._harvest: Harvest | None = None
        self._underway = False
        self._weights_wanted = False
        self._stopped = False
        self._settled_early: list[OrderedGroup] = []
        """Groups of this replica that were taken in, and that the metrics of no step have counted yet."""
        self._failure: Exception | None = None
        """Of this rank's last harvest; told when a step needs what that has not brought."""

    def begin(self, step: int) -> None:
        """Begins to sample for a step, in the background. A collective over the world."""
        super().begin(step)
        self._leave_begun_to_leader()
        self._drawn_in_step = 0
        self._start()

    def state(self) -> dict[str, Any]:
        """See `Collector`. A harvest in the background is stopped for it, and goes on with what is still missing.

        What has failed in the background fails the step that needs it, and not a checkpoint of the one that is done.
        """
        harvesting = self._underway
        if self._harvest is not None:
            self._harvest.cancel()
        if harvesting:
            self._settled_early += self._take_in(lambda count: None)
            if isinstance(self._failure, EngineError):
                self._failure = None  # servers are tried once more
        state = super().state()
        first = self._ranks.replica_rank == 0  # as in `Collector`
        parts = gather_on_first(self._settled_early, self._ranks.data_objects) if first else []
        if harvesting:
            self._start()
        return state | {"settled_early": [group for part in parts for group in part]}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        ranks = self._ranks
        self._settled_early = [g for g in state["settled_early"] if g.order % ranks.data_size == ranks.data_rank]
        self._leave_begun_to_leader()

    def close(self) -> None:
        """Stops the servers."""
        if self._harvest is not None:
            self._harvest.cancel()

    def _leave_begun_to_leader(self) -> None:
        """Only a leader goes on with groups, though all ranks of a replica learn which go back to be sampled again."""
        if self._ranks.replica_rank:
            self._begun = []

    def _start(self) -> None:
        """A harvest of what is missing."""
        self._attempts += 1
        self._underway = True
        self._board = Counters(self._store, str(self._attempts))
        missing = max(0, self._prompts - self._kept_everywhere)
        # A step never draws more prompts than there are: sampling one twice would not make it informative.
        most = min(self._settings.max_rounds * self._prompts, self._cursor.prompts) if missing else 0
        quota = Quota(
            missing=missing,
            begun=self._count(len(self._begun)),
            prompts=self._cursor.peek(max(0, most - self._drawn_in_step)),
            first_order=self._drawn,
            informative=self._informative,
            seen=self._seen,
            leaders=self._ranks.data_size,
        )
        self._most = len(quota.prompts)
        if self._ranks.replica_rank == 0:
            begun, self._begun = self._begun, []
            self._harvest = Harvest(
                self._sampler,
                self._settings,
                self._board,
                quota,
                begun,
                informative=self._is_informative,
                overlong_buffer=self._reward.overlong_buffer,
                seed=self._seed,
            )

    def _fill(self, step: int, on_finished: Callable[[int], None]) -> Filled:
        self._settle(on_finished)
        while self._weights_wanted and not self._stopped:
            self._sync()
            self._start()
            self._settle(on_finished)
        if self._stopped and self._kept_everywhere < self._prompts:
            raise CollectionStoppedError(f"sampling for step {step} was stopped")
        finished, self._settled_early = self._settled_early, []
        total, informative = self._count(len(finished)), self._count(sum(map(self._is_informative, finished)))
        if self._kept_everywhere < self._prompts:
            used_up = self._drawn_in_step == self._cursor.prompts
            rounds = self._settings.max_rounds
            self._warn(
                step, "the set has no other prompts" if used_up else f"rollout.max_rounds {rounds} found no more"
            )
        return Filled(finished, total, informative, self._drawn_in_step / self._prompts)

    def _settle(self, on_finished: Callable[[int], None]) -> None:
        """Takes in the harvest; raises on every rank what has ended it on any, but for the want of weights."""
        self._settled_early += self._take_in(on_finished)
        failure, self._failure = self._failure, None
        raise_on_all_ranks(failure)

    def _take_in(self, on_finished: Callable[[int], None]) -> list[OrderedGroup]:
        """Waits for the harvest and keeps what it has brought; its finished groups, of this replica."""
        here = self._finish(on_finished)
        self._keep(here.settled, self._count(sum(map(self._is_informative, here.settled))))
        wanted = isinstance(here.failure, WeightsMissingError)
        self._failure = self._failure or (None if wanted else here.failure)
        told = gather((wanted, self._stop_wanted()), self._world)
        self._weights_wanted, self._stopped = (any(column) for column in zip(*told, strict=True))
        return here.settled

    def _finish(self, on_finished: Callable[[int], None]) -> Yield:
        """What this replica has sampled, known to its ranks, once all have finished; the begun groups to its leader."""
        here = Yield()
        if self._harvest is not None:
            harvest, seen = self._harvest, 0

            def look() -> None:
                nonlocal seen
                sampled = harvest.sampled
                on_finished(sampled - seen)
                seen = sampled
                if self._stop_wanted():
                    harvest.stop_soon()

            here = harvest.finish(look)
            look()
            self._harvest = None
            self._begun = here.begun
        self._underway = False
        self._board.wait_for_all(self._ranks.data_size)
        drawn = min(self._board.counts().drawn, self._most)
        self._cursor.take(drawn)
        self._drawn += drawn
        self._drawn_in_step += drawn
        here.settled, self._begun_here = gather((here.settled, len(here.begun)), self._ranks.replica_objects)[0]
        return here
