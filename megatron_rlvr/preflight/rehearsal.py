"""One step of the run before the run: its own trainer, layout, engine and servers, on a few prompts.

What differs is listed in `rehearsal_settings`, and that answers are taken for right and wrong in turn (grading.py).
The run folder is another, which is removed; servers get the weights of `model.path` back.
"""

import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_rlvr.algo.loss import make_loss
from megatron_rlvr.batching.batch import MicroBatch, Packing, Sample
from megatron_rlvr.config import EvaluateSettings, RolloutSettings, Settings
from megatron_rlvr.config.command_line import validate
from megatron_rlvr.distributed import accelerator
from megatron_rlvr.hf.families import rows_of
from megatron_rlvr.hf.weights import TensorReader
from megatron_rlvr.policy.build import DTYPES
from megatron_rlvr.preflight.context import LESS_MEMORY, Site
from megatron_rlvr.preflight.grading import ContrastingGraders
from megatron_rlvr.preflight.results import Finding, in_gb
from megatron_rlvr.preflight.servers import weights_on_servers
from megatron_rlvr.startup.assembly import build_trainer

_SHORT_RESPONSE = 64
_LARGE_GAP_SHARE = 0.1
_LEAST_LEFT = 0.1


class Rehearsal:
    """The run's trainer, made for one step. All methods are collectives over the world.

    Attributes:
        settings: of the rehearsal.
        metrics: of its step.
        held: what servers called their weights before it.
    """

    def __init__(self, site: Site) -> None:
        resolved, resources = site.resolved, site.resources
        sync = resolved.settings.sync.dir
        self.settings = rehearsal_settings(
            resolved.settings,
            site.new_folder(Path(resolved.settings.run.dir)),
            site.new_folder(Path(sync)) if sync else None,
            prompts=min(site.ranks.data_size, len(resolved.train)),
            most_tokens=None if site.full_length else _SHORT_RESPONSE,
        )
        self.graders = ContrastingGraders(self.settings.reward, site.ranks.replica_rank)
        resources.enter_context(self.graders)
        changed = replace(resolved, settings=self.settings, evaluation={}, start=None)
        with redirect_stdout(io.StringIO()):  # no terminal: the run's bar would be drawn among the rows of the table
            self.trainer = build_trainer(changed, self.graders, site.signals, site.ranks, resources)
        self.metrics: dict[str, float] = {}
        self.held: dict[str, str] = {}

    def step(self) -> None:
        """The step, after which servers hold the weights that it made."""
        self.metrics = self.trainer.train_step(1)

    def longest(self, settings: Settings) -> int:
        """Scores and trains on the largest micro-batches that the run can meet, as many as a pipeline holds at once.

        Args:
            settings: of the run.

        Returns: tokens of each.
        """
        policy, device = self.trainer.policy, accelerator.device()
        packing = policy.packing(settings.batch.tokens_per_micro_batch)
        batch = largest_micro_batch(settings, packing, policy.hf_config["vocab_size"])
        batches = [batch] * max(policy.ranks.pipeline_size, packing.micro_batch_multiple)

        def mask(rows: int) -> torch.Tensor:
            return torch.arange(rows, device=device) % max(1, round(1 / settings.selection.fraction)) == 0

        masks = [mask(len(b.rows)) for b in batches]
        current = settings.selection.entropy == "current"
        self.trainer.engine.release_memory()
        scores = policy.score(batches)
        policy.train_step(
            batches,
            (lambda _, entropy: mask(len(entropy))) if current else masks,
            scores.logp,
            make_loss(settings.loss),
            sum(len(b.rows) for b in batches),
        )
        return len(batch.tokens)

    def restore(self) -> None:
        """Gives servers the weights of `model.path`, under the name that they had before the step."""
        policy = self.trainer.policy
        weights = _weights_of_the_folder(self.settings, policy.hf_config) if policy.ranks.is_main else ()
        self.trainer.engine.update_weights(weights, 0)


