r"""Published problem sets as files of this project: which there are, what they should hold, and their conversion.

The conversion has three steps, each of which is counted:

  1. DAPO's instructions around a problem ("The last line of your response should be of the form Answer: ...") are
     removed. Of OlympiadBench, rows that are not open-ended text-only English mathematics are left out.
  2. Of rows with exactly the same problem and answer, only the first is kept. A problem with several different answers
     is kept with each of them, because the data does not say which one is correct.
  3. Each problem is inserted into a frame, if there is one: the text that a base model sees, for `data.template:
     plain`.

Nothing is downloaded.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlvr.atomic import write_text
from megatron_rlvr.data.records import ANSWER_COLUMNS, Record, encodable, read_records
from megatron_rlvr.data.rows import DataError, read_rows
from megatron_rlvr.input_files import same_place

FRAMES = {
    "none": "{problem}",
    "paper": (
        "User:\n{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.\n\nAssistant:\n"
    ),
}
"""{name: text around a problem}. paper: that of arXiv 2506.01939 for base models (section 5.2)."""

_DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
_DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'

# Columns of OlympiadBench, and the values of the subset that is graded automatically.
_OLYMPIAD_SUBSET = {"subject": "Math", "language": "English", "modality": "Text-only", "question_type": "Open-ended"}


@dataclass(frozen=True)
class PublishedSet:
    """A published set.

    Attributes:
        files: Where it is published: name of the data set on Hugging Face, and its file.
        problems: Number of problems that it should have; None if it is not known for certain.
        rows: Number of rows of the published file, if a problem has more than one.
    """

    files: tuple[str, ...]
    problems: int | None
    rows: int | None = None


SETS: dict[str, PublishedSet] = {
    "dapo-math-17k": PublishedSet(("BytedTsinghua-SIA/DAPO-Math-17k: data/dapo-math-17k.parquet",), None, 1_791_700),
    "aime24": PublishedSet(
        (
            "HuggingFaceH4/aime_2024: data/train-*.parquet",
            "BytedTsinghua-SIA/AIME-2024: data/aime-2024.parquet, each problem 32 times",
            "MathArena/aime_2024_I and _II: give both files",
        ),
        30,
    ),
    "aime25": PublishedSet(
        ("math-ai/aime25: test.jsonl", "opencompass/AIME2025: aime2025-I.jsonl and -II.jsonl, give both files"), 30
    ),
    "aime26": PublishedSet(("MathArena/aime_2026: data/train-*.parquet",), 30),
    "hmmt-feb-2025": PublishedSet(("MathArena/hmmt_feb_2025: data/train-*.parquet",), 30),
    "hmmt-nov-2025": PublishedSet(("MathArena/hmmt_nov_2025: data/train-*.parquet",), 30),
    "hmmt-feb-2026": PublishedSet(("MathArena/hmmt_feb_2026: data/train-*.parquet",), 33),
    "amc23": PublishedSet(("math-ai/amc23: data/test-*.parquet",), 40),
    "math500": PublishedSet(("HuggingFaceH4/MATH-500: test.jsonl",), 500),
    "minerva": PublishedSet(("math-ai/minervamath: test.jsonl",), 272),
    "olympiadbench": PublishedSet(("Hothan/OlympiadBench: OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet",), 674),
}
"""{name: set}. The numbers are those on the data sets' pages in November 2026."""

_OLYMPIAD = "olympiadbench"


@dataclass(frozen=True)
class Problem:
    """A problem without a frame.

    Attributes:
        text: The problem.
        answer: Gold answer.
        source: Name of the data set.
        instructed: True if DAPO's instructions surrounded the text in the file.
    """

    text: str
    answer: str
    source: str
    instructed: bool = False


@dataclass
class Counts:
    """Numbers of rows and problems.

    Attributes:
        rows: Rows read.
        left_out: Rows that do not belong to the set.
        instructed: Rows from which DAPO's instructions were removed.
        repeats: Rows that repeat an earlier problem and answer.
        ambiguous: Problems with more than one answer.
        problems: Distinct problems.
        written: Rows written.
    """

    rows: int = 0
    left_out: int = 0
    instructed: int = 0
    repeats: int = 0
    ambiguous: int = 0
    problems: int = 0
    written: int = 0


