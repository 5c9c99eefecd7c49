"""Prompts of a run: prompt files are read, rendered as text (template.py), tokenized, and filtered by length.

Equal texts are tokenized once and share one array: DAPO-Math repeats each of its 17 thousand problems a hundred times.
How many problems are distinct is counted, and each file has a digest of what was read from it.
"""

import hashlib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rlvr.data.records import Columns, Record, RecordFile
from megatron_rlvr.data.rows import DataError
from megatron_rlvr.data.template import PromptTemplate, Template
from megatron_rlvr.data.tokenizer import Tokenizer
from megatron_rlvr.types import Prompt

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
        settings: Section of the settings that has these keys, for messages.
        options: Options of a data set of reasoning-gym, whose path is "reasoning_gym:NAME".
    """

    path: str | Path
    weight: float | None = None
    name: str | None = None
    prompt_key: str | None = None
    answer_key: str | None = None
    id_key: str | None = None
    settings: str = "data"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FilePrompts:
    """Prompts of one file: ``PromptSet.prompts[start : start + count]``, with ``count`` at least 1.

    Attributes:
        columns: Columns that were read.
        digests: {part: digest of that part of all prompts, in order}; see `digests`.
    """

    name: str
    start: int
    count: int
    weight: float
    dropped_too_long: int
    columns: Columns | None = None
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts of one or more files, with unique ids, in the order of the files and of their rows.

    Attributes:
        distinct: Number of distinct token sequences among the prompts; None if it was not counted.
        ambiguous: Number of these that have more than one gold answer.
    """

    prompts: list[Prompt]
    files: tuple[FilePrompts, ...]
    distinct: int | None = None
    ambiguous: int = 0

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
    template_kwargs: Mapping[str, Any] | None = None,
    now: datetime | None = None,
    show_progress: bool = True,
) -> PromptSet:
    """Read and tokenize the prompts of all files.

    Args:
        files: Prompt files, at least one.
        tokenizer: Tokenizer of the model.
        max_prompt_tokens: Maximum prompt length in tokens. Longer prompts are dropped and counted, never truncated.
        template: "auto", "chat" or "plain"; see template.py.
        system: System message for every prompt, or None.
        suffix: Text appended to every problem, such as "\\nPut the final answer within \\\\boxed{}."
        template_kwargs: Variables of the chat template.
        now: Moment that a chat template sees which reads the clock; None for the clock itself.
        show_progress: Show a progress bar if stderr is a terminal. Set it on one rank only.

    Raises:
        DataError: If a file is malformed, no prompt of a file is short enough, two files have the same name, a weight
            is not positive, or the template cannot be applied (`PromptTemplate`).
    """
    if not files:
        raise DataError("no prompt files; name at least one in data.train")
    names = _names(files)
    to_text = PromptTemplate(tokenizer, template, system=system, suffix=suffix, variables=template_kwargs, now=now)
    prompts: list[Prompt] = []
    loaded: list[FilePrompts] = []
    answers = _Answers()
    for file, name in zip(files, names, strict=True):
        reader = RecordFile(
            file.path,
            name=name,
            prompt_key=file.prompt_key,
            answer_key=file.answer_key,
            id_key=file.id_key,
            settings=file.settings,
            options=file.options,
        )
        records, numbers, texts = _rendered(reader, to_text)
        token_ids = _tokenize(texts, tokenizer, to_text, f"tokenizing {name}", show_progress)
        fits = [len(ids) <= max_prompt_tokens for ids in token_ids]
        if not any(fits):
            raise DataError(
                f"data.max_prompt_tokens={max_prompt_tokens}: all {len(records)} prompts of {file.path} are longer; "
                f"raise it to {min(map(len, token_ids))} or more"
            )
        kept = [(record, number) for record, number in zip(records, numbers, strict=True) if fits[number]]
        weight = float(len(kept)) if file.weight is None else float(file.weight)
        dropped = len(records) - len(kept)
        digests = _digests(kept, token_ids)
        loaded.append(FilePrompts(name, len(prompts), len(kept), weight, dropped, reader.columns, digests))
        prompts += [Prompt(r.id, token_ids[number], r.answer, r.source, r.extra, r.question) for r, number in kept]
        answers.add(kept, token_ids)
    return PromptSet(prompts, tuple(loaded), answers.distinct, answers.ambiguous)


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


