"""Records of prompt files: the problem and the gold answer of each row, before tokenization.

The first row decides which columns are read, by the first name that is present in each list:

    prompt   prompt, messages, problem, question           text, or chat messages [{role, content}, ...],
                                                           which may be text in JSON
    answer   reward_model.ground_truth, answer             text or a number, which becomes its decimal digits, or
                                                           a list of one of them
    id       id, idx, extra_info.index                     else the line or row number, counted from 1
    source   source, data_source                           else the file's name

These names cover files written for this project, verl's layout (DAPO-Math), GSM8K, AIME and AMC. A dot selects a
nested column. If the prompt column is `question` and the first answer contains `#### n` (GSM8K), the gold answer is
the text after the last `####`, without thousands separators.

Numbers become the digits that the file has, without an exponent and without losing one: 27.0 is "27", 1e-05 is
"0.00001".

Every later row must have the same columns as the first: a row that is read by another rule could yield an incorrect
gold answer, which is noise in the reward that no later check can detect.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron_rlvr.data.gym import gym_rows
from megatron_rlvr.data.rows import DataError, LongFloat, read_rows
from megatron_rlvr.reward_spec import GYM_PREFIX

PROMPT_COLUMNS = ("prompt", "messages", "problem", "question")
ANSWER_COLUMNS = ("reward_model.ground_truth", "answer")
ID_COLUMNS = ("id", "idx", "extra_info.index")
SOURCE_COLUMNS = ("source", "data_source")

REPEATING_ID = "extra_info.index"
"""Id column whose values may repeat: DAPO-Math has each problem about a hundred times, with the same index."""

GOLD_MARK = "####"
"""Text before the gold answer in GSM8K's solutions."""

Message = dict[str, str]
"""Message of a chat: {"role": ..., "content": ...}."""

_MAX_DIGITS = 1000
_MISSING = object()
_NOTHING: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a prompt file.

    Attributes:
        prompt: Text of the problem, or its chat messages (never empty, never ending with an assistant message).
        answer: Gold answer, not empty.
        id: "<name of the file>/<id of the row>", unique within the file.
        source: Name of the data set.
        extra: All other columns of the row.
    """

    prompt: str | list[Message]
    answer: str
    id: str
    source: str
    extra: dict[str, Any]

    @property
    def question(self) -> str:
        """Text of the problem: of a chat, the last message."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of a file that are read.

    Attributes:
        prompt, answer: Columns of the problem and of its gold answer.
        id, source: Columns of the row's id and of the name of its data set; None if the file has none.
        marked: True if the answers end with `#### n`.
    """

    prompt: str
    answer: str
    id: str | None
    source: str | None
    marked: bool


class RecordFile:
    """A prompt file, read row by row: iterating yields a `Record` for every row, in the order of the file.

    Ids are unique. If they are read from `extra_info.index`, which DAPO-Math repeats, the second row with an id gets
    the suffix "#2", and so on; in any other column a repeated id is an error. Equal problems, answers and sources are
    one object each, and so are equal other columns: files may repeat each problem a hundred times.

    Args:
        path: A .jsonl, .json (one object per line) or .parquet file.
        name: Prefix of the ids, and source of rows without one; the file's stem by default.
        prompt_key, answer_key, id_key: Columns to read instead of those found by name ("a.b" for a nested column).
        settings: Section of the settings that has these keys, for messages.
        options: Options of a data set of reasoning-gym, whose path is "reasoning_gym:NAME".

    Attributes:
        columns: Columns that are read; None until the first row is.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        prompt_key: str | None = None,
        answer_key: str | None = None,
        id_key: str | None = None,
        settings: str = "data",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.columns: Columns | None = None
        self._path = Path(path)
        self._options = options or {}
        self._name = self._path.stem if name is None else name
        self._keys = {"prompt": prompt_key, "answer": answer_key, "id": id_key}
        self._settings = settings

    def __iter__(self) -> Iterator[Record]:
        """Yield the records, at least one.

        Raises:
            DataError: One sentence with the file and the line (of JSON lines) or row (of parquet), counted from 1.
        """
        row_numbers: dict[str, int] = {}
        copies: dict[str, int] = {}
        known: dict[Any, Any] = {}
        path = str(self._path)
        rows = gym_rows(path, self._options) if path.startswith(GYM_PREFIX) else read_rows(self._path)
        for unit, number, row in rows:
            where = f"{self._path}, {unit} {number}"
            if self.columns is None:
                self.columns = self._find_columns(row, where)
            columns = self.columns
            own_id = str(number) if columns.id is None else _row_id(row, columns.id, where)
            row_id = f"{self._name}/{own_id}"
            if row_id in row_numbers:
                if columns.id != REPEATING_ID:
                    raise DataError(
                        f"{where}: {columns.id} {own_id!r} repeats that of {unit} {row_numbers[row_id]}; make ids "
                        f"unique, or set {self._settings}.id_key to a column of unique ids"
                    )
                row_id = _next_copy(row_id, copies, row_numbers)
            row_numbers[row_id] = number
            yield self._record(row, columns, row_id, where, known)
        if not row_numbers:
            raise DataError(f"{self._path} has no rows; give a file with at least one prompt")

    def _find_columns(self, row: dict[str, Any], where: str) -> Columns:
        def find(meaning: str, names: tuple[str, ...]) -> str | None:
            present = (column for column in names if _value(row, column) is not _MISSING)
            return self._keys.get(meaning) or next(present, None)

        def required(meaning: str, names: tuple[str, ...]) -> str:
            column = find(meaning, names)
            if column is None:
                raise DataError(
                    f"{where}: no column {' or '.join(names)} among {_names(row)}; set {self._settings}.{meaning}_key "
                    f"to the column of the {meaning}"
                )
            return column

        prompt, answer = required("prompt", PROMPT_COLUMNS), required("answer", ANSWER_COLUMNS)
        marked = prompt == "question" and GOLD_MARK in str(_value(row, answer))
        return Columns(prompt, answer, find("id", ID_COLUMNS), find("source", SOURCE_COLUMNS), marked)

    def _record(self, row: dict[str, Any], columns: Columns, row_id: str, where: str, known: dict[Any, Any]) -> Record:
        prompt = _prompt(row, columns.prompt, where, self._settings)
        key = prompt if isinstance(prompt, str) else tuple((m["role"], m["content"]) for m in prompt)
        answer = _answer(row, columns.answer, where, self._settings)
        if columns.prompt == "question":
            answer = _gold(answer, columns, where)
        source = self._name if columns.source is None else _source(row, columns.source, where)
        used = (columns.prompt, columns.answer, columns.id, columns.source)
        extra = {column: value for column, value in row.items() if column not in used}
        return Record(
            known.setdefault(key, prompt),
            known.setdefault(answer, answer),
            row_id,
            known.setdefault(source, source),
            known.setdefault(("", repr(extra)), extra) if extra else _NOTHING,
        )


