"""Rehearsal: one training step with the run's own trainer, layout, engine and servers, on a few prompts.

It differs from the run in the settings that `rehearsal_settings` changes, and in its responses counting as correct and
incorrect in turn (grading.py). Its run folder is temporary, and servers get the weights of `model.path` back.
"""

import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_rlvr.config import EvaluateSettings, RolloutSettings, Settings
from megatron_rlvr.config.loading import validate
from megatron_rlvr.distributed import accelerator
from megatron_rlvr.engines.sglang.pool import ServerPool
from megatron_rlvr.hf.families import rows_of
from megatron_rlvr.hf.weights import TensorReader
from megatron_rlvr.policy.build import DTYPES
from megatron_rlvr.preflight.context import PreflightContext
from megatron_rlvr.preflight.grading import AlternatingGraders
from megatron_rlvr.preflight.results import CheckResult
from megatron_rlvr.preflight.servers import weight_versions
from megatron_rlvr.startup.assembly import build_trainer

_SHORT_RESPONSE = 64
# Share of rollout.max_logprob_gap above which a mismatch is worth a warning.
_LARGE_MISMATCH_SHARE = 0.1


class Rehearsal:
    """The run's trainer, built for one step. All methods are collectives over the world.

    Attributes:
        settings: Settings of the rehearsal.
        graders: Graders of the rehearsal.
        trainer: Trainer of the rehearsal.
        metrics: Metrics of its step.
        initial_weights: {URL: name of the weights that the server held before the step}
    """

    def __init__(self, context: PreflightContext) -> None:
        resolved, resources = context.resolved, context.resources
        sync = resolved.settings.sync.dir
        self.settings = rehearsal_settings(
            resolved.settings,
            context.new_folder(Path(resolved.settings.run.dir)),
            context.new_folder(Path(sync)) if sync else None,
            prompts=min(context.ranks.data_size, len(resolved.train)),
            max_tokens=None if context.full_length else _SHORT_RESPONSE,
        )
        self.graders = AlternatingGraders(
            self.settings.reward, context.ranks.replica_rank, context.resolved.answer_after
        )
        resources.enter_context(self.graders)
        changed = replace(resolved, settings=self.settings, evaluation={}, start=None)
        with redirect_stdout(io.StringIO()):  # not a terminal, so that no progress bar appears within the table
            self.trainer = build_trainer(changed, self.graders, context.signals, context.ranks, resources)
        self.metrics: dict[str, float] = {}
        self.initial_weights: dict[str, str] = {}

    def step(self) -> None:
        """Take the training step. Afterwards servers hold the new weights."""
        self.metrics = self.trainer.train_step(1)

    def restore(self) -> None:
        """Push the weights of `model.path` to the servers, under the name that they had before the step."""
        policy = self.trainer.policy
        weights = _weights_of_folder(self.settings, policy.hf_config) if policy.ranks.is_main else ()
        self.trainer.engine.update_weights(weights, 0)


def rehearsal_settings(
    settings: Settings, folder: Path, sync: Path | None, *, prompts: int, max_tokens: int | None
) -> Settings:
    """Return the run's settings without evaluation, checkpoints, logs and everything else that a rehearsal leaves out.

    Args:
        folder: Replacement for `run.dir`.
        sync: Replacement for `sync.dir`, if that is set.
        prompts: Number of groups of the only step.
        max_tokens: Maximum number of tokens of a response; None for the run's own.
    """
    values = settings.model_dump()
    response = min(max_tokens or settings.rollout.max_response_tokens, settings.rollout.max_response_tokens)
    changes: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder), "steps": 1, "eval_every": 0, "save_every": 0, "keep_every": 0, "export": False}
        | {"export_every": 0, "async_save": False},
        "rollout": {
            "max_response_tokens": response,
            "dynamic_sampling": False,
            "max_rounds": RolloutSettings.model_fields["max_rounds"].default,
            "max_logprob_gap": 1e6,  # the mismatch is a check of its own
        },
        "batch": {"prompts": prompts, "mini_batch_prompts": prompts},
        "log": {"tensorboard": False, "wandb": False, "wandb_project": None, "rollouts": 0},
        "evaluate": EvaluateSettings().model_dump(),
        "sync": {"dir": str(sync)} if sync else {},
    }
    if settings.reward.overlong_buffer >= response:
        changes["reward"] = {"overlong_buffer": 0}
    return validate({section: values[section] | changes.get(section, {}) for section in values})


