"""What the checks look at, and how all ranks take part in one without any being left waiting for good.

A check runs on every rank and may use collectives. One that raises on some rank has others wait for it there. So ranks
that leave a check, whether it ended well or not, meet at counters in the process group's store, where nobody blocks:
if all come, they tell each other what happened, and the next check begins; if some do not come within a while after
a failure, they are stuck, and the main rank ends it all with the table as far as it got.
"""

import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch.distributed as dist

from megatron_rlvr.distributed import process_group
from megatron_rlvr.distributed.collectives import gather
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.errors import FaultError
from megatron_rlvr.signals import Signals
from megatron_rlvr.startup.resolve import Resolved

if TYPE_CHECKING:
    from megatron_rlvr.engines.sglang.pool import ServerPool
    from megatron_rlvr.preflight.rehearsal import Rehearsal

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Whoever has not left a check so long after another has failed in it waits for that one.
STUCK_SECONDS = 15.0
_LOOK_SECONDS = 0.1


class PreflightError(FaultError):
    """A check that cannot go on; one sentence."""


@dataclass(frozen=True)
class Fault:
    """An exception on a rank, as a sentence."""

    rank: int
    sentence: str


@dataclass
class Site:
    """A run and the place where it is to run, as checks see them.

    Attributes:
        full_length: rehearse with responses as long as the run's.
        longest: try the largest micro-batches on a CPU too.
        pool: of the servers, on ranks that talk to them, once they were found.
        rehearsal: once it has begun.
        resources: closed at the end.
        folders: that this rank has made.
    """

    resolved: Resolved
    ranks: Ranks
    signals: Signals
    full_length: bool = False
    longest: bool = False
    pool: "ServerPool | None" = None
    rehearsal: "Rehearsal | None" = None
    resources: ExitStack = field(default_factory=ExitStack)
    folders: list[Path] = field(default_factory=list)

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``; a collective over the world."""
        return gather(value, cast(dist.ProcessGroup, dist.group.WORLD))

    def attempt(self, look: Callable[[], T]) -> list[T | Fault]:
        """What ``look`` returned on every rank, or its failure there; a collective that every rank reaches."""
        here: T | Fault
        try:
            here = look()
        except Exception as error:
            here = self.fault(error)
        return self.gather(here)

    def new_folder(self, near: Path) -> Path:
        """A folder of the preflight's own in the file system of ``near``, for every rank, and for servers of another
        user too; removed at the end. A collective.

        Raises: PreflightError on every rank.
        """

        def make() -> Path:
            folder = existing(near).absolute() / f".preflight-{secrets.token_hex(4)}"
            if self.ranks.is_main:
                folder.mkdir()
                self.folders.append(folder)
            return folder

        made = self.attempt(make)[0]
        if isinstance(made, Fault):
            raise PreflightError(made.sentence)
        self.resources.callback(self.remove_folders)
        return made

    def remove_folders(self) -> None:
        """All that this rank has made."""
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)

    def fault(self, error: Exception) -> Fault:
        """An error on this rank. One that is not ours leaves its traceback in the log."""
        text = " ".join(str(error).split())
        if type(error).__name__ == "OutOfMemoryError":
            return Fault(self.ranks.rank, f"out of memory ({text}); {LESS_MEMORY}")
        if type(error).__module__.startswith("megatron_rlvr"):
            return Fault(self.ranks.rank, text)
        if isinstance(error, OSError):
            return Fault(self.ranks.rank, f"{text}; look at what it names, and try again")
        logger.error("rank %d failed", self.ranks.rank, exc_info=error)
        return Fault(self.ranks.rank, f"{type(error).__name__}: {text}; see the traceback of rank {self.ranks.rank}")


LESS_MEMORY = (
    "lower batch.tokens_per_micro_batch, raise parallel.tensor, pipeline or context, or set "
    "megatron.recompute_granularity, recompute_method and recompute_num_layers"
)


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def faults_in(results: list[Any]) -> list[Fault]:
    """The failures among what `Site.attempt` returned."""
    return [result for result in results if isinstance(result, Fault)]


class Meeting:
    """Where ranks meet after each check.

    Args:
        give_up: called on the main rank, in a thread of its own, with the failure that ranks are stuck behind. It must
            end the process.
    """

    def __init__(self, site: Site, give_up: Callable[[Fault], None]) -> None:
        self._site = site
        self._store = process_group.store()
        self._give_up = give_up
        self._checks = 0

    def all_run(self, act: Callable[[], T]) -> list[T | Fault]:
        """What ``act`` returned on every rank, or its failure there. A collective over the world."""
        self._checks += 1
        name = f"preflight/{self._checks}"
        here: T | Fault
        with self._watched(name):
            try:
                here = act()
            except Exception as error:
                here = self._site.fault(error)
                self._store.set(f"{name}/fault", json.dumps([here.rank, here.sentence]))
            if self._store.add(f"{name}/left", 1) == self._site.ranks.world_size:
                self._store.set(f"{name}/all", "")
            while not self._store.check([f"{name}/all"]):
                time.sleep(_LOOK_SECONDS)
        return self._site.gather(here)

    @contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        """On the main rank: somebody looks whether ranks are stuck while this one may be among them."""
        over = threading.Event()
        if self._site.ranks.is_main and self._site.ranks.world_size > 1:
            threading.Thread(target=self._watch, args=(name, over), name="preflight", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _watch(self, name: str, over: threading.Event) -> None:
        store = process_group.store()  # a connection of this thread's own
        stuck_at = None
        while not over.wait(_LOOK_SECONDS):
            if stuck_at is None and store.check([f"{name}/fault"]):
                stuck_at = time.monotonic() + STUCK_SECONDS
            if stuck_at is not None and time.monotonic() > stuck_at and not store.check([f"{name}/all"]):
                try:
                    self._give_up(Fault(*json.loads(store.get(f"{name}/fault"))))
                finally:
                    os._exit(1)
