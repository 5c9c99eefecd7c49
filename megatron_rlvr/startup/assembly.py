"""Assembly of a run: every part is made from the settings and connected to the others here, and nowhere else."""

import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rlvr.algo.loss import policy_loss
from megatron_rlvr.analysis.report import REPORT, write_report
from megatron_rlvr.checkpoint.files import HUGGING_FACE
from megatron_rlvr.checkpoint.megatron.policy import export_policy
from megatron_rlvr.checkpoint.store import Checkpoints
from megatron_rlvr.config import LossSettings, Settings
from megatron_rlvr.data.cursor import PromptCursor
from megatron_rlvr.data.difficulty import DifficultyCursor
from megatron_rlvr.data.tokenizer import TOKENIZER_FILES
from megatron_rlvr.distributed import accelerator, process_group
from megatron_rlvr.distributed.collectives import raise_on_all_ranks
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.engines.embedded.engine import EmbeddedEngine
from megatron_rlvr.engines.sglang.connect import connect
from megatron_rlvr.engines.sglang.engine import SglangEngine
from megatron_rlvr.engines.sglang.pool import ServerPool
from megatron_rlvr.engines.sglang.weight_sync.base import WeightSync
from megatron_rlvr.engines.sglang.weight_sync.disk import DiskSync
from megatron_rlvr.engines.sglang.weight_sync.distributed import DistributedSync
from megatron_rlvr.engines.sglang.weight_sync.tensor import TensorSync
from megatron_rlvr.errors import RlvrError, one_line
from megatron_rlvr.evaluation.background import BackgroundEvaluation
from megatron_rlvr.evaluation.evaluator import Evaluator, share_of
from megatron_rlvr.evaluation.majority import same_answers
from megatron_rlvr.evaluation.training import TrainingEvaluation
from megatron_rlvr.learner import Learner
from megatron_rlvr.metrics import MetricsLog
from megatron_rlvr.policy.build import DTYPES
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.progress import Progress
from megatron_rlvr.protocols import PolicyLoss, RolloutEngine
from megatron_rlvr.recording.recorder import RolloutRecorder
from megatron_rlvr.reward.graders import GraderPool
from megatron_rlvr.rollout.asynchronous import AsynchronousCollector
from megatron_rlvr.rollout.collector import Collector
from megatron_rlvr.rollout.sampler import Sampler
from megatron_rlvr.rollout.synchronous import SynchronousCollector
from megatron_rlvr.signals import Signals
from megatron_rlvr.startup.evaluation import describe_evaluation
from megatron_rlvr.startup.resolve import Resolved
from megatron_rlvr.trainer import Trainer


def build_trainer(
    resolved: Resolved, graders: GraderPool, signals: Signals, ranks: Ranks, resources: ExitStack
) -> Trainer:
    """Make the trainer and all of its parts. A collective over the world.

    Args:
        resolved: Settings of the run, with a run folder that is prepared.
        resources: Closes the parts.
    """
    settings, start = resolved.settings, resolved.start
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
    collector = _collector(resolved, sampler, ranks, policy, signals)
    resources.callback(collector.close)
    evaluator = Evaluator(
        sampler,
        settings.evaluate,
        {name: prompts.prompts for name, prompts in resolved.evaluation.items()},
        share=share_of(ranks, leaders_only=on_servers),
        same=same_answers(settings.reward, graders, resolved.answer_after),
        max_response_tokens=settings.rollout.max_response_tokens,
        seed=settings.run.seed,
    )
    evaluation = TrainingEvaluation(evaluator, describe_evaluation(resolved), Path(settings.run.dir))
    background = _background_evaluation(resolved, graders, ranks, resources)
    learner = Learner(settings, policy, make_loss(settings.loss), load_reference(settings, ranks))
    folder = Path(settings.run.dir)
    log = MetricsLog(folder, settings.log, settings, enabled=ranks.is_main, after=start.step if start else None)
    resources.callback(log.close)
    own_tokenizer = partial(_replace_tokenizer, resolved)
    checkpoints = Checkpoints(
        settings.run,
        is_main=ranks.is_main,
        start=start,
        raise_on_all_ranks=raise_on_all_ranks,
        finish=lambda folder: own_tokenizer(folder / HUGGING_FACE),
        inputs=resolved.inputs,
    )
    recorder = RolloutRecorder(
        folder,
        settings.log.most_rollouts,
        resolved.tokenizer,
        ranks.data_objects,
        share=settings.log.rollout_share,
        is_main=ranks.is_main,
    )
    progress = resources.enter_context(Progress(settings.run.steps, enabled=ranks.is_main))

    def report() -> None:
        if not ranks.is_main:
            return
        try:
            write_report([folder], folder / REPORT)
        except (RlvrError, OSError) as error:  # the run is worth more than a page about it
            progress.say(f"the report was not written, and training continues: {one_line(error)}")

    def export(folder: Path) -> None:
        with checkpoints.explaining_errors(f"the export {folder.name}", folder.parent):
            export_policy(policy, folder, own_tokenizer)

    return Trainer(
        settings,
        policy,
        engine,
        collector,
        resolved.train.prompts,
        learner,
        evaluation,
        background,
        log,
        progress,
        checkpoints,
        signals,
        recorder,
        report,
        export,
    )


