"""A run from its resolved settings to its end: the process group, the trainer, the export, and every way to stop.

    last step done          export, summary.json, status 0
    SIGTERM, SIGHUP         a checkpoint as soon as all ranks can save together, status 0
    SIGTERM, grace over     exit in the middle of a step, status 0
    SIGINT                  exit at once, status 130
    user's input            one line on stderr, status 2: some errors are found only now, such as a server's model
    fault                   one line on stderr, or the traceback of a defect, status 1
    a rank lost             one line on stderr, status 1
    its launcher ended      killed with it, also by SIGKILL
    the folder's lease lost one line on stderr, status 1

Whichever it is, metrics.jsonl is complete, no grader process or process that one has started is left, and the same
command resumes from the last checkpoint.
"""

import signal
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_rlvr.checkpoint.store import CheckpointError, RunTotals
from megatron_rlvr.config import RunSettings, SettingsError
from megatron_rlvr.errors import InputError, RlvrError
from megatron_rlvr.reward.graders import GraderPool
from megatron_rlvr.signals import Signals, Stopped
from megatron_rlvr.startup.describe import describe_plan
from megatron_rlvr.startup.inputs import differences
from megatron_rlvr.startup.lease import Lease, Process
from megatron_rlvr.startup.process import is_first_of_host, is_main, leave, print_defect, print_error, print_line
from megatron_rlvr.startup.resolve import Resolved
from megatron_rlvr.startup.run_folder import prepare_run_folder, summarize, write_summary
from megatron_rlvr.write_errors import explained

if TYPE_CHECKING:
    from megatron_rlvr.distributed.ranks import Ranks
    from megatron_rlvr.trainer import Trainer


def run(resolved: Resolved, graders: GraderPool, signals: Signals, lease: Lease | None = None) -> None:
    """Train, and return when all is done; a run that ends otherwise exits the process with its status.

    Args:
        lease: Lease of the run folder, on the main rank. It is released when all is done. Otherwise other ranks may
            still be writing; the lease names them, and the next run waits for their end.
    """
    try:
        train(resolved, graders, signals, lease)
        if lease is not None:
            lease.release()
    except Stopped as stopped:
        if is_main():
            print(f"stopped by {stopped}; {resolved.settings.run.dir}/metrics.jsonl is complete", file=sys.stderr)
        leave(stopped.exit_status, graders)
    except RlvrError as error:
        # These two are raised on all ranks alike. Others may follow from a rank that has given up after SIGTERM.
        if not isinstance(error, InputError | CheckpointError):
            signals.failed()
        print_error(error)
        leave(error.exit_status, graders)
    except Exception:
        signals.failed()
        print_defect()
        leave(1, graders)


def train(
    resolved: Resolved, graders: GraderPool, signals: Signals, lease: Lease | None = None
) -> dict[str, Any] | None:
    """Train as resolved.

    Args:
        lease: Lease of the run folder, on the main rank; it gets to know the processes of all ranks.

    Returns:
        The content of summary.json, on every rank; None if SIGTERM stopped the run before its last step.
    """
    from megatron_rlvr.distributed import process_group
    from megatron_rlvr.distributed.heartbeat import Heartbeat
    from megatron_rlvr.distributed.ranks import initialize_ranks
    from megatron_rlvr.startup.assembly import build_trainer

    settings = resolved.settings
    # A rank waits there outside of Python, for others that may have ended: SIGTERM ends it by another thread.
    with signals.deferring(0.0, partial(leave, 128 + signal.SIGTERM, graders)):
        ranks = initialize_ranks(settings.parallel, settings.run.timeout_minutes)
    resolved = _prepare(resolved, ranks, lease)
    with ExitStack() as resources:
        lost = partial(_lost, settings.run.timeout_minutes, graders)
        timeout_seconds = 60 * settings.run.timeout_minutes
        closed = partial(_launcher_ended, graders)
        store = process_group.store()
        resources.enter_context(Heartbeat(store, ranks.rank, ranks.world_size, timeout_seconds, lost, closed))
        trainer = build_trainer(resolved, graders, signals, ranks, resources)
        trainer.progress.say(describe_plan(resolved))
        if resolved.start is not None:
            trainer.resume(resolved.start)
        with signals.deferring(settings.run.grace_seconds, partial(_give_up, trainer, graders)):
            totals = trainer.run()
        if totals.step < settings.run.steps:
            trainer.progress.say(_stopped(settings.run, totals, signals.stop_signal))
    if totals.step < settings.run.steps:  # after the block: the engine's own process groups are closed by now
        process_group.shut_down()
        return None
    export = Path(settings.run.dir) / "hf" if settings.run.export else None
    if export is not None:
        trainer.export(export)
    summary = summarize(settings, totals, export)
    if ranks.is_main:
        write_summary(settings, summary)
    process_group.shut_down()
    return summary