def rehearsal_settings(
    settings: Settings, folder: Path, sync: Path | None, *, prompts: int, most_tokens: int | None
) -> Settings:
    """The run's settings with all that is not to happen taken out.

    Args:
        folder, sync: in place of `run.dir` and, if given, `sync.dir`.
        prompts: groups of the only step.
        most_tokens: of a response; None for the run's own.
    """
    values = settings.model_dump()
    response = min(most_tokens or settings.rollout.max_response_tokens, settings.rollout.max_response_tokens)
    changes: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder), "steps": 1, "eval_every": 0, "save_every": 0, "keep_every": 0, "export": False}
        | {"export_every": 0, "async_save": False},
        "rollout": {
            "max_response_tokens": response,
            "dynamic_sampling": False,
            "max_rounds": RolloutSettings.model_fields["max_rounds"].default,
            "max_logprob_gap": 1e9,  # the gap is a check of its own
        },
        "batch": {"prompts": prompts, "mini_batch_prompts": prompts},
        "log": {"tensorboard": False, "wandb": False, "wandb_project": None, "rollouts": 0},
        "evaluate": EvaluateSettings().model_dump(),
        "sync": {"dir": str(sync)} if sync else {},
    }
    if settings.reward.overlong_buffer >= response:
        changes["reward"] = {"overlong_buffer": 0}
    return validate({section: values[section] | changes.get(section, {}) for section in values})


def largest_micro_batch(settings: Settings, packing: Packing, vocabulary: int) -> MicroBatch:
    """A stream of random tokens: sequences as long as they get, up to the budget, or one that is longer than it."""
    dice = np.random.default_rng(0)
    most = settings.data.max_prompt_tokens + settings.rollout.max_response_tokens - 1
    count, rest = divmod(packing.capacity, packing.padded(most))
    lengths = [most] * count + ([rest] if rest else []) if count else [most]
    samples = []
    for number, length in enumerate(lengths):
        response = min(length, settings.rollout.max_response_tokens)
        samples.append(
            Sample(
                number=number,
                prompt_ids=dice.integers(vocabulary, size=length + 1 - response).astype(np.int32),
                response_ids=dice.integers(vocabulary, size=response).astype(np.int32),
                rollout_logp=np.full(response, -1.0, np.float32),
                advantage=1.0 - 2.0 * (number % 2),
                weight_versions=np.zeros(response, np.int32),
            )
        )
    return packing.pack(samples)


