"""The settings of a run, validated where they are defined. Imports no torch.

Rules: sections are frozen and passed on whole; an unknown key is refused with the nearest known one; a setting that
would have no effect in a combination is an error that names both keys. Defaults follow the paper (arXiv 2506.01939).
"""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_rlvr.config.rollout import RolloutSettings, SyncSettings
from megatron_rlvr.config.section import Section
from megatron_rlvr.config.section import SettingsError as SettingsError


def _expand_paths(values: Any, key: str) -> Any:
    """A path or a list of paths stands for files with default options."""
    if not isinstance(values, dict) or key not in values:
        return values
    files = values[key] if isinstance(values[key], list) else [values[key]]
    return values | {key: [{"path": file} if isinstance(file, str) else file for file in files]}


class RunSettings(Section):
    dir: str = Field(min_length=1)
    """Folder of the run: settings, metrics, sampled text, exports."""
    steps: int = Field(ge=1)
    """Training steps; each samples `batch.prompts` groups and takes one optimizer step a mini-batch."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Source of all randomness: prompt order, sampling, random selection."""
    eval_every: int = Field(default=0, ge=0)
    """Evaluate every this many steps; 0: only before and after training."""
    export: bool = True
    """Write the trained model as a Hugging Face folder, `DIR/hf`, at the end."""
    export_every: int = Field(default=0, ge=0)
    """Write the model as a Hugging Face folder, `DIR/exports/step_N`, every this many steps; 0: none on the way."""
    save_every: int = Field(default=10, ge=0)
    """Save a checkpoint every this many steps; 0: only at the end, and when SIGTERM stops the run."""
    async_save: bool = False
    """Write a checkpoint while the next step runs; the machine's memory must hold a copy of what is saved."""
    keep_last: int = Field(default=2, ge=1)
    """Checkpoints that are kept; older ones are removed."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints of steps that are multiples of this are kept as well; 0: none."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Go on from the last checkpoint in `run.dir`: where there is one, never, or not without one."""
    grace_seconds: float = Field(default=40.0, gt=0)
    """After SIGTERM, sampling is cut short and saved; training may take this long to end its step, or is given up."""
    overwrite: bool = False
    """Begin anew and replace an earlier run in `run.dir`, its checkpoints included."""
    timeout_minutes: float = Field(default=30.0, gt=0)
    """How long a rank waits for another before the run is given up."""

    @model_validator(mode="after")
    def _resume_or_replace(self) -> "RunSettings":
        if self.overwrite and self.resume == "must":
            raise ValueError("run.overwrite true removes the checkpoint that run.resume must needs; drop one of them")
        if self.keep_every and not self.save_every:
            raise ValueError(f"run.keep_every {self.keep_every} does nothing with run.save_every 0; drop it")
        if self.keep_every and self.keep_every % self.save_every:
            raise ValueError(
                f"run.keep_every {self.keep_every} is not a multiple of run.save_every {self.save_every}; choose one"
            )
        return self


class ModelSettings(Section):
    path: str = Field(min_length=1)
    """Hugging Face folder of the model to start from: config.json, safetensors, tokenizer."""
    tokenizer: str | None = None
    """Tokenizer folder, or a sentencepiece .model file; default: the model's folder."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of weights and activations; the optimizer keeps fp32 weights either way."""


