"""Starts the ranks of a command on this machine, and ends with their exit status.

torchrun's agent starts and watches the ranks. It runs in a thread, where it leaves signals alone, so that this process
can forward them: torchrun itself would kill ranks 30 s after SIGTERM, even while they save a checkpoint. Nothing is
printed about a rank that has printed its own error and exited; torchrun's own report has 30 lines.
"""

import logging
import os
import re
import signal
import sys
import threading
import uuid
from collections.abc import Sequence
from typing import Any

from megatron_rlvr import open_files
from megatron_rlvr.config import Settings, SettingsError
from megatron_rlvr.config.loading import load_settings

RANKS_FLAG = "--ranks"
_POLL_SECONDS = 0.2
_AGENT_PATIENCE_SECONDS = 30  # between SIGTERM and SIGKILL


def launched() -> bool:
    """Return whether this process is a rank that a launcher, such as torchrun, has started."""
    return "RANK" in os.environ


def split_ranks_flag(arguments: Sequence[str]) -> tuple[int | None, list[str]]:
    """Return the value of ``--ranks N``, or None without that flag, and the other arguments.

    Raises: SettingsError if N is missing or not an int above 0.
    """
    rest, ranks = [], None
    words = iter(arguments)
    for word in words:
        name, equals, text = word.partition("=")
        if name != RANKS_FLAG:
            rest.append(word)
            continue
        text = text if equals else next(words, "")
        if not re.fullmatch("0*[1-9][0-9]{0,8}", text):
            raise SettingsError(
                f"{RANKS_FLAG} {text[:60]}: not an int above 0; give the number of ranks on this machine"
            )
        ranks = int(text)
    return ranks, rest


def default_ranks(settings: Settings) -> int:
    """Return the number of GPUs of this machine; without a GPU, the ranks of one copy of the model."""
    from megatron_rlvr.distributed.accelerator import gpu_count  # imports torch

    return gpu_count() or settings.parallel.replica


def run_on_ranks(verb: str, arguments: Sequence[str], ranks: int | None, config: str, flags: list[str]) -> int:
    """Run ``rlvr VERB ARGUMENTS`` on all ranks and return the exit status.

    Args:
        verb: A verb that does its work in this process where a launcher has started it.
        arguments: All arguments of the verb, without ``--ranks N``.
        ranks: Number of ranks; None for `default_ranks`.
        config: Settings file among the arguments, and ``flags`` those that change settings: read here as well, to fail
            before torch is imported, and to know the layout.

    Returns: 0 if every rank succeeded, else the status of the first rank that failed, 128 + n if signal n killed it.
    Raises: SettingsError if the settings cannot be read.
    """
    settings = load_settings(config, flags)
    if ranks is None:
        ranks = default_ranks(settings)
    return start_ranks(verb, arguments, ranks)


def start_ranks(verb: str, arguments: Sequence[str], ranks: int) -> int:
    """Run ``rlvr VERB ARGUMENTS`` on this number of ranks and return the exit status; see `run_on_ranks`."""
    open_files.raise_limit()  # the ranks' store is in this process
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # spinning threads of several ranks would slow each other down
    return _Launch([sys.executable, "-m", "megatron_rlvr.cli", verb, *arguments], ranks).run()


class _Launch:
    """One start of all ranks.

    Args:
        command: Command of each rank.
        ranks: Number of ranks.
    """

    def __init__(self, command: Sequence[str], ranks: int) -> None:
        self._command = command
        self._ranks = ranks
        self._signals: list[int] = []
        self._status = 1

    def run(self) -> int:
        """Run the ranks to their end and return the exit status."""
        for handled in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(handled) is not signal.SIG_IGN:
                signal.signal(handled, lambda signum, frame: self._signals.append(signum))
        agent = threading.Thread(target=self._run_agent, name="agent", daemon=True)
        agent.start()
        forwarded = 0
        while agent.is_alive():
            agent.join(_POLL_SECONDS)
            for signum in self._signals[forwarded:]:
                self._forward(signum)
                forwarded += 1
        return self._status

    def _run_agent(self) -> None:
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self._ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",  # this machine's own name may not resolve, or to an address of another
            max_restarts=0,
            monitor_interval=_POLL_SECONDS,
        )
        program, *arguments = self._command
        try:
            elastic_launch(config, program)(*arguments)
            self._status = 0
        except ChildFailedError as error:
            rank, code = _culprit({rank: (f.timestamp, f.exitcode) for rank, f in error.failures.items()})
            self._status = code if code > 0 else 128 - code
            if code < 0 and not self._signals:
                name = signal.Signals(-code).name
                why = ", which the kernel sends when memory is exhausted" if code == -signal.SIGKILL else ""
                sys.stderr.write(
                    f"megatron_rlvr: rank {rank} was killed by {name}{why}; run the same command to resume\n"
                )

    def _forward(self, signum: int) -> None:
        """Send a signal to the ranks, which are the children of this process."""
        import psutil

        for child in psutil.Process().children():
            if _is_rank(child):
                child.send_signal(signum)


def _culprit(failures: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return (rank, exit code) of the rank that made the others fail.

    A rank that is killed takes others with it, which lose their connections and exit before torchrun's agent looks. The
    agent then ends all that still run, by SIGTERM and 30 s later by SIGKILL.

    Args:
        failures: {rank: (time in seconds, exit code or minus the signal)}.
    """
    first = min(when for when, _ in failures.values())

    def order(rank: int) -> tuple[bool, bool, bool, int]:
        when, code = failures[rank]
        return when - first > _AGENT_PATIENCE_SECONDS / 2, code == -signal.SIGTERM, code > 0, rank

    rank = min(failures, key=order)
    return rank, failures[rank][1]


def _is_rank(process: Any) -> bool:
    """Return whether a child process is a rank, and not a helper of torch."""
    import psutil

    try:
        return "megatron_rlvr.cli" in process.cmdline()
    except psutil.Error:
        return False