def read_records(path: str | Path, **options: Any) -> list[Record]:
    """Read every row of a prompt file; arguments and errors are those of `RecordFile`."""
    return list(RecordFile(path, **options))


def _next_copy(row_id: str, copies: dict[str, int], taken: dict[str, int]) -> str:
    copies[row_id] = copies.get(row_id, 1) + 1
    while f"{row_id}#{copies[row_id]}" in taken:
        copies[row_id] += 1
    return f"{row_id}#{copies[row_id]}"


def _value(row: dict[str, Any], column: str) -> Any:
    if column in row:
        return row[column]
    outer, _, inner = column.partition(".")
    nested = row.get(outer)
    return _value(nested, inner) if inner and isinstance(nested, dict) else _MISSING


def _names(row: dict[str, Any]) -> str:
    return ", ".join(row) or "none"


def _present(row: dict[str, Any], column: str, where: str) -> Any:
    value = _value(row, column)
    if value is _MISSING:
        raise DataError(f"{where}: no column {column} among {_names(row)}; add it to every row or name another column")
    return value


def encodable(value: str, column: str, where: str) -> str:
    """Return the text if it can be encoded as UTF-8, as tokenizers require.

    JSON escapes can produce an unpaired surrogate, which cannot be encoded.

    Raises: DataError with ``where`` and ``column``.
    """
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {column} has an unpaired surrogate at character {error.start + 1}; remove it"
        ) from error
    return value


def _prompt(row: dict[str, Any], column: str, where: str, settings: str) -> str | list[Message]:
    value = _present(row, column, where)
    if isinstance(value, str) and (chat := _chat_of_json(value)):
        value = chat
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{where}: {column} is empty; write a problem or remove the row")
        return encodable(value, column, where)
    if isinstance(value, list):
        others = (other for other in PROMPT_COLUMNS if other != column and isinstance(row.get(other), str))
        return _messages(value, column, where, "".join(f"set {settings}.prompt_key to {o}, or " for o in others))
    raise DataError(f"{where}: {column} is {_kind(value)}; write text or a list of {{role, content}}")


