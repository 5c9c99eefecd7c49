"""Everything about a run that can be known before a process group starts: files read, sizes checked, a plan in words.

Whatever is wrong with the input is found here and raised as one sentence; later rooms may rely on it.
"""

import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlvr.checkpoint.store import Checkpoint, where_to_begin
from megatron_rlvr.config import ParallelSettings, Settings, SettingsError, evaluation_name
from megatron_rlvr.data.prompts import PromptFile, PromptSet, load_prompts
from megatron_rlvr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_rlvr.hf.families import ModelError, family_of, transformer_fields
from megatron_rlvr.hf.files import read_config, weight_files

RUN_FILES = (
    *("metrics.jsonl", "summary.json", "rollouts", "tensorboard", "hf", "exports", "sync", "skipped", "checkpoints"),
)
"""What a run writes into `run.dir` besides config.yaml, and a new run there would replace."""

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Resolved:
    """Settings with all that they name, read and found to fit together."""

    settings: Settings
    hf_config: Mapping[str, Any]
    tokenizer: Tokenizer
    stop_token_ids: tuple[int, ...]
    train: PromptSet
    evaluation: Mapping[str, PromptSet]
    world_size: int
    start: Checkpoint | None
    """The checkpoint that the run goes on from."""


def resolve(settings: Settings, *, show_progress: bool = False) -> Resolved:
    """Reads and checks model folder, tokenizer and prompt files; the number of ranks comes from WORLD_SIZE.

    Raises: ValueErrors of ours (SettingsError, ModelError, TokenizerError, DataError), each one sentence.
    """
    hf_config = read_config(settings.model.path)
    weight_files(settings.model.path)
    _check_config(settings.model.path, hf_config)
    fields = transformer_fields(hf_config)
    ranks = world_size(settings.parallel)
    check_layout(settings, fields, ranks)
    check_experts(settings, fields, ranks)
    check_lengths(settings, hf_config)
    _check_packages(settings)
    start = _check_run_folder(settings)
    tokenizer = load_tokenizer(settings.model.tokenizer or settings.model.path)
    if tokenizer.vocab_size > hf_config["vocab_size"]:
        raise SettingsError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than vocab_size {hf_config['vocab_size']} of "
            f"{settings.model.path}; set model.tokenizer to the model's own"
        )
    train = _load(settings, [(f.path, f.weight, None) for f in settings.data.train], tokenizer, show_progress)
    if len(train) < settings.batch.prompts:
        raise SettingsError(
            f"batch.prompts {settings.batch.prompts} is more than the {len(train)} prompts of data.train; lower it"
        )
    evaluation = {
        evaluation_name(f): _load(settings, [(f.path, None, evaluation_name(f))], tokenizer, show_progress)
        for f in settings.evaluate.sets
    }
    stop = _stop_token_ids(settings.model.path, hf_config, tokenizer)
    return Resolved(settings, hf_config, tokenizer, stop, train, evaluation, ranks, start)


def _load(
    settings: Settings,
    files: Sequence[tuple[str, float | None, str | None]],
    tokenizer: Tokenizer,
    show_progress: bool,
) -> PromptSet:
    data = settings.data
    return load_prompts(
        [PromptFile(path, weight, name, data.prompt_key, data.answer_key, data.id_key) for path, weight, name in files],
        tokenizer,
        max_prompt_tokens=data.max_prompt_tokens,
        template=data.template,
        system=data.system,
        suffix=data.suffix,
        show_progress=show_progress,
    )


def _check_config(folder: str, hf_config: Any) -> None:
    """The entries of config.json that are relied on from here."""
    path = Path(folder) / "config.json"
    if not isinstance(hf_config, dict):
        raise ModelError(f"{path} holds no JSON object; copy the model's own")
    family_of(hf_config)
    for key in _SIZES:
        value = hf_config.get(key)
        if type(value) is not int or value < 1:
            raise ModelError(f"{path}: {key} is {json.dumps(value)}, not a whole number above 0; copy the model's own")
    if not isinstance(hf_config.get("rms_norm_eps"), float | int):
        raise ModelError(f"{path}: rms_norm_eps is missing or not a number; copy the model's own")


