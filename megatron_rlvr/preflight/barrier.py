"""A barrier after each check, so that a rank that fails in a check cannot leave others waiting for it forever.

A check runs on every rank and may use collectives. If it raises on one rank, others may wait for that rank in a
collective. So ranks that leave a check, successfully or not, increment a counter in the process group's store, on which
none of them blocks. If all arrive, they exchange their results, and the next check starts. If some do not arrive within
`STUCK_SECONDS` after a failure, they are stuck, and the main rank ends the preflight with the results so far.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from megatron_rlvr.distributed import process_group
from megatron_rlvr.preflight.context import PreflightContext, RankFailure

T = TypeVar("T")

# A rank that is still in a check this long after another failed in it is waiting for that one.
STUCK_SECONDS = 15.0
_POLL_SECONDS = 0.1


class CheckBarrier:
    """Runs checks on all ranks, with a barrier after each.

    Args:
        context: The run under check.
        give_up: Called in a separate thread of the main rank with the failure behind which ranks are stuck. It must
            end the process.
    """

    def __init__(self, context: PreflightContext, give_up: Callable[[RankFailure], None]) -> None:
        self._context = context
        self._store = process_group.store()
        self._give_up = give_up
        self._checks = 0

    def run(self, check: Callable[[], T]) -> list[T | RankFailure]:
        """Return the result of ``check`` on every rank, or its failure there. A collective over the world."""
        self._checks += 1
        name = f"preflight/{self._checks}"
        here: T | RankFailure
        with self._watched(name):
            try:
                here = check()
            except Exception as error:  # a failed check, whatever it is, becomes a row of the table
                here = self._context.failure(error)
                self._store.set(f"{name}/failure", json.dumps([here.rank, here.sentence]))
            if self._store.add(f"{name}/left", 1) == self._context.ranks.world_size:
                self._store.set(f"{name}/all", "")
            while not self._store.check([f"{name}/all"]):
                time.sleep(_POLL_SECONDS)
        return self._context.gather(here)

    @contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        """Watch for stuck ranks in a thread of the main rank, which may itself be one of them."""
        over = threading.Event()
        if self._context.ranks.is_main and self._context.ranks.world_size > 1:
            threading.Thread(target=self._watch, args=(name, over), name="preflight", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _watch(self, name: str, over: threading.Event) -> None:
        store = process_group.store()  # a connection for this thread alone
        stuck_at = None
        while not over.wait(_POLL_SECONDS):
            if stuck_at is None and store.check([f"{name}/failure"]):
                stuck_at = time.monotonic() + STUCK_SECONDS
            if stuck_at is not None and time.monotonic() > stuck_at and not store.check([f"{name}/all"]):
                try:
                    self._give_up(RankFailure(*json.loads(store.get(f"{name}/failure"))))
                finally:
                    os._exit(1)