class ParallelSettings(Section):
    tensor: int = Field(default=1, ge=1)
    """Ranks that share each layer's weights."""
    pipeline: int = Field(default=1, ge=1)
    """Stages the layers are cut into."""
    virtual_pipeline: int = Field(default=1, ge=1)
    """Pieces of the model on each stage (interleaved schedule): shorter waits, more messages. Needs a pipeline."""
    context: int = Field(default=1, ge=1)
    """Ranks that share each sequence: the activations of a long response are cut between them."""
    expert: int = Field(default=1, ge=1)
    """Ranks that share the experts of each layer (mixture of experts), within tensor x context x data ranks."""
    sequence: bool = False
    """Sequence parallel: the tensor-parallel ranks also share the norms' activations. Needs `parallel.tensor` > 1."""

    @model_validator(mode="after")
    def _combination(self) -> "ParallelSettings":
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence true does nothing with parallel.tensor 1; drop one of the two")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"parallel.virtual_pipeline {self.virtual_pipeline} does nothing with parallel.pipeline 1; drop it, or "
                "raise parallel.pipeline"
            )
        return self

    @property
    def replica(self) -> int:
        """Ranks that hold one copy of the model, experts aside."""
        return self.tensor * self.context * self.pipeline


class PromptFileSettings(Section):
    path: str
    """A .jsonl or .parquet file of problems."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the prompts drawn from this file, relative to the others'; default: its number of prompts."""


class DataSettings(Section):
    train: list[PromptFileSettings] = Field(min_length=1)
    """Files of problems: paths, or {path, weight}."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """chat: the tokenizer's chat template; plain: the text as it is; auto: chat where the tokenizer has a template."""
    system: str | None = None
    """System message put in front of every problem."""
    suffix: str = ""
    """Text appended to every problem, such as an instruction to box the answer."""
    max_prompt_tokens: int = Field(default=2048, ge=1)
    """Longer prompts are left out, and counted."""
    shuffle: bool = True
    """Shuffle each file anew every epoch; false: the file's order."""
    prompt_key: str | None = None
    """Column of the problem, where it is not one of the known names."""
    answer_key: str | None = None
    """Column of the gold answer, where it is not one of the known names."""
    id_key: str | None = None
    """Column of the problem's id, where it is not one of the known names."""

    @model_validator(mode="before")
    @classmethod
    def _paths_are_files(cls, values: Any) -> Any:
        return _expand_paths(values, "train")


class RewardSettings(Section):
    function: str = "math"
    """math (math-verify on the boxed answer), or a function of yours as module:function."""
    correct: float = 1.0
    """Reward of a right answer."""
    wrong: float = -1.0
    """Reward of a wrong answer."""
    timeout_seconds: float = Field(default=2.0, gt=0, le=86400)
    """A grader that takes longer is killed and replaced; the answer counts as wrong."""
    workers: int = Field(default=2, ge=1)
    """Grader processes a rank."""
    overlong_buffer: int = Field(default=4096, ge=0)
    """Last tokens before the cap in which a penalty falls from 0 to -1 (DAPO's soft overlong punishment); 0: none."""

    @model_validator(mode="after")
    def _right_pays(self) -> "RewardSettings":
        if self.correct <= self.wrong:
            raise ValueError(f"reward.correct {self.correct} must be above reward.wrong {self.wrong}; raise it")
        if self.function != "math" and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.function):
            raise ValueError(f"reward.function {self.function!r} is neither math nor module:function; write either")
        return self


class AdvantageSettings(Section):
    estimator: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """grpo: (R - mean) / std over the group; dr_grpo: R - mean; rloo: R - mean of the others."""