def make_loss(settings: LossSettings) -> PolicyLoss:
    """Bind the numbers of the settings to `algo.loss.policy_loss`."""
    return partial(
        policy_loss,
        objective=settings.objective,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
        kl_estimator=settings.kl_estimator,
        kl_coefficient=settings.kl_coefficient,
    )


def load_reference(settings: Settings, ranks: Ranks) -> Policy | None:
    """Load the model of `model.path`, also in a run that resumes, as the frozen reference; None without a KL term."""
    if not settings.loss.kl_coefficient:
        return None
    return Policy(
        settings.model,
        settings.parallel,
        ranks,
        megatron=settings.megatron,
        temperature=settings.rollout.temperature,
        seed=settings.run.seed,
    )


def _engine(resolved: Resolved, ranks: Ranks, resources: ExitStack) -> RolloutEngine:
    """Make the rollout engine, which ``resources`` closes. A collective if it checks servers."""
    settings = resolved.settings
    if settings.rollout.engine == "embedded":
        return EmbeddedEngine(
            settings.model.path,
            dtype=DTYPES[settings.model.dtype],
            device=accelerator.device(),
            stop_token_ids=resolved.stop_token_ids,
            pad_token_id=resolved.tokenizer.pad_token_id,
            max_batch_tokens=settings.rollout.max_batch_tokens,
            max_batch_rows=settings.rollout.max_batch_rows,
        )

    pool = _connect(resolved, ranks, same_transport=settings.sync.method == "distributed")
    engine = SglangEngine(
        pool,
        _weight_sync(resolved, pool, ranks),
        stop_token_ids=resolved.stop_token_ids,
        vocab_size=resolved.hf_config["vocab_size"],
        max_sequence_tokens=settings.max_sequence_tokens,
        colocated=settings.rollout.colocated,
    )
    resources.callback(engine.close)
    return engine


def _connect(resolved: Resolved, ranks: Ranks, **which: Any) -> ServerPool | None:
    """Connect to servers that fit the run; ``which`` goes to `connect`."""
    settings = resolved.settings
    return connect(
        settings.rollout,
        ranks,
        resolved.hf_config,
        max_sequence_tokens=settings.max_sequence_tokens,
        dtype=settings.model.dtype,
        **which,
    )