def _rendered(records: RecordFile, template: PromptTemplate) -> tuple[list[Record], list[int], list[str]]:
    """Return the records, for each the number of its text, and the distinct texts."""
    kept = list(records)
    first: dict[int, Record] = {}  # by the identity of the problem, as equal problems of a file are one object
    for record in kept:
        first.setdefault(id(record.prompt), record)
    texts: dict[str, int] = {}
    number_of = {
        problem: texts.setdefault(text, len(texts))
        for problem, text in zip(first, template.texts(list(first.values())), strict=True)
    }
    return kept, [number_of[id(record.prompt)] for record in kept], list(texts)


def _tokenize(
    texts: list[str], tokenizer: Tokenizer, template: PromptTemplate, title: str, show_progress: bool
) -> list[np.ndarray]:
    """Return read-only token ids [P] int32 for each text."""
    arrays = []
    for batch in _batches(texts, title, show_progress):
        for ids in tokenizer.encode_batch(batch):
            arrays.append(np.array(template.with_start(ids), dtype=np.int32))
            arrays[-1].flags.writeable = False
    return arrays


def _digests(rows: Sequence[tuple[Record, int]], token_ids: Sequence[np.ndarray]) -> dict[str, str]:
    """Return a digest of each part of the prompts of a file, in order.

    Args:
        rows: (record, index of its token ids).
    """
    tokens: dict[int, bytes] = {}
    problems: dict[int, bytes] = {}
    others: dict[int, bytes] = {}
    for record, number in rows:
        if number not in tokens:
            tokens[number] = _short_hash(token_ids[number].tobytes())
        if id(record.prompt) not in problems:  # equal ones are one object
            problems[id(record.prompt)] = _short_hash(repr(record.prompt).encode())
        if id(record.extra) not in others:
            others[id(record.extra)] = _short_hash(repr(sorted(record.extra.items())).encode())
    parts: dict[str, Iterable[bytes]] = {
        "ids": (f"{record.id}\0{record.source}\0".encode() for record, _ in rows),
        "problems": (problems[id(record.prompt)] for record, _ in rows),
        "answers": (f"{record.answer}\0".encode() for record, _ in rows),
        "other columns": (others[id(record.extra)] for record, _ in rows),
        "prompts": (tokens[number] for _, number in rows),
    }
    digests = {}
    for part, values in parts.items():
        whole = hashlib.blake2b(digest_size=16)
        for value in values:
            whole.update(value)
        digests[part] = whole.hexdigest()
    return digests


def _short_hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


class _Answers:
    """Gold answers of each distinct prompt over all files."""

    def __init__(self) -> None:
        self._answer_of: dict[bytes, str] = {}
        self._ambiguous: set[bytes] = set()

    def add(self, rows: Sequence[tuple[Record, int]], token_ids: Sequence[np.ndarray]) -> None:
        keys = [_short_hash(ids.tobytes()) for ids in token_ids]
        for record, number in rows:
            if self._answer_of.setdefault(keys[number], record.answer) != record.answer:
                self._ambiguous.add(keys[number])

    @property
    def distinct(self) -> int:
        return len(self._answer_of)

    @property
    def ambiguous(self) -> int:
        return len(self._ambiguous)


def _batches(texts: list[str], title: str, show_progress: bool) -> Iterator[list[str]]:
    from rich.console import Console
    from rich.progress import track

    starts = range(0, len(texts), ENCODE_BATCH)
    shown = show_progress and sys.stderr.isatty()
    for start in track(starts, title, console=Console(stderr=True), transient=True, disable=not shown):
        yield texts[start : start + ENCODE_BATCH]