class SelectionSettings(Section):
    keep: Literal["top", "bottom", "random", "all"] = "top"
    """Which response tokens carry the gradient: those of highest or lowest entropy, a random set, or all."""
    fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of the scope's response tokens that is kept (rho in the paper); 1 with `keep: all`."""
    scope: Literal["micro_batch", "mini_batch", "rollout_batch"] = "mini_batch"
    """Tokens that share one threshold, over all data-parallel ranks; micro_batch: each micro-batch its own."""
    entropy: Literal["old", "current"] = "old"
    """Whose entropies: the policy's before the update, or the policy's being trained (scope micro_batch only)."""

    @model_validator(mode="before")
    @classmethod
    def _all_keeps_everything(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("keep") == "all":
            return {"fraction": 1.0} | values
        return values

    @model_validator(mode="after")
    def _combination(self) -> "SelectionSettings":
        if self.keep == "all" and self.fraction != 1.0:
            raise ValueError(f"selection.fraction {self.fraction} does nothing with selection.keep all; drop it")
        if self.keep == "all" and self.scope != "mini_batch":
            raise ValueError(f"selection.scope {self.scope} does nothing with selection.keep all; drop it")
        if self.keep == "all" and self.entropy != "old":
            raise ValueError(f"selection.entropy {self.entropy} does nothing with selection.keep all; drop it")
        if self.keep == "random" and self.entropy == "current":
            raise ValueError("selection.entropy current does nothing with selection.keep random; drop it")
        if self.entropy == "current" and self.scope != "micro_batch":
            raise ValueError(
                f"selection.entropy current needs selection.scope micro_batch, not {self.scope}: a wider threshold "
                "would need the whole batch's entropies before its first backward; set scope, or entropy to old"
            )
        return self


class LossSettings(Section):
    objective: Literal["dapo", "gspo", "cispo"] = "dapo"
    """dapo: clips each token's ratio; gspo: each sequence's; cispo: weights log-probabilities by the cut ratio."""
    clip_low: float | None = Field(default=0.2, gt=0, lt=1)
    """The ratio is clipped below at 1 - clip_low; 3e-4 with `objective: gspo`, null (not at all) with cispo."""
    clip_high: float = Field(default=0.28, gt=0)
    """The ratio is clipped above at 1 + clip_high (DAPO's clip-higher); 4e-4 with `objective: gspo`, 4 with cispo."""
    dual_clip: float | None = Field(default=10.0, gt=1)
    """Bound on the ratio where the advantage is negative (dual-clip PPO); null: none, as with gspo and cispo."""
    rollout_correction: Literal["none", "tis", "mis"] = "none"
    """Weight by w = p(policy before the update) / p(engine): tis cuts w at C, mis drops tokens beyond 1/C .. C."""
    correction_cap: float | None = Field(default=2.0, gt=1)
    """C of `loss.rollout_correction`; null with none."""
    normalizer: Literal["all_tokens", "selected_tokens"] = "all_tokens"
    """Divide by all response tokens (the paper's formula) or by the selected ones (its released code)."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_objective(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        defaults = _OBJECTIVE_DEFAULTS.get(str(values.get("objective")), {})
        if values.get("rollout_correction", "none") == "none":
            defaults = defaults | {"correction_cap": None}
        return defaults | values

    @model_validator(mode="after")
    def _combination(self) -> "LossSettings":
        if self.objective == "cispo" and self.clip_low is not None:
            raise ValueError(f"loss.clip_low {self.clip_low} does nothing with loss.objective cispo; drop it")
        if self.objective != "cispo" and self.clip_low is None:
            raise ValueError(f"loss.clip_low null does not go with loss.objective {self.objective}; give a number")
        if self.objective != "dapo" and self.dual_clip is not None:
            raise ValueError(
                f"loss.dual_clip {self.dual_clip} does nothing with loss.objective {self.objective}; drop it"
            )
        if self.rollout_correction == "none" and self.correction_cap is not None:
            raise ValueError(
                f"loss.correction_cap {self.correction_cap} does nothing with loss.rollout_correction none; drop it, "
                "or choose tis or mis"
            )
        if self.rollout_correction != "none" and self.correction_cap is None:
            raise ValueError(
                f"loss.correction_cap null does not go with loss.rollout_correction {self.rollout_correction}; give a "
                "number above 1"
            )
        return self


# What differs from dapo's defaults. gspo: arXiv 2507.18071, section 5.1. cispo: MiniMax-M1 (arXiv 2506.13585) tunes the
# upper bound only; ScaleRL (arXiv 2510.13786) compares ratios of at most 4, 5 and 8 and finds little difference.
_OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "dual_clip": None},
    "cispo": {"clip_low": None, "clip_high": 4.0, "dual_clip": None},
}


class BatchSettings(Section):
    prompts: int = Field(default=512, ge=1)
    """Prompts (groups) a training step."""
    mini_batch_prompts: int = Field(default=32, ge=1)
    """Prompts (groups) an optimizer step; divides `batch.prompts`."""
    tokens_per_micro_batch: int = Field(default=24576, ge=1)
    """Budget of a packed micro-batch; a longer sequence gets one of its own."""

    @model_validator(mode="after")
    def _divides(self) -> "BatchSettings":
        if self.prompts % self.mini_batch_prompts:
            raise ValueError(
                f"batch.prompts {self.prompts} is not a multiple of batch.mini_batch_prompts "
                f"{self.mini_batch_prompts}; choose a divisor"
            )
        return self


class OptimizerSettings(Section):
    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a cosine down to `min_learning_rate` over `decay_steps`."""
    warmup_steps: int = Field(default=10, ge=0)
    """Training steps over which the learning rate rises linearly; the first step already learns."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Training steps until the cosine's end, warm-up included (cosine only)."""
    min_learning_rate: float = Field(default=0.0, ge=0)
    """Learning rate at the cosine's end (cosine only)."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay; norms are exempt."""
    clip_grad: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Adam's decay of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Adam's decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    max_skipped_steps: int = Field(default=5, ge=1)
    """Optimizer steps in a row that may be skipped since a loss or gradient is not finite; so many stop the run."""

    @model_validator(mode="after")
    def _schedule(self) -> "OptimizerSettings":
        for key, value in (("decay_steps", self.decay_steps), ("min_learning_rate", self.min_learning_rate or None)):
            if self.schedule == "constant" and value is not None:
                raise ValueError(
                    f"optimizer.{key} {value} does nothing with optimizer.schedule constant; drop it or set cosine"
                )
        if self.schedule == "cosine" and (self.decay_steps is None or self.decay_steps <= self.warmup_steps):
            found = "is missing" if self.decay_steps is None else f"{self.decay_steps} is too small"
            raise ValueError(
                f"optimizer.decay_steps {found} for optimizer.schedule cosine; set it above optimizer.warmup_steps "
                f"{self.warmup_steps}"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"optimizer.min_learning_rate {self.min_learning_rate} is above optimizer.learning_rate "
                f"{self.learning_rate}; lower it"
            )
        return self


class EvaluationFileSettings(Section):
    path: str
    """A .jsonl or .parquet file of problems."""
    name: str | None = None
    """Name in the metrics, `eval/NAME/accuracy`; default: the file's name."""


class EvaluateSettings(Section):
    sets: list[EvaluationFileSettings] = Field(default_factory=list)
    """Problem sets: paths, or {path, name}. Without any there is no evaluation."""
    samples: int = Field(default=32, ge=1)
    """Completions a problem; the accuracy is their mean (avg@32 in the paper)."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature; 0: greedy."""
    top_p: float = Field(default=0.7, gt=0, le=1)
    """Nucleus sampling."""

    @model_validator(mode="before")
    @classmethod
    def _paths_are_files(cls, values: Any) -> Any:
        return _expand_paths(values, "sets")

    @model_validator(mode="after")
    def _settings_need_sets(self) -> "EvaluateSettings":
        for key in ("samples", "temperature", "top_p"):
            value = getattr(self, key)
            if not self.sets and value != EvaluateSettings.model_fields[key].default:
                raise ValueError(f"evaluate.{key} {value} does nothing without evaluate.sets; name a set or drop it")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> "EvaluateSettings":
        names = [evaluation_name(file) for file in self.sets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"evaluate.sets holds the name {twice[0]!r} twice; give one of them another name")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"evaluate.samples {self.samples} with evaluate.temperature 0 are all the same; set samples to 1"
            )
        return self