def _chat_of_json(text: str) -> list[Any] | None:
    """Return the messages that a text has in JSON, as tables have them whose columns hold text only; else None."""
    if text.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(text)
            if value and all(isinstance(message, dict) and {"role", "from"} & set(message) for message in value):
                return list(value)
    return None


def _messages(value: list[Any], column: str, where: str, way_out: str) -> list[Message]:
    """Return the messages of a chat; ``way_out`` is a remedy that is put before the others."""
    messages = []
    for number, message in enumerate(value, start=1):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise DataError(
                    f"{where}: message {number} of {column} has no {key} of type str; {way_out}give each a "
                    "role and a content"
                )
        messages.append({key: encodable(message[key], column, where) for key in ("role", "content")})
    if not messages or not messages[-1]["content"].strip():
        raise DataError(f"{where}: {column} is empty; write a problem or remove the row")
    if messages[-1]["role"] == "assistant":
        # Probably a supervised data set, whose last message is the solution that the policy has to find.
        raise DataError(f"{where}: {column} ends with an assistant message; {way_out}end it with a user message")
    return messages


def _answer(row: dict[str, Any], column: str, where: str, settings: str) -> str:
    value = _present(row, column, where)
    if isinstance(value, list) and len(value) == 1:  # as files have it in which other rows have several answers
        (value,) = value
    if _is_number(value):
        return _digits(value, column, where)
    answer = encodable(value, column, where).strip() if isinstance(value, str) else ""
    if not answer:
        raise DataError(
            f"{where}: {column} is {_kind(value)}; write the answer as text or a number, set {settings}.answer_key to "
            "another column, or remove the row"
        )
    return answer


def _is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return False
    return isinstance(value, int) or math.isfinite(value)


def _digits(number: int | float | Decimal, column: str, where: str) -> str:
    """Return a number as digits without an exponent, those of the file; 27.0 as "27".

    Raises: DataError if these are more than a thousand.
    """
    if isinstance(number, float):  # the shortest digits that denote this float, unless the file has more
        literal = number.literal if isinstance(number, LongFloat) else repr(number)
        try:
            number = Decimal(literal)
        except ArithmeticError:  # an exponent of twenty digits
            number = Decimal("Infinity")
    decimal = Decimal(number)
    _, digits, exponent = decimal.as_tuple()
    if not isinstance(exponent, int) or len(digits) + abs(exponent) > _MAX_DIGITS:
        raise DataError(f"{where}: {column} is a number of more than {_MAX_DIGITS} digits; write it as text")
    return str(int(decimal)) if decimal == int(decimal) else f"{decimal:f}"


def _gold(answer: str, columns: Columns, where: str) -> str:
    """Return the text after the last `####` if the file's answers are marked (GSM8K), else the answer unchanged."""
    if (GOLD_MARK in answer) != columns.marked:
        this_row, first_row = ("no", "has one") if columns.marked else ("a", "has none")
        raise DataError(
            f"{where}: {columns.answer} has {this_row} `{GOLD_MARK} n`, but the first row {first_row}; "
            "use the mark in every row or in none"
        )
    if not columns.marked:
        return answer
    gold = answer.rpartition(GOLD_MARK)[2].replace(",", "").strip()
    if not gold:
        raise DataError(
            f"{where}: {columns.answer} has no text after `{GOLD_MARK}`; write the answer there or remove the row"
        )
    return gold


def _row_id(row: dict[str, Any], column: str, where: str) -> str:
    value = _present(row, column, where)
    if isinstance(value, float) and value.is_integer():  # pandas turns integers into floats
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise DataError(f"{where}: {column} is {_kind(value)}; write an id as text or int or remove the column")
    return encodable(str(value), column, where)


def _source(row: dict[str, Any], column: str, where: str) -> str:
    value = _present(row, column, where)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: {column} is {_kind(value)}; write the name of the data set or remove the column")
    return encodable(value, column, where)


def _kind(value: Any) -> str:
    """Describe a value in an error message: null, empty, the value of a bool or float, else the type."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "empty"
    return repr(value) if isinstance(value, bool | float) else f"of type {type(value).__name__}"
