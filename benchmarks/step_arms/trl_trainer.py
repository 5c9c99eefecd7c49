"""TRL's arm: its GRPOTrainer as a user would set it up for the same training, with a stopwatch around its phases.

Only files and logs are left out, as in our own arm, and activation checkpointing, which is on by default and would make
it slower.
"""

from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from step_arms import workload
from step_arms.workload import Case, Stopwatch


def run(case: Case, folder: str, steps: int, pipe: Connection) -> None:
    """Take ``steps`` training steps, one per message; see `step_arms`."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [" ".join(map(str, ids)) for ids in workload.prompts_of(case)]
    trainer = TimedTrainer(
        model=folder,
        reward_funcs=half_right_in_groups(case.samples),
        args=config_of(case, folder, steps),
        train_dataset=Dataset.from_dict({"prompt": prompts * steps}),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TurnTaker(trainer, pipe))
    pipe.send({"before_mb": workload.resident_mb(), "version": version("trl")})
    trainer.train()


def config_of(case: Case, folder: str, steps: int) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(Path(folder, "unused")),
        max_steps=steps * workload.UPDATES,
        per_device_train_batch_size=case.prompts * case.samples // workload.UPDATES,
        steps_per_generation=workload.UPDATES,
        num_generations=case.samples,
        max_completion_length=case.response,
        top_entropy_quantile=workload.FRACTION,
        loss_type="dapo",
        beta=0.0,
        epsilon=workload.CLIP_LOW,
        epsilon_high=workload.CLIP_HIGH,
        learning_rate=workload.LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta2=workload.BETA2,
        adam_epsilon=workload.EPSILON,
        max_grad_norm=workload.CLIP_GRAD,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
    )


def half_right_in_groups(size: int) -> Any:
    """Return the reward as TRL calls it: with all responses of a rollout, group after group."""

    def reward(completion_ids: list[list[int]], **unused: Any) -> list[float]:
        groups = [completion_ids[i : i + size] for i in range(0, len(completion_ids), size)]
        return [reward for group in groups for reward in workload.half_right(group)]

    return reward


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer that times and counts what it does; ``_prepare_inputs`` holds generation, scoring and rewards."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.watch = Stopwatch()
        self.tokens = self.selected = 0
        super().__init__(*args, **kwargs)

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        with self.watch("rollout"):
            return super()._prepare_inputs(*args, **kwargs)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self.watch("generation"):
            completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        self.tokens += sum(map(len, completion_ids))
        return completion_ids, logprobs

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with self.watch("scoring"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def get_high_entropy_mask(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        mask = super().get_high_entropy_mask(*args, **kwargs)
        self.selected += int(mask.sum())
        return mask

    def take_metrics(self) -> dict[str, float]:
        """Return the metrics since the last call, without the number of optimizer steps."""
        seconds = self.watch.take()
        metrics = {
            "generation": seconds["generation"],
            "scoring": seconds["scoring"],
            "other": seconds["rollout"] - seconds["generation"] - seconds["scoring"],
            "training": seconds["total"] - seconds["rollout"],
            "total": seconds["total"],
            "tokens": self.tokens,
            "selected": self.selected,
            "entropy": self._metrics["train"]["entropy"][-workload.UPDATES],
            "peak_mb": workload.resident_mb(),
        }
        self.tokens = self.selected = 0
        return metrics


class TurnTaker(TrainerCallback):
    """Waits for a message before each rollout with its optimizer steps, and answers after it."""

    def __init__(self, trainer: TimedTrainer, pipe: Connection) -> None:
        self._trainer = trainer
        self._pipe = pipe
        self._turn: Any = None
        self._updates = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % workload.UPDATES == 0:
            self._pipe.recv()
            self._updates = 0
            self._turn = self._trainer.watch("total")
            self._turn.__enter__()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._updates += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % workload.UPDATES == 0:
            self._turn.__exit__(None, None, None)
            self._pipe.send(self._trainer.take_metrics() | {"updates": self._updates})
