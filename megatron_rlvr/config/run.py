"""Settings of a run as a whole: its folder, its length, checkpoints and exports, and what is logged."""

from typing import Literal

from pydantic import Field, model_validator

from megatron_rlvr.config.section import PathText, Section


class RunSettings(Section):
    """Folder, length, checkpoints, exports and signals of the run."""

    dir: PathText = Field(min_length=1)
    """Folder that the run writes: settings, metrics, sampled text, checkpoints, exports."""
    steps: int = Field(ge=1, le=10**9)
    """Number of training steps. Each samples `batch.prompts` groups and takes one optimizer step per mini-batch."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of all randomness: prompt order, sampling, random selection."""
    eval_every: int = Field(default=0, ge=0)
    """Number of steps between evaluations; 0: evaluate only before and after training."""
    export: bool = True
    """Write the trained model in Hugging Face format to `DIR/hf` after the last step."""
    export_every: int = Field(default=0, ge=0)
    """Number of steps between exports in Hugging Face format to `DIR/exports/step_N`; 0: no exports during training."""
    save_every: int = Field(default=10, ge=0)
    """Number of steps between checkpoints, of which the last step has one too; 0: save only when a signal, or a fault
    of servers, stops the run."""
    async_save: bool = False
    """Write checkpoints in the background of the next step; the host's memory must hold a copy of the checkpoint."""
    keep_last: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep; older ones are deleted."""
    keep_every: int = Field(default=0, ge=0)
    """Also keep the checkpoints of steps that this number divides, a multiple of `run.save_every`; 0: none."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: resume if `run.dir` has a checkpoint; never: start fresh; must: fail if there is none."""
    accept_changed_inputs: bool = False
    """Resume although prompts, answers, tokenizer, chat template or stop tokens differ from those of the checkpoint.
    Groups that it holds of changed prompts are discarded."""
    grace_seconds: float = Field(default=40.0, gt=0, le=604800)
    """After SIGTERM, sampling stops and is saved; a training step may use this many seconds to finish before the
    process exits without saving it."""
    overwrite: bool = False
    """Delete an earlier run in `run.dir`, including its checkpoints, and start from scratch."""
    timeout_minutes: float = Field(default=30.0, ge=0.001, le=10080)
    """Minutes that a rank waits for another rank before the run fails."""

    @model_validator(mode="after")
    def _combination(self) -> "RunSettings":
        if self.overwrite and self.resume == "must":
            raise ValueError(
                "run.overwrite=true: would delete the checkpoint that run.resume=must requires; remove one of the two"
            )
        unused = "overwrite=true" if self.overwrite else "resume=never" if self.resume == "never" else None
        if self.accept_changed_inputs and unused:
            raise ValueError(f"run.accept_changed_inputs=true: has no effect with run.{unused}; remove one of the two")
        if self.save_every and self.keep_every % self.save_every:
            raise ValueError(
                f"run.keep_every={self.keep_every}: not a multiple of run.save_every={self.save_every}; choose one"
            )
        return self


class LogSettings(Section):
    """Logs besides `DIR/metrics.jsonl`, which is always written."""

    tensorboard: bool = True
    """Write the metrics as TensorBoard events to `DIR/tensorboard`."""
    wandb: bool = False
    """Send the metrics to Weights & Biases."""
    wandb_project: str | None = None
    """Weights & Biases project; null: megatron_rlvr."""
    rollouts: int | None = Field(default=None, ge=0)
    """Number of responses to record in `DIR/rollouts` in each step, whole groups while they fit: as text when they are
    sampled, and after the step with entropies, log-probabilities and alternatives of the tokens trained on. Null:
    16, but with tokens at most a twelfth of the step's responses."""
    report_every: int = Field(default=0, ge=0)
    """Number of steps after which `DIR/report.html` is written again; 0: only by `rlvr report`."""

    @property
    def most_rollouts(self) -> int:
        """Largest number of responses that are recorded of a step."""
        return 16 if self.rollouts is None else self.rollouts

    @property
    def rollout_share(self) -> float:
        """Largest share of a step's responses that are recorded with their tokens, of two responses at least."""
        return 1 / 12 if self.rollouts is None else 1.0
