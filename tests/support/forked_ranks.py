"""Runs of two ranks that meet a given end, one after the other: ``python forked_ranks.py CONFIG FOLDER SEED END...``.

Launchers and ranks are forked from this process, which has imported everything, so that a run lasts a few seconds. A
launcher does what torchrun does: it starts each rank in a session of its own, has their store, and when a rank fails,
sends SIGTERM to the others and SIGKILL some time later. The next run is started at once, while ranks of the last one
may still be ending. Ends:

    launcher, rank 0, rank 1, tree      SIGKILL at a random moment: at the start, in a step, while it saves
    suspended                           SIGSTOP of rank 1 in a step
    twice                               a second launcher in the middle of the run, which then gets SIGTERM
    terminal                            a run without a launcher, of which the terminal is closed
    full PLACE, read-only PLACE         the disk of the folder, when rank 0 is about to write there (`PLACES`)
    memory                              the kernel kills rank 1 in a step, as the memory of its cgroup is exhausted
    none

A full disk has room again for the next run, and a disk that became read-only is repaired and mounted again.

Prints a line for each: end, exit status of the launcher (of the second one for `twice`), seconds from the kill or
signal until all ranks had ended, and the latest checkpoint. The output of runs is in CONFIG.out.
"""

import json
import os
import pty
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch.distributed as dist

from megatron_rlvr import metrics, trainer
from megatron_rlvr.evaluation.training import TrainingEvaluation
from megatron_rlvr.process_table import start_time
from megatron_rlvr.startup import assembly, lease
from megatron_rlvr.startup import run as run_module
from megatron_rlvr.train import main

KILLS = ("launcher", "rank 0", "rank 1", "tree")
_PATIENCE_SECONDS = 4.0  # between SIGTERM and SIGKILL; torchrun's are 30

# {place: what writes there, and the number of its call at which that is about to fail}
PLACES: dict[str, tuple[Any, str, int]] = {
    "start": (run_module, "prepare_run_folder", 1),
    "metrics": (metrics.MetricsLog, "write", 2),
    "rollouts": (metrics.MetricsLog, "write_rollouts", 2),
    "tensorboard": (metrics._TensorBoard, "write", 2),
    "evaluation": (TrainingEvaluation, "run", 1),
    "export": (assembly, "export_policy", 1),
    "summary": (run_module, "write_summary", 1),
}


def before_call(owner: Any, name: str, number: int, action: Callable[[], object]) -> None:
    """Do something right before a function is called for the given time."""
    function, calls = getattr(owner, name), iter(range(1, 10**9))

    def replacement(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == number:
            action()
        return function(*arguments, **keywords)

    setattr(owner, name, replacement)


def fill(folder: Path) -> None:
    """Leave not a byte on the disk: neither a free block, nor room in the last block of a file that is appended to."""
    for path in [folder / "filler", folder / "metrics.jsonl", *folder.glob("tensorboard/*")]:
        for size in (1 << 16, 1 << 8, 1):
            with suppress(OSError), path.open("ab", buffering=0) as file:
                while file.write(b"\n" * size):
                    pass


def make_read_only(folder: Path) -> None:
    """Let the kernel find an error in the file system, after which it writes nothing there (errors=remount-ro)."""
    device = subprocess.run(["findmnt", "-no", "SOURCE", folder], capture_output=True, text=True, check=True).stdout
    Path("/sys/fs/ext4", Path(device.strip()).name, "trigger_fs_error").write_text("by a test")


def repair(folder: Path, image: str) -> None:
    for command in (
        ["umount", str(folder)],
        ["e2fsck", "-fy", image],
        ["mount", "-o", "loop,errors=remount-ro", image, str(folder)],
    ):
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=command[0] != "e2fsck")


def exhaust_memory() -> None:
    """Use more memory than this process's cgroup may."""
    Path(os.environ["MEMORY_GROUP"], "cgroup.procs").write_text(str(os.getpid()))
    bytearray(os.urandom(2**10)) * 2**20


def train(config: str, flags: Sequence[str], spoil: Callable[[], object] = lambda: None) -> NoReturn:
    """Body of a rank."""
    status: object = 1
    try:
        spoil()
        main([config, *flags])
        status = 0
    except SystemExit as left:
        status = left.code
    finally:
        sys.stdout.flush()
        os._exit(status if isinstance(status, int) else 1)