def _background_evaluation(
    resolved: Resolved, graders: GraderPool, ranks: Ranks, resources: ExitStack
) -> BackgroundEvaluation | None:
    """Make the evaluation on `evaluate.servers`; None without them. A collective if there are any."""
    settings = resolved.settings
    if not settings.evaluate.servers:
        return None
    pool = _connect(resolved, ranks, evaluation_servers=settings.evaluate.servers)
    folder = Path(settings.run.dir) / "sync_evaluation"
    engine = SglangEngine(
        pool,
        DiskSync(folder, Path(settings.model.path), pool, ranks, partial(_replace_tokenizer, resolved)),
        stop_token_ids=resolved.stop_token_ids,
        vocab_size=resolved.hf_config["vocab_size"],
        max_sequence_tokens=settings.max_sequence_tokens,
    )
    resources.callback(engine.close)
    stop = threading.Event()
    evaluator = Evaluator(
        Sampler(engine, resolved.tokenizer, graders, settings.reward),
        settings.evaluate,
        {name: prompts.prompts for name, prompts in resolved.evaluation.items()},
        share=slice(None),
        same=same_answers(settings.reward, graders, resolved.answer_after),
        max_response_tokens=settings.rollout.max_response_tokens,
        seed=settings.run.seed,
        generate=partial(engine.completions, stop_wanted=stop.is_set),
    )
    evaluation = TrainingEvaluation(evaluator, describe_evaluation(resolved), Path(settings.run.dir))
    background = BackgroundEvaluation(evaluation, engine.update_weights, stop)
    resources.callback(background.close)
    return background


def _weight_sync(resolved: Resolved, pool: ServerPool | None, ranks: Ranks) -> WeightSync:
    """Make the weight sync to servers."""
    settings = resolved.settings
    if settings.sync.method == "disk":
        folder = Path(settings.sync.dir or Path(settings.run.dir) / "sync")
        return DiskSync(folder, Path(settings.model.path), pool, ranks, partial(_replace_tokenizer, resolved))
    if settings.sync.method == "tensor":
        return TensorSync(pool, ranks, settings.sync.bucket_bytes)

    return DistributedSync(pool, ranks, settings.sync.bucket_bytes)


def _collector(resolved: Resolved, sampler: Sampler, ranks: Ranks, policy: Policy, signals: Signals) -> Collector:
    """Make the collector: synchronous for the embedded engine, asynchronous for servers."""
    settings, engine = resolved.settings, sampler.engine
    cursor = _cursor(resolved)
    groups_per_batch, seed = settings.batch.prompts, settings.run.seed

    def stop_wanted() -> bool:
        return signals.stop_wanted

    if isinstance(engine, EmbeddedEngine):
        return SynchronousCollector(
            sampler,
            cursor,
            ranks,
            settings.rollout,
            groups_per_batch=groups_per_batch,
            seed=seed,
            generate=partial(engine.completions, stop_wanted=stop_wanted),
            stop_wanted=stop_wanted,
        )
    assert isinstance(engine, SglangEngine), type(engine)

    def sync() -> None:
        engine.update_weights(policy.export_weights(), engine.version)

    return AsynchronousCollector(
        sampler,
        cursor,
        ranks,
        settings.rollout,
        groups_per_batch=groups_per_batch,
        seed=seed,
        store=process_group.store(),
        sync=sync,
        stop_wanted=stop_wanted,
    )


def _cursor(resolved: Resolved) -> PromptCursor:
    """Return the cursor over the prompts to train on."""
    settings = resolved.settings
    seed, shuffle, changes = settings.run.seed, settings.data.shuffle, settings.run.accept_changed_inputs
    if settings.data.difficulty is None:
        return PromptCursor(resolved.train, seed, shuffle, accept_changes=changes)
    return DifficultyCursor(
        resolved.train,
        seed,
        shuffle,
        accept_changes=changes,
        retire_above=settings.data.difficulty.retire_above,
        rest_below=settings.data.difficulty.rest_below,
        rest_steps=settings.data.difficulty.rest_steps or 0,
    )


def _replace_tokenizer(resolved: Resolved, folder: Path) -> None:
    """Replace the model's tokenizer in a folder by that of `model.tokenizer`, if it is set.

    All files of the model's tokenizer are removed, as one that is left could be read instead of the new ones.
    """
    if resolved.settings.model.tokenizer is None:
        return
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    resolved.tokenizer.save(folder)
