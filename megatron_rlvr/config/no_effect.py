"""Settings that have no effect in combination with another setting, as one table.

Such a setting is an error, not a silent no-op: the person who wrote it expects it to do something.
"""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from megatron_rlvr.config.yaml_format import shown

_DEFAULT, _ANY = object(), object()


@dataclass(frozen=True)
class NoEffect:
    """One row of the table: ``key`` has no effect while ``other`` has one of ``values``.

    Attributes:
        key: The setting without effect, such as "run.keep_every".
        other: The setting that decides.
        values: Values of ``other``.
        reason: Why there is no effect, in a few words.
        remedy: What to do about it.
        unset: Value of ``key`` that counts as not written; the default of the field unless given.
        unless: A setting that gives it an effect all the same, if it is not its default.
        only: The one value of ``key`` that has no effect; any unless given.
    """

    key: str
    other: str
    values: tuple[Any, ...]
    reason: str
    remedy: str = "remove it"
    unset: Any = _DEFAULT
    unless: str | None = None
    only: Any = _ANY

    def message(self, settings: BaseModel) -> str | None:
        """Return the error of these settings, or None if the row does not apply to them."""
        (value, default), (other, _) = _lookup(settings, self.key), _lookup(settings, self.other)
        if other not in self.values or value == (default if self.unset is _DEFAULT else self.unset):
            return None
        if self.only is not _ANY and value != self.only:
            return None
        if self.unless is not None and _is_set(settings, self.unless):
            return None
        return (
            f"{self.key}={shown(value)}: has no effect with {self.other}={shown(other)} ({self.reason}); {self.remedy}"
        )


def _lookup(settings: BaseModel, dotted: str) -> tuple[Any, Any]:
    """(value, default) of a key such as "run.steps"."""
    section, key = dotted.split(".")
    found: BaseModel = getattr(settings, section)
    return getattr(found, key), type(found).model_fields[key].get_default(call_default_factory=True)


def _is_set(settings: BaseModel, dotted: str) -> bool:
    value, default = _lookup(settings, dotted)
    return bool(value != default)


_ONLY_SGLANG = ("servers", "oversampling", "partial", "overlap", "colocated")
_SHARED = ("api_key_file", "max_inflight", "retries", "server_timeout_seconds")
_EMBEDDED = ("rollout.engine", ("embedded",))
_NAME_A_SET = "name a set, or remove it"
_SET_COSINE = "remove it, or set cosine"
_RAISE_PIPELINE = "remove it, or raise parallel.pipeline"