def world_size(parallel: ParallelSettings) -> int:
    """Number of ranks that torchrun starts, or that hold one copy of the model without it."""
    text = os.environ.get("WORLD_SIZE", str(parallel.replica))
    if not text.isdecimal() or int(text) < 1:
        raise SettingsError(f"WORLD_SIZE {text!r} is not a number of ranks; set a whole number above 0 or unset it")
    return int(text)


def check_layout(settings: Settings, fields: Mapping[str, Any], world_size: int) -> None:
    """SettingsError if the model, by Megatron's ``fields``, cannot be cut that way over so many ranks."""
    parallel = settings.parallel
    if world_size % parallel.replica:
        sizes = [(name, getattr(parallel, name)) for name in ("tensor", "context", "pipeline")]
        product = " x ".join(f"parallel.{name} {size}" for name, size in sizes if size > 1)
        raise SettingsError(f"{world_size} ranks do not divide into {product}; launch a multiple of {parallel.replica}")
    for name, what in (
        ("num_attention_heads", "attention heads"),
        ("num_query_groups", "key-value heads"),
        ("ffn_hidden_size", "feed-forward columns"),
    ):
        if fields[name] % parallel.tensor:
            raise SettingsError(
                f"{fields[name]} {what} of {settings.model.path} do not divide by parallel.tensor {parallel.tensor}; "
                "choose a divisor"
            )
    if fields["num_layers"] % (parallel.pipeline * parallel.virtual_pipeline):
        virtual = f" x parallel.virtual_pipeline {parallel.virtual_pipeline}" if parallel.virtual_pipeline > 1 else ""
        raise SettingsError(
            f"{fields['num_layers']} layers of {settings.model.path} do not divide by parallel.pipeline "
            f"{parallel.pipeline}{virtual}; choose a divisor"
        )
    shares = 2 * parallel.context * parallel.tensor
    if parallel.context > 1 and settings.batch.tokens_per_micro_batch < shares:
        raise SettingsError(
            f"batch.tokens_per_micro_batch {settings.batch.tokens_per_micro_batch} cannot be cut into 2 x "
            f"parallel.context {parallel.context} x parallel.tensor {parallel.tensor} parts; raise it to {shares}"
        )


def check_experts(settings: Settings, fields: Mapping[str, Any], world_size: int) -> None:
    """Like `check_layout`, for a mixture of experts."""
    parallel, folder, experts = settings.parallel, settings.model.path, fields.get("num_moe_experts")
    if experts is None:
        if parallel.expert > 1:
            raise SettingsError(
                f"parallel.expert {parallel.expert} does nothing with {folder}, a dense model; drop one of the two"
            )
        return
    if parallel.tensor > 1 and not parallel.sequence:
        raise SettingsError(
            f"parallel.tensor {parallel.tensor} with {folder}, a mixture of experts, needs parallel.sequence true; set "
            "it, or parallel.tensor to 1"
        )
    if experts % parallel.expert:
        raise SettingsError(
            f"{experts} experts of {folder} do not divide by parallel.expert {parallel.expert}; choose a divisor"
        )
    if world_size // parallel.pipeline % parallel.expert:
        unit = parallel.pipeline * math.lcm(parallel.tensor * parallel.context, parallel.expert)
        raise SettingsError(
            f"{world_size // parallel.pipeline} tensor x context x data ranks do not divide by parallel.expert "
            f"{parallel.expert}; launch a multiple of {unit} ranks"
        )
    # Megatron's gradient norm of the experts is a collective in which only stages that have some take part.
    pieces = parallel.pipeline * parallel.virtual_pipeline
    with_experts = {
        layer * pieces // fields["num_layers"] % parallel.pipeline
        for layer, sparse in enumerate(fields["moe_layer_freq"])
        if sparse
    }
    if len(with_experts) < parallel.pipeline:
        raise SettingsError(
            f"parallel.pipeline {parallel.pipeline} leaves a stage without experts, as mlp_only_layers and "
            f"decoder_sparse_step of {folder} place them; lower it"
        )


