"""Detection of ranks that have died or lost their network, by counters in the process group's store.

A collective fails by itself after a timeout. While ranks sample, however, they wait for each other outside of any
collective, for as long as responses take, and nothing else would detect that a host is down or unreachable.
"""

import threading
from collections.abc import Callable
from types import TracebackType

import torch.distributed as dist

_MAX_INTERVAL_SECONDS = 5.0
_INTERVALS_PER_TIMEOUT = 20
# A rank is reported lost this much before the timeout, at which collectives that wait for it fail and do not name it.
_INTERVALS_BEFORE_TIMEOUT = 2
_LEFT = 2**40
# The store's process has ended if this many beats in a row, this far apart, find the connection closed.
_CLOSED_BEATS, _CLOSED_INTERVAL_SECONDS = 4, 1.0


class Heartbeat:
    """Heartbeat of this rank, and the watch over others: rank 0 watches all other ranks, and these watch rank 0.

    Use it as a context manager: the heartbeat lasts as long as the block, and a rank that leaves the block is no longer
    watched.

    Time is measured in heartbeats of this process, not by a clock, so that no rank is reported lost after all processes
    were suspended for an hour.

    Args:
        store: Store shared by all ranks; no other thread may use this connection.
        rank: Rank of this process.
        world_size: Number of ranks.
        timeout_seconds: Time without a heartbeat after which a rank is lost.
        on_lost: Called once, in a thread, with the rank from which no heartbeat has been seen for that time, or with
            None if another rank has reported that a rank is lost.
        on_closed: Called once, in a thread, when the process that has the store has ended: the launcher of the first
            host, or rank 0 without one. It would be reported as lost only after ``timeout_seconds``.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        on_lost: Callable[[int | None], object],
        on_closed: Callable[[], object],
    ) -> None:
        self._store = dist.PrefixStore("heartbeat", store)
        self._rank = rank
        self._interval = min(_MAX_INTERVAL_SECONDS, timeout_seconds / _INTERVALS_PER_TIMEOUT)
        self._max_missed = round(timeout_seconds / self._interval) - _INTERVALS_BEFORE_TIMEOUT
        self._on_lost = on_lost
        self._on_closed = on_closed
        self._seen = dict.fromkeys(range(1, world_size) if rank == 0 else [0], (0, 0))
        """{rank: (its counter, number of this rank's heartbeats since that last changed)}."""
        self._beats = 0
        self._stopped = threading.Event()
        # A store on a host that is down never answers, so the thread that measures the time must not use the store.
        targets = (self._beat, self._watch_store) if world_size > 1 else ()
        self._threads = [threading.Thread(target=target, name="heartbeat", daemon=True) for target in targets]

    def __enter__(self) -> "Heartbeat":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(1.0)

    def _beat(self) -> None:
        """Increment this rank's counter and check the others', until the block ends or a rank is lost."""
        closed = 0
        while not self._stopped.wait(min(self._interval, _CLOSED_INTERVAL_SECONDS) if closed else self._interval):
            try:
                self._store.add(str(self._rank), 1)
                reported = self._store.add("lost", 0) > 0
                silent = [] if reported else self._silent()
                if silent:
                    self._store.add("lost", 1)
            except dist.DistNetworkError:  # torch does not connect again
                closed += 1
                if closed == _CLOSED_BEATS:
                    self._on_closed()
                    return
                continue
            except RuntimeError:  # no answer from the store; if this lasts, `_watch_store` reports rank 0 as lost
                continue
            closed = 0
            if reported or silent:
                self._on_lost(silent[0] if silent else None)
                return
            self._beats += 1
        try:
            self._store.add(str(self._rank), _LEFT)
        except RuntimeError:
            return

    def _silent(self) -> list[int]:
        """Return the watched ranks whose counter has not changed for too long."""
        for rank, (before, missed) in self._seen.items():
            now = self._store.add(str(rank), 0)
            self._seen[rank] = now, missed + 1 if now == before and now < _LEFT else 0
        return [rank for rank, (_, missed) in self._seen.items() if missed >= self._max_missed]

    def _watch_store(self) -> None:
        """Report rank 0, on which the store is, as lost if `_beat` has had no answer for too long."""
        before, missed = 0, 0
        while not self._stopped.wait(self._interval):
            before, missed = self._beats, missed + 1 if self._beats == before else 0
            if missed >= self._max_missed:
                self._on_lost(0)
                return
