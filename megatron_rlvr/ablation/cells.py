"""Runs of an ablation: how far each is, and running those that are not finished, some beside each other.

Each run is `rlvr train` in a process of its own, with its output in a log. A run that fails does not stop the others; a
run that was stopped or killed resumes from its last checkpoint when the same command is given again. Until then,
DIR/ARM/seed_N.failed says why a run has failed, also to other processes. Imports no torch.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_rlvr import atomic
from megatron_rlvr.ablation.spec import Ablation, Cell, SpecError
from megatron_rlvr.checkpoint.store import FOLDER, latest_checkpoint
from megatron_rlvr.child_process import ends_with_parent
from megatron_rlvr.config import SettingsError
from megatron_rlvr.config.loading import load_settings
from megatron_rlvr.errors import one_line
from megatron_rlvr.evaluation.folder import differences
from megatron_rlvr.input_files import BadFileError, is_file, read_json_object, read_text
from megatron_rlvr.write_errors import explained

_POLL_SECONDS = 0.2
_TAIL_BYTES = 4096
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def is_finished(cell: Cell) -> bool:
    """Return whether a run has done all its steps."""
    return unfinished(cell) is None


def unfinished(cell: Cell) -> str | None:
    """Return why a run has no results yet: it is not finished, has failed, or its summary.json is damaged; or None."""
    try:
        if _summary(cell).get("steps") == cell.settings.run.steps:
            return None
    except FileNotFoundError:
        pass
    except SpecError as error:
        return str(error)
    why = failure(cell)
    return "not finished" if why is None else f"failed, {why}"


def failure(cell: Cell) -> str | None:
    """Return why a run failed when it was last started; None if it did not fail."""
    try:
        return one_line(read_text(_failed(cell), _TAIL_BYTES + 100)) or "for a reason that was not written"
    except FileNotFoundError:
        return None
    except BadFileError as error:
        return f"{_failed(cell)} cannot be read: {error}"


def _failed(cell: Cell) -> Path:
    return cell.file.with_suffix(".failed")


def _summary(cell: Cell) -> dict[str, Any]:
    """Return summary.json. Raises: FileNotFoundError; SpecError if it is damaged."""
    return read_json_object(cell.folder / "summary.json", SpecError, f"remove {cell.folder}, to run it again")


def check_unchanged(cells: Sequence[Cell]) -> None:
    """Check that what is in the folders belongs to these cells: a changed arm must not be taken for its former self.

    `run.steps` may be raised: runs are then continued.

    Raises:
        SpecError: A run in the folder has other settings, or has done more steps.
    """
    for cell in cells:
        config = cell.folder / "config.yaml"
        if not is_file(config):
            continue
        remedy = f"choose another dir, or remove {cell.folder}"
        if (done := _steps_done(cell)) > cell.settings.run.steps:
            raise SpecError(
                f"{cell.name}: its run has done {done} steps, and the specification has run.steps="
                f"{cell.settings.run.steps}; give {done} or more, {remedy}"
            )
        try:
            before = load_settings(config)
        except SettingsError as error:
            raise SpecError(f"{config} cannot be compared with the specification ({error}); {remedy}") from None
        for key, then, now in differences(_compared(before), _compared(cell.settings)):
            raise SpecError(f"{cell.name}: its run has {key}={then}, and the specification {now}; {remedy}")


def _steps_done(cell: Cell) -> int:
    """Return the number of steps that a run has saved or finished; a damaged summary counts as none."""
    latest = latest_checkpoint(cell.folder / FOLDER)
    try:
        steps = _summary(cell).get("steps")
    except (FileNotFoundError, SpecError):
        steps = None
    return max(latest.step if latest else 0, steps if type(steps) is int else 0)


def _compared(settings: Any) -> dict[str, Any]:
    values = settings.model_dump()
    for key in ("steps", "resume", "overwrite"):
        values["run"].pop(key)
    return values


def run_cells(
    ablation: Ablation, cells: Sequence[Cell], *, jobs: int, ranks: int | None, say: Callable[[str], None]
) -> tuple[dict[int, str], int]:
    """Run cells that are not finished, ``jobs`` at a time.

    Args:
        ranks: Ranks of each run on this machine; None for the default of `rlvr train`.
        say: Prints a line.

    Returns: {index: why it failed} of cells that failed, and the signal that has ended all this, or 0. After a signal,
        runs in progress save a checkpoint, and no further one is started. A second SIGINT ends them at once.
    """
    waiting = [cell for cell in cells if not is_finished(cell)]
    total, failed = len(ablation.cells), dict[int, str]()
    running: dict[int, tuple[Cell, subprocess.Popen[bytes], float]] = {}
    if len(waiting) < len(cells):
        say(f"{len(cells) - len(waiting)} of {len(cells)} runs are finished")
    with _signals() as received:
        forwarded = 0
        while waiting or running:
            while waiting and len(running) < jobs and not received:
                cell = waiting.pop(0)
                with explained("the output of a run", cell.log.parent):
                    _failed(cell).unlink(missing_ok=True)
                say(f"{cell.index + 1}/{total}  {cell.name}: started")
                running[cell.index] = cell, _start(cell, ranks), time.monotonic()
            if received:
                waiting = []
            for signum in received[forwarded:]:
                if not forwarded:
                    say("runs in progress save a checkpoint; a second Ctrl-C ends them without")
                # SIGINT would end a run at once, with nothing saved.
                sent = signal.SIGINT if forwarded and signum == signal.SIGINT else signal.SIGTERM
                forwarded += 1
                for _, process, _ in running.values():
                    process.send_signal(sent)
            time.sleep(_POLL_SECONDS)
            for index, (cell, process, start) in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[index]
                if status == 0 and is_finished(cell):
                    say(f"{index + 1}/{total}  {cell.name}: finished in {time.monotonic() - start:.0f} s")
                elif received:
                    say(f"{index + 1}/{total}  {cell.name}: stopped")
                else:
                    failed[index] = f"status {status}: {_last_line(cell)}"
                    with explained("why a run failed", cell.log.parent):
                        atomic.write_text(_failed(cell), failed[index] + "\n")
                    say(f"{index + 1}/{total}  {cell.name}: failed, {failed[index]}")
        return failed, received[0] if received else 0


def _start(cell: Cell, ranks: int | None) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "megatron_rlvr.cli", "train", str(cell.file)]
    command += ["--ranks", str(ranks)] if ranks is not None else []
    with explained("the output of a run", cell.log.parent), cell.log.open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            start_new_session=True,  # a terminal's SIGINT reaches it once, from here
            preexec_fn=ends_with_parent(signal.SIGTERM),
        )


def _last_line(cell: Cell) -> str:
    """Return the last line of a run's output, which says why it failed."""
    with cell.log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return one_line(lines[-1].removeprefix("megatron_rlvr: ")) if lines else f"no output in {cell.log}"


@contextmanager
def _signals() -> Any:
    """Collect the signals that ask this process to stop, instead of obeying them."""
    received: list[int] = []
    before = {
        signum: signal.signal(signum, lambda number, frame: received.append(number))
        for signum in _STOPPING
        if signal.getsignal(signum) is not signal.SIG_IGN
    }
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