def prepare(
    name: str,
    files: Sequence[Path],
    out: Path,
    *,
    frame: str = FRAMES["none"],
    problem_key: str | None = None,
    answer_key: str | None = None,
) -> Counts:
    """Convert the published files of a set into one file of JSON lines: id, prompt, answer and source.

    Args:
        name: Key of `SETS`.
        files: Its files, .parquet, .jsonl or .json (lines), whose rows are read in this order.
        out: File to write; it appears complete or not at all.
        frame: Text with ``{problem}`` where the problem belongs.
        problem_key, answer_key: Columns to read instead of those found by name.

    Raises:
        DataError: If a file cannot be read.
        OSError: If ``out`` cannot be written.
    """
    if any(same_place(file) == same_place(out) for file in files):
        raise DataError(f"--out {out}: is one of the files to read; choose another")
    counts = Counts()
    read = _olympiad_problems if name == _OLYMPIAD and answer_key is None else _problems
    first: dict[tuple[str, str], Problem] = {}
    for problem in read(files, counts, problem_key, answer_key):
        counts.instructed += problem.instructed
        first.setdefault((problem.text, problem.answer), problem)
    counts.repeats = counts.rows - counts.left_out - len(first)
    answers = Counter(text for text, _ in first)
    counts.problems, counts.written = len(answers), len(first)
    counts.ambiguous = sum(count > 1 for count in answers.values())
    if not first:
        raise DataError(f"{files[0]}: none of its {counts.rows} rows belong to {name}; give the published file")
    _write(out, first.values(), frame)
    return counts


def report(name: str, out: Path, counts: Counts) -> str:
    """Return one line about what was expected, read and written."""
    line = f"{out}: {counts.written:,} problems from {counts.rows:,} rows, {counts.repeats:,} repeated rows omitted"
    if counts.left_out:
        line += f", {counts.left_out:,} rows of other subsets left out"
    if counts.instructed:
        line += f"; DAPO's instructions removed from {counts.instructed:,} rows"
    if counts.ambiguous:
        line += f"; problems with more than one answer, all kept: {counts.ambiguous:,}"
    published = SETS[name]
    for expected, found, what in (
        (published.problems, counts.problems, "problems"),
        (published.rows, counts.rows, "rows"),
    ):
        if expected is not None:
            difference = "" if expected == found else "; not the published file, or not all of it"
            line += f"; expected {expected:,} {what}, found {found:,}{difference}"
    return line


def bare_problem(text: str) -> str:
    """Return a problem without DAPO's instructions and without the paper's frame."""
    before, after = FRAMES["paper"].split("{problem}")
    text = text.removeprefix(_DAPO_BEFORE).removesuffix(_DAPO_AFTER)
    return text.removeprefix(before).removesuffix(after) if text.endswith(after) else text


def _problems(
    files: Sequence[Path], counts: Counts, problem_key: str | None, answer_key: str | None
) -> Iterator[Problem]:
    """Yield the problems of all files. A solution is the gold answer of a file that has no other."""
    for file in files:
        key = answer_key or _solution_key(file)
        for record in read_records(file, prompt_key=problem_key, answer_key=key):
            counts.rows += 1
            text = _only_text(record)
            bare = text.removeprefix(_DAPO_BEFORE).removesuffix(_DAPO_AFTER)
            yield Problem(bare, record.answer, record.source, instructed=bare != text)


def _solution_key(file: Path) -> str | None:
    for _, _, row in read_rows(file):
        named = [column for column in ANSWER_COLUMNS if column.partition(".")[0] in row]
        return "solution" if not named and "solution" in row else None
    return None


def _only_text(record: Record) -> str:
    if isinstance(record.prompt, str):
        return record.prompt
    if len(record.prompt) > 1:
        raise DataError(f"{record.id} has {len(record.prompt)} chat messages; give a file with one message per problem")
    return record.prompt[0]["content"]


def _olympiad_problems(
    files: Sequence[Path], counts: Counts, problem_key: str | None, answer_key: str | None
) -> Iterator[Problem]:
    """Yield the open-ended text-only English problems of OlympiadBench; of several answers, the list is the gold."""
    for file in files:
        for unit, number, row in read_rows(file):
            counts.rows += 1
            if any(row.get(column, value) != value for column, value in _OLYMPIAD_SUBSET.items()):
                counts.left_out += 1
                continue
            question, answers = row.get(problem_key or "question"), row.get("final_answer")
            if not (isinstance(question, str) and question.strip()) or not _are_texts(answers):
                raise DataError(
                    f"{file}, {unit} {number}: no text in {problem_key or 'question'} or no list of texts in "
                    "final_answer; give the published file"
                )
            context = row.get("context")
            text = f"{context}\n{question}" if isinstance(context, str) and context.strip() else question
            assert answers is not None
            gold = ", ".join(answer.strip().strip("$") for answer in answers)
            where = f"{file}, {unit} {number}"
            yield Problem(encodable(text, "question", where), encodable(gold, "final_answer", where), _OLYMPIAD)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text.strip() for text in value)


def _write(out: Path, problems: Iterable[Problem], frame: str) -> None:
    rows = (
        {
            "id": number,
            "prompt": frame.replace("{problem}", problem.text),
            "answer": problem.answer,
            "source": problem.source,
        }
        for number, problem in enumerate(problems, start=1)
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
