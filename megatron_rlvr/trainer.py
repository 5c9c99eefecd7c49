"""The training loop.

Each step:
    1. collect: sample groups from the rollout engine and grade them (rollout/)
    2. learn: advantages, packed mini-batches, scores, selection, one optimizer step per mini-batch (learner.py)
    3. sync: push the new weights to the rollout engine (engines/); servers that share the GPUs take their memory back
       here, so that what a checkpoint needs of the policy is copied to host memory before
    4. every so many steps: evaluate, save a checkpoint, export the model
"""

import time
from collections.abc import Callable, Iterator, Sequence
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
from megatron_rlvr.evaluation.background import BackgroundEvaluation
from megatron_rlvr.evaluation.training import TrainingEvaluation
from megatron_rlvr.learner import Learner, SkippedStepsError
from megatron_rlvr.metrics import MetricsLog
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.progress import Progress
from megatron_rlvr.protocols import EngineError, RolloutEngine, WeightsMissingError
from megatron_rlvr.recording.recorder import RolloutRecorder
from megatron_rlvr.rollout.collector import CollectionStoppedError, Collector, Rollout
from megatron_rlvr.rollout.saved_groups import restored_form, saved_form
from megatron_rlvr.signals import Signals
from megatron_rlvr.types import Prompt

# Share of truncated responses from which the end of a response is probably not recognized.
_MOSTLY_TRUNCATED = 0.95


