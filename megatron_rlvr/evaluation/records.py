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
from megatron_rlvr.errors import InputError
from megatron_rlvr.input_files import BadFileError, decode, lines_of, open_file, parse_json
from megatron_rlvr.types import Completion, CompletionRequest, Grade
from megatron_rlvr.write_errors import explained

FOLDER = "records"

Key = tuple[str, int]
"""Prompt id and completion index, which identify a record."""


# {key of a record: types of its value}
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("problem", "finish_reason", "gold", "response"), (str,)),
    **dict.fromkeys(("answer", "failure"), (str, type(None))),
    **dict.fromkeys(("index", "seed", "tokens"), (int,)),
    **dict.fromkeys(("reward", "seconds"), (int, float)),
    "correct": (bool,),
}
_LARGEST = 2.0**64  # of a number: its square can be computed with


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
    for path in sorted((folder / FOLDER).glob("*.jsonl")):
        for number, line in enumerate(_lines(path), start=1):
            record, response = _parse(line, f"{path}, line {number}")
            if record.key not in known:
                known.add(record.key)
                yield record, response


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


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the complete lines of a file."""
    try:
        with open_file(path) as file:
            for line in lines_of(file):
                if line.endswith(b"\n"):
                    yield line
    except (FileNotFoundError, BadFileError) as error:
        where = f"{path}, line {error.line}" if isinstance(error, BadFileError) and error.line else path
        raise RecordsError(f"{where}: cannot be read ({error}); restore the file, or choose another --out") from None


def _parse(line: bytes, where: str) -> tuple[Record, str]:
    try:
        row: dict[str, Any] = parse_json(decode(line))
        for name, kinds in _KINDS.items():
            if type(row[name]) not in kinds or not (isinstance(row[name], str) or abs(row[name] or 0) < _LARGEST):
                raise ValueError(name)
        return Record(**{name: row[name] for name in Record.__slots__}), row["response"]
    except (ValueError, LookupError, TypeError):
        raise RecordsError(
            f"{where}: not a record of an evaluation; restore the file, or choose another --out"
        ) from None


def _remove_incomplete_line(path: Path) -> None:
    with path.open("r+b") as file:
        content_end = 0
        for line in file:
            if line.endswith(b"\n"):
                content_end += len(line)
        file.truncate(content_end)
