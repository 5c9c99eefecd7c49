"""Settings of what a step does with its rollout: advantages, selection, loss, batches, optimizer."""

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_rlvr.config.section import Section
from megatron_rlvr.config.yaml_format import shown


class AdvantageSettings(Section):
    """Advantage of a completion over the others of its group."""

    estimator: Literal["grpo", "dr_grpo", "rloo", "batch"] = "grpo"
    """grpo: (R - mean) / std over the group; dr_grpo: R - mean; rloo: R - mean of the other completions; batch: that
    of dr_grpo, divided by its std over the training step."""
    entropy_bonus: float = Field(default=0.0, ge=0, le=10**6)
    """Entropy-shaped advantages: add min(this times the token's entropy in nats, |A| / `entropy_bound`); 0: none."""
    entropy_bound: float = Field(default=2.0, gt=1, le=10**6)
    """Bound of `entropy_bonus`: the advantage is raised by at most |A| divided by this."""


class SelectionSettings(Section):
    """Selection of the response tokens that carry the policy gradient."""

    keep: Literal["top", "bottom", "band", "random", "all"] = "top"
    """Tokens that carry the gradient. top: largest signal; bottom: smallest; band: between two quantiles of it;
    random: a random set; all."""
    signal: Literal["entropy", "surprisal", "covariance", "gradient"] = "entropy"
    """Value by which tokens are compared. entropy; surprisal: -ln p; covariance: (A - mean A) (ln p - mean ln p);
    gradient: norm of the gradient of ln p by the logits. docs/method.md has formulas and sources."""
    fraction: float = Field(default=0.2, gt=0, le=1)
    """Fraction of the response tokens in the scope to keep (rho in the paper); 1 with `keep: all`."""
    fraction_end: float | None = Field(default=None, gt=0, le=1)
    """Fraction from step `fraction_steps` on, linearly approached from `fraction` in step 1; null: constant."""
    fraction_steps: int | None = Field(default=None, ge=2, le=10**9)
    """Step at which the fraction reaches `fraction_end`."""
    band: list[float] | None = None
    """The two quantiles of `keep: band`, such as [0.5, 0.8]: of tokens in ascending order, 30 % above the median."""
    by_sign: bool = False
    """Keep the fraction of the tokens with positive and of those with negative advantage, each with a threshold."""
    scope: Literal["micro_batch", "mini_batch", "rollout_batch"] = "mini_batch"
    """Tokens that share one threshold, over all data-parallel ranks; micro_batch: one per micro-batch and rank."""
    entropy: Literal["old", "current"] = "old"
    """old: entropies of the policy before the update; current: of the policy being trained (scope micro_batch only)."""
    guard_probability: float = Field(default=0.0, ge=0, lt=1)
    """Drop tokens of positive advantage with a probability below this (STAPO: 0.002) of which the policy was
    confident; 0: no guard."""
    guard_quantile: float = Field(default=0.75, gt=0, le=1)
    """Share of the tokens of positive advantage below `guard_probability` that counts as confident: the lowest
    entropies of the scope."""

    @property
    def largest_fraction(self) -> float:
        """Largest fraction of the tokens that any step keeps, before rounding."""
        if self.band is not None:
            return self.band[1] - self.band[0]
        return max(self.fraction, self.fraction_end or 0.0)

    @model_validator(mode="before")
    @classmethod
    def _all_keeps_everything(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("keep") == "all":
            return {"fraction": 1.0} | values
        return values

    @model_validator(mode="after")
    def _combination(self) -> "SelectionSettings":
        compares = self.keep in ("top", "bottom", "band")
        if compares and self.entropy == "current" and self.scope != "micro_batch":
            raise ValueError(
                f"selection.entropy=current: needs selection.scope=micro_batch, not {self.scope}, as a wider threshold "
                "needs the entropies of the whole batch before its first backward; set scope, or set entropy to old"
            )
        if self.guard_probability and self.entropy == "current":
            raise ValueError(
                f"selection.guard_probability={self.guard_probability}: judges tokens by the policy before the update, "
                "and selection.entropy=current by the policy being trained; remove one of the two"
            )
        if self.keep == "band" and not _rises_within_one(self.band):
            raise ValueError(
                f"selection.band={shown(self.band)}: selection.keep=band needs two quantiles, rising within 0 .. 1; "
                "give [low, high]"
            )
        if self.keep == "band" and self.band == [0, 1]:
            raise ValueError("selection.band=[0, 1]: holds every token; narrow it, or set selection.keep to all")
        if self.keep in ("all", "band"):  # no fraction is read, and `no_effect.py` answers a schedule
            return self
        if self.fraction_end == self.fraction:
            raise ValueError(
                f"selection.fraction_end={self.fraction_end}: has no effect, as selection.fraction is the same; remove "
                "it and selection.fraction_steps"
            )
        if (self.fraction_end is None) != (self.fraction_steps is None):
            there, missing = ("fraction_end", "fraction_steps")[:: 1 if self.fraction_steps is None else -1]
            raise ValueError(
                f"selection.{there}={getattr(self, there)}: a schedule needs selection.{missing} as well; set it"
            )
        return self


def _rises_within_one(band: list[float] | None) -> bool:
    return band is not None and len(band) == 2 and 0 <= band[0] < band[1] <= 1


class LossSettings(Section):
    """Policy-gradient loss."""

    objective: Literal["dapo", "gspo", "cispo", "dppo"] = "dapo"
    """dapo: clip the ratio of each token; gspo: of each sequence; cispo: weight log-probabilities by the truncated
    ratio; dppo: drop tokens whose probability has moved too far."""
    clip_low: float | None = Field(default=0.2, gt=0, lt=1)
    """Clip the ratio below at 1 - clip_low; with dppo, the largest fall of a probability. Default 3e-4 with
    `objective: gspo`, null (no lower bound) with cispo."""
    clip_high: float = Field(default=0.28, gt=0, le=10**6)
    """Clip the ratio above at 1 + clip_high (DAPO's clip-higher); with dppo, the largest rise of a probability.
    Default 4e-4 with `objective: gspo`, 4 with cispo, 0.2 with dppo."""
    dual_clip: float | None = Field(default=10.0, gt=1, le=10**6)
    """Upper bound of the ratio for negative advantages (dual-clip PPO); null: none. Default null but with dapo."""
    rollout_correction: Literal["none", "tis", "mis"] = "none"
    """Importance weight w = p(policy before the update) / p(engine). tis: truncate w at C; mis: drop tokens with w
    outside 1/C .. C."""
    correction_level: Literal["token", "sequence", "geometric"] = "token"
    """Ratio w of `rollout_correction`: of a token; of its whole response; or the geometric mean over the response, by
    which mis drops responses without weighing the others."""
    correction_cap: float | None = Field(default=2.0, gt=1, le=10**6)
    """The bound C of `loss.rollout_correction`; null without a correction."""
    correction_veto: float | None = Field(default=None, gt=0, lt=1)
    """Drop every response that has a token with p(policy before the update) / p(engine) below this, such as 1e-4;
    null: none."""
    normalizer: Literal["all_tokens", "selected_tokens", "sequence_mean", "prompt_mean"] = "all_tokens"
    """Divide the loss by all response tokens (the paper's formula) or by the selected ones (its released code); or
    take the mean over sequences, or over prompts, of the loss divided by their response tokens."""
    kl_coefficient: float = Field(default=0.0, ge=0, le=10**6)
    """Factor of the KL divergence from the policy to the model of `model.path`, on the selected tokens; 0: none. Needs
    memory for the weights of that model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that divergence, with d = ln p(reference) / p(policy). k1: -d; k2: d^2 / 2; k3: exp(d) - d - 1."""
    entropy_target: float | None = Field(default=None, ge=0, le=100)
    """Subtract the selected tokens' entropies from the loss, with a coefficient that rises from 0 while their mean is
    below this many nats and falls above; null: none."""
    entropy_step: float = Field(default=1e-4, gt=0, le=10**6)
    """Change of the coefficient of `entropy_target` in a training step."""
    entropy_max: float = Field(default=5e-3, gt=0, le=10**6)
    """Largest coefficient of `entropy_target`."""

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
        if self.rollout_correction == "tis" and self.correction_level == "geometric":
            raise ValueError(
                "loss.correction_level=geometric: a geometric mean is no importance weight, which "
                "loss.rollout_correction=tis multiplies by; choose mis, or level sequence"
            )
        if self.entropy_target is not None and self.entropy_step > self.entropy_max:
            raise ValueError(
                f"loss.entropy_step={self.entropy_step}: above loss.entropy_max={self.entropy_max}, which bounds the "
                "coefficient that it changes; lower it"
            )
        if self.objective == "dppo" and self.clip_high >= 1:
            raise ValueError(
                f"loss.clip_high={self.clip_high}: with loss.objective=dppo it bounds the rise of a probability; give "
                "a value below 1"
            )
        return self


# Defaults that differ from those of dapo. gspo: arXiv 2507.18071, section 5.1. cispo: MiniMax-M1 (arXiv 2506.13585)
# tunes the upper bound only; ScaleRL (arXiv 2510.13786) compares ratios of at most 4, 5 and 8 and finds little
# difference. dppo: the code of arXiv 2602.04879.
_OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "dual_clip": None},
    "cispo": {"clip_low": None, "clip_high": 4.0, "dual_clip": None},
    "dppo": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None},
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
