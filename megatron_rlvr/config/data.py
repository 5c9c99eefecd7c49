"""Settings of prompts: those to train on, and those to evaluate on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_rlvr.config.section import FreeForm, PathText, Section
from megatron_rlvr.config.urls import check_urls, without_slash
from megatron_rlvr.config.yaml_format import shown
from megatron_rlvr.reward_spec import GYM_PREFIX

# Set by the trainer, or decided by other settings.
_OWN_VARIABLES = {
    *("messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "strftime_now"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask",),
}


MIN_TEMPERATURE = 0.01
"""Smallest temperature that is not 0: logits are divided by it."""


def _expand_paths(values: Any, key: str) -> Any:
    """Replace a path, or each path of a list, by a file with default options."""
    if not isinstance(values, dict) or key not in values:
        return values
    files = values[key] if isinstance(values[key], list) else [values[key]]
    return values | {key: [{"path": file} if isinstance(file, str) else file for file in files]}


class FileSettings(Section):
    """One file of problems."""

    path: PathText
    """A .jsonl or .parquet file of problems, or reasoning_gym:NAME for problems that reasoning-gym generates."""
    name: str | None = None
    """Name of the file, with which the ids of its problems begin; null: the file's name without its ending, or that of
    the data set of reasoning-gym, with the options in which sets of the same name differ."""
    prompt_key: str | None = None
    """Column of the problem; null: one of the known names."""
    answer_key: str | None = None
    """Column of the gold answer; null: one of the known names."""
    id_key: str | None = None
    """Column of the problem's id; null: one of the known names."""
    options: FreeForm = Field(default_factory=dict)
    """Options of a data set of reasoning-gym, such as size, seed and min_terms; they may also stand beside `path`."""

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not str(values.get("path")).startswith(GYM_PREFIX):
            return values
        own = {key: value for key, value in values.items() if key in cls.model_fields}
        others = {key: value for key, value in values.items() if key not in own}
        options = own.get("options", {})
        return own | {"options": options | others} if isinstance(options, dict) else own

    @model_validator(mode="after")
    def _columns_or_options(self) -> "FileSettings":
        keys = [key for key in ("prompt_key", "answer_key", "id_key") if getattr(self, key) is not None]
        generated = self.path.startswith(GYM_PREFIX)
        if generated and keys:
            raise ValueError(f"{shown(self.path)}: {keys[0]}={shown(getattr(self, keys[0]))} has no effect; remove it")
        if self.options and not generated:
            raise ValueError(f"{shown(self.path)}: options={shown(self.options)} has no effect with a file; remove it")
        return self


class PromptFileSettings(FileSettings):
    """One file of `data.train`; its columns are those of `data.prompt_key` and so on, unless it has its own."""

    weight: float | None = Field(default=None, gt=0)
    """Share of the prompts drawn from this file, relative to the other files; null: its number of prompts."""


class DifficultySettings(Section):
    """Prompts that are drawn less often, by the share of correct completions in their last group."""

    retire_above: float | None = Field(default=None, ge=0, lt=1)
    """Do not draw a prompt again once its pass rate is above this, such as 0.9; null: none is retired."""
    rest_below: float | None = Field(default=None, gt=0, le=1)
    """Let a prompt rest if its pass rate is below this, such as 0.05; null: none rests."""
    rest_steps: int | None = Field(default=None, ge=1, le=10**9)
    """Training steps for which it rests."""

    @model_validator(mode="after")
    def _combination(self) -> "DifficultySettings":
        if self.retire_above is None and self.rest_below is None:
            raise ValueError("data.difficulty: has no effect without retire_above or rest_below; set one, or remove it")
        if (self.rest_below is None) != (self.rest_steps is None):
            there, missing = ("rest_below", "rest_steps")[:: 1 if self.rest_steps is None else -1]
            raise ValueError(f"data.difficulty.{there}={getattr(self, there)}: needs data.difficulty.{missing}; set it")
        if self.retire_above is not None and self.rest_below is not None and self.rest_below > self.retire_above:
            raise ValueError(
                f"data.difficulty.rest_below={self.rest_below}: above data.difficulty.retire_above="
                f"{self.retire_above}; lower it"
            )
        return self


