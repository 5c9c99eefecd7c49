"""Counters of one step in the process group's c10d store, which the leaders share while they sample.

Each counter changes by atomic additions, so no prompt is drawn twice and the number of finished groups is exact without
a collective. Leaders also wait for each other here, where nothing times out: the heartbeat (heartbeat.py) detects a
rank that has exited.
"""

import time
from dataclasses import dataclass, fields

import torch.distributed as dist

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.005, 0.25


@dataclass(frozen=True)
class Counts:
    """Values of the counters, over all data-parallel replicas.

    Attributes:
        drawn: Prompts claimed in this step; above the number of prompts if leaders claimed more than there are.
        finished: Groups of this step with all completions graded.
        informative: Finished groups that can be trained on.
        stopped: Leaders that stopped before the step had enough groups, for whatever reason.
    """

    drawn: int
    finished: int
    informative: int
    stopped: int


class Counters:
    """Counters of one attempt at a step, or of another occasion on which ranks wait for each other.

    Args:
        store: Store of all ranks; used by no other thread.
        name: Name of the attempt or occasion, used only once in the life of the store.
    """

    def __init__(self, store: dist.Store, name: str) -> None:
        self._store = dist.PrefixStore(f"rollout/{name}", store)

    def counts(self) -> Counts:
        """Return the current values."""
        return Counts(**{field.name: self._store.add(field.name, 0) for field in fields(Counts)})

    def claim(self) -> int:
        """Return the number of the next prompt of the step, from 0; no other caller gets the same."""
        return self._store.add("drawn", 1) - 1

    def finish(self, informative: bool) -> None:
        """Count a finished group."""
        self._store.add("finished", 1)
        if informative:
            self._store.add("informative", 1)

    def stop(self) -> None:
        """Count a leader that stopped early, so that all others stop as well."""
        self._store.add("stopped", 1)

    def leave(self) -> None:
        """Count a rank that has finished."""
        self._store.add("left", 1)

    def wait_for_all(self, ranks: int) -> None:
        """Return when this number of ranks has called `leave`."""
        pause = _FIRST_PAUSE_SECONDS
        while self._store.add("left", 0) < ranks:
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE_SECONDS, 1.5 * pause)