class LogSettings(Section):
    tensorboard: bool = True
    """Write TensorBoard events to `DIR/tensorboard`."""
    wandb: bool = False
    """Log to Weights & Biases as well."""
    wandb_project: str | None = None
    """Project there; default: megatron_rlvr."""
    rollouts: int = Field(default=4, ge=0)
    """Sampled responses written to `DIR/rollouts` each step."""


class Settings(Section):
    """All settings of a run."""

    run: RunSettings
    model: ModelSettings
    parallel: ParallelSettings = ParallelSettings()
    data: DataSettings
    rollout: RolloutSettings = RolloutSettings()
    sync: SyncSettings = SyncSettings()
    reward: RewardSettings = RewardSettings()
    advantage: AdvantageSettings = AdvantageSettings()
    selection: SelectionSettings = SelectionSettings()
    loss: LossSettings = LossSettings()
    batch: BatchSettings = BatchSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    log: LogSettings = LogSettings()
    megatron: dict[str, Any] = Field(default_factory=dict)
    """Any field of Megatron's TransformerConfig, DistributedDataParallelConfig or OptimizerConfig."""

    @model_validator(mode="after")
    def _across_sections(self) -> "Settings":
        reward, rollout = self.reward, self.rollout
        if reward.overlong_buffer >= rollout.max_response_tokens:
            raise ValueError(
                f"reward.overlong_buffer {reward.overlong_buffer} must be below rollout.max_response_tokens "
                f"{rollout.max_response_tokens}; lower it, or set it to 0 for no penalty"
            )
        if self.run.eval_every and not self.evaluate.sets:
            raise ValueError(f"run.eval_every {self.run.eval_every} does nothing without evaluate.sets; name a set")
        if not rollout.dynamic_sampling and rollout.max_rounds != RolloutSettings.model_fields["max_rounds"].default:
            raise ValueError(
                f"rollout.max_rounds {rollout.max_rounds} does nothing with rollout.dynamic_sampling false; drop it"
            )
        if self.loss.normalizer == "selected_tokens" and self.selection.keep == "all":
            raise ValueError("loss.normalizer selected_tokens is all_tokens with selection.keep all; drop it")
        if self.log.wandb_project is not None and not self.log.wandb:
            raise ValueError(
                f"log.wandb_project {self.log.wandb_project!r} does nothing with log.wandb false; drop it, or set "
                "log.wandb to true"
            )
        longest = self.data.max_prompt_tokens + rollout.max_response_tokens
        if rollout.engine == "embedded" and self.sync != SyncSettings():
            key = next(k for k, v in self.sync if v != SyncSettings.model_fields[k].default)
            raise ValueError(f"sync.{key} {getattr(self.sync, key)} does nothing with rollout.engine embedded; drop it")
        if rollout.overlap == "one_step":
            if rollout.colocated:
                raise ValueError(
                    "rollout.overlap one_step samples while a step trains, and rollout.colocated true takes the "
                    "servers' memory then; drop one of them"
                )
            if self.loss.rollout_correction == "none":
                raise ValueError(
                    "rollout.overlap one_step trains on samples of older weights, which loss.rollout_correction none "
                    "ignores; set it to tis or mis"
                )
        if rollout.colocated and self.sync.method == "distributed":
            raise ValueError(
                "sync.method distributed does not go with rollout.colocated true: a process group has no two members "
                "on one GPU; choose disk (sync.dir may be a folder in memory, such as /dev/shm/NAME) or tensor"
            )
        if rollout.engine == "embedded" and rollout.max_batch_tokens < longest:
            raise ValueError(
                f"rollout.max_batch_tokens {rollout.max_batch_tokens} cannot hold a sequence of "
                f"data.max_prompt_tokens {self.data.max_prompt_tokens} + rollout.max_response_tokens "
                f"{rollout.max_response_tokens}; raise it"
            )
        return self


def evaluation_name(file: EvaluationFileSettings) -> str:
    """Name of a problem set in the metrics."""
    return file.name or Path(file.path).stem
