"""megatron_rlvr's arm: the engine, policy and learner of the package, put together as `trainer.py` does."""

from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection

import numpy as np
import torch
from transformers import AutoTokenizer

from megatron_rlvr.batching.mini_batches import MiniBatch, build_mini_batches
from megatron_rlvr.config import Settings
from megatron_rlvr.distributed import accelerator, process_group
from megatron_rlvr.distributed.ranks import initialize_ranks
from megatron_rlvr.engines.embedded.engine import EmbeddedEngine
from megatron_rlvr.learner import Learner
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.rollout.sampler import requests_for
from megatron_rlvr.startup.assembly import make_loss
from megatron_rlvr.types import Completion, Grade, Group, Prompt
from step_arms import workload
from step_arms.workload import Case, Stopwatch


def run(case: Case, folder: str, steps: int, pipe: Connection) -> None:
    """Take ``steps`` training steps, one per message; see `step_arms`."""
    torch.set_num_threads(1)
    arm = Arm(case, folder, steps)
    pipe.send({"before_mb": workload.resident_mb()})
    for step in range(1, steps + 1):
        pipe.recv()
        pipe.send(arm.step(step))
    process_group.shut_down()


def settings_of(case: Case, folder: str, steps: int) -> Settings:
    return Settings.model_validate(
        {
            "run": {"dir": "unused", "steps": steps},
            "model": {"path": folder, "dtype": "float32"},
            "data": {"train": "unused", "max_prompt_tokens": workload.PROMPT_TOKENS[1]},
            "rollout": {"group_size": case.samples, "max_response_tokens": case.response},
            "reward": {"overlong_buffer": 0},
            "selection": {"fraction": workload.FRACTION},
            "loss": {"clip_low": workload.CLIP_LOW, "clip_high": workload.CLIP_HIGH, "dual_clip": None},
            "batch": {
                "prompts": case.prompts,
                "mini_batch_prompts": max(1, case.prompts // workload.UPDATES),
                "tokens_per_micro_batch": 4096,
            },
            "optimizer": {
                "learning_rate": workload.LEARNING_RATE,
                "warmup_steps": 0,
                "weight_decay": 0.0,
                "clip_grad": workload.CLIP_GRAD,
                "beta2": workload.BETA2,
                "eps": workload.EPSILON,
            },
        }
    )


class Arm:
    """A trainer without its files, data sets and grader processes."""

    def __init__(self, case: Case, folder: str, steps: int) -> None:
        self.settings = settings_of(case, folder, steps)
        ranks = initialize_ranks(self.settings.parallel, timeout_minutes=30)
        self.policy = Policy(
            self.settings.model, self.settings.parallel, ranks, optimizer=self.settings.optimizer, megatron={}
        )
        self.learner = Learner(self.settings, self.policy, make_loss(self.settings.loss))
        self.engine = EmbeddedEngine(folder, device=accelerator.device(), stop_token_ids=[], pad_token_id=workload.PAD)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.prompts = [
            Prompt(str(n), np.array(ids, np.int32), "", "") for n, ids in enumerate(workload.prompts_of(case))
        ]
        self.watch = Stopwatch()
        self.engine.update_weights(self.policy.export_weights(), version=0)

    def step(self, step: int) -> dict[str, float]:
        """Take one training step; return its metrics."""
        with self.watch("total"):
            with self.watch("generation"):
                completions = self.sample(step)
            self.policy.start_step()
            metrics = self.learner.learn(step, self.mini_batches(completions), self.watch)
            self.engine.update_weights(self.policy.export_weights(), version=step)
        seconds = self.watch.take()
        phases = {"generation": seconds["generation"], "scoring": seconds["score"], "training": seconds["train"]}
        return {
            **phases,
            "other": seconds["total"] - sum(phases.values()),
            "total": seconds["total"],
            "tokens": sum(len(completion.token_ids) for completion in completions),
            "updates": workload.UPDATES - metrics["train/skipped"],
            "selected": metrics["selection/tokens"],
            "entropy": metrics["entropy/mean"],
            "peak_mb": workload.resident_mb(),
        }

    def sample(self, step: int) -> list[Completion]:
        samples = self.settings.rollout.group_size
        requests = [r for prompt in self.prompts for r in requests_for(prompt, samples, 0, f"train/{step}")]
        return list(self.engine.generate(requests, self.settings.rollout))

    def mini_batches(self, completions: Sequence[Completion]) -> list[MiniBatch]:
        """Decode (as TRL does, though the reward needs no text), grade, and pack."""
        return self.packed(self.graded(completions))

    def graded(self, completions: Sequence[Completion]) -> list[tuple[int, Group]]:
        """Decode and grade; return (place in the batch, group) of each prompt."""
        by_prompt: dict[str, list[Completion]] = {}
        for completion in sorted(completions, key=lambda c: c.index):
            by_prompt.setdefault(completion.prompt_id, []).append(completion)
        self.tokenizer.batch_decode([completion.token_ids.tolist() for completion in completions])
        groups = []
        for order, prompt in enumerate(self.prompts):
            members = by_prompt[prompt.id]
            rewards = workload.half_right([completion.token_ids.tolist() for completion in members])
            groups.append((order, Group(prompt, members, [Grade(reward, reward > 0) for reward in rewards])))
        return groups

    def packed(self, groups: Sequence[tuple[int, Group]]) -> list[MiniBatch]:
        """Pack the groups into two mini-batches."""
        return _halves(
            build_mini_batches(
                groups,
                estimator=self.settings.advantage.estimator,
                groups_per_mini_batch=self.settings.batch.mini_batch_prompts,
                packing=self.policy.packing(self.settings.batch.tokens_per_micro_batch),
                data_group=self.policy.ranks.data_objects,
            )
        )


def _halves(mini_batches: list[MiniBatch]) -> list[MiniBatch]:
    """Return two mini-batches; of a single prompt each has half of the responses, as with TRL."""
    if len(mini_batches) == workload.UPDATES:
        return mini_batches
    (whole,) = mini_batches
    middle = len(whole.micro_batches) // 2
    parts = whole.micro_batches[:middle], whole.micro_batches[middle:]
    numbers = [{token >> 20 for batch in part for token in batch.token_ids.tolist()} for part in parts]
    assert len(numbers[0]) == len(numbers[1]), "a single prompt needs the same number of micro-batches in each half"
    return [
        replace(whole, micro_batches=part, lengths={n: whole.lengths[n] for n in held})
        for part, held in zip(parts, numbers, strict=True)
    ]