def check_lengths(settings: Settings, hf_config: Mapping[str, Any]) -> None:
    """SettingsError if a prompt with its response may be longer than the model's positions."""
    longest = settings.data.max_prompt_tokens + settings.rollout.max_response_tokens
    if longest > hf_config["max_position_embeddings"]:
        raise SettingsError(
            f"data.max_prompt_tokens {settings.data.max_prompt_tokens} + rollout.max_response_tokens "
            f"{settings.rollout.max_response_tokens} exceed the model's {hf_config['max_position_embeddings']} "
            "positions; lower one of them"
        )


def _check_packages(settings: Settings) -> None:
    for wanted, package in ((settings.log.wandb, "wandb"), (settings.log.tensorboard, "tensorboard")):
        if wanted and importlib.util.find_spec(package) is None:
            raise SettingsError(
                f"log.{package} true needs the package {package}; pip install {package}, or set it to false"
            )


def _check_run_folder(settings: Settings) -> Checkpoint | None:
    """What the run goes on from."""
    folder = Path(settings.run.dir)
    earlier = [name for name in RUN_FILES if (folder / name).exists()]
    start = where_to_begin(settings, earlier)
    for key, needed in _inputs(settings):
        for name in earlier:
            if Path(needed).resolve().is_relative_to((folder / name).resolve()):
                raise SettingsError(f"{key} {needed} is in run.dir {folder}, where {name} is replaced; choose another")
    _check_writable("run.dir", folder)
    if settings.sync.dir is not None:
        _check_writable("sync.dir", Path(settings.sync.dir))
    return start


def _check_writable(key: str, folder: Path) -> None:
    parent = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise SettingsError(f"{key} {folder} cannot be written ({parent}); choose another folder")


def _inputs(settings: Settings) -> list[tuple[str, str]]:
    """(key, path) of all that the run reads."""
    return [
        ("model.path", settings.model.path),
        ("model.tokenizer", settings.model.tokenizer or settings.model.path),
        *(("data.train", file.path) for file in settings.data.train),
        *(("evaluate.sets", file.path) for file in settings.evaluate.sets),
    ]