def _weights_of_folder(settings: Settings, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of every weight, in the order of the family's table and in the run's precision."""
    reader = TensorReader(settings.model.path, config)
    for (row,) in rows_of(config):
        for name in row.hugging_face:
            yield name, reader.read(name).to(DTYPES[settings.model.dtype])


# Checks -------------------------------------------------------------------------------------------------------------


def check_rehearsal(context: PreflightContext, pool: ServerPool | None) -> tuple[CheckResult, Rehearsal]:
    """Sample, score, select, train and push weights, once, by the run's own code.

    Args:
        pool: Connections to the servers, on leaders.
    """
    before = weight_versions(context, pool)
    rehearsal = Rehearsal(context)
    accelerator.reset_peak_memory()
    rehearsal.trainer.sync(version=0)
    rehearsal.initial_weights = weight_versions(context, pool)
    rehearsal.step()
    after = weight_versions(context, pool)
    return _judge(context, rehearsal, before, after), rehearsal


def _judge(
    context: PreflightContext, rehearsal: Rehearsal, before: dict[str, str], after: dict[str, str]
) -> CheckResult:
    settings, metrics, initial = rehearsal.settings, rehearsal.metrics, rehearsal.initial_weights
    verdicts = [verdict for part in context.gather(rehearsal.graders.verdicts) for verdict in part]
    failures = [verdict.failure for verdict in verdicts if verdict.failure]
    correct = sum(verdict.is_correct(settings.reward.correct) for verdict in verdicts)
    phases = ", ".join(f"{phase} {metrics[f'time/{phase}']:.1f} s" for phase in ("rollout", "score", "train", "sync"))
    message = (
        f"{len(verdicts)} responses of up to {settings.rollout.max_response_tokens} tokens to {settings.batch.prompts} "
        f"prompt(s), {correct} correct: {phases}"
    )
    if metrics["rollout/groups"] < settings.batch.prompts:
        problem = f"only {metrics['rollout/groups']:g} groups were sampled; {message}"
        return CheckResult("rehearsal", "failed", problem, "see the lines above for what happened to the others")
    if metrics["train/skipped_steps"]:
        remedy = "check the weights in model.path, and optimizer.learning_rate"
        return CheckResult("rehearsal", "failed", f"the loss or the gradient is not finite; {message}", remedy)
    if not metrics["train/grad_norm"] > 0:
        remedy = "see the lines above, and compare with a run on one rank"
        return CheckResult("rehearsal", "failed", f"the gradient is zero; {message}", remedy)
    if wrong := _wrong_weights(before, initial, after):
        return CheckResult("rehearsal", "failed", wrong, "restart these servers, and read their logs")
    if failures:
        problem = f"{message}; {len(failures)} responses were not graded: {failures[0]}"
        return CheckResult(
            "rehearsal", "warned", problem, "correct the reward function, or raise reward.timeout_seconds"
        )
    if initial:
        name = next(iter(initial.values()))
        message += f"; {len(initial)} server(s) held the weights pushed, {name}, and then the next"
    return CheckResult("rehearsal", "passed", message)


def _wrong_weights(before: dict[str, str], initial: dict[str, str], after: dict[str, str]) -> str | None:
    """Return what is wrong with the servers' weights: each weight sync must give all of them the same new weights."""
    for earlier, now in ((before, initial), (initial, after)):
        if len(set(now.values())) > 1:
            return "servers hold different weights after a weight sync: " + ", ".join(
                f"{u}: {w}" for u, w in now.items()
            )
        unchanged = [url for url in now if now[url] == earlier[url]]
        if unchanged:
            return f"{', '.join(unchanged)} still held weights {now[unchanged[0]]} after a weight sync"
    return None


def check_mismatch(context: PreflightContext, rehearsal: Rehearsal) -> CheckResult:
    """Compare the log-probabilities of engine and policy for the same tokens and weights."""
    metrics, limit = rehearsal.metrics, context.resolved.settings.rollout.max_logprob_gap
    mean, largest = metrics["rollout/logprob_gap_mean"], metrics["rollout/logprob_gap_max"]
    message = f"{mean:.3g} nats on average, {largest:.3g} at most; the run stops above {limit:g}"
    remedy = "compare the precision of engine and policy (model.dtype, --dtype of the servers) and rollout.temperature"
    if mean > limit:
        return CheckResult("mismatch", "failed", message, f"the engine samples from another model: {remedy}")
    if mean > _LARGE_MISMATCH_SHARE * limit:
        return CheckResult("mismatch", "warned", message, f"{remedy}, or set loss.rollout_correction to tis")
    return CheckResult("mismatch", "passed", message)


def check_restored(context: PreflightContext, pool: ServerPool | None, rehearsal: Rehearsal) -> CheckResult:
    """Push the weights with which a run of these settings starts, and check that servers hold them.

    Args:
        pool: Connections to the servers, on leaders.
    """
    if context.resolved.settings.rollout.engine == "embedded":
        message = "nothing to restore: no servers, and the rehearsal's folder is removed"
        return CheckResult("restored", "passed", message)
    rehearsal.restore()
    held = weight_versions(context, pool)
    wrong = [url for url in held if held[url] != rehearsal.initial_weights[url]]
    if wrong:
        problem = f"{', '.join(wrong)} did not load the weights of model.path again"
        return CheckResult("restored", "failed", problem, "restart these servers")
    message = f"{len(held)} server(s) hold the weights of model.path again, {next(iter(held.values()))}"
    return CheckResult("restored", "passed", f"{message}; a run pushes its own before it samples")