def _weights_of_the_folder(settings: Settings, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every weight in the order of the tables, in the precision of the run."""
    reader = TensorReader(settings.model.path)
    for (row,) in rows_of(config):
        for name in row.hugging_face:
            yield name, reader.read(name).to(DTYPES[settings.model.dtype])


# Checks -------------------------------------------------------------------------------------------------------------


def check_rehearsal(site: Site) -> Finding:
    """Collect, score, select, train and sync, once, by the run's own code."""
    before = weights_on_servers(site)
    site.rehearsal = rehearsal = Rehearsal(site)
    accelerator.reset_peak_memory()
    rehearsal.trainer.sync(version=0)
    rehearsal.held = first = weights_on_servers(site)
    rehearsal.step()
    second = weights_on_servers(site)
    settings, metrics = rehearsal.settings, rehearsal.metrics
    verdicts = [verdict for part in site.gather(rehearsal.graders.verdicts) for verdict in part]
    failures = [verdict.failure for verdict in verdicts if verdict.failure]
    phases = ", ".join(f"{phase} {metrics[f'time/{phase}']:.1f} s" for phase in ("rollout", "score", "train", "sync"))
    found = (
        f"{len(verdicts)} responses of up to {settings.rollout.max_response_tokens} tokens to {settings.batch.prompts} "
        f"prompt(s), {sum(bool(v.value) and v.value > 0 for v in verdicts if v.value is not None)} right: {phases}"
    )
    if metrics["rollout/groups"] < settings.batch.prompts:
        remedy = "look at the lines above for what became of the others"
        return Finding("rehearsal", "failed", f"{metrics['rollout/groups']:g} groups came back; {found}", remedy)
    if metrics["train/skipped_steps"]:
        remedy = "check the weights in model.path, and optimizer.learning_rate"
        return Finding("rehearsal", "failed", f"the loss or the gradient is not finite; {found}", remedy)
    if not metrics["train/grad_norm"] > 0:
        remedy = "look at the lines above, and compare with a run on one rank"
        return Finding("rehearsal", "failed", f"the gradient is zero; {found}", remedy)
    if odd := _wrong_versions(before, first, second):
        return Finding("rehearsal", "failed", odd, "start these servers again, and look at what they log")
    if failures:
        remedy = "correct the reward function, or raise reward.timeout_seconds"
        return Finding("rehearsal", "warned", f"{found}; {len(failures)} graders failed: {failures[0]}", remedy)
    if first:
        found += f"; {len(first)} server(s) held the weights sent, {next(iter(first.values()))}, and then the next"
    return Finding("rehearsal", "passed", found)


def _wrong_versions(before: dict[str, str], first: dict[str, str], second: dict[str, str]) -> str | None:
    """What is wrong with what servers call their weights: after each sync all alike, and as never before."""
    for earlier, now in ((before, first), (first, second)):
        if len(set(now.values())) > 1:
            return "servers hold different weights after one sync: " + ", ".join(f"{u}: {w}" for u, w in now.items())
        kept = [url for url in now if now[url] == earlier[url]]
        if kept:
            return f"{', '.join(kept)} still held weights {now[kept[0]]} after a sync"
    return None


def check_gap(site: Site) -> Finding:
    """The engine's log-probabilities against the policy's, for the same tokens and weights."""
    assert site.rehearsal is not None
    metrics, limit = site.rehearsal.metrics, site.resolved.settings.rollout.max_logprob_gap
    gap = metrics["rollout/logprob_gap_mean"]
    found = (
        f"{gap:.3g} nats on average, {metrics['rollout/logprob_gap_max']:.3g} at most; the run stops above {limit:g}"
    )
    other = "compare the precision of engine and policy (model.dtype, --dtype of the servers) and rollout.temperature"
    if gap > limit:
        return Finding("gap", "failed", found, f"the engine samples from another model: {other}")
    if gap > _LARGE_GAP_SHARE * limit:
        return Finding("gap", "warned", found, f"{other}, or set loss.rollout_correction to tis")
    return Finding("gap", "passed", found)


def check_memory(site: Site) -> Finding:
    """What is left at the peak of the rehearsal, and of the largest micro-batches where they are tried."""
    assert site.rehearsal is not None
    facts = site.gather(accelerator.device_info())
    found = f"at most {in_gb(max(fact.peak for fact in facts))} a rank in the rehearsal"
    if accelerator.has_gpu() or site.longest:
        accelerator.reset_peak_memory()
        tokens = site.rehearsal.longest(site.resolved.settings)
        facts = site.gather(accelerator.device_info())
        found += f", {in_gb(max(fact.peak for fact in facts))} with micro-batches of {tokens} tokens, the run's largest"
    else:
        found += "; the largest micro-batches were not tried (--longest tries them)"
    rank = min(range(len(facts)), key=lambda r: facts[r].free_at_peak / facts[r].total)
    share = facts[rank].free_at_peak / facts[rank].total
    found += f"; {in_gb(facts[rank].free_at_peak)} of {in_gb(facts[rank].total)} are left on rank {rank}"
    if share < _LEAST_LEFT:
        return Finding("memory", "warned", found, LESS_MEMORY)
    return Finding("memory", "passed", found)


def check_restored(site: Site) -> Finding:
    """Servers hold the weights that a run of these settings begins with."""
    assert site.rehearsal is not None
    if site.resolved.settings.rollout.engine == "embedded":
        return Finding("restored", "passed", "nothing to restore: no servers, and the rehearsal's folder is removed")
    site.rehearsal.restore()
    held = weights_on_servers(site)
    other = [url for url in held if held[url] != site.rehearsal.held[url]]
    if other:
        found = f"{', '.join(other)} did not take the weights of model.path back"
        return Finding("restored", "failed", found, "start these servers again")
    found = f"{len(held)} server(s) hold the weights of model.path again, {next(iter(held.values()))}"
    return Finding("restored", "passed", found + "; a run hands over its own before it samples")
