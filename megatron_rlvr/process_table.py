"""The processes of this machine, as /proc lists them (Linux): whether one still runs, and killing a tree of them.

A process id alone identifies nothing, because ids are reused; with the start time it identifies one process since the
machine booted, within one process table (a container has its own).
"""

import contextlib
import os
import signal
import time
from functools import cache
from pathlib import Path

_KILL_SECONDS, _POLL_SECONDS = 10.0, 0.02
_START_TIME, _SESSION, _STATE = 19, 3, 0  # fields of /proc/PID/stat, counted from its third
_PROC = Path("/proc")


@cache
def table_id() -> str:
    """Return a name of this process table: equal in two processes if and only if they see each other's process ids."""
    with contextlib.suppress(OSError):
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat(_PROC / 'self/ns/pid').st_ino}"
    return f"unknown/{os.getpid()}/{time.monotonic_ns()}"  # no /proc: equal to no other


def start_time(pid: int) -> str | None:
    """Return the start time of a process in clock ticks since the machine booted; None if it does not run.

    A process that has been killed still runs until its last thread has left the kernel; a zombie does not run.
    """
    fields = _stat(pid)
    return fields[_START_TIME] if fields else None


def is_suspended(pid: int) -> bool:
    """Return whether a process has been stopped by SIGSTOP, or by Ctrl-Z in its terminal."""
    return _stat(pid)[:1] == ["T"]


def kill_tree(sessions: set[int], mark: str | None = None) -> None:
    """Kill processes with SIGKILL, new ones included, and wait up to 10 s until all of them have exited.

    Children of this process among them become zombies, which the caller reaps.

    Args:
        sessions: Sessions whose processes are killed, whichever their parents are by now.
        mark: Text ``NAME=VALUE``; processes are killed as well if a variable of their environment begins with it. It
            finds those that have left the session.
    """
    deadline = time.monotonic() + _KILL_SECONDS
    while time.monotonic() < deadline:
        found = [pid for pid in _all() if _is_member(pid, sessions, mark)]
        for pid in found:
            with contextlib.suppress(OSError):  # it has exited, or runs as another user
                os.kill(pid, signal.SIGKILL)
        if not found:
            return
        time.sleep(_POLL_SECONDS)


def _all() -> list[int]:
    names = os.listdir(_PROC) if _PROC.is_dir() else []
    return [int(name) for name in names if name.isdigit() and int(name) != os.getpid()]


def _is_member(pid: int, sessions: set[int], mark: str | None) -> bool:
    fields = _stat(pid)
    if not fields:
        return False
    if int(fields[_SESSION]) in sessions:
        return True
    if mark is None:
        return False
    try:
        return b"\0" + mark.encode() in b"\0" + (_PROC / str(pid) / "environ").read_bytes()
    except OSError:  # it has exited, or belongs to another user
        return False


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on; none if the process does not run."""
    folder = _PROC / str(pid)
    try:
        fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        if fields and fields[_STATE] in "ZX" and len(os.listdir(folder / "task")) <= 1:
            return []
    except OSError:
        return []
    return fields