class DataSettings(Section):
    """Problems to train on, and how they become prompts."""

    train: list[PromptFileSettings] = Field(min_length=1)
    """Files of problems: paths, or {path, name, weight, prompt_key, answer_key, id_key}."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """chat: the tokenizer's chat template; plain: the text itself; auto: chat if the tokenizer has a template."""
    template_kwargs: FreeForm = Field(default_factory=dict)
    """Variables of the chat template, such as {enable_thinking: false}."""
    system: str | None = None
    """System message of every prompt; null: none."""
    suffix: str = ""
    """Text appended to every problem, such as an instruction to box the answer."""
    max_prompt_tokens: int = Field(default=2048, ge=1, lt=2**20)
    """Longest prompt in tokens; longer ones are left out, and their number is reported."""
    shuffle: bool = True
    """Shuffle each file again in every epoch; false: keep the file's order."""
    difficulty: DifficultySettings | None = None
    """{retire_above, rest_below, rest_steps}: retire prompts with a pass rate above the first in their last group, let
    those below the second rest for that many training steps; null: draw all alike."""
    prompt_key: str | None = None
    """Column of the problem in the files of `data.train`; null: one of the known names."""
    answer_key: str | None = None
    """Column of the gold answer in the files of `data.train`; null: one of the known names."""
    id_key: str | None = None
    """Column of the problem's id in the files of `data.train`; null: one of the known names."""

    @model_validator(mode="before")
    @classmethod
    def _paths_are_files(cls, values: Any) -> Any:
        return _expand_paths(values, "train")

    @model_validator(mode="after")
    def _combination(self) -> "DataSettings":
        _check_names("data.train", self.train)
        for name, value in self.template_kwargs.items():
            if name in _OWN_VARIABLES:
                raise ValueError(f"data.template_kwargs.{name}={shown(value)}: is set by the trainer; remove it")
        for key in ("prompt_key", "answer_key", "id_key"):
            if getattr(self, key) is not None and all(getattr(file, key) is not None for file in self.train):
                raise ValueError(
                    f"data.{key}={shown(getattr(self, key))}: has no effect, as every file of data.train has its own "
                    f"{key}; remove it"
                )
        return self


class EvaluationFileSettings(FileSettings):
    """One file of `evaluate.sets`, which is read by its own columns, whatever those of `data.train` are.

    Its name is that of the set in the metrics, `eval/NAME/accuracy`.
    """


class EvaluateSettings(Section):
    """Problem sets to evaluate on, and how they are sampled."""

    sets: list[EvaluationFileSettings] = Field(default_factory=list)
    """Problem sets: paths, or {path, name, prompt_key, answer_key, id_key}. Without any, nothing is evaluated."""
    group_size: int = Field(default=32, ge=1, le=2**16)
    """Number of completions per problem; the accuracy is their mean (avg@32 in the paper)."""
    temperature: float = Field(default=1.0, ge=0, le=100)
    """Sampling temperature; 0: greedy."""
    top_p: float = Field(default=0.7, gt=0, le=1)
    """Nucleus sampling: probability mass of the tokens to sample from."""
    pass_at: list[int] | None = Field(default=None, min_length=1)
    """Values of k for which pass@k is computed; null: 1, 2, 4 and so on up to `evaluate.group_size`."""
    servers: list[str] = Field(default_factory=list)
    """URLs of SGLang servers for evaluations only, which then run beside training; none: evaluations use the rollout
    engine, and training waits. Servers read the weights of each evaluation from `DIR/sync_evaluation`."""

    @model_validator(mode="before")
    @classmethod
    def _paths_are_files(cls, values: Any) -> Any:
        values = _expand_paths(values, "sets")
        if isinstance(values, dict) and isinstance(values.get("servers"), list | str):
            servers = values["servers"]
            values = values | {"servers": without_slash([servers] if isinstance(servers, str) else servers)}
        return values

    @model_validator(mode="after")
    def _combination(self) -> "EvaluateSettings":
        _check_names("evaluate.sets", self.sets)
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"evaluate.temperature={self.temperature}: neither 0 nor at least {MIN_TEMPERATURE}; give 0 for greedy "
                "sampling"
            )
        check_urls("evaluate.servers", self.servers)
        for k in self.pass_at or ():
            if not 1 <= k <= self.group_size:
                raise ValueError(
                    f"evaluate.pass_at={k}: pass@k needs k completions, and evaluate.group_size={self.group_size}; "
                    "give ints from 1 to that"
                )
        if self.sets and self.temperature == 0 and self.group_size > 1:
            raise ValueError(
                f"evaluate.group_size={self.group_size}: with evaluate.temperature=0 all completions are alike; set 1"
            )
        return self


def names_of(files: Sequence[FileSettings]) -> list[str]:
    """Return the name of each file of `data.train` or `evaluate.sets`, which `_check_names` has found to be unique.

    Generated sets of the same path have different names, by the options that not all of them share.
    """
    alike: dict[str, list[FileSettings]] = {}
    for file in files:
        if file.name is None and file.path.startswith(GYM_PREFIX):
            alike.setdefault(file.path, []).append(file)
    return [_name(file, alike.get(file.path, [])) for file in files]


def _name(file: FileSettings, alike: Sequence[FileSettings]) -> str:
    if file.name is not None:
        return file.name
    if not alike:
        return Path(file.path).stem
    keys = sorted({key for each in alike for key in each.options})
    own = [
        f"{key}={file.options[key]}"
        for key in keys
        if key in file.options and any(each.options.get(key) != file.options[key] for each in alike)
    ]
    return file.path + (f"({','.join(own)})" if own else "")


def _check_names(key: str, files: Sequence[FileSettings]) -> None:
    """Raise ValueError if a file has no name that can be part of a metric and of an id, or two have the same."""
    names = names_of(files)
    for name in names:
        if not name or "/" in name or not name.isprintable():
            raise ValueError(
                f"{key}: {shown(name)} is no name of a set, which needs printable characters other than a slash; set "
                "name beside its path"
            )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        flag = " (--sets NAME=FILE)" if key == "evaluate.sets" else ""
        raise ValueError(f"{key}: two sets have the name {twice[0]!r}; set name beside the path of one of them{flag}")
