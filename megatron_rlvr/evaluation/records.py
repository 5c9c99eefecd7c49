"""Records of an evaluation: one JSON line for each completion, written as soon as it is graded.

    DIR/records/00000.jsonl    the completions of rank 0, in the order in which they were graded
    DIR/records/00001.jsonl    those of rank 1, ...

A line is written whole and flushed, so that the files can be read at any time. A killed process may leave an incomplete
last line, which readers leave out and the next writer of the file removes. An evaluation that is run again reads all
records first and requests only the completions that have none, on any number of ranks. Imports no torch.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rlvr.atomic import AppendedFile
from megatron_rlvr.config.section import MAX_FLOAT
from megatron_rlvr.errors import InputError
from megatron_rlvr.input_files import BadFileError, decode, is_folder, parse_json, read_lines
from megatron_rlvr.types import Completion, CompletionRequest, Grade
from megatron_rlvr.write_errors import explained

FOLDER = "records"

_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("problem", "finish_reason", "gold", "response"), (str,)),
    **dict.fromkeys(("answer", "failure"), (str, type(None))),
    **dict.fromkeys(("index", "seed", "tokens"), (int,)),
    **dict.fromkeys(("reward", "seconds"), (int, float)),
    "correct": (bool,),
}
_MAX_COUNT = 2**31  # of completions of a problem, and of tokens of a response

Key = tuple[str, int]
"""Prompt id and completion index, which identify a record."""


class RecordsError(InputError):
    """Records that cannot be read or used."""


@dataclass(frozen=True, slots=True)
class Record:
    """One graded completion.

    Attributes:
        problem: Id of the prompt: the name of the set, a slash, the id of the row.
        index: Completion index, from 0.
        seed: Seed of the completion's random stream.
        tokens: Number of response tokens, the stop token included.
        finish_reason: "stop" or "length".
        gold: Gold answer, as in the set.
        answer: Answer that the reward function has read; None if there is none, or if the function names none.
        correct: The verdict; False after a failure.
        reward: The reward, without a penalty for length.
        failure: None, or the reason why the grader reached no verdict.
        seconds: Time from the start of sampling until the response was complete.
    """

    problem: str
    index: int
    seed: int
    tokens: int
    finish_reason: str
    gold: str
    answer: str | None
    correct: bool
    reward: float
    failure: str | None
    seconds: float

    @property
    def key(self) -> Key:
        """Problem and completion index, which identify the record."""
        return self.problem, self.index

    @property
    def set_name(self) -> str:
        """Name of the set to which the problem belongs."""
        return self.problem.partition("/")[0]

    @property
    def truncated(self) -> bool:
        """True if the cap on response tokens ended the response."""
        return self.finish_reason == "length"


def record_of(request: CompletionRequest, completion: Completion, grade: Grade, seconds: float) -> Record:
    """Return the record of a completion."""
    return Record(
        problem=request.prompt.id,
        index=request.index,
        seed=request.seed,
        tokens=len(completion.token_ids),
        finish_reason=completion.finish_reason,
        gold=request.prompt.answer,
        answer=grade.answer,
        correct=grade.correct,
        reward=grade.reward,
        failure=grade.failure,
        seconds=round(seconds, 3),
    )


class RecordWriter:
    """Appends the records of one rank; a context manager. Every method raises WriteError if the file cannot be written.

    Args:
        folder: Folder of the evaluation.
        rank: The rank.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        path = folder / FOLDER / f"{rank:05d}.jsonl"
        self._folder = path.parent
        with self._explained():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = AppendedFile(path)
            _remove_incomplete_line(path)

    def write(self, record: Record, response: str) -> None:
        """Append one record with the text of its response."""
        line = json.dumps(asdict(record) | {"response": response}, ensure_ascii=False)
        # A lone surrogate, which a damaged response may hold, has no UTF-8; escaped, it is valid JSON.
        try:
            content = line.encode("utf-8")
        except UnicodeEncodeError:
            content = json.dumps(asdict(record) | {"response": response}).encode("ascii")
        with self._explained():
            self._file.write(content + b"\n")

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, *_: object) -> None:
        with closing(self._file), self._explained():
            self._file.flush_to_disk()

    def _explained(self) -> AbstractContextManager[None]:
        return explained("records of the evaluation", self._folder)


def read_records(folder: Path) -> list[Record]:
    """Return all records of an evaluation; of records with the same key, the first. Empty without any.

    Raises:
        RecordsError: A file holds a line that is no record; one without a line break at the end of a file is left out.
    """
    return [record for record, _ in read_responses(folder)]


def read_responses(folder: Path) -> Iterator[tuple[Record, str]]:
    """Yield each record of an evaluation with the text of its response; see `read_records`."""
    known: set[Key] = set()
    paths = sorted((folder / FOLDER).glob("*.jsonl")) if is_folder(folder / FOLDER) else []
    for path in paths:
        try:
            for number, line in read_lines(path):
                if not line.endswith(b"\n"):
                    break
                record, response = _parse(line, f"{path}, line {number}")
                if record.key not in known:
                    known.add(record.key)
                    yield record, response
        except BadFileError as error:
            where = f"{path}, line {error.line}" if error.line else str(path)
            raise RecordsError(f"{where} cannot be read ({error}); restore the file, or evaluate again") from None


def by_set(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return {name of the set: its records}."""
    sets: dict[str, list[Record]] = {}
    for record in records:
        sets.setdefault(record.set_name, []).append(record)
    return sets


def by_problem(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return {problem: its records by ascending completion index}, in the order of first appearance."""
    problems: dict[str, list[Record]] = {}
    for record in records:
        problems.setdefault(record.problem, []).append(record)
    return {problem: sorted(own, key=lambda r: r.index) for problem, own in problems.items()}


def _parse(line: bytes, where: str) -> tuple[Record, str]:
    try:
        row = parse_json(decode(line))
        problem = _problem(row)
    except BadFileError as error:
        problem = str(error)
    if problem:
        raise RecordsError(f"{where}: not a record of an evaluation ({problem}); restore the file, or evaluate again")
    return Record(**{name: row[name] for name in Record.__slots__}), row["response"]


def _problem(row: Any) -> str | None:
    """Return why a row is no record, or None."""
    if not isinstance(row, dict):
        return "no JSON object"
    for name, types in _TYPES.items():
        if name not in row:
            return f"no {name}"
        if type(row[name]) not in types:
            return f"{name} is of type {type(row[name]).__name__}"
    if not (0 <= row["index"] < _MAX_COUNT and 0 <= row["tokens"] < _MAX_COUNT):
        return "index or tokens is out of range"
    if not all(-MAX_FLOAT <= row[name] <= MAX_FLOAT for name in ("reward", "seconds")):  # false for NaN, too
        return "reward or seconds is out of range"
    return None


def _remove_incomplete_line(path: Path) -> None:
    with path.open("r+b") as file:
        content_end = 0
        for line in file:
            if line.endswith(b"\n"):
                content_end += len(line)
        file.truncate(content_end)
