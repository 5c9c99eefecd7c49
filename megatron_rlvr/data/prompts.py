"""Prompts of a run: prompt files are read, rendered as text, tokenized, and filtered by length.

The text of a prompt is made of messages = [system message, if set] + the row's messages (plain text is one user
message), with `suffix` appended to the last content. The template decides how messages become text:

    chat    the tokenizer's chat template, up to where the assistant's answer starts
    plain   the contents joined by blank lines, after the start tokens that the model expects (Llama's <s>)
    auto    chat if the tokenizer has a chat template, else plain

Equal texts are tokenized once and share one array: DAPO-Math repeats each of its 17 thousand problems a hundred times.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_rlvr.data.records import Message, Record, read_records
from megatron_rlvr.data.rows import DataError
from megatron_rlvr.data.tokenizer import Tokenizer, TokenizerError
from megatron_rlvr.types import Prompt

Template = Literal["auto", "chat", "plain"]

ENCODE_BATCH = 1024


@dataclass(frozen=True, slots=True)
class PromptFile:
    """Prompt file and the options for reading it.

    Attributes:
        path: Path of a .jsonl, .json (lines) or .parquet file.
        weight: Frequency of the file's prompts relative to the other files' weights; None for the number of its
            prompts, which makes every prompt equally likely.
        name: Prefix of the prompts' ids, and name of the set in metrics; None for the file's stem. Unique in a set.
        prompt_key, answer_key, id_key: Columns to read instead of those found by name.
    """

    path: str | Path
    weight: float | None = None
    name: str | None = None
    prompt_key: str | None = None
    answer_key: str | None = None
    id_key: str | None = None


@dataclass(frozen=True, slots=True)
class FilePrompts:
    """Prompts of one file: ``PromptSet.prompts[start : start + count]``, with ``count`` at least 1."""

    name: str
    start: int
    count: int
    weight: float
    dropped_too_long: int


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts of one or more files, with unique ids, in the order of the files and of their rows."""

    prompts: list[Prompt]
    files: tuple[FilePrompts, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def dropped_too_long(self) -> int:
        return sum(file.dropped_too_long for file in self.files)


def load_prompts(
    files: Sequence[PromptFile],
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int,
    template: Template = "auto",
    system: str | None = None,
    suffix: str = "",
    show_progress: bool = True,
) -> PromptSet:
    """Read and tokenize the prompts of all files.

    Args:
        files: Prompt files, at least one.
        tokenizer: Tokenizer of the model.
        max_prompt_tokens: Maximum prompt length in tokens. Longer prompts are dropped and counted, never truncated.
        template: "auto", "chat" or "plain"; see the module docstring.
        system: System message for every prompt, or None.
        suffix: Text appended to every problem, such as "\\nPut the final answer within \\\\boxed{}."
        show_progress: Show a progress bar if stderr is a terminal. Set it on one rank only.

    Raises:
        DataError: If a file is malformed, no prompt of a file is short enough, two files have the same name, a weight
            is not positive, a row has its own system message although ``system`` is set, or the chat template rejects a
            row.
    """
    if not files:
        raise DataError("no prompt files; name at least one in data.train")
    if template not in ("auto", "chat", "plain"):
        raise DataError(f"data.template={template}: unknown template; choose auto, chat or plain")
    chat = template == "chat" or (template == "auto" and tokenizer.chat_template is not None)
    prompts: list[Prompt] = []
    loaded: list[FilePrompts] = []
    for file, name in zip(files, _names(files), strict=True):
        records = read_records(
            file.path, name=name, prompt_key=file.prompt_key, answer_key=file.answer_key, id_key=file.id_key
        )
        texts = [_text(record, tokenizer, chat, system, suffix) for record in records]
        start_ids = [] if chat else tokenizer.start_ids
        token_ids = _tokenize(texts, tokenizer, start_ids, f"tokenizing {name}", show_progress)
        kept = [
            Prompt(record.id, ids, record.answer, record.source, record.extra)
            for record, ids in zip(records, token_ids, strict=True)
            if len(ids) <= max_prompt_tokens
        ]
        if not kept:
            shortest = min(len(ids) for ids in token_ids)
            raise DataError(
                f"data.max_prompt_tokens={max_prompt_tokens}: all {len(records)} prompts of {file.path} are longer; "
                f"raise it to {shortest} or more"
            )
        weight = float(len(kept)) if file.weight is None else float(file.weight)
        loaded.append(FilePrompts(name, len(prompts), len(kept), weight, len(records) - len(kept)))
        prompts += kept
    return PromptSet(prompts, tuple(loaded))


def _names(files: Sequence[PromptFile]) -> list[str]:
    """Return the names of the files, after all checks that need not read a file, which may be long."""
    names: dict[str, PromptFile] = {}
    for file in files:
        name = Path(file.path).stem if file.name is None else file.name
        if not name or "/" in name:
            raise DataError(f"{file.path}: the name {name!r} is empty or contains a slash; choose another name")
        if name in names:
            raise DataError(f"{names[name].path} and {file.path} are both named {name!r}; rename one of them")
        if file.weight is not None and not (math.isfinite(file.weight) and file.weight > 0):
            raise DataError(
                f"weight={file.weight}: the weight of {file.path} must be finite and above 0; "
                "raise it or remove the file"
            )
        names[name] = file
    return list(names)


def _text(record: Record, tokenizer: Tokenizer, chat: bool, system: str | None, suffix: str) -> str:
    messages: list[Message] = (
        [{"role": "user", "content": record.prompt}] if isinstance(record.prompt, str) else record.prompt
    )
    if system is not None:
        if any(message["role"] == "system" for message in messages):
            raise DataError(f"prompt {record.id} has its own system message; unset data.system or remove the message")
        messages = [{"role": "system", "content": system}, *messages]
    messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + suffix}]
    if not chat:
        return "\n\n".join(message["content"] for message in messages)
    try:
        return tokenizer.render_chat(messages)
    except TokenizerError as error:
        raise DataError(f"prompt {record.id}: {error}") from error


def _tokenize(
    texts: list[str], tokenizer: Tokenizer, start_ids: list[int], title: str, show_progress: bool
) -> list[np.ndarray]:
    """Return token ids [P] int32 for each text; equal texts share one array, which is therefore read-only."""
    distinct = list(dict.fromkeys(texts))
    arrays: dict[str, np.ndarray] = {}
    for batch in _batches(distinct, title, show_progress):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            arrays[text] = np.array(start_ids + ids, dtype=np.int32)
            arrays[text].flags.writeable = False
    return [arrays[text] for text in texts]


def _batches(texts: list[str], title: str, show_progress: bool) -> Iterator[list[str]]:
    from rich.console import Console
    from rich.progress import track

    starts = range(0, len(texts), ENCODE_BATCH)
    shown = show_progress and sys.stderr.isatty()
    for start in track(starts, title, console=Console(stderr=True), transient=True, disable=not shown):
        yield texts[start : start + ENCODE_BATCH]
