"""The lease of a run folder: one run at a time reads and changes it. Imports no torch.

`run.dir`/lease/TOKEN.json names the processes of a run: host, process table, process ids with start times. The main
rank takes the lease before anything else in the folder is read or changed, and touches its file every few seconds:

    create the file of this run; list the folder; alone in it: the lease is taken
    another file of a run that is alive:  remove the own file, wait a random time, try again
    another file of a run that is dead:   remove it, try again

Two runs cannot both take it: the one that created its file later finds the other's in the list. This needs only files
that can be created and listed, and no locks, hard links or exclusive creation, which network file systems lack or get
wrong. As tokens are never used again, whatever is removed late is not the lease of a third run.

A run is dead if none of its processes runs. Those of this process table are looked up at once. For those of other hosts
or containers, the file must not have been touched for `SILENT_SECONDS` of this process's observations, so that clocks
are never compared, and a file system that did not answer for a while makes no run dead.

A run that finds its file removed, since it was suspended for longer than that, ends at once.
"""

import contextlib
import errno
import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rlvr.config import RunSettings, SettingsError
from megatron_rlvr.errors import FaultError
from megatron_rlvr.process_table import is_suspended, start_time, table_id

FOLDER = "lease"
SILENT_SECONDS = 25.0
"""Time without a touch after which a run of another process table is dead."""
_ENDING_SECONDS = 30.0
"""Time for which the next run waits, besides `run.grace_seconds`, for one that is ending."""
_TOUCH_SECONDS = 5.0
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Process:
    """One process of a run.

    Attributes:
        host: Name of its machine, for messages.
        table: Its process table (`process_table.table_id`).
        pid: Its id in that table.
        started: Its start time (`process_table.start_time`).
    """

    host: str
    table: str
    pid: int
    started: str | None

    @classmethod
    def this(cls) -> "Process":
        """Return the process that calls."""
        return cls(socket.gethostname(), table_id(), os.getpid(), start_time(os.getpid()))

    def __str__(self) -> str:
        suspended = ", suspended" if self.table == table_id() and is_suspended(self.pid) else ""
        return f"process {self.pid} on {self.host}{suspended}"


class Lease:
    """A lease that is held until `release`, or until this process ends.

    Args:
        path: File of the lease.
        created: The folder of the file, and those that were created for it, the deepest first.
        key: Setting or flag that names the folder of the run, for messages.
    """

    def __init__(self, path: Path, created: list[Path], key: str) -> None:
        self._path = path
        self._created = created
        self._key = key
        self._released = threading.Event()
        self._touching: threading.Thread | None = None

    def keep(self, on_lost: Callable[[Exception], object]) -> None:
        """Touch the file from now on, in a thread of its own.

        Args:
            on_lost: Called once, in that thread, with an error in words, when another run has removed the file.
        """
        self._touching = threading.Thread(target=self._keep, args=(on_lost,), name="lease", daemon=True)
        self._touching.start()

    def name_processes(self, processes: Iterable[Process]) -> None:
        """Replace the processes that the file names, by those of all ranks.

        Raises: OSError if the file cannot be written, or has been removed.
        """
        text = _as_text(processes)
        with self._path.open("r+", encoding="utf-8") as file:  # never creates the file
            file.write(text)
            file.truncate()

    def release(self) -> None:
        """Remove the file, its folder, and those created for it, if they are empty. May be called repeatedly.

        A file that cannot be removed is that of a dead run for the next one.
        """
        self._released.set()
        if self._touching is not None:
            self._touching.join()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
            for folder in self._created:
                folder.rmdir()

    def _keep(self, on_lost: Callable[[Exception], object]) -> None:
        while not self._released.wait(_TOUCH_SECONDS):
            try:
                os.utime(self._path)
            except OSError as error:  # of others, such as a folder that became read-only, what writes there reports
                if error.errno in (errno.ENOENT, errno.ESTALE):
                    folder = self._path.parent.parent
                    on_lost(
                        FaultError(
                            f"{self._key}={folder}: {self._path} was removed, by another run if this one was "
                            f"suspended for {SILENT_SECONDS:.0f} s or more; "
                            "this run ends, so that only one writes there"
                        )
                    )
                    return