def start(
    config: str, flags: Sequence[str] = (), spoil: Callable[[int], object] = lambda rank: None
) -> tuple[int, list[int]]:
    """Fork a launcher; return its process id and those of its ranks. ``spoil`` is called in each, with its rank."""
    reader, writer = os.pipe()
    launcher = os.fork()
    if launcher:
        os.close(writer)
        with open(reader, encoding="ascii") as pipe:
            return launcher, json.loads(pipe.readline())
    os.close(reader)
    os.setsid()
    os.dup2(os.open(config + ".out", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks, gates = {}, []
    for rank in range(2):
        gate, opens = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(opens)
            os.close(writer)
            os.setsid()
            if not os.read(gate, 1):  # the launcher was killed
                os._exit(1)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
            train(config, flags, lambda: spoil(rank))  # noqa: B023
        os.close(gate)
        ranks[pid] = rank
        gates.append(opens)
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for opens in gates:
        os.write(opens, b"x")
    os.write(writer, json.dumps(list(ranks)).encode() + b"\n")
    os.close(writer)
    os._exit(_supervise(set(ranks), store))


def _supervise(ranks: set[int], store: dist.Store) -> int:
    """Wait for the ranks as torchrun does; return the status of the first that failed, or 0."""
    first = 0
    deadline = float("inf")
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            ranks.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            if code and not first:
                first = code if code > 0 else 128 - code
                deadline = time.monotonic() + _PATIENCE_SECONDS
                for rank in ranks:
                    os.killpg(rank, signal.SIGTERM)
            continue
        if time.monotonic() > deadline:
            for rank in ranks:
                os.killpg(rank, signal.SIGKILL)
        time.sleep(0.01)
    return first


def status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_until(condition: Callable[[], object], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"not in {seconds} s")
        time.sleep(0.002)


class Runs:
    """Runs of one configuration."""

    def __init__(self, config: str, folder: Path, seed: int) -> None:
        self.config = config
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.dice = random.Random(seed)

    def latest(self) -> str:
        path = self.checkpoints / "latest"
        return path.read_text().strip() if path.exists() else ""

    def wait_for_steps(self, steps: int, launcher: int) -> None:
        """Return after so many new checkpoints, or the end of the launcher."""
        for _ in range(steps):
            before = self.latest()
            wait_until(lambda before=before: self.latest() != before or not start_time(launcher))  # type: ignore[misc]

    def wait_for_a_moment(self, launcher: int) -> None:
        kind, pause = self.dice.choices(("early", "late", "saving"), (2, 4, 4))[0], self.dice.random()
        if kind == "early":
            time.sleep(2.0 * pause)
            return
        self.wait_for_steps(1, launcher)
        deadline = time.monotonic() + 0.3 * pause
        wait_until(
            lambda: (
                time.monotonic() > deadline
                if kind == "late"
                else any(self.checkpoints.glob("*.incomplete")) or not start_time(launcher)
            )
        )

    def meet(self, end: str) -> None:
        if end == "terminal":
            self.close_terminal()
            return
        if end.startswith(("full", "read-only", "memory")):
            self.spoil(end)
            return
        launcher, ranks = start(self.config, ["--run.timeout_minutes=0.1"] if end == "suspended" else [])
        if end in KILLS:
            self.wait_for_a_moment(launcher)
            self.kill(end, launcher, ranks)
            return
        began, status = time.monotonic(), None
        if end == "suspended":
            self.wait_for_steps(1, launcher)
            os.kill(ranks[1], signal.SIGSTOP)
            began = time.monotonic()
        elif end == "twice":
            self.wait_for_steps(1, launcher)
            lease._ENDING_SECONDS = 1.0
            status = status_of(start(self.config, ["--run.grace_seconds=1"])[0])
            self.wait_for_steps(1, launcher)  # the first run continues
            began = time.monotonic()
            for rank in ranks:
                os.kill(rank, signal.SIGTERM)
        ended = status_of(launcher)
        wait_until(lambda: not any(map(start_time, ranks)))
        self.report(end, ended if status is None else status, began)

    def kill(self, end: str, launcher: int, ranks: list[int]) -> None:
        """Kill what the end names, and let a child of this process report when the ranks have ended."""
        targets = {"launcher": [launcher], "rank 0": ranks[:1], "rank 1": ranks[1:]}.get(end)
        if targets is None:
            targets = [launcher, *(child.pid for child in psutil.Process(launcher).children(recursive=True))]
        began = time.monotonic()
        for pid in targets:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not os.fork():
            wait_until(lambda: not any(map(start_time, ranks)))
            self.report(end, -signal.SIGKILL, began)
            os._exit(0)

    def spoil(self, end: str) -> None:
        kind, _, place = end.partition(" ")

        def spoil(rank: int) -> None:
            if kind == "memory" and rank == 1:
                before_call(trainer.Trainer, "train_step", 2, exhaust_memory)
            elif kind != "memory" and rank == 0:
                action = {"full": fill, "read-only": make_read_only}[kind]
                before_call(*PLACES[place], lambda: action(self.folder))

        began = time.monotonic()
        launcher, ranks = start(self.config, (), spoil)
        status = status_of(launcher)
        wait_until(lambda: not any(map(start_time, ranks)))
        if kind == "full":
            (self.folder / "filler").unlink()
        if kind == "read-only":
            repair(self.folder, os.environ["DISK"])
        self.report(end, status, began)

    def close_terminal(self) -> None:
        child, terminal = pty.fork()
        if not child:
            train(self.config, ())
        os.set_blocking(terminal, False)
        before, steps = self.latest(), 0
        while steps < 2 and start_time(child):
            try:
                os.read(terminal, 1 << 16)
            except BlockingIOError:
                time.sleep(0.005)
            if self.latest() != before:
                before, steps = self.latest(), steps + 1
        os.close(terminal)
        began = time.monotonic()
        self.report("terminal", status_of(child), began)

    def report(self, end: str, status: int, began: float) -> None:
        line = json.dumps([end, status, round(time.monotonic() - began, 1), self.latest()])
        os.write(1, line.encode() + b"\n")


if __name__ == "__main__":
    runs = Runs(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    for each in sys.argv[4:]:
        runs.meet(each)
    with suppress(ChildProcessError):
        while True:
            os.wait()
