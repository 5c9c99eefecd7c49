"""The command line: checks everything, wires the rooms together, trains, exports.

    torchrun --nproc-per-node 2 -m megatron_rlvr.train CONFIG.yaml --selection.fraction 0.1

Wrong input ends with status 2 and one line on stderr before any process group starts, most of it before torch is
imported. SIGTERM saves a checkpoint after the step it arrives in and ends with status 0; Ctrl-C ends the run at once.
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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_rlvr.checkpoints import Checkpoint, CheckpointError, Checkpoints, Done, prepare
from megatron_rlvr.command_line import help_text, load_settings, to_yaml
from megatron_rlvr.config import Settings, SettingsError
from megatron_rlvr.data.rows import DataError
from megatron_rlvr.data.tokenizer import TokenizerError
from megatron_rlvr.hf.families import ModelError
from megatron_rlvr.resolve import RUN_FILES, Resolved, plan_in_words, resolve, world_size
from megatron_rlvr.reward.graders import GraderPool, RewardError
from megatron_rlvr.signals import Signals, Stopped

if TYPE_CHECKING:
    from megatron_rlvr.policy.policy import Policy
    from megatron_rlvr.policy.ranks import Ranks
    from megatron_rlvr.protocols import RolloutEngine
    from megatron_rlvr.rollout.collector import Collector
    from megatron_rlvr.rollout.sampler import Sampler
    from megatron_rlvr.rollout.servers import ServerPool
    from megatron_rlvr.rollout.sglang import WeightSync

logger = logging.getLogger("megatron_rlvr")

# What a user can put right; everything else is a fault and keeps its traceback.
INPUT_ERRORS = (SettingsError, ModelError, TokenizerError, DataError, RewardError)


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 0, 2 for wrong input, 128 + n for signal n that ended it at once, or 1."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in arguments or "-h" in arguments:
        print(help_text(), end="")
        return
    check = "--check" in arguments
    _quiet_libraries()
    signals = Signals()
    signals.listen()
    try:
        config, *flags = [argument for argument in arguments if argument != "--check"] or [""]
        if not config or config.startswith("--"):
            raise SettingsError("the first argument is not a settings file; give CONFIG.yaml, or --help for its keys")
        settings = load_settings(config, flags)
        if not check:
            _check_launch(settings)
        resolved = resolve(settings, show_progress=_is_main())
        _check_megatron(resolved, running=not check)
        graders = GraderPool(
            settings.reward.function,
            workers=1 if check else settings.reward.workers,
            timeout_seconds=settings.reward.timeout_seconds,
        )
    except INPUT_ERRORS as error:
        _complain(error)
        sys.exit(2)
    except Stopped as stopped:
        sys.exit(stopped.exit_status)
    with graders:
        if check:
            print(plan_in_words(resolved))
        else:
            _run_until_stopped(resolved, graders, signals)


def _run_until_stopped(resolved: Resolved, graders: GraderPool, signals: Signals) -> None:
    try:
        train(resolved, graders, signals)
    except Stopped as stopped:
        if _is_main():
            print(f"stopped by {stopped}; {resolved.settings.run.dir}/metrics.jsonl is complete", file=sys.stderr)
        _leave(graders, stopped.exit_status)
    except INPUT_ERRORS as error:  # found only now, such as a tensor that the model's files lack
        _complain(error)
        _leave(graders, 2)
    except CheckpointError as error:
        _complain(error)
        _leave(graders, 1)
    except Exception:
        logger.exception("rank %s failed", os.environ.get("RANK", "0"))
        _leave(graders, 1)


def train(resolved: Resolved, graders: GraderPool, signals: Signals) -> dict[str, Any] | None:
    """Trains as resolved and returns what summary.json says, on every rank; None where SIGTERM ended it before."""
    from megatron_rlvr import platform
    from megatron_rlvr.algo.loss import make_loss
    from megatron_rlvr.evaluate import Evaluator
    from megatron_rlvr.learner import Learner
    from megatron_rlvr.metrics import MetricsLog
    from megatron_rlvr.policy.policy import Policy
    from megatron_rlvr.policy.ranks import initialize_ranks
    from megatron_rlvr.progress import Progress
    from megatron_rlvr.rollout.sampler import Sampler
    from megatron_rlvr.trainer import Trainer

    settings = resolved.settings
    ranks = initialize_ranks(settings.parallel, settings.run.timeout_minutes)
    start = _prepare_run_folder(resolved, ranks)
    resources = ExitStack()
    engine = _engine(resolved, ranks, resources)
    policy = Policy(
        settings.model,
        settings.parallel,
        ranks,
        optimizer=settings.optimizer,
        megatron=settings.megatron,
        temperature=settings.rollout.temperature,
        seed=settings.run.seed,
    )
    on_servers = settings.rollout.engine == "sglang"
    sampler = Sampler(engine, resolved.tokenizer, graders, settings.reward, leaders_only=on_servers)
    collector = _collector(resolved, sampler, ranks, policy)
    resources.callback(collector.close)
    evaluator = Evaluator(
        sampler,
        ranks,
        settings.evaluate,
        {name: prompts.prompts for name, prompts in resolved.evaluation.items()},
        max_response_tokens=settings.rollout.max_response_tokens,
        seed=settings.run.seed,
    )
    learner = Learner(settings, policy, make_loss(settings.loss))
    folder = Path(settings.run.dir)
    log = MetricsLog(folder, settings.log, settings, enabled=ranks.is_main, after=start.step if start else None)
    resources.callback(log.close)
    checkpoints = Checkpoints(settings.run, is_main=ranks.is_main, start=start)
    with resources, Progress(settings.run.steps, enabled=ranks.is_main) as progress:
        progress.say(plan_in_words(resolved))
        trainer = Trainer(settings, policy, engine, collector, learner, evaluator, log, progress, checkpoints, signals)
        if start is not None:
            trainer.resume(start)
        with signals.noting():
            done = trainer.run()
        if done.step < settings.run.steps:
            progress.say(_stopped_in_words(settings, done))
            platform.shut_down()
            return None
    export = folder / "hf" if settings.run.export else None
    if export is not None:
        policy.save_hugging_face(export, partial(_replace_tokenizer, resolved))
    summary = _summary(settings, done, export)
    if ranks.is_main:
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    platform.shut_down()
    return summary


def _engine(resolved: Resolved, ranks: "Ranks", resources: ExitStack) -> "RolloutEngine":
    """The engine of the settings; ``resources`` closes it. Servers are asked who they are, a collective."""
    settings = resolved.settings
    if settings.rollout.engine == "embedded":
        from megatron_rlvr import platform
        from megatron_rlvr.policy.build import DTYPES
        from megatron_rlvr.rollout.embedded import EmbeddedEngine

        return EmbeddedEngine(
            settings.model.path,
            dtype=DTYPES[settings.model.dtype],
            device=platform.device(),
            stop_token_ids=resolved.stop_token_ids,
            pad_token_id=resolved.tokenizer.pad_token_id,
            max_batch_tokens=settings.rollout.max_batch_tokens,
            max_batch_rows=settings.rollout.max_batch_rows,
        )
    from megatron_rlvr.rollout.sglang import SglangEngine, connect

    longest = settings.data.max_prompt_tokens + settings.rollout.max_response_tokens
    pool = connect(settings.rollout, ranks, resolved.hf_config, longest=longest)
    engine = SglangEngine(
        pool,
        _weight_sync(resolved, pool, ranks),
        stop_token_ids=resolved.stop_token_ids,
        vocab_size=resolved.hf_config["vocab_size"],
        longest=longest,
        colocated=settings.rollout.colocated,
    )
    resources.callback(engine.close)
    return engine


def _weight_sync(resolved: Resolved, pool: "ServerPool | None", ranks: "Ranks") -> "WeightSync":
    """The way of weights to servers."""
    settings = resolved.settings
    if settings.sync.method == "disk":
        from megatron_rlvr.sync.disk import DiskSync

        folder = Path(settings.sync.dir or Path(settings.run.dir) / "sync")
        return DiskSync(folder, Path(settings.model.path), pool, ranks, partial(_replace_tokenizer, resolved))
    if settings.sync.method == "tensor":
        from megatron_rlvr.sync.tensor import TensorSync

        return TensorSync(pool, ranks, settings.sync.bucket_bytes)
    from megatron_rlvr.sync.distributed import DistributedSync

    return DistributedSync(pool, ranks, settings.sync.bucket_bytes)


def _collector(resolved: Resolved, sampler: "Sampler", ranks: "Ranks", policy: "Policy") -> "Collector":
    """The collector that suits the engine."""
    from megatron_rlvr import platform
    from megatron_rlvr.data.cursor import PromptCursor
    from megatron_rlvr.rollout.rounds import RoundsCollector
    from megatron_rlvr.rollout.sglang import SglangEngine
    from megatron_rlvr.rollout.streaming import StreamingCollector

    settings, engine = resolved.settings, sampler.engine
    parts: dict[str, Any] = {
        "sampler": sampler,
        "cursor": PromptCursor(resolved.train, settings.run.seed, settings.data.shuffle),
        "ranks": ranks,
        "rollout": settings.rollout,
        "reward": settings.reward,
        "prompts": settings.batch.prompts,
        "seed": settings.run.seed,
    }
    if not isinstance(engine, SglangEngine):
        return RoundsCollector(**parts)

    def sync() -> None:
        engine.update_weights(policy.export_weights(), engine.version)

    return StreamingCollector(**parts, store=platform.store(), sync=sync)


def _replace_tokenizer(resolved: Resolved, folder: Path) -> None:
    """The run's own tokenizer, if it has one, in place of the model's: a file left of that would be read first."""
    if resolved.settings.model.tokenizer is None:
        return
    for name in _TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    resolved.tokenizer.save(folder)


def _stopped_in_words(settings: Settings, done: Done) -> str:
    how = " with run.overwrite false" if settings.run.overwrite else ""
    return f"stopped by SIGTERM after step {done.step}, which is saved; the same command{how} goes on from there"


def _summary(settings: Settings, done: Done, export: Path | None) -> dict[str, Any]:
    """The run in a few figures; the accuracies are those of the first evaluation set."""
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
        for name in RUN_FILES if resolved.start is None else ("summary.json", "sync"):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        prepare(resolved.settings, resolved.start)
        (folder / "config.yaml").write_text(to_yaml(resolved.settings), encoding="utf-8")
    told = [resolved.start]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def _check_megatron(resolved: Resolved, *, running: bool) -> None:
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


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _complain(error: Exception) -> None:
    """One line from one rank: torchrun ends the others when the first leaves. A fault of another's own is told late."""
    if not _is_main():
        time.sleep(10)
    print(f"megatron_rlvr: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def _leave(graders: GraderPool, status: int) -> NoReturn:
    """Ends this process at once: other ranks may be gone, and leaving the process group would wait for them."""
    graders.close()
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(status)


def _quiet_libraries() -> None:
    """One log of our own; libraries speak up for errors only."""
    level = logging.INFO if _is_main() else logging.ERROR
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
