"""Records of prompt files: the problem and the gold answer of each row, before tokenization.

The first row decides which columns are read, by the first name that is present in each list:

    prompt   prompt, messages, problem, question           text, or chat messages [{role, content}, ...]
    answer   reward_model.ground_truth, answer             text or a number; 27.0 is read as "27"
    id       id, idx, extra_info.index                     else the line or row number, counted from 1
    source   source, data_source                           else the file's name

These names cover files written for this project, verl's layout (DAPO-Math), GSM8K, AIME and AMC. A dot selects a
nested column. If the prompt column is `question` and the first answer contains `#### n` (GSM8K), the gold answer is
the text after the last `####`, without thousands separators.

Every later row must have the same columns as the first: a row that is read by another rule could yield an incorrect
gold answer, which is noise in the reward that no later check can detect.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlvr.data.rows import DataError, read_rows

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

_MISSING = object()


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


@dataclass(frozen=True, slots=True)
class _Columns:
    """Columns of a file that are read; ``marked`` is true if its answers end with `#### n`."""

    prompt: str
    answer: str
    id: str | None
    source: str | None
    marked: bool


def read_records(
    path: str | Path,
    *,
    name: str | None = None,
    prompt_key: str | None = None,
    answer_key: str | None = None,
    id_key: str | None = None,
) -> list[Record]:
    """Read every row of a prompt file, in the order of the file.

    Args:
        path: A .jsonl, .json (one object per line) or .parquet file.
        name: Prefix of the ids, and source of rows without one; the file's stem by default.
        prompt_key, answer_key, id_key: Columns to read instead of those found by name ("a.b" for a nested column).

    Returns:
        At least one record, with unique ids. If ids are read from `extra_info.index`, which DAPO-Math repeats, the
        second row with an id gets the suffix "#2", and so on; in any other column a repeated id is an error.

    Raises:
        DataError: One sentence with the file and the line (of JSON lines) or row (of parquet), counted from 1.
    """
    path = Path(path)
    name = path.stem if name is None else name
    columns: _Columns | None = None
    records: list[Record] = []
    row_numbers: dict[str, int] = {}
    copies: dict[str, int] = {}
    for unit, number, row in read_rows(path):
        where = f"{path}, {unit} {number}"
        if columns is None:
            columns = _find_columns(row, where, prompt_key, answer_key, id_key)
        own_id = str(number) if columns.id is None else _row_id(row, columns.id, where)
        row_id = f"{name}/{own_id}"
        if row_id in row_numbers:
            if columns.id != REPEATING_ID:
                raise DataError(
                    f"{where}: {columns.id} {own_id!r} repeats that of {unit} {row_numbers[row_id]}; make ids unique"
                )
            row_id = _next_copy(row_id, copies, row_numbers)
        row_numbers[row_id] = number
        records.append(_record(row, columns, row_id, name, where))
    if not records:
        raise DataError(f"{path} has no rows; give a file with at least one prompt")
    return records


def _find_columns(
    row: dict[str, Any], where: str, prompt_key: str | None, answer_key: str | None, id_key: str | None
) -> _Columns:
    def find(names: tuple[str, ...], override: str | None = None) -> str | None:
        present = (column for column in names if _value(row, column) is not _MISSING)
        return next(present, None) if override is None else override

    prompt, answer = find(PROMPT_COLUMNS, prompt_key), find(ANSWER_COLUMNS, answer_key)
    for meaning, column, names in (("prompt", prompt, PROMPT_COLUMNS), ("answer", answer, ANSWER_COLUMNS)):
        if column is None:
            raise DataError(
                f"{where}: no column {' or '.join(names)} among {_names(row)}; "
                f"set {meaning}_key to the column of the {meaning}"
            )
    assert prompt is not None
    assert answer is not None
    marked = prompt == "question" and GOLD_MARK in str(_value(row, answer))
    return _Columns(prompt, answer, find(ID_COLUMNS, id_key), find(SOURCE_COLUMNS), marked)


def _record(row: dict[str, Any], columns: _Columns, row_id: str, name: str, where: str) -> Record:
    prompt = _prompt(row, columns.prompt, where)
    answer = _answer(row, columns.answer, where)
    if columns.prompt == "question":
        answer = _gold(answer, columns, where)
    source = name if columns.source is None else _source(row, columns.source, where)
    used = (columns.prompt, columns.answer, columns.id, columns.source)
    extra = {column: value for column, value in row.items() if column not in used}
    return Record(prompt, answer, row_id, source, extra)


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


def _text(value: str, column: str, where: str) -> str:
    """Return the text if it can be encoded as UTF-8, as tokenizers require.

    JSON escapes can produce an unpaired surrogate, which cannot be encoded.
    """
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {column} has an unpaired surrogate at character {error.start + 1}; remove it"
        ) from error
    return value


def _prompt(row: dict[str, Any], column: str, where: str) -> str | list[Message]:
    value = _present(row, column, where)
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{where}: {column} is empty; write a problem or remove the row")
        return _text(value, column, where)
    if isinstance(value, list):
        return _messages(value, column, where)
    raise DataError(f"{where}: {column} is {_kind(value)}; write text or a list of {{role, content}}")


def _messages(value: list[Any], column: str, where: str) -> list[Message]:
    messages = []
    for number, message in enumerate(value, start=1):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise DataError(
                    f"{where}: message {number} of {column} has no {key} of type str; give each a role and a content"
                )
        messages.append({key: _text(message[key], column, where) for key in ("role", "content")})
    if not messages or not messages[-1]["content"].strip():
        raise DataError(f"{where}: {column} is empty; write a problem or remove the row")
    if messages[-1]["role"] == "assistant":
        # Probably a supervised data set, whose last message is the solution that the policy has to find.
        raise DataError(f"{where}: {column} ends with an assistant message; end it with a user message")
    return messages


def _answer(row: dict[str, Any], column: str, where: str) -> str:
    value = _present(row, column, where)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    answer = _text(str(value), column, where).strip() if isinstance(value, str) or is_number else ""
    if not answer:
        raise DataError(f"{where}: {column} is {_kind(value)}; write the answer as text or a number or remove the row")
    return answer


def _gold(answer: str, columns: _Columns, where: str) -> str:
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
    return _text(str(value), column, where)


def _source(row: dict[str, Any], column: str, where: str) -> str:
    value = _present(row, column, where)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: {column} is {_kind(value)}; write the name of the data set or remove the column")
    return _text(value, column, where)


def _kind(value: Any) -> str:
    """Describe a value in an error message: null, empty, the value of a bool or float, else the type."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "empty"
    return repr(value) if isinstance(value, bool | float) else f"of type {type(value).__name__}"
