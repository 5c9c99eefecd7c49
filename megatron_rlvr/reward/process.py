"""Trainer's side of one grader process (``worker.py``): start it, send tasks with a hard deadline, kill it.

A reward function may start processes of its own. They are killed with the grader, and after the end of the trainer,
also if it was killed (`process_guard.py`).

The thread that constructs a `GraderProcess` starts the process, and Linux kills the process when *that thread* ends
(not when the trainer ends): construct it in a thread that lives at least as long as the process should.
"""

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_rlvr.errors import InputError
from megatron_rlvr.process_guard import ProcessGuard
from megatron_rlvr.types import Graded

START_LIMIT_SECONDS = 60.0
"""Time limit for importing the reward function.

Importing numpy takes a second; on a cold network file system, or for 16 processes at once on two cores, much longer.
"""

# A deadline is extended by the time for which other processes had the CPU, at most to this multiple of it.
_LONGEST_DEADLINE = 10.0


class RewardError(InputError):
    """Invalid reward function or setting of the graders."""


class GraderTimeout(Exception):
    """The process missed the deadline of a task and has been killed."""


class GraderDied(Exception):
    """The process exited before it returned a result."""


class GraderProcess:
    """One grader process. Use it from one thread only; `kill` may be called from any thread."""

    def __init__(
        self, guard: ProcessGuard, function: str, timeout_seconds: float, answer_after: str | None = None
    ) -> None:
        """Start the process without waiting for it.

        Args:
            guard: Starts and kills the process.
            function: The reward functions, as `reward_spec.as_text` writes them.
            timeout_seconds: Deadline of each task in seconds.
            answer_after: Text after which the answer begins, for built-in functions; None for the whole response.

        Raises:
            RewardError: If the system cannot start a process.
        """
        self._guard = guard
        self._function = function
        self._timeout_seconds = timeout_seconds
        trainer_end, grader_end = socket.socketpair()
        # The deadline applies to sending too: a stopped process does not read, and a long response fills the socket.
        trainer_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout_seconds))
        self._connection = Connection(trainer_end.detach())
        command = [sys.executable, "-u", "-m", "megatron_rlvr.reward.worker"]
        # The process imports modules from where the trainer would, in the same order; -m adds the current directory.
        search_path = filter(None, [*sys.path, os.environ.get("PYTHONPATH")])
        with grader_end:
            try:
                self._process = guard.start(
                    [*command, str(grader_end.fileno()), str(os.getpid()), function, answer_after or ""],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # standard error, by descriptor: sys.stderr may be captured
                    pass_fds=[grader_end.fileno()],
                    env={
                        **os.environ,
                        "PYTHONPATH": os.pathsep.join(search_path),
                        "OMP_NUM_THREADS": "1",
                    },
                )
            except OSError as error:
                self._connection.close()
                raise RewardError(f"reward.workers: cannot start a grader process ({error}); set fewer") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self, limit_seconds: float = START_LIMIT_SECONDS) -> None:
        """Wait until the process has imported the function.

        Raises:
            RewardError: If the function cannot be imported, or the process dies or misses the limit. The process has
                then been reaped.
        """
        try:
            if self._connection.poll(limit_seconds):
                error = self._connection.recv()
                if error is None:
                    return
                message = f"cannot be imported ({error}); add its folder to PYTHONPATH, or start in that folder"
            else:
                message = f"not imported within {limit_seconds:.0f} s; make its module do less work at import"
        except (EOFError, OSError):
            message = f"cannot be imported ({self._cause_of_death()}); see its output on standard error"
        self.reap()
        raise RewardError(f"reward.function={self._function}: {message}")

    def grade(self, task: bytes) -> Graded | str:
        """Send one task, a pickled (Prompt, response), and return the result of the function, or why there is none.

        The time for which the process was ready to run, and others had the CPU, does not count towards the deadline;
        ten times the deadline ends a task in any case.

        Raises:
            GraderTimeout: If the process misses the deadline.
            GraderDied: If the process exits first. In both cases it has been reaped and must be replaced.
        """
        start, waited = time.monotonic(), seconds_without_cpu(self.pid)
        try:
            self._connection.send_bytes(task)
            while True:
                limit = self._timeout_seconds + max(0.0, seconds_without_cpu(self.pid) - waited)
                remaining = start + min(limit, _LONGEST_DEADLINE * self._timeout_seconds) - time.monotonic()
                if self._connection.poll(max(0.0, remaining)):
                    return self._connection.recv()
                if remaining <= 0.0:
                    break
        except BlockingIOError:
            pass  # sending missed the deadline
        except (EOFError, OSError):
            cause = self._cause_of_death()
            self.reap()
            raise GraderDied(cause) from None
        self.reap()
        raise GraderTimeout(f"timeout after {self._timeout_seconds} s")

    def kill(self) -> None:
        """Send SIGKILL; `grade` and `wait_until_ready` in another thread then return at once.

        Killing a dead process has no effect.
        """
        self._process.kill()

    def reap(self) -> None:
        """Kill the process and what it has started, wait until they have exited, and close the socket."""
        self._guard.kill(self._process)
        self._connection.close()

    def _cause_of_death(self) -> str:
        """Describe how the process ended, after its socket has closed."""
        try:
            code = self._process.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            return "grader died: it closed its socket"
        return f"grader died of {signal.Signals(-code).name}" if code < 0 else f"grader died with exit code {code}"


def seconds_without_cpu(pid: int) -> float:
    """Return for how long the main thread of a process has been ready to run without a CPU; 0 if that is not known."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    return 0.0


def _timeval(seconds: float) -> bytes:
    """Pack seconds as C's struct timeval, for setsockopt."""
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
