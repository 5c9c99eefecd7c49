"""The process of one rank: its place in the launch, its line on stderr, its log, and its exit."""

import logging
import os
import re
import sys
import time
from contextlib import suppress
from typing import Any, NoReturn

from megatron_rlvr.child_process import end_with_parent
from megatron_rlvr.config import ParallelSettings, SettingsError
from megatron_rlvr.config.yaml_format import shown
from megatron_rlvr.distributed import environment
from megatron_rlvr.errors import one_line
from megatron_rlvr.reward.graders import GraderPool
from megatron_rlvr.signals import Stopped

logger = logging.getLogger("megatron_rlvr")

# Seconds after which a rank prints an error although it is not the main rank.
_OTHER_RANKS_WAIT_SECONDS = 10.0
# Seconds for which a rank with a defect waits for the launcher to end it, as another rank has failed first.
_FIRST_FAILURE_SECONDS = 2.0


def is_main() -> bool:
    """Return whether this process is rank 0, by the launcher's RANK; True without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def is_leader(parallel: ParallelSettings) -> bool:
    """Return whether this process is the first rank of its data-parallel replica, before the ranks have joined."""
    rank = int(os.environ.get("RANK", "0"))
    return rank % (parallel.tensor * parallel.context) == 0 and rank < world_size(parallel) // parallel.pipeline


def is_first_of_host() -> bool:
    """Return whether this process is the first rank of its host, by the launcher's LOCAL_RANK."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def end_with_launcher() -> None:
    """Make the kernel kill this rank when torchrun, or `rlvr train`, ends, even by SIGKILL.

    Other launchers may start ranks from a thread that ends before them, which would count as the end of the launcher.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())


def world_size(parallel: ParallelSettings) -> int:
    """Number of ranks: the launcher's WORLD_SIZE, or without a launcher the ranks of one copy of the model.

    Raises: SettingsError if WORLD_SIZE is not an int above 0.
    """
    text = os.environ.get("WORLD_SIZE", str(parallel.replica))
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text):
        raise SettingsError(f"WORLD_SIZE={shown(text)}: not an int above 0; set it to the number of ranks, or unset it")
    return int(text)


def check_launch(parallel: ParallelSettings, command: str) -> None:
    """Raise SettingsError if several ranks are needed and no launcher has started this process.

    Args:
        command: How to start the ranks, with ``{ranks}`` for their number.
    """
    ranks = world_size(parallel)
    if ranks > 1 and "RANK" not in os.environ:
        raise SettingsError(
            f"{ranks} ranks are needed, and this is one process; start it with {command.replace('{ranks}', str(ranks))}"
        )


def print_error(error: Exception) -> None:
    """Print an error as one line on stderr.

    The main rank prints at once. Another rank waits first: torchrun ends it when the main rank exits, so that an error
    of all ranks is printed once, and an error of that rank alone is still printed.
    """
    if not is_main():
        try:
            time.sleep(_OTHER_RANKS_WAIT_SECONDS)
        except Stopped:  # by the launcher: another rank has printed the error and exited
            return
    print_line(str(error))


def print_defect() -> None:
    """Log the traceback of the exception that is being handled.

    A rank that exits with an error breaks the collectives of the others. Their exceptions say nothing about it, so each
    waits first: the launcher ends it then.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        try:
            time.sleep(_FIRST_FAILURE_SECONDS if is_main() else _OTHER_RANKS_WAIT_SECONDS)
        except Stopped:
            return
    logger.exception("rank %s failed", os.environ.get("RANK", "0"))


def print_line(text: str) -> None:
    """Print a message as one line on stderr."""
    print(f"megatron_rlvr: {one_line(text)}", file=sys.stderr, flush=True)


def leave(status: int, graders: GraderPool | None = None) -> NoReturn:
    """Exit at once, without leaving the process group: that would wait for ranks that may have exited already."""
    if graders is not None:
        graders.close()
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(status)


def survive_closed_output() -> None:
    """Drop what standard output and standard error do not take any more, when a terminal or pipe has been closed.

    Otherwise the next line of progress would end the run, which is about to save its checkpoint after SIGHUP.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _Dropping):
            setattr(sys, name, _Dropping(stream))


class _Dropping:
    """A stream whose errors at writing are ignored."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def quiet_libraries() -> None:
    """Log the package's messages on the main rank; of libraries, and on other ranks, log errors only."""
    logging.basicConfig(level=logging.ERROR, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO if is_main() else logging.ERROR)
    environment.quiet_libraries()
