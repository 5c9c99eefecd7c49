"""Settings with all files that they name, read and checked to fit together, before a process group starts.

An error of the user's input is raised here, as one sentence; later modules may rely on what is checked.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_rlvr.checkpoint.store import Checkpoint
from megatron_rlvr.config import DataSettings, FileSettings, RewardSettings, Settings, SettingsError, names_of
from megatron_rlvr.config.yaml_format import shown
from megatron_rlvr.data.prompts import PromptFile, PromptSet, load_prompts
from megatron_rlvr.data.template import EndOfTurn, PromptTemplate
from megatron_rlvr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_rlvr.engines.sglang.api_key import key_of
from megatron_rlvr.hf.families import ModelError, family_of, transformer_fields
from megatron_rlvr.hf.files import read_config, weight_files
from megatron_rlvr.hf.headers import model_tensors
from megatron_rlvr.reward.final_answer import THINK_CLOSE, THINK_OPEN
from megatron_rlvr.startup.inputs import check_inputs, inputs_of, recorded_clock, recorded_inputs
from megatron_rlvr.startup.layout_checks import check_experts, check_layout, check_lengths
from megatron_rlvr.startup.process import is_main, world_size
from megatron_rlvr.startup.run_folder import check_run_folder
from megatron_rlvr.startup.stop_tokens import StopToken, find_stop_tokens

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
_KEYS = ("prompt_key", "answer_key", "id_key")


@dataclass(frozen=True)
class Resolved:
    """Settings with the content of the files that they name.

    Attributes:
        hf_config: config.json of the model.
        stop_tokens: Tokens that end a response, by ascending id.
        turn: What the chat template writes after an answer; None without a chat template.
        answer_after: Text after which the answer of a response begins; None for the whole response.
        train: Prompts to train on.
        evaluation: {name of the set: its prompts}.
        now: Moment that the chat template sees; None if it does not read the clock.
        world_size: Number of ranks.
        start: Checkpoint that the run resumes from; None for a fresh run, and on other ranks than the main rank.
        skipped_tensors: Names of tensors in the model's files that are no weights of it.
    """

    settings: Settings
    hf_config: Mapping[str, Any]
    tokenizer: Tokenizer
    stop_tokens: tuple[StopToken, ...]
    turn: EndOfTurn | None
    answer_after: str | None
    train: PromptSet
    evaluation: Mapping[str, PromptSet]
    now: datetime | None
    world_size: int
    start: Checkpoint | None
    skipped_tensors: tuple[str, ...] = ()

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids of `stop_tokens`."""
        return tuple(token.id for token in self.stop_tokens)

    @property
    def inputs(self) -> dict[str, Any]:
        """Record of what the run reads besides its settings and weights, for `inputs.py` to compare."""
        return inputs_of(self.settings, self.tokenizer, self.train, self.evaluation, self.stop_token_ids, self.now)

    def at(self, now: datetime) -> "Resolved":
        """Return the same with prompts whose template sees another moment."""
        train, evaluation = _prompt_sets(self.settings, self.tokenizer, now, show_progress=False)
        return replace(self, train=train, evaluation=evaluation, now=now)


def resolve(settings: Settings, *, show_progress: bool = False) -> Resolved:
    """Read and check the model folder, the tokenizer, the prompt files and, on the main rank, the run folder.

    Raises:
        InputError: SettingsError, ModelError, TokenizerError or DataError, each one sentence.
    """
    hf_config = read_config(settings.model.path)
    weight_files(settings.model.path)
    check_config(settings.model.path, hf_config)
    fields = transformer_fields(hf_config)
    ranks = world_size(settings.parallel)
    check_layout(settings, fields, ranks)
    check_experts(settings, fields, ranks)
    check_lengths(settings, hf_config)
    _check_packages(settings)
    key_of(settings.rollout)
    start = check_run_folder(settings) if is_main() else None  # the main rank has the lease of the folder
    tokenizer = load_tokenizer(settings.model.tokenizer or settings.model.path)
    if tokenizer.vocab_size > hf_config["vocab_size"]:
        raise SettingsError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than vocab_size {hf_config['vocab_size']} of "
            f"{settings.model.path}; set model.tokenizer to the model's own"
        )
    skipped = model_tensors(settings.model.path, hf_config).skipped
    recorded = recorded_inputs(start)
    template = PromptTemplate(tokenizer, settings.data.template, variables=settings.data.template_kwargs)
    now = (recorded_clock(recorded) or datetime.now()) if template.reads_clock else None
    train, evaluation = _prompt_sets(settings, tokenizer, now, show_progress=show_progress)
    if len(train) < settings.batch.prompts:
        raise SettingsError(
            f"batch.prompts={settings.batch.prompts}: more than the {len(train)} prompts of data.train; lower it"
        )
    turn = template.end_of_turn()
    stop = find_stop_tokens(settings, hf_config, tokenizer, turn, in_use=template.chat or holds_turns(train, turn))
    _check_sources(settings.reward, {"data.train": train} | evaluation)
    after = find_answer_after(settings.reward, tokenizer, train)
    resolved = Resolved(
        settings, hf_config, tokenizer, stop, turn, after, train, evaluation, now, ranks, start, skipped
    )
    check_inputs(settings, recorded, resolved.inputs)
    return resolved


