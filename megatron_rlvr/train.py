"""The command line: checks everything, wires the rooms together, trains, exports.

    torchrun --nproc-per-node 2 -m megatron_rlvr.train CONFIG.yaml --selection.fraction 0.1

Wrong input ends with status 2 and one line on stderr before any process group starts, most of it before torch is
imported. SIGTERM saves a checkpoint as soon as all ranks can and ends with status 0; Ctrl-C ends the run at once.
Either leaves the metrics complete and no grader process behind, and the same command goes on from the last checkpoint.
"""

import json
import logging
import os
import shutil
import sys
import time
import warnings
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_rlvr.checkpoint.store import FOLDER, Checkpoint, CheckpointError, Done, prepare
from megatron_rlvr.config import RunSettings, Settings, SettingsError
from megatron_rlvr.config.loading import help_text, load_settings, to_yaml
from megatron_rlvr.data.rows import DataError
from megatron_rlvr.data.tokenizer import TokenizerError
from megatron_rlvr.hf.families import ModelError
from megatron_rlvr.reward.graders import GraderPool, RewardError
from megatron_rlvr.signals import Signals, Stopped
from megatron_rlvr.startup.resolve import RUN_FILES, Resolved, describe_plan, resolve, world_size

if TYPE_CHECKING:
    from megatron_rlvr.distributed.ranks import Ranks
    from megatron_rlvr.trainer import Trainer

logger = logging.getLogger("megatron_rlvr")

# What a user can put right; everything else is a fault and keeps its traceback.
INPUT_ERRORS = (SettingsError, ModelError, TokenizerError, DataError, RewardError)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 0, 2 for wrong input, 128 + n for signal n that ended it at once, or 1."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in arguments or "-h" in arguments:
        print(help_text(), end="")
        return
    check = "--check" in arguments
    quiet_libraries()
    signals = Signals()
    signals.listen()
    try:
        config, *flags = [argument for argument in arguments if argument != "--check"] or [""]
        if not config or config.startswith("--"):
            raise SettingsError("the first argument is not a settings file; give CONFIG.yaml, or --help for its keys")
        settings = load_settings(config, flags)
        if not check:
            _check_launch(settings)
        resolved = resolve(settings, show_progress=is_main())
        check_megatron(resolved, running=not check)
        graders = GraderPool(
            settings.reward.function,
            workers=1 if check else settings.reward.workers,
            timeout_seconds=settings.reward.timeout_seconds,
        )
    except INPUT_ERRORS as error:
        complain(error)
        sys.exit(2)
    except Stopped as stopped:
        sys.exit(stopped.exit_status)
    with graders:
        if check:
            print(describe_plan(resolved))
        else:
            _run_until_stopped(resolved, graders, signals)


def _run_until_stopped(resolved: Resolved, graders: GraderPool, signals: Signals) -> None:
    try:
        train(resolved, graders, signals)
    except Stopped as stopped:
        if is_main():
            print(f"stopped by {stopped}; {resolved.settings.run.dir}/metrics.jsonl is complete", file=sys.stderr)
        _leave(graders, stopped.exit_status)
    except INPUT_ERRORS as error:  # found only now, such as a tensor that the model's files lack
        complain(error)
        _leave(graders, 2)
    except CheckpointError as error:
        complain(error)
        _leave(graders, 1)
    except Exception as error:
        signals.failed()
        if isinstance(error, _explained()):
            complain(error)
        else:
            logger.exception("rank %s failed", os.environ.get("RANK", "0"))
        _leave(graders, 1)


def _explained() -> tuple[type[Exception], ...]:
    """What ends a run without being a fault of the program: the message says what happened. They come with torch."""
    from megatron_rlvr.learner import LogprobGapError, PolicyEntropyError, SkippedStepsError
    from megatron_rlvr.protocols import EngineError

    return EngineError, LogprobGapError, PolicyEntropyError, SkippedStepsError


def train(resolved: Resolved, graders: GraderPool, signals: Signals) -> dict[str, Any] | None:
    """Trains as resolved and returns what summary.json says, on every rank; None where SIGTERM ended it before."""
    from megatron_rlvr.distributed import process_group
    from megatron_rlvr.distributed.heartbeat import Heartbeat
    from megatron_rlvr.distributed.ranks import initialize_ranks
    from megatron_rlvr.startup.assembly import build_trainer

    settings, folder = resolved.settings, Path(resolved.settings.run.dir)
    ranks = initialize_ranks(settings.parallel, settings.run.timeout_minutes)
    resolved = replace(resolved, start=_prepare_run_folder(resolved, ranks))
    with ExitStack() as resources:
        lost = partial(_lost, settings.run.timeout_minutes, graders)
        timeout_seconds = 60 * settings.run.timeout_minutes
        resources.enter_context(Heartbeat(process_group.store(), ranks.rank, ranks.world_size, timeout_seconds, lost))
        trainer = build_trainer(resolved, graders, signals, ranks, resources)
        trainer.progress.say(describe_plan(resolved))
        if resolved.start is not None:
            trainer.resume(resolved.start)
        with signals.noting(settings.run.grace_seconds, partial(_give_up, trainer, graders)):
            done = trainer.run()
        if done.step < settings.run.steps:
            trainer.progress.say(_stopped_in_words(settings, done))
    if done.step < settings.run.steps:  # what the engine holds of the world is gone by now
        process_group.shut_down()
        return None
    export = folder / "hf" if settings.run.export else None
    if export is not None:
        trainer.export(export)
    summary = _summary(settings, done, export)
    if ranks.is_main:
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    process_group.shut_down()
    return summary


