"""Whether the other ranks are alive, by counters in the process group's store.

A collective gives up by itself after a time. While ranks sample they wait for each other outside of any, for as long as
responses take, and nothing else would tell them that a host is gone or cut off.
"""

import threading
from collections.abc import Callable
from types import TracebackType

import torch.distributed as dist

_LONGEST_PAUSE_SECONDS = 5.0
_LOOKS = 20
_LEFT = 2**40


class Heartbeat:
    """Says that this rank is alive while it is entered, and watches: rank 0 all others, and these rank 0.

    Time is counted in looks of this process, so that processes that were all suspended for an hour miss nobody.

    Args:
        store: of all ranks; used by no other thread.
        timeout_seconds: how long a rank may be silent.
        lost: called, in a thread, with the rank of whom nothing has been heard for so long, or with None where another
            rank has told all that somebody is lost.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        lost: Callable[[int | None], object],
    ) -> None:
        self._store = dist.PrefixStore("pulse", store)
        self._rank = rank
        self._pause = min(_LONGEST_PAUSE_SECONDS, timeout_seconds / _LOOKS)
        self._most = round(timeout_seconds / self._pause)
        self._lost = lost
        self._heard = dict.fromkeys(range(1, world_size) if rank == 0 else [0], (0, 0))
        """{rank: (its counter, looks since that last changed)}."""
        self._looks = 0
        self._stopped = threading.Event()
        # A store on a host that is gone never answers: who counts the looks must not be who waits for it.
        parts = (self._beat, self._watch) if world_size > 1 else ()
        self._threads = [threading.Thread(target=part, name="pulse", daemon=True) for part in parts]

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
        while not self._stopped.wait(self._pause):
            try:
                self._store.add(str(self._rank), 1)
                told = self._store.add("lost", 0) > 0
                silent = [] if told else self._silent()
                if silent:
                    self._store.add("lost", 1)
            except RuntimeError:  # the store is gone: with a rank that has ended, or it counts as silent
                continue
            if told or silent:
                self._lost(silent[0] if silent else None)
                return
            self._looks += 1
        try:
            self._store.add(str(self._rank), _LEFT)
        except RuntimeError:
            return

    def _silent(self) -> list[int]:
        for rank, (before, looks) in self._heard.items():
            now = self._store.add(str(rank), 0)
            self._heard[rank] = now, looks + 1 if now == before and now < _LEFT else 0
        return [rank for rank, (_, looks) in self._heard.items() if looks >= self._most]

    def _watch(self) -> None:
        before, looks = 0, 0
        while not self._stopped.wait(self._pause):
            before, looks = self._looks, looks + 1 if self._looks == before else 0
            if looks >= self._most:
                self._lost(0)
                return
