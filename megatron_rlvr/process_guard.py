"""Children of which nothing is left when this process ends, whichever way: not they, nor what they have started.

Each child is the first process of a session of its own, and has a mark in its environment, which whatever it starts
inherits. `ProcessGuard.kill` kills the session, and what has the mark and has left the session. If this process is
killed, a process of a few megabytes does the same, in place of it: ``python -m megatron_rlvr.process_guard MARK`` reads
ids of sessions from a pipe, and the end of the pipe is the end of this process. It has its own session as well, so that
what a terminal or a launcher sends to this process's group does not reach it.

A process that clears its environment *and* leaves its session escapes. So does everything if both this process and the
guard are killed; children that use `child_process.end_with_parent` then still end themselves.
"""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rlvr.process_table import kill_tree

_VARIABLE = "MEGATRON_RLVR_STARTED_BY"


class ProcessGuard:
    """Starts processes, and kills each with everything that it has started. Its methods are thread-safe."""

    def __init__(self) -> None:
        """Start the process that takes over when this one is killed.

        Raises: OSError if the system cannot start a process.
        """
        self._name = uuid.uuid4().hex
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._marks: dict[int, str] = {}
        """{session: mark} of children that have not been killed."""
        self._guard = subprocess.Popen(
            [sys.executable, "-m", "megatron_rlvr.process_guard", f"{_VARIABLE}={self._name}."],
            stdin=subprocess.PIPE,
            # A standard stream that it shared would keep a pipe open after this process.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )

    def start(self, command: Sequence[str], *, env: Mapping[str, str], **options: Any) -> "subprocess.Popen[bytes]":
        """Start a process in a session of its own.

        Args:
            env: Its environment, to which the mark is added.
            options: Further arguments of `subprocess.Popen`.

        Raises: OSError if the system cannot start a process.
        """
        mark = f"{_VARIABLE}={self._name}.{next(self._numbers)}."
        variable, _, value = mark.partition("=")
        with self._lock:  # until the guard knows of it
            process = subprocess.Popen(command, env={**env, variable: value}, start_new_session=True, **options)
            self._marks[process.pid] = mark
            self._report(f"+{process.pid}")
        return process

    def kill(self, process: "subprocess.Popen[bytes]") -> None:
        """Kill a process and everything that it has started, and reap it. May be called repeatedly."""
        with self._lock:
            mark = self._marks.get(process.pid)
        if mark is None:
            return
        process.kill()
        kill_tree({process.pid}, mark)
        process.wait()
        with self._lock:
            self._marks.pop(process.pid, None)
            self._report(f"-{process.pid}")

    def close(self) -> None:
        """Kill everything that is left, and end the guard. May be called repeatedly."""
        with self._lock, contextlib.suppress(OSError):
            if self._guard.stdin is not None:
                self._guard.stdin.close()
        self._guard.wait()

    def _report(self, line: str) -> None:
        assert self._guard.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it was killed, or is closed
            self._guard.stdin.write(line.encode() + b"\n")
            self._guard.stdin.flush()


def main() -> None:
    """Wait for the end of the process that has started this one, then kill what that has left."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    sessions: set[int] = set()
    for line in sys.stdin.buffer:
        number = int(line[1:])
        sessions = sessions | {number} if line.startswith(b"+") else sessions - {number}
    kill_tree(sessions, sys.argv[1])


if __name__ == "__main__":
    main()