def _give_up(trainer: "Trainer", graders: GraderPool) -> NoReturn:
    """Ends this process in the middle of a step, whatever its main thread is doing."""
    run, last = trainer.settings.run, trainer.checkpoints.last
    goes_on = f"goes on after step {last.step}" if last else "begins again"
    if is_main():
        print(
            f"stopped by SIGTERM in step {trainer.done.step + 1}, which did not end within run.grace_seconds "
            f"{run.grace_seconds:g}; the same command{_without_overwrite(run)} {goes_on}",
            flush=True,
        )
    _leave(graders, 0)


def _lost(minutes: float, graders: GraderPool, rank: int | None) -> NoReturn:
    """Ends this process, wherever its main thread waits. None: another rank has told who is lost."""
    if rank is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"megatron_rlvr: rank {rank} has given no sign of life for {minutes:g} min (run.timeout_minutes): it, its "
            "host or the network is down; the same command goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
    _leave(graders, 1)


def _without_overwrite(run: RunSettings) -> str:
    return " with run.overwrite false" if run.overwrite else ""


def _stopped_in_words(settings: Settings, done: Done) -> str:
    how = _without_overwrite(settings.run)
    return f"stopped by SIGTERM after step {done.step}, which is saved; the same command{how} goes on from there"


def _summary(settings: Settings, done: Done, export: Path | None) -> dict[str, Any]:
    """The run in a few metrics; the accuracies are those of the first evaluation set."""
    before, after = done.before, done.after
    accuracy = [key for key in before if key.endswith("/accuracy")]
    return {
        "steps": settings.run.steps,
        "seconds": round(done.seconds, 1),
        "accuracy_before": before[accuracy[0]] if accuracy else None,
        "accuracy_after": after[accuracy[0]] if accuracy else None,
        "before": before,
        "after": after,
        "export": str(export) if export is not None else None,
    }


def _prepare_run_folder(resolved: Resolved, ranks: "Ranks") -> Checkpoint | None:
    """The run folder with the resolved settings and nothing of an earlier run but what this one goes on from.

    That is what the main rank has found: another may have looked at a shared folder too early.
    """
    import torch.distributed as dist

    if ranks.is_main:
        folder = Path(resolved.settings.run.dir)
        folder.mkdir(parents=True, exist_ok=True)
        ours = [name for name in RUN_FILES if name != FOLDER]  # `prepare` sees to that one
        for name in ours if resolved.start is None else ("summary.json", "sync"):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        prepare(resolved.settings, resolved.start)
        (folder / "config.yaml").write_text(to_yaml(resolved.settings), encoding="utf-8")
    told = [resolved.start]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def check_megatron(resolved: Resolved, *, running: bool) -> None:
    """The `megatron:` section against Megatron's own dataclasses; costs an import of torch, so only where it is set.

    A run needs this machine's kernels too; a mere check may be made on another machine.
    """
    settings = resolved.settings
    if settings.megatron:
        from megatron_rlvr.policy.build import check_kernels, check_passthrough

        check_passthrough(settings.megatron, settings.model, settings.parallel, resolved.hf_config)
        if running:
            check_kernels(settings.megatron)


def _check_launch(settings: Settings) -> None:
    ranks = world_size(settings.parallel)
    if ranks > 1 and "RANK" not in os.environ:
        raise SettingsError(
            f"{ranks} ranks are needed, and this is one process; start it with "
            f"torchrun --nproc-per-node {ranks} -m megatron_rlvr.train"
        )


def is_main() -> bool:
    """Whether this is rank 0, by what the launcher says."""
    return os.environ.get("RANK", "0") == "0"


def complain(error: Exception) -> None:
    """One line from one rank: torchrun ends the others when the first leaves. A fault of another's own is told late."""
    if not is_main():
        try:
            time.sleep(10)
        except Stopped:  # by the launcher: another rank has told it
            return
    print(f"megatron_rlvr: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def _leave(graders: GraderPool, status: int) -> NoReturn:
    """Ends this process at once: other ranks may be gone, and leaving the process group would wait for them."""
    graders.close()
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(status)


def quiet_libraries() -> None:
    """One log of our own; libraries speak up for errors only."""
    level = logging.INFO if is_main() else logging.ERROR
    logging.basicConfig(level=logging.ERROR, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logger.setLevel(level)
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    main()