def _stop_token_ids(folder: str, hf_config: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    """End-of-sequence ids of the tokenizer, the model's config and its generation_config.json."""
    ids = {tokenizer.eos_token_id}
    sources = [hf_config]
    generation = Path(folder) / "generation_config.json"
    if generation.is_file():
        try:
            sources.append(json.loads(generation.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ModelError(f"{generation}, line {error.lineno}: not valid JSON ({error.msg}); correct it") from None
    for source in sources:
        value = source.get("eos_token_id")
        ids |= set(value) if isinstance(value, list) else {value} if value is not None else set()
    outside = [token for token in ids if type(token) is not int or not 0 <= token < hf_config["vocab_size"]]
    if outside:
        raise ModelError(
            f"eos_token_id {outside[0]!r} of {folder} is no token of its vocabulary of {hf_config['vocab_size']}; "
            "correct config.json or generation_config.json"
        )
    return tuple(sorted(ids))


def describe_plan(resolved: Resolved) -> str:
    """What the run will do, for a person to read before it does."""
    s, model = resolved.settings, transformer_fields(resolved.hf_config)
    p = s.parallel
    layout = [f"tensor {p.tensor}", f"context {p.context}", f"pipeline {p.pipeline}"]
    layout = [part for part in layout if not part.endswith(" 1")] + [f"data {resolved.world_size // p.replica}"]
    extras = [
        *(["sequence parallel"] if p.sequence else []),
        *([f"{p.virtual_pipeline} virtual stages"] if p.virtual_pipeline > 1 else []),
        *([f"experts over {p.expert} ranks"] if p.expert > 1 else []),
    ]
    dropped = f", {resolved.train.dropped_too_long} left out as too long" if resolved.train.dropped_too_long else ""
    samples = f"{s.batch.prompts} prompts x {s.rollout.group_size}"
    divisor = "all response tokens" if s.loss.normalizer == "all_tokens" else "the number of selected tokens"
    updates = f"{s.batch.prompts // s.batch.mini_batch_prompts} steps a rollout on {s.batch.mini_batch_prompts} prompts"
    warmup = f" after {s.optimizer.warmup_steps} warm-up steps" if s.optimizer.warmup_steps else ""
    overlong = f", overlong penalty over the last {s.reward.overlong_buffer}" if s.reward.overlong_buffer else ""
    sampling = (
        f"groups without both right and wrong answers replaced, {s.rollout.max_rounds} rounds at most"
        if s.rollout.dynamic_sampling
        else "no dynamic sampling"
    )
    lines = [
        f"model       {s.model.path}: {resolved.hf_config['model_type']}, {model['num_layers']} layers of "
        f"{model['hidden_size']}, vocabulary {resolved.hf_config['vocab_size']}, {s.model.dtype}",
        f"ranks       {resolved.world_size} = {' x '.join(layout)}{' with ' + ', '.join(extras) if extras else ''}",
        f"prompts     {len(resolved.train)} from {len(resolved.train.files)} file(s){dropped}",
        f"rollout     {samples} responses a step of up to {s.rollout.max_response_tokens} tokens at temperature "
        f"{s.rollout.temperature:g}{_engine_in_words(s)}; {sampling}",
        f"reward      {s.reward.function}: right {s.reward.correct:g}, wrong {s.reward.wrong:g}{overlong}",
        f"mask        {describe_mask(s)}",
        f"loss        {describe_loss(s)}, sum over the selected tokens / {divisor} of the mini-batch; advantages "
        f"{s.advantage.estimator}",
        f"optimizer   {updates} each, Adam, learning rate {s.optimizer.learning_rate:g}{warmup}",
        f"evaluation  {_evaluation_in_words(resolved)}",
        f"run         {s.run.steps} steps into {s.run.dir}{_start_in_words(resolved)}",
    ]
    return "\n".join(lines)


def describe_mask(settings: Settings) -> str:
    """The resolved meaning of the mask, in one line."""
    s = settings.selection
    if s.keep == "all":
        return "the policy gradient touches all response tokens"
    which = {
        "top": "with the highest entropy",
        "bottom": "with the lowest entropy",
        "random": "drawn at random",
    }[s.keep]
    scope = {
        "micro_batch": "each micro-batch on its own",
        "mini_batch": "a mini-batch over all ranks",
        "rollout_batch": "the whole rollout over all ranks",
    }[s.scope]
    owner = "policy before the update" if s.entropy == "old" else "policy being trained"
    whose = "" if s.keep == "random" else f", by the entropies of the {owner}"
    return f"the policy gradient touches the {s.fraction * 100:g} % of response tokens {which}, of {scope}{whose}"


def describe_loss(settings: Settings) -> str:
    """What becomes of a token's ratio of probabilities, and what weighs its loss, in one line."""
    s = settings.loss
    ratio = {"dapo": "clip", "gspo": "gspo, clip of sequence ratios", "cispo": "cispo, weight"}[s.objective]
    bounds = f"{1 + s.clip_high:g}"
    bounds = f"at most {bounds}" if s.clip_low is None else f"{1 - s.clip_low:g} .. {bounds}"
    words = f"{ratio} {bounds}"
    if s.correction_cap is not None:
        beyond = {"tis": "cut at {:g}", "mis": "0 beyond 1/{0:g} .. {0:g}"}[s.rollout_correction]
        words += f", times policy / engine probability {beyond.format(s.correction_cap)} ({s.rollout_correction})"
    return words


def _start_in_words(resolved: Resolved) -> str:
    return f", going on after step {resolved.start.step}" if resolved.start else ""


def _engine_in_words(settings: Settings) -> str:
    if settings.rollout.engine == "embedded":
        return ""
    return f" from {len(settings.rollout.servers)} SGLang server(s), which get weights by {settings.sync.method}"


def _evaluation_in_words(resolved: Resolved) -> str:
    s = resolved.settings
    if not resolved.evaluation:
        return "none"
    sets = ", ".join(f"{name} ({len(prompts)} problems)" for name, prompts in resolved.evaluation.items())
    every = f", every {s.run.eval_every} steps" if s.run.eval_every else ""
    return f"{sets} x {s.evaluate.samples} samples, before and after{every}"
