"""The trainer's end of one grader process (``worker.py``): start, ask with a hard deadline, kill.

A process starts in the thread that constructs it, and Linux kills it when *that thread* ends (not when the trainer
does): construct it in a thread that lives as long as the process shall.
"""

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from multiprocessing.connection import Connection

from megatron_rlvr.errors import InputError

START_LIMIT_SECONDS = 60.0
"""Importing sympy takes a second; on a cold network file system, or 16 at once on two cores, much longer."""


class RewardError(InputError):
    """A reward function, or a setting of the graders, that cannot be used; the message is for the user."""


class GraderTimeout(Exception):
    """No answer within the deadline; the process has been killed."""


class GraderDied(Exception):
    """The process ended instead of answering."""


class GraderProcess:
    """One grader process. Use it from one thread; only ``kill`` may come from another."""

    def __init__(self, function: str, timeout_seconds: float) -> None:
        """Starts it without waiting.

        Args:
            function: "math" or "module:function".
            timeout_seconds: the deadline of every answer.

        Raises: RewardError if the system cannot start a process.
        """
        self._function = function
        self._timeout_seconds = timeout_seconds
        ours, theirs = socket.socketpair()
        # A stopped process does not read, and a long response overfills the socket: sending has the deadline, too.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout_seconds))
        self._connection = Connection(ours.detach())
        command = [sys.executable, "-u", "-m", "megatron_rlvr.reward.worker"]
        # It imports what the trainer would, in the same order; -m adds the current directory.
        search_path = filter(None, [*sys.path, os.environ.get("PYTHONPATH")])
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [*command, str(theirs.fileno()), str(os.getpid()), function],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # standard error, by descriptor: sys.stderr may be captured
                    pass_fds=[theirs.fileno()],
                    env={
                        **os.environ,
                        "PYTHONPATH": os.pathsep.join(search_path),
                        "OMP_NUM_THREADS": "1",
                    },
                )
            except OSError as error:
                self._connection.close()
                raise RewardError(f"reward.workers: no grader process can be started ({error}); set fewer") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self, limit_seconds: float = START_LIMIT_SECONDS) -> None:
        """Waits until the function is imported.

        Raises: RewardError if it cannot be imported, or the process dies or is not ready in time; it is reaped then.
        """
        try:
            if self._connection.poll(limit_seconds):
                error = self._connection.recv()
                if error is None:
                    return
                message = f"cannot be imported: {error}; put its folder on PYTHONPATH, or start from that folder"
            else:
                message = f"was not imported within {limit_seconds:.0f} s; let its module do less when it is imported"
        except (EOFError, OSError):
            message = f"cannot be imported: {self._cause_of_death()}; its standard error says why"
        self.reap()
        raise RewardError(f"reward.function {self._function} {message}")

    def ask(self, task: bytes) -> tuple[bool | float | None, str | None]:
        """(value, failure) of one task, a pickled (Prompt, response).

        Raises: GraderTimeout or GraderDied; the process is reaped then, and must be replaced.
        """
        deadline = time.monotonic() + self._timeout_seconds
        try:
            self._connection.send_bytes(task)
            if self._connection.poll(max(0.0, deadline - time.monotonic())):
                return self._connection.recv()
        except BlockingIOError:
            pass  # the deadline of sending
        except (EOFError, OSError):
            cause = self._cause_of_death()
            self.reap()
            raise GraderDied(cause) from None
        self.reap()
        raise GraderTimeout(f"timeout after {self._timeout_seconds} s")

    def kill(self) -> None:
        """Sends SIGKILL; ``ask`` and ``wait_until_ready`` in another thread return at once. Harmless if it is dead."""
        self._process.kill()

    def reap(self) -> None:
        """Kills the process, waits for its end and closes the socket."""
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def _cause_of_death(self) -> str:
        """How the process ended, once the socket has ended."""
        try:
            code = self._process.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            return "grader died: it closed its socket"
        return f"grader died of {signal.Signals(-code).name}" if code < 0 else f"grader died with exit code {code}"


def _timeval(seconds: float) -> bytes:
    """C's struct timeval, as setsockopt takes it."""
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
