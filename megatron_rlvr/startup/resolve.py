"""Settings with all files that they name, read and checked to fit together, before a process group starts.

An error of the user's input is raised here, as one sentence; later modules may rely on what is checked.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlvr.checkpoint.store import Checkpoint
from megatron_rlvr.config import Settings, SettingsError, evaluation_name
from megatron_rlvr.data.prompts import PromptFile, PromptSet, load_prompts
from megatron_rlvr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_rlvr.hf.families import ModelError, family_of, transformer_fields
from megatron_rlvr.hf.files import read_config, weight_files
from megatron_rlvr.hf.headers import model_tensors
from megatron_rlvr.startup.layout_checks import check_experts, check_layout, check_lengths
from megatron_rlvr.startup.process import world_size
from megatron_rlvr.startup.run_folder import check_run_folder

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
    """Settings with the content of the files that they name.

    Attributes:
        hf_config: config.json of the model.
        stop_token_ids: Ids that end a response, ascending.
        train: Prompts to train on.
        evaluation: {name of the set: its prompts}.
        world_size: Number of ranks.
        start: Checkpoint that the run resumes from; None for a fresh run.
        skipped_tensors: Names of tensors in the model's files that are no weights of it.
    """

    settings: Settings
    hf_config: Mapping[str, Any]
    tokenizer: Tokenizer
    stop_token_ids: tuple[int, ...]
    train: PromptSet
    evaluation: Mapping[str, PromptSet]
    world_size: int
    start: Checkpoint | None
    skipped_tensors: tuple[str, ...] = ()


def resolve(settings: Settings, *, show_progress: bool = False) -> Resolved:
    """Read and check the model folder, the tokenizer, the prompt files and the run folder.

    Raises:
        InputError: SettingsError, ModelError, TokenizerError or DataError, each one sentence.
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
    start = check_run_folder(settings)
    tokenizer = load_tokenizer(settings.model.tokenizer or settings.model.path)
    if tokenizer.vocab_size > hf_config["vocab_size"]:
        raise SettingsError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than vocab_size {hf_config['vocab_size']} of "
            f"{settings.model.path}; set model.tokenizer to the model's own"
        )
    skipped = model_tensors(settings.model.path, hf_config).skipped
    train = _load(settings, [(f.path, f.weight, None) for f in settings.data.train], tokenizer, show_progress)
    if len(train) < settings.batch.prompts:
        raise SettingsError(
            f"batch.prompts={settings.batch.prompts}: more than the {len(train)} prompts of data.train; lower it"
        )
    evaluation = {
        evaluation_name(f): _load(settings, [(f.path, None, evaluation_name(f))], tokenizer, show_progress)
        for f in settings.evaluate.sets
    }
    stop = _stop_token_ids(settings.model.path, hf_config, tokenizer)
    return Resolved(settings, hf_config, tokenizer, stop, train, evaluation, ranks, start, skipped)


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
    """Raise ModelError unless config.json has the entries that the rest of the program relies on."""
    path = Path(folder) / "config.json"
    if not isinstance(hf_config, dict):
        raise ModelError(f"{path} holds no JSON object; copy the model's own")
    family_of(hf_config)
    for key in _SIZES:
        value = hf_config.get(key)
        if type(value) is not int or value < 1:
            raise ModelError(f"{path}: {key} is {json.dumps(value)}, not an int above 0; copy the model's own")
    if not isinstance(hf_config.get("rms_norm_eps"), float | int):
        raise ModelError(f"{path}: rms_norm_eps is missing or not a float; copy the model's own")


def _check_packages(settings: Settings) -> None:
    for wanted, package in ((settings.log.wandb, "wandb"), (settings.log.tensorboard, "tensorboard")):
        if wanted and importlib.util.find_spec(package) is None:
            raise SettingsError(
                f"log.{package}=true: needs the package {package}; pip install {package}, or set it to false"
            )


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