class Trainer:
    """Trains a policy with parts that `startup/assembly.py` makes. All ranks make the same calls.

    Attributes:
        prompts: Prompts to train on.
        report: Writes the report of the run; does nothing on other ranks than the main rank.
        export: Writes the policy as a Hugging Face folder; a collective over the world.
        totals: Totals of the run so far, over all of its processes.
    """

    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        engine: RolloutEngine,
        collector: Collector,
        prompts: Sequence[Prompt],
        learner: Learner,
        evaluation: TrainingEvaluation,
        background: BackgroundEvaluation | None,
        log: MetricsLog,
        progress: Progress,
        checkpoints: Checkpoints,
        signals: Signals,
        recorder: RolloutRecorder,
        report: Callable[[], None],
        export: Callable[[Path], None],
    ) -> None:
        self.settings = settings
        self.policy = policy
        self.engine = engine
        self.collector = collector
        self.prompts = prompts
        self.learner = learner
        self.evaluation = evaluation
        self.background = background
        self.log = log
        self.progress = progress
        self.checkpoints = checkpoints
        self.signals = signals
        self.recorder = recorder
        self.report = report
        self.export = export
        self.totals = RunTotals()
        self._save_policy = partial(save_policy, policy)
        self._start_time = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def run(self) -> RunTotals:
        """Train all remaining steps, or until SIGTERM stops the run; return the totals."""
        run, totals = self.settings.run, self.totals
        self.sync(version=totals.step)
        if totals.step == 0 and not totals.before:
            self._note_evaluation(0, self.evaluate(0))
        elif self.background is not None:
            self._resume_evaluation(self.background)
        for step in range(totals.step + 1, run.steps + 1):
            try:
                metrics = self.train_step(step, saves=self.checkpoints.due(step))
            except CollectionStoppedError:
                self.signals.accept()
                self.save()
                break
            if self._evaluation_is_due(step):
                metrics |= self._note_evaluation(step, self.evaluate(step))
            self.log.write(step, metrics)
            self.progress.step(step, metrics)
            if _is_multiple(step, self.settings.log.report_every):
                self.report()
            totals.step = step
            self._collect_evaluation(wait=False)
            self.checkpoints.complete()
            stop = self._stop_is_wanted()
            if stop or self.checkpoints.due(step):
                self.save()
            if _is_multiple(step, run.export_every):
                self.checkpoints.complete()  # first: an export may fail, or take too long after SIGTERM
                self.export(Path(run.dir) / "exports" / f"step_{step:06d}")
            if stop:
                break
        if totals.step == run.steps:
            self._collect_evaluation(wait=True)
            if self.background is not None and self.background.step is not None:
                self.progress.say(f"the evaluation after step {self.background.step} was stopped; its records are kept")
        self.checkpoints.complete()
        totals.seconds += time.perf_counter() - self._start_time
        return totals

    def train_step(self, step: int, *, saves: bool = False) -> dict[str, float]:
        """Run one training step: a rollout, one optimizer step per mini-batch, a weight sync. Return its metrics.

        Args:
            saves: True if `save` follows: it then starts before servers that share the GPUs take their memory back.
        """
        self._seconds = dict.fromkeys(("rollout", "score", "train", "sync"), 0.0)
        with self._timed("step"):
            with self._timed("rollout"):
                try:
                    rollout = self.collector.collect(step, self.progress.sampled)
                except EngineError:  # raised on every rank, with the weights of the last step unchanged
                    self.save()
                    self.checkpoints.complete()
                    raise
            self._warn_of_truncation(step, rollout)
            self.log.write_rollouts(step, rollout.sampled, self.collector.tokenizer)
            if self.settings.rollout.overlap == "one_step" and step < self.settings.run.steps:
                self.collector.begin(step + 1)
            self.engine.release_memory()
            self.policy.start_step()
            metrics = rollout.metrics | (self._learn(step, rollout) if rollout.size else {})
            if saves and self.settings.rollout.colocated:
                with self._timed("save"):
                    self.checkpoints.start(step, self._save_policy)
            with self._timed("sync"):
                self.sync(version=step)
            accelerator.trim_host_memory()
        self.totals.skipped += metrics.pop("train/skipped", 0.0)
        metrics |= {"train/learning_rate": self.policy.learning_rate, "train/skipped_steps": self.totals.skipped}
        metrics |= {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        metrics["memory/held_gb"] = self._most(accelerator.held_memory()) / 1e9
        metrics["memory/peak_gb"] = self._most(accelerator.device_info().peak) / 1e9
        metrics["rollout/tokens_per_second"] = metrics["rollout/response_tokens"] / metrics["time/rollout"]
        return metrics

    def save(self) -> None:
        """Save a checkpoint of everything that the next step depends on."""
        self.log.flush_to_disk()
        totals = replace(self.totals, seconds=self.totals.seconds + time.perf_counter() - self._start_time)
        state = {
            "totals": asdict(totals),
            "collector": saved_form(self.collector.state()),
            "skipped_in_a_row": self.learner.skipped_in_a_row,
            "entropy_coefficient": self.learner.entropy_coefficient,
        }
        with self.signals.saving():
            self.checkpoints.save(totals.step, state, self._save_policy)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Restore the state that `save` saved; the checkpoint has been verified."""
        state = checkpoint.state()
        load_policy(self.policy, checkpoint.folder)
        self.collector.restore(restored_form(state["collector"], self.prompts))
        self.learner.skipped_in_a_row = state["skipped_in_a_row"]
        self.learner.entropy_coefficient = state["entropy_coefficient"]
        self.totals = RunTotals(**state["totals"])

    def sync(self, version: int) -> None:
        """Push the policy's weights to the rollout engine."""
        self.engine.update_weights(self.policy.export_weights(), version)

    def evaluate(self, step: int) -> dict[str, float]:
        """Return the metrics of each evaluation set; empty without sets, and if the background evaluates them."""
        if not self.evaluation:
            return {}
        if self.background is not None:
            self._collect_evaluation(wait=True)
            self.totals.after = {}
            if self.background.step is None:  # else SIGTERM has ended the wait for the last one, and ends the run
                self.background.start(step, self.policy.export_weights())
            return {}
        self.evaluation.start(step)
        while True:
            try:
                with self.progress.evaluating(self.evaluation.share_size()) as finished:
                    metrics = self.evaluation.run(step, finished)
                break
            except WeightsMissingError:  # raised on every rank: servers have restarted without the weights
                self.sync(version=step)  # and the evaluation continues with what is not recorded yet
        self.progress.evaluated(step, metrics)
        if step == 0:
            self.log.write(0, metrics)
        return metrics

    def _collect_evaluation(self, *, wait: bool) -> None:
        """Take the metrics of an evaluation in the background, if it has ended, and log them under its own step."""
        if self.background is None:
            return
        found = self.background.collect(wait=wait, stop_wanted=self._stop_is_wanted)
        if found is None:
            return
        step, metrics, failure = found
        if failure is not None:
            self.progress.say(f"the evaluation after step {step} has failed, and training continues: {failure}")
            return
        self.progress.evaluated(step, self._note_evaluation(step, metrics))
        self.log.write_late(step, metrics)

    def _resume_evaluation(self, background: BackgroundEvaluation) -> None:
        """Log what evaluations in the background have found since the checkpoint was saved; resume that of its step.

        Those of earlier steps that have not finished stay so: their weights are lost.
        """
        finished, step = self.evaluation.finished(), self.totals.step
        for each, metrics in finished.items():
            self._note_evaluation(each, metrics)
            self.log.write_missing(each, metrics)
        if self._evaluation_is_due(step) and step not in finished:
            self.totals.after = {}
            background.start(step, self.policy.export_weights(), resumed=True)

    def _evaluation_is_due(self, step: int) -> bool:
        return bool(self.evaluation) and (
            step == self.settings.run.steps or _is_multiple(step, self.settings.run.eval_every)
        )

    def _note_evaluation(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Keep the metrics of the first evaluation of the run, and of the last one; return them."""
        if metrics:
            self.totals.after = metrics
            if step == 0:
                self.totals.before = metrics
        return metrics

    def _warn_of_truncation(self, step: int, rollout: Rollout) -> None:
        """Say after the first rollout of the run if nearly no response ended by itself."""
        share = rollout.metrics.get("rollout/truncated_fraction", 0.0)
        if step == 1 and share >= _MOSTLY_TRUNCATED:
            cap = self.settings.rollout.max_response_tokens
            self.progress.say(
                f"in step 1, {100 * share:.0f} % of the responses reached rollout.max_response_tokens={cap}, and none "
                "of the stop tokens in the plan ended them; read rollouts/, and add the token that should have to "
                "rollout.stop, or raise the cap"
            )

    def _stop_is_wanted(self) -> bool:
        """Return on every rank whether SIGTERM has arrived on any; ranks get it at different moments."""
        ranks = self.policy.ranks
        in_data_group = any(gather(self.signals.stop_wanted, ranks.data_objects))
        wanted = any(gather(in_data_group, ranks.replica_objects))
        if wanted:
            self.signals.accept()
        return wanted

    def _most(self, size: int) -> int:
        """Return the largest ``size`` of any rank. A collective over the world."""
        ranks = self.policy.ranks
        return max(gather(max(gather(size, ranks.data_objects)), ranks.replica_objects))

    def _learn(self, step: int, rollout: Rollout) -> dict[str, float]:
        """Train on a rollout; a SkippedStepsError names the prompts and the file that holds the mini-batch."""
        settings, groups = self.settings, [(group.order, group.group) for group in rollout.groups]
        mini_batches = build_mini_batches(
            groups,
            estimator=settings.advantage.estimator,
            groups_per_mini_batch=settings.batch.mini_batch_prompts,
            packing=self.policy.packing(settings.batch.tokens_per_micro_batch),
            data_group=self.policy.ranks.data_objects,
        )
        recorder = self.recorder.choose(groups, mini_batches[0].group_size)
        try:
            metrics = self.learner.learn(step, mini_batches, self._timed, recorder)
        except SkippedStepsError as error:
            size = settings.batch.mini_batch_prompts
            here = [group.group for group in rollout.groups if group.order // size == error.mini_batch]
            skipped = [group for part in gather(here, self.policy.ranks.data_objects) for group in part]
            path = self.log.write_skipped(step, skipped, self.collector.tokenizer)
            ids = ", ".join(group.prompt.id for group in skipped)
            raise SkippedStepsError(f"{error}: prompts {ids}, written to {path}", error.mini_batch) from None
        if recorder is not None:
            with self._timed("record"):
                self.recorder.write(step, groups, recorder)
        return metrics

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Time a phase of the step, and show its name."""
        self.progress.phase(phase)
        start = time.perf_counter()
        yield
        accelerator.synchronize()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start


def _is_multiple(step: int, every: int) -> bool:
    """Return whether something that happens every ``every`` steps (0: never) happens after ``step``."""
    return bool(every) and step % every == 0
