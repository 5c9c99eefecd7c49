"""Settings of what a step does with its rollout: advantages, selection, loss, batches, optimizer."""

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_rlvr.config.section import Section


class AdvantageSettings(Section):
    """Advantage of a completion over the others of its group."""

    estimator: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """grpo: (R - mean) / std over the group; dr_grpo: R - mean; rloo: R - mean of the other completions."""


class SelectionSettings(Section):
    """Selection of the response tokens that carry the policy gradient."""

    keep: Literal["top", "bottom", "random", "all"] = "top"
    """Tokens that carry the gradient. top: highest entropy; bottom: lowest entropy; random: a random set; all."""
    fraction: float = Field(default=0.2, gt=0, le=1)
    """Fraction of the response tokens in the scope to keep (rho in the paper); 1 with `keep: all`."""
    scope: Literal["micro_batch", "mini_batch", "rollout_batch"] = "mini_batch"
    """Tokens that share one threshold, over all data-parallel ranks; micro_batch: one per micro-batch and rank."""
    entropy: Literal["old", "current"] = "old"
    """old: entropies of the policy before the update; current: of the policy being trained (scope micro_batch only)."""

    @model_validator(mode="before")
    @classmethod
    def _all_keeps_everything(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("keep") == "all":
            return {"fraction": 1.0} | values
        return values

    @model_validator(mode="after")
    def _combination(self) -> "SelectionSettings":
        by_entropy = self.keep in ("top", "bottom")
        if by_entropy and self.entropy == "current" and self.scope != "micro_batch":
            raise ValueError(
                f"selection.entropy=current: needs selection.scope=micro_batch, not {self.scope}, as a wider threshold "
                "needs the entropies of the whole batch before its first backward; set scope, or set entropy to old"
            )
        return self


class LossSettings(Section):
    """Policy-gradient loss."""

    objective: Literal["dapo", "gspo", "cispo"] = "dapo"
    """dapo: clip the ratio of each token; gspo: of each sequence; cispo: weight log-probabilities by the truncated
    ratio."""
    clip_low: float | None = Field(default=0.2, gt=0, lt=1)
    """Clip the ratio below at 1 - clip_low. Default 3e-4 with `objective: gspo`, null (no lower bound) with cispo."""
    clip_high: float = Field(default=0.28, gt=0, le=10**6)
    """Clip the ratio above at 1 + clip_high (DAPO's clip-higher). Default 4e-4 with `objective: gspo`, 4 with cispo."""
    dual_clip: float | None = Field(default=10.0, gt=1, le=10**6)
    """Upper bound of the ratio for negative advantages (dual-clip PPO); null: none. Default null with gspo, cispo."""
    rollout_correction: Literal["none", "tis", "mis"] = "none"
    """Importance weight w = p(policy before the update) / p(engine). tis: truncate w at C; mis: drop tokens with w
    outside 1/C .. C."""
    correction_cap: float | None = Field(default=2.0, gt=1, le=10**6)
    """The bound C of `loss.rollout_correction`; null without a correction."""
    normalizer: Literal["all_tokens", "selected_tokens"] = "all_tokens"
    """Divide the loss by all response tokens (the paper's formula) or by the selected ones (its released code)."""

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
        if self.objective != "cispo" and self.clip_low is None:
            raise ValueError(f"loss.clip_low=null: loss.objective={self.objective} needs a lower bound; give a float")
        if self.rollout_correction != "none" and self.correction_cap is None:
            raise ValueError(
                f"loss.correction_cap=null: loss.rollout_correction={self.rollout_correction} needs a bound; give a "
                "float above 1"
            )
        return self


# Defaults that differ from those of dapo. gspo: arXiv 2507.18071, section 5.1. cispo: MiniMax-M1 (arXiv 2506.13585)
# tunes the upper bound only; ScaleRL (arXiv 2510.13786) compares ratios of at most 4, 5 and 8 and finds little
# difference.
_OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "dual_clip": None},
    "cispo": {"clip_low": None, "clip_high": 4.0, "dual_clip": None},
}


class BatchSettings(Section):
    """Sizes of batch, mini-batch and micro-batch."""

    prompts: int = Field(default=512, ge=1, le=2**20)
    """Number of prompts (groups) per training step."""
    mini_batch_prompts: int = Field(default=32, ge=1)
    """Number of prompts (groups) per optimizer step; divides `batch.prompts`."""
    tokens_per_micro_batch: int = Field(default=24576, ge=1, le=2**31)
    """Tokens that are packed into one micro-batch; a longer sequence gets a micro-batch of its own."""

    @model_validator(mode="after")
    def _divides(self) -> "BatchSettings":
        if self.prompts % self.mini_batch_prompts:
            raise ValueError(
                f"batch.prompts={self.prompts}: not a multiple of batch.mini_batch_prompts={self.mini_batch_prompts}; "
                "choose a divisor"
            )
        return self


class OptimizerSettings(Section):
    """Adam with decoupled weight decay, and the learning-rate schedule."""

    learning_rate: float = Field(default=1e-6, gt=0, le=10**6)
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or a cosine down to `min_learning_rate` at `decay_steps`."""
    warmup_steps: int = Field(default=10, ge=0)
    """Linear warm-up over this many training steps, starting above zero."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Training step at which the cosine ends, counted with the warm-up (cosine only)."""
    min_learning_rate: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the cosine (cosine only)."""
    weight_decay: float = Field(default=0.1, ge=0, le=100)
    """Decoupled weight decay; norms are exempt."""
    clip_grad: float = Field(default=1.0, gt=0)
    """Global gradient norm above which gradients are scaled down to it."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Adam's decay rate of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Adam's decay rate of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon, added to the denominator."""
    max_skipped_steps: int = Field(default=5, ge=1)
    """Abort after this many consecutive optimizer steps with a non-finite loss or gradient."""

    @model_validator(mode="after")
    def _combination(self) -> "OptimizerSettings":
        if self.schedule != "cosine":
            return self
        if self.decay_steps is None or self.decay_steps <= self.warmup_steps:
            value = "null" if self.decay_steps is None else self.decay_steps
            raise ValueError(
                f"optimizer.decay_steps={value}: optimizer.schedule=cosine needs it above "
                f"optimizer.warmup_steps={self.warmup_steps}; set it"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"optimizer.min_learning_rate={self.min_learning_rate}: above "
                f"optimizer.learning_rate={self.learning_rate}; lower it"
            )
        return self
