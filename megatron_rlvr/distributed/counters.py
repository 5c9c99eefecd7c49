"""What leaders know of each other while they sample for one step: counters in the process group's store.

A counter is changed by atomic additions, so that no prompt is drawn twice and the number of groups is exact without
any collective; leaders that wait for each other do so here, where nothing times out: pulse.py notices one that is gone.
"""

import time
from dataclasses import dataclass

import torch.distributed as dist

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.005, 0.25


@dataclass(frozen=True)
class Counts:
    """Where the step stands, over all replicas.

    Attributes:
        drawn: prompts claimed in this step; more than the limit where leaders asked in vain.
        settled: groups of this step that are finished and graded.
        informative: those of them that can be trained on.
        stopped: leaders that gave up, for whatever reason.
    """

    drawn: int
    settled: int
    informative: int
    stopped: int


class Counters:
    """The counters of one step, or of another occasion on which ranks wait for each other.

    Args:
        store: of all ranks; used by no other thread.
        name: of the attempt or occasion, never used before.
    """

    def __init__(self, store: dist.Store, name: str) -> None:
        self._store = dist.PrefixStore(f"rollout/{name}", store)

    def counts(self) -> Counts:
        return Counts(**{name: self._store.add(name, 0) for name in ("drawn", "settled", "informative", "stopped")})

    def claim(self) -> int:
        """Number of the next prompt of the step, from 0: nobody else gets the same."""
        return self._store.add("drawn", 1) - 1

    def settle(self, informative: bool) -> None:
        """A group is finished."""
        self._store.add("settled", 1)
        if informative:
            self._store.add("informative", 1)

    def stop(self) -> None:
        """Nobody need go on."""
        self._store.add("stopped", 1)

    def leave(self) -> None:
        """This rank has finished."""
        self._store.add("left", 1)

    def wait_for_all(self, ranks: int) -> None:
        """Returns when so many have left."""
        pause = _FIRST_PAUSE_SECONDS
        while self._store.add("left", 0) < ranks:
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE_SECONDS, 1.5 * pause)