def take_lease(run: RunSettings, say: Callable[[str], object], key: str = "run.dir") -> Lease:
    """Take the lease of `run.dir`; wait up to `run.grace_seconds` + 30 s for a run that may be ending.

    Args:
        say: Prints a line that says for which process this one waits.
        key: Setting or flag that names the folder, for messages.

    Raises:
        SettingsError: Another run uses the folder for longer, or the folder cannot be written. Nothing in it has been
            read or changed.
    """
    limit = run.grace_seconds + _ENDING_SECONDS
    deadline = time.monotonic() + limit
    folder = Path(run.dir) / FOLDER
    observed = _Observed(folder)
    waiting = ""
    while True:
        try:
            users = observed.users()
            if not users and (lease := _try_to_take(folder, key)) is not None:
                return lease
        except (OSError, ValueError) as error:
            raise SettingsError(f"{key}={run.dir}: cannot be written ({error}); choose another folder") from None
        if users and time.monotonic() >= deadline:
            raise SettingsError(
                f"{key}={run.dir}: in use by another run, {users}, which has not ended within {limit:.0f} s "
                f"(run.grace_seconds + {_ENDING_SECONDS:.0f}); stop it, or choose another folder"
            )
        if users and not waiting:
            waiting = users
            say(f"{key}={run.dir} is in use by another run, {users}; waiting up to {limit:.0f} s for its end")
        time.sleep(_POLL_SECONDS * random.uniform(0.5, 1.5) if users else random.uniform(0.0, _POLL_SECONDS))


def _try_to_take(folder: Path, key: str) -> Lease | None:
    """Create the file of this run; None if there is another file, or the folder has just been removed."""
    created = [folder, *(path for path in folder.parents if not path.exists())]  # a killed run has left the first
    folder.mkdir(parents=True, exist_ok=True)
    lease = Lease(folder / f"{uuid.uuid4().hex}.json", created, key)
    try:
        lease._path.write_text(_as_text([Process.this()]), encoding="utf-8")
    except FileNotFoundError:
        return None
    if _files(folder) == [lease._path]:
        return lease
    lease._path.unlink(missing_ok=True)
    return None


class _Observed:
    """The files of other runs in a lease folder, and for how long each has not been touched."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[Path, tuple[int, float, float]] = {}
        """{file: (its time of modification, time of the last observation, seconds without a touch)}."""

    def users(self) -> str:
        """Return the processes of runs that are alive, in words; "" if there is none. Removes the files of dead runs.

        Raises: OSError if the folder cannot be read.
        """
        alive = []
        for path in _files(self._folder):
            try:
                with path.open("rb") as file:  # a file server is asked again at each opening
                    touched, text = os.fstat(file.fileno()).st_mtime_ns, file.read()
            except FileNotFoundError:
                continue
            users = _running(_from_text(text), silent=self._silence(path, touched) >= SILENT_SECONDS)
            if users:
                alive.append(users)
            else:
                path.unlink(missing_ok=True)
        return " and ".join(alive)

    def _silence(self, path: Path, touched: int) -> float:
        """Seconds of observation for which a file has not been touched."""
        now = time.monotonic()
        before, last, seconds = self._seen.get(path, (None, now, 0.0))
        # A longer pause between two observations was one of this process or of the file system.
        seconds = seconds + min(now - last, 4 * _POLL_SECONDS) if touched == before else 0.0
        self._seen[path] = touched, now, seconds
        return seconds


def _running(processes: list[Process], silent: bool) -> str:
    """Return the processes of a run that may run, in words; "" if there is none.

    Args:
        processes: Those that the run's file names; [] if the file is incomplete.
        silent: Whether the file has not been touched for long.
    """
    here = [process for process in processes if process.table == table_id()]
    running = [process for process in here if process.started and start_time(process.pid) == process.started]
    elsewhere = [process for process in processes if process not in here]
    if not silent:
        running += elsewhere
    if not running:
        return "" if silent or processes else "which is just starting"
    more = f" and {len(running) - 1} more" if len(running) > 1 else ""
    return f"{running[0]}{more}"


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".json")
    except FileNotFoundError:
        return []


def _as_text(processes: Iterable[Process]) -> str:
    return json.dumps([asdict(process) for process in processes]) + "\n"


def _from_text(text: bytes) -> list[Process]:
    """Return the processes that a file names; [] if it is just being written, or is no file of a run."""
    try:
        values: Any = json.loads(text)
        return [Process(**{key: value[key] for key in ("host", "table", "pid", "started")}) for value in values]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
