"""The training loop: sample and grade, score, select and train, hand the weights over. Each verb has its own room."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from megatron_rlvr.batching.mini_batches import build_mini_batches
from megatron_rlvr.checkpoint.megatron.policy import load_policy, save_policy
from megatron_rlvr.checkpoint.store import Checkpoint, Checkpoints, RunTotals
from megatron_rlvr.config import Settings
from megatron_rlvr.distributed import accelerator
from megatron_rlvr.distributed.collectives import gather
from megatron_rlvr.evaluation.evaluator import Evaluator
from megatron_rlvr.learner import Learner, SkippedStepsError
from megatron_rlvr.metrics import MetricsLog
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.progress import Progress
from megatron_rlvr.protocols import EngineError, RolloutEngine, WeightsMissingError
from megatron_rlvr.rollout.collector import CollectionStoppedError, Collector, Rollout
from megatron_rlvr.signals import Signals

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a policy; everything it needs is made elsewhere (`train.py`) and passed in. All ranks run it alike."""

    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        engine: RolloutEngine,
        collector: Collector,
        learner: Learner,
        evaluator: Evaluator,
        log: MetricsLog,
        progress: Progress,
        checkpoints: Checkpoints,
        signals: Signals,
        export: Callable[[Path], None],
    ) -> None:
        self.settings = settings
        self.policy = policy
        self.engine = engine
        self.collector = collector
        self.learner = learner
        self.evaluator = evaluator
        self.log = log
        self.progress = progress
        self.checkpoints = checkpoints
        self.signals = signals
        self.export = export
        """Writes the policy as a Hugging Face folder; a collective over the world."""
        self.done = RunTotals()
        self._began = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def run(self) -> RunTotals:
        """All steps that are left, unless SIGTERM ends the run before; what is done then."""
        run = self.settings.run
        steps, every, every_export = run.steps, run.eval_every, run.export_every
        self.sync(version=self.done.step)
        if self.done.step == 0 and not self.done.before:
            self.done.before = self.done.after = self.evaluate(0)
        for step in range(self.done.step + 1, steps + 1):
            try:
                metrics = self.train_step(step)
            except CollectionStoppedError:
                self.signals.accept()
                self.save()
                break
            if step == steps or (every and step % every == 0):
                self.done.after = self.evaluate(step)
                metrics |= self.done.after
            self.log.write(step, metrics)
            self.progress.step(step, metrics)
            self.done.step = step
            self.checkpoints.complete()
            stop = self._stop_is_wanted()
            if stop or self.checkpoints.due(step):
                self.save()
            if every_export and step % every_export == 0:
                self.checkpoints.complete()  # an export that fails, or takes too long after SIGTERM, must not cost it
                self.export(Path(run.dir) / "exports" / f"step_{step:06d}")
            if stop:
                break
        self.checkpoints.complete()
        self.done.seconds += time.perf_counter() - self._began
        return self.done

    def train_step(self, step: int) -> dict[str, float]:
        """One training step: a rollout, and one optimizer step for each of its mini-batches."""
        self._seconds = dict.fromkeys(("rollout", "score", "train", "sync"), 0.0)
        with self._timed("step"):
            with self._timed("rollout"):
                try:
                    rollout = self.collector.collect(step, self.progress.sampled)
                except EngineError:  # on every rank, and the weights are still those of the last step
                    self.save()
                    self.checkpoints.complete()
                    raise
            self.log.write_rollouts(step, rollout.sampled, self.collector.tokenizer)
            if self.settings.rollout.overlap == "one_step" and step < self.settings.run.steps:
                self.collector.begin(step + 1)
            self.engine.release_memory()
            self.policy.start_step()
            metrics = rollout.metrics | (self._learn(step, rollout) if rollout.size else {})
            with self._timed("sync"):
                self.sync(version=step)
        self.done.skipped += metrics.pop("train/skipped", 0.0)
        metrics |= {"train/learning_rate": self.policy.learning_rate, "train/skipped_steps": self.done.skipped}
        metrics |= {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        metrics["rollout/tokens_per_second"] = metrics["rollout/response_tokens"] / metrics["time/rollout"]
        return metrics

    def save(self) -> None:
        """A checkpoint of all that the next step depends on."""
        self.log.flush_to_disk()
        done = replace(self.done, seconds=self.done.seconds + time.perf_counter() - self._began)
        state = {
            "done": asdict(done),
            "collector": self.collector.state(),
            "skipped_in_a_row": self.learner.skipped_in_a_row,
        }
        with self.signals.saving():
            self.checkpoints.save(done.step, state, partial(save_policy, self.policy))

    def _stop_is_wanted(self) -> bool:
        """Whether SIGTERM was noted on any rank; it reaches them at different moments."""
        ranks = self.policy.ranks
        noted = any(gather(self.signals.stop_wanted, ranks.data_objects))
        wanted = any(gather(noted, ranks.replica_objects))
        if wanted:
            self.signals.accept()
        return wanted

    def resume(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint instead of from the beginning."""
        state = checkpoint.state()
        load_policy(self.policy, checkpoint.folder)
        self.collector.restore(state["collector"])
        self.learner.skipped_in_a_row = state["skipped_in_a_row"]
        self.done = RunTotals(**state["done"])

    def sync(self, version: int) -> None:
        """Hands the policy's weights to the rollout engine."""
        self.engine.update_weights(self.policy.export_weights(), version)

    def evaluate(self, step: int) -> dict[str, float]:
        """Accuracy on the evaluation sets; nothing where none is given."""
        if not self.evaluator:
            return {}
        while True:
            try:
                with self.progress.evaluating(self.evaluator.requests_of_this_rank()) as finished:
                    metrics = self.evaluator.run(finished)
                break
            except WeightsMissingError:  # on every rank: servers came back without them
                self.sync(version=step)
        self.progress.evaluated(step, metrics)
        if step == 0:
            self.log.write(0, metrics)
        return metrics

    def _learn(self, step: int, rollout: Rollout) -> dict[str, float]:
        settings = self.settings
        mini_batches = build_mini_batches(
            [(group.order, group.group) for group in rollout.groups],
            estimator=settings.advantage.estimator,
            groups_per_mini_batch=settings.batch.mini_batch_prompts,
            packing=self.policy.packing(settings.batch.tokens_per_micro_batch),
            data_group=self.policy.ranks.data_objects,
        )
        try:
            return self.learner.learn(step, mini_batches, self._timed)
        except SkippedStepsError as error:
            size = settings.batch.mini_batch_prompts
            here = [group.group for group in rollout.groups if group.order // size == error.mini_batch]
            groups = [group for part in gather(here, self.policy.ranks.data_objects) for group in part]
            path = self.log.write_skipped(step, groups, self.collector.tokenizer)
            ids = ", ".join(group.prompt.id for group in groups)
            raise SkippedStepsError(f"{error}: prompts {ids}, all of it in {path}", error.mini_batch) from None

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        self.progress.phase(phase)
        start = time.perf_counter()
        yield
        accelerator.synchronize()
        self._seconds[phase] = time.perf_counter() - start