def _prompt_sets(
    settings: Settings, tokenizer: Tokenizer, now: datetime | None, *, show_progress: bool
) -> tuple[PromptSet, dict[str, PromptSet]]:
    """Read the prompts to train on, and those of each evaluation set by its name."""
    data = settings.data
    train = []
    for file, name in zip(data.train, names_of(data.train), strict=True):
        keys = {key: value or getattr(data, key) for key, value in _own_keys(file).items()}
        train.append(PromptFile(file.path, file.weight, name, **keys, options=file.options))
    evaluation = evaluation_sets(settings, tokenizer, now, show_progress=show_progress)
    return _load(train, data, tokenizer, now, show_progress), evaluation


def evaluation_sets(
    settings: Settings, tokenizer: Tokenizer, now: datetime | None, *, show_progress: bool
) -> dict[str, PromptSet]:
    """Return {name: prompts} of `evaluate.sets`. Raises DataError."""
    sets = settings.evaluate.sets
    files = [
        PromptFile(
            file.path,
            None,
            name,
            **_own_keys(file),
            settings=f"evaluate.sets.{number}",
            options=file.options,
        )
        for number, (file, name) in enumerate(zip(sets, names_of(sets), strict=True))
    ]
    return {str(file.name): _load([file], settings.data, tokenizer, now, show_progress) for file in files}


def _load(
    files: Sequence[PromptFile], data: DataSettings, tokenizer: Tokenizer, now: datetime | None, show_progress: bool
) -> PromptSet:
    return load_prompts(
        files,
        tokenizer,
        max_prompt_tokens=data.max_prompt_tokens,
        template=data.template,
        system=data.system,
        suffix=data.suffix,
        template_kwargs=data.template_kwargs,
        now=now,
        show_progress=show_progress,
    )


def _own_keys(file: FileSettings) -> dict[str, str | None]:
    return {key: getattr(file, key) for key in _KEYS}


def holds_turns(prompts: PromptSet, turn: EndOfTurn | None) -> bool:
    """Return whether prompts have been rendered beforehand by the chat template: they then hold its end of turn."""
    if turn is None or turn.token_id is None:
        return False
    arrays = {id(prompt.token_ids): prompt.token_ids for prompt in prompts.prompts}
    return any((ids == turn.token_id).any() for ids in arrays.values())


def check_config(folder: str, hf_config: Mapping[str, Any]) -> None:
    """Raise ModelError unless config.json has the entries that the rest of the program relies on."""
    family_of(hf_config)
    for key in _SIZES:
        value = hf_config.get(key)
        if type(value) is not int or not 0 < value < 2**31:
            raise ModelError(
                f"{Path(folder) / 'config.json'}: {key} is {shown(value)}, not an int above 0; copy the model's own"
            )


def _check_packages(settings: Settings) -> None:
    for wanted, package in ((settings.log.wandb, "wandb"), (settings.log.tensorboard, "tensorboard")):
        if wanted and importlib.util.find_spec(package) is None:
            raise SettingsError(
                f"log.{package}=true: needs the package {package}; pip install {package}, or set it to false"
            )


def _check_sources(reward: RewardSettings, sets: Mapping[str, PromptSet]) -> None:
    """Raise SettingsError for a source without a reward function, and for a function whose source no prompt has."""
    functions, sources = reward.functions, dict[str, str]()
    for prompts in sets.values():
        for prompt in prompts.prompts:
            sources.setdefault(prompt.source, prompt.id)
    for source, prompt_id in sources.items():
        if functions.of(source) is None:
            raise SettingsError(
                f"reward.function: none for source {shown(source)} of prompt {prompt_id}; add it, or one for '*'"
            )
    for source in functions.by_source:
        if source not in sources:
            known = ", ".join(map(shown, list(sources)[:5]))
            raise SettingsError(
                f"reward.function.{source:.60}: has no effect, as no prompt has this source (there are: {known}); "
                "correct or remove it"
            )


def find_answer_after(reward: RewardSettings, tokenizer: Tokenizer, prompts: PromptSet) -> str | None:
    """Return the text after which the answer of a response begins, by `reward.answer_after`.

    With auto, the first prompt decides (`opens_thinking`), as the template has rendered it. A template that leaves it
    to the model to open a thinking section decides nothing.
    """
    if reward.answer_after == "none" or not any(call.reads_answers for call in reward.functions.all):
        return None
    marker = reward.answer_after
    if marker == "auto":
        if not opens_thinking(tokenizer, prompts):
            return None
        marker = THINK_CLOSE
    if marker not in tokenizer.decode(tokenizer.encode(marker)):
        raise SettingsError(
            f"reward.answer_after={reward.answer_after}: {marker} is a special token of the tokenizer, which graders "
            "never see, so that no response would have an answer; set it to none"
        )
    return marker


def opens_thinking(tokenizer: Tokenizer, prompts: PromptSet) -> bool:
    """Return whether the first prompt ends in an open thinking section."""
    _, opened, thoughts = tokenizer.decode(prompts.prompts[0].token_ids.tolist()).rpartition(THINK_OPEN)
    return bool(opened) and THINK_CLOSE not in thoughts