def _prepare(resolved: Resolved, ranks: "Ranks", lease: Lease | None) -> Resolved:
    """Prepare the run folder, and agree with the main rank on the checkpoint to resume from and on the prompts.

    Only the main rank has looked at the run folder. Another rank may have started its clock on another day, or may have
    another copy of a file.
    """
    import torch.distributed as dist

    from megatron_rlvr.checkpoint.verification import verify
    from megatron_rlvr.distributed.collectives import on_main_rank, raise_on_all_ranks

    main: list[Any] = [resolved.start, resolved.now, resolved.inputs]
    dist.broadcast_object_list(main, src=0)
    start, now, inputs = main
    if now is not None and differences(resolved.settings, inputs, resolved.inputs):
        resolved = resolved.at(now)
    found = differences(resolved.settings, inputs, resolved.inputs)
    unlike = f"{found[0]} on rank {ranks.rank}, compared with rank 0; give all hosts the same files" if found else ""
    raise_on_all_ranks(SettingsError(unlike) if unlike else None)
    if start is not None:
        verify(start)  # before anything in the folder is changed
    processes: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(processes, Process.this())

    def prepare() -> None:
        if lease is not None:
            with explained("the lease", Path(resolved.settings.run.dir)):
                lease.name_processes(processes)
        prepare_run_folder(resolved.settings, start)

    on_main_rank(prepare)
    return replace(resolved, start=start, now=now)


def _stopped(run: RunSettings, totals: RunTotals, signal_name: str) -> str:
    return f"stopped by {signal_name} after step {totals.step}, which is saved; {_same_command(run)} resumes from there"


def _give_up(trainer: "Trainer", graders: GraderPool) -> NoReturn:
    """Exit in the middle of a step, whatever the main thread is doing."""
    run, last = trainer.settings.run, trainer.checkpoints.last
    then = f"resumes after step {last.step}" if last else "starts from the first step"
    if is_main():
        print(
            f"stopped by SIGTERM in step {trainer.totals.step + 1}, which did not end within "
            f"run.grace_seconds={run.grace_seconds:g}; {_same_command(run)} {then}",
            flush=True,
        )
    leave(0, graders)


def _lost(minutes: float, graders: GraderPool, rank: int | None) -> NoReturn:
    """Exit wherever the main thread waits, as ``rank`` is lost; None if another rank has reported which one is."""
    if rank is not None and is_first_of_host():
        print_line(
            f"rank {rank} has given no sign of life for {minutes:g} min (run.timeout_minutes): it, its host or the "
            "network is down; the same command resumes from the last checkpoint"
        )
    leave(1, graders)


def _launcher_ended(graders: GraderPool) -> NoReturn:
    """Exit wherever the main thread waits, as the launcher of the first host has ended, and its ranks with it."""
    if is_first_of_host():
        print_line("the launcher of the first host has ended; the same command resumes from the last checkpoint")
    leave(1, graders)


def _same_command(run: RunSettings) -> str:
    """The command that resumes the run, in words: with run.overwrite it would delete the checkpoints."""
    return "the same command" + (" with run.overwrite=false" if run.overwrite else "")
