"""Ranks for tests: processes on this machine that run a function together, and that a hang cannot outlive.

The processes are forked from one that has imported what they need (`zygote`), and are used again: `Ranks.run` hands
the first n of them a function, its arguments and a world of their own (RANK, WORLD_SIZE and a free port of the
loopback), and returns their results in rank order. If one fails or the time is up, all are killed by their process id,
and the next call starts new ones.
"""

import contextlib
import gc
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
import zygote

# When one rank has failed, the others may wait for it in a collective, or be about to report their own failure.
_GRACE_SECONDS = 1.0
# A process group that is still referred to has threads that wake a hundred times a second each. A process with more
# threads than this is replaced before the next run.
_MOST_THREADS = 120


_all: "weakref.WeakSet[Ranks]" = weakref.WeakSet()


class RankError(AssertionError):
    """A rank raised, died or did not answer in time; the message is its traceback."""


class Ranks:
    """Up to ``most`` processes, started when they are first needed."""

    def __init__(self, most: int = 4) -> None:
        self._most = most
        _all.add(self)
        self._processes: list[tuple[zygote.Process, Connection]] = []

    def run(self, function: Callable[..., Any], size: int, *arguments: Any, timeout: float = 240.0) -> list[Any]:
        """Call ``function(*arguments)`` on ``size`` ranks at once; return the result of each.

        The function is found by its name in its module, and joins a process group itself where it wants one
        (`joined_process_group`, or the package's own). Arguments and results are pickled.
        """
        for again in (True, False):
            self._start()
            port = _free_port()
            chosen = self._processes[:size]
            for rank, (_, connection) in enumerate(chosen):
                connection.send_bytes(pickle.dumps((_world(rank, size, port), function, arguments)))
            try:
                results = _answers([connection for _, connection in chosen], timeout)
                if any(_threads(process) > _MOST_THREADS for process, _ in chosen):
                    self.stop()
                return results
            except RankError as error:
                self.stop()
                # Another program may take the port between its choice and its use.
                if not (again and "EADDRINUSE" in str(error)):
                    raise
        raise AssertionError("not reached")

    def stop(self) -> None:
        """End the processes; those that are still busy after a second are killed, whatever they are doing."""
        for _, connection in self._processes:
            connection.close()
        deadline = time.monotonic() + _GRACE_SECONDS
        for process, _ in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
        for process, _ in self._processes:
            process.wait()
        self._processes = []

    def _start(self) -> None:
        for _ in range(self._most - len(self._processes)):
            ours, theirs = multiprocessing.Pipe()
            code = f"import sys; sys.path[:] = {sys.path!r}; from launcher import serve; serve()"
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = zygote.start([sys.executable, "-c", code], cwd=Path.cwd(), env=environment, stdin=theirs)
            theirs.close()
            self._processes.append((process, ours))


def stop_all() -> None:
    """End all ranks, which write down the lines that they ran, and the processes that fork."""
    for ranks in list(_all):
        ranks.stop()
    zygote.stop()


@contextlib.contextmanager
def joined_process_group(timeout_seconds: float = 120.0) -> Iterator[Any]:
    """The group of all ranks of this run, on gloo, left at the end."""
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_seconds))
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _world(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve() -> None:
    """Body of a rank's process: serve one request after the other until the other end of its standard input closes."""
    warnings.simplefilter("ignore")
    connection = Connection(os.dup(0))
    while True:
        try:
            environment, function, arguments = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        os.environ.update(environment)
        answer: Any
        try:
            answer = (True, function(*arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        answer, reply = None, pickle.dumps(answer)
        forget_process_groups()
        connection.send_bytes(reply)


def forget_process_groups() -> None:
    """Drop the references to process groups that outlive a run: reference cycles, and keys of Megatron's caches."""
    rotary = sys.modules.get("megatron.core.models.common.embeddings.rotary_pos_embedding")
    if rotary is not None:
        rotary.RotaryEmbedding.forward.cache_clear()
    gc.collect()


def _threads(process: zygote.Process) -> int:
    return psutil.Process(process.pid).num_threads()


def _answers(connections: list[Connection], timeout: float) -> list[Any]:
    """Return the result of every rank; RankError with the tracebacks if one fails."""
    results: dict[int, Any] = {}
    failures: list[str] = []
    deadline = time.monotonic() + timeout
    waiting = dict(zip(connections, range(len(connections)), strict=True))
    while waiting and (left := deadline - time.monotonic()) > 0:
        for ready in wait(list(waiting), left):
            assert isinstance(ready, Connection)
            rank = waiting.pop(ready)
            try:
                good, value = pickle.loads(ready.recv_bytes())
            except EOFError:
                good, value = False, "the process died"
            if good:
                results[rank] = value
            else:
                failures.append(f"rank {rank}: {value}")
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    if waiting:
        failures.append(f"no answer from rank {', '.join(map(str, waiting.values()))}")
    if failures:
        raise RankError("\n".join(failures))
    return [results[rank] for rank in range(len(connections))]
