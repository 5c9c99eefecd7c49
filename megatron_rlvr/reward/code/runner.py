"""Runs one solution in a process of its own, bounded in time, memory and output, and confined by the kernel."""

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_CHECKOUT = str(Path(__file__).parents[3])
# The folder of the package is removed from the search path before anything is confined, so that it cannot be read.
_START = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from megatron_rlvr.reward.code.solution import main; "
    "sys.path.pop(0); main()"
)
_KEPT_VARIABLES = ("MEGATRON_RLVR_STARTED_BY", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
"""Variables that a solution gets: the mark of the process guard, and none of the trainer's secrets."""
_MAX_OUTPUT_BYTES = 2**20


@dataclass(frozen=True)
class Limits:
    """Limits of one run of a solution.

    Attributes:
        seconds: CPU time, and wall-clock time, of which Python's start takes a part.
        memory_bytes: Address space.
    """

    seconds: float
    memory_bytes: int


def output_of(program: str, given: str, limits: Limits) -> str | None:
    """Return what a program writes to standard output if it reads ``given``; None if it fails or exceeds a limit."""
    output, _ = _run({"program": program}, "run", given, limits)
    return output


def asserts_hold(program: str, asserts: Sequence[str], limits: Limits) -> bool:
    """Return whether a program runs to its end and each of the asserts holds in its namespace.

    The asserts run in the process of the program. One that ends early does not pass, as a random token is sent after
    the last assert; but a program that looks for the token in the frames of its process can send it, or tamper with the
    asserts. Pairs of standard input and output cannot be passed so.
    """
    token = secrets.token_hex(16)
    _, answer = _run({"program": program, "asserts": list(asserts), "token": token}, "assert", "", limits)
    return answer == token


def confinement() -> list[str]:
    """Return what confines solutions on this machine besides limits (`confinement.confine`)."""
    output, _ = _run({}, "probe", "", Limits(30.0, 2**30))
    return json.loads(output) if output else []


def _run(task: dict[str, object], mode: str, given: str, limits: Limits) -> tuple[str | None, str]:
    """Return the standard output of a run, None after a failure, and what it has sent over its socket."""
    deadline = time.monotonic() + limits.seconds
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-s", "-P", "-B", "-c", _START, _CHECKOUT, str(theirs.fileno())]
    command += [str(limits.seconds), str(limits.memory_bytes), mode]
    with ours, tempfile.TemporaryFile() as stdin:
        with theirs:
            stdin.write(given.encode("utf-8", "surrogatepass"))
            stdin.seek(0)
            process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
                | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            )
        try:
            ours.settimeout(max(0.01, deadline - time.monotonic()))
            with contextlib.suppress(OSError):  # it has ended
                ours.sendall(json.dumps(task).encode())
                ours.shutdown(socket.SHUT_WR)
            output = _read(process, deadline)
            answer = b""
            if output is not None:
                ours.settimeout(0.1)
                with contextlib.suppress(OSError):
                    answer = ours.recv(64)
            failed = output is None or process.returncode != 0
            return (None if failed else (output or b"").decode("utf-8", "replace")), answer.decode("ascii", "replace")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _read(process: "subprocess.Popen[bytes]", deadline: float) -> bytes | None:
    """Return all that a process writes until it ends; None if it takes too long or writes too much."""
    assert process.stdout is not None
    output = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return None
            part = os.read(process.stdout.fileno(), 2**16)
            output += part
            if len(output) > _MAX_OUTPUT_BYTES:
                return None
            if not part:
                break
    try:
        process.wait(max(0.01, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    return output