NO_EFFECT: tuple[NoEffect, ...] = (
    NoEffect("run.keep_every", "run.save_every", (0,), "no checkpoints are saved on the way"),
    NoEffect("data.template_kwargs", "data.template", ("plain",), "there is no chat template to read them"),
    NoEffect("run.eval_every", "evaluate.sets", ([],), "there is nothing to evaluate", _NAME_A_SET),
    NoEffect(
        *("parallel.sequence", "parallel.tensor", (1,), "it shards over tensor-parallel ranks"),
        remedy="remove it, or raise parallel.tensor",
    ),
    NoEffect(
        *("parallel.virtual_pipeline", "parallel.pipeline", (1,), "it divides pipeline stages"),
        remedy=_RAISE_PIPELINE,
    ),
    NoEffect("parallel.first_stage_layers", "parallel.pipeline", (1,), "there is one stage", _RAISE_PIPELINE),
    NoEffect("parallel.last_stage_layers", "parallel.pipeline", (1,), "there is one stage", _RAISE_PIPELINE),
    *(NoEffect(f"rollout.{key}", *_EMBEDDED, "there are no servers") for key in _ONLY_SGLANG),
    *(NoEffect(f"rollout.{key}", *_EMBEDDED, "there are no servers", unless="evaluate.servers") for key in _SHARED),
    NoEffect("rollout.max_batch_rows", "rollout.engine", ("sglang",), "servers have limits of their own"),
    NoEffect("rollout.max_batch_tokens", "rollout.engine", ("sglang",), "servers have limits of their own"),
    NoEffect("rollout.max_rounds", "rollout.dynamic_sampling", (False,), "a step samples one round"),
    NoEffect("sync.method", "rollout.engine", ("embedded",), "there are no servers"),
    NoEffect("sync.dir", "rollout.engine", ("embedded",), "there are no servers"),
    NoEffect("sync.bucket_bytes", "rollout.engine", ("embedded",), "there are no servers"),
    NoEffect("sync.dir", "sync.method", ("distributed", "tensor"), "no files are written"),
    NoEffect("sync.bucket_bytes", "sync.method", ("disk",), "files are written whole"),
    NoEffect("selection.fraction", "selection.keep", ("all",), "every token is selected", unset=1.0),
    NoEffect("selection.fraction", "selection.keep", ("band",), "the band decides"),
    NoEffect("selection.fraction_end", "selection.keep", ("all", "band"), "no fraction is kept"),
    NoEffect("selection.fraction_steps", "selection.keep", ("all", "band"), "no fraction is kept"),
    NoEffect("selection.band", "selection.keep", ("top", "bottom", "random", "all"), "only band reads it"),
    NoEffect("selection.signal", "selection.keep", ("random", "all"), "tokens are not compared"),
    NoEffect("selection.by_sign", "selection.keep", ("all",), "every token is selected"),
    NoEffect(
        "selection.scope", "selection.keep", ("all",), "every token is selected", unless="selection.guard_probability"
    ),
    NoEffect("selection.entropy", "selection.keep", ("all",), "every token is selected"),
    NoEffect("selection.entropy", "selection.keep", ("random",), "tokens are not compared by entropy"),
    NoEffect(
        *("selection.entropy", "selection.signal", ("surprisal", "covariance", "gradient")),
        reason="these signals are of the policy before the update",
    ),
    NoEffect("selection.guard_quantile", "selection.guard_probability", (0.0,), "there is no guard"),
    NoEffect(
        *("loss.normalizer", "selection.keep", ("all",), "selected_tokens is then all_tokens"),
        unless="selection.guard_probability",
        only="selected_tokens",
    ),
    NoEffect("loss.clip_low", "loss.objective", ("cispo",), "its ratio has no lower bound", unset=None),
    NoEffect("loss.dual_clip", "loss.objective", ("gspo", "cispo", "dppo"), "only dapo has it", unset=None),
    NoEffect("loss.correction_level", "loss.rollout_correction", ("none",), "there is no weight"),
    NoEffect("loss.correction_veto", "loss.rollout_correction", ("none",), "there is no weight"),
    NoEffect("loss.kl_estimator", "loss.kl_coefficient", (0.0,), "there is no reference"),
    NoEffect("loss.entropy_step", "loss.entropy_target", (None,), "there is no entropy term"),
    NoEffect("loss.entropy_max", "loss.entropy_target", (None,), "there is no entropy term"),
    NoEffect("advantage.entropy_bound", "advantage.entropy_bonus", (0.0,), "nothing is added"),
    NoEffect(
        *("loss.correction_cap", "loss.rollout_correction", ("none",), "no weight is bounded"),
        remedy="remove it, or choose tis or mis",
        unset=None,
    ),
    NoEffect("optimizer.decay_steps", "optimizer.schedule", ("constant",), "there is no decay", _SET_COSINE),
    NoEffect("optimizer.min_learning_rate", "optimizer.schedule", ("constant",), "there is no decay", _SET_COSINE),
    NoEffect("evaluate.group_size", "evaluate.sets", ([],), "there is nothing to evaluate", _NAME_A_SET),
    NoEffect("evaluate.temperature", "evaluate.sets", ([],), "there is nothing to evaluate", _NAME_A_SET),
    NoEffect("evaluate.top_p", "evaluate.sets", ([],), "there is nothing to evaluate", _NAME_A_SET),
    NoEffect("evaluate.servers", "evaluate.sets", ([],), "there is nothing to evaluate", _NAME_A_SET),
    NoEffect("evaluate.pass_at", "evaluate.sets", ([],), "there is nothing to evaluate", _NAME_A_SET),
    NoEffect(
        *("log.wandb_project", "log.wandb", (False,), "nothing is sent"),
        remedy="remove it, or set log.wandb to true",
    ),
)


class NoEffectError(ValueError):
    """A setting without effect.

    Attributes:
        row: The row of the table that applies.
    """

    def __init__(self, message: str, row: NoEffect) -> None:
        super().__init__(message)
        self.row = row


def check_no_effect(settings: BaseModel) -> None:
    """Raise NoEffectError if a setting has no effect, for the first row of the table that applies."""
    for row in NO_EFFECT:
        if message := row.message(settings):
            raise NoEffectError(message, row)
