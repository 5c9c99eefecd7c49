#!/usr/bin/env python3
r"""Convert the published files of DAPO-Math-17k, AIME'24 and AIME'25 into the prompt files that the recipes use.

    python examples/prepare_data.py dapo-math-17k.parquet --out data/dapo_math_17k.jsonl
    python examples/prepare_data.py aime24.parquet        --out data/aime24.jsonl
    python examples/prepare_data.py aime25.jsonl          --out data/aime25.jsonl

Nothing is downloaded. The files are data sets on Hugging Face (`hf download --repo-type dataset NAME` gets one):

    BytedTsinghua-SIA/DAPO-Math-17k   data/dapo-math-17k.parquet       training; each problem about a hundred times
    HuggingFaceH4/aime_2024           data/train-*.parquet             AIME'24, 30 problems
    BytedTsinghua-SIA/AIME-2024       data/aime-2024.parquet           AIME'24, each problem 32 times
    math-ai/aime25                    test.jsonl                       AIME'25, 30 problems
    opencompass/AIME2025              aime2025-I.jsonl, -II.jsonl      AIME'25, 15 problems in each: give both files

All layouts that the trainer reads are accepted, by the same rules. The conversion has three steps, and prints how many
rows and problems each of them affected:

  1. DAPO's instructions around a problem ("The last line of your response should be of the form Answer: ...") are
     removed.
  2. Of rows with exactly the same problem and answer, only the first is kept. A problem with several different answers
     is kept with each of them, because the data does not say which one is correct.
  3. Each problem is inserted into a frame, the text that the policy sees. The default is the paper's frame for base
     models (section 5.2); its text after {problem} asks for a \boxed answer, which the reward function looks for.

The column `prompt` is exactly the text that the policy reads, in training and evaluation: use `data.template: plain`.
DAPO's 1.8 million rows take one to two minutes and 4.5 GB of memory. After an error, the program prints one line and
exits with status 2, and OUT is unchanged.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_rlvr.atomic import write_text
from megatron_rlvr.data.records import Record, read_records
from megatron_rlvr.data.rows import DataError

PAPER_FRAME = (
    "User:\n{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.\n\nAssistant:\n"
)

_DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
_DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


@dataclass(frozen=True)
class Problem:
    text: str
    answer: str
    source: str
    instructed: bool
    """True if DAPO's instructions surrounded the text in the file."""


@dataclass(frozen=True)
class Counts:
    """Numbers of rows and problems, for the report.

    Attributes:
        rows: Rows read.
        instructed: Rows from which DAPO's instructions were removed.
        repeats: Rows that repeat an earlier problem and answer.
        ambiguous: Problems with more than one answer.
    """

    rows: int
    instructed: int
    repeats: int
    ambiguous: int


def main() -> None:
    options = _parser().parse_args()
    if "{problem}" not in options.frame:
        _parser().error(f"--frame={options.frame!r}: no {{problem}} in it; write {{problem}} where the problem belongs")
    try:
        counts, kept = distinct(problems(options.files, options.problem_key, options.answer_key))
        write(options.out, kept, options.frame)
    except (DataError, OSError) as error:
        _parser().error(str(error))
    print(report(options.out, counts, len(kept)))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )  # fmt: skip
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="published file: .parquet, .jsonl or .json (lines)")
    add("--out", type=Path, required=True, metavar="OUT", help=".jsonl file to write; an existing one is replaced")
    add("--frame", default=PAPER_FRAME, metavar="TEXT", help="text around each {problem} (default: the paper's)")
    add("--problem-key", metavar="COLUMN", help="column of the problem, if not one of the usual names")
    add("--answer-key", metavar="COLUMN", help="column of the answer, if not one of the usual names")
    return parser


def problems(files: Sequence[Path], problem_key: str | None, answer_key: str | None) -> Iterator[Problem]:
    """Yield the problems of all files in their order, without DAPO's instructions. Raises DataError."""
    for file in files:
        for record in read_records(file, prompt_key=problem_key, answer_key=answer_key):
            text = _only_text(record)
            bare = text.removeprefix(_DAPO_BEFORE).removesuffix(_DAPO_AFTER)
            yield Problem(bare, record.answer, record.source, instructed=bare != text)


def _only_text(record: Record) -> str:
    if isinstance(record.prompt, str):
        return record.prompt
    if len(record.prompt) > 1:
        raise DataError(f"{record.id} has {len(record.prompt)} chat messages; give a file with one message per problem")
    return record.prompt[0]["content"]


def distinct(found: Iterable[Problem]) -> tuple[Counts, list[Problem]]:
    """Return the first problem of each text and answer, in their order, and the counts for the report."""
    first: dict[tuple[str, str], Problem] = {}
    rows = instructed = 0
    for problem in found:
        rows += 1
        instructed += problem.instructed
        first.setdefault((problem.text, problem.answer), problem)
    answers = Counter(text for text, _ in first)
    ambiguous = sum(count > 1 for count in answers.values())
    return Counts(rows, instructed, rows - len(first), ambiguous), list(first.values())


def write(out: Path, kept: Sequence[Problem], frame: str) -> None:
    """Write JSON lines of id, prompt, answer and source; the file appears complete or not at all.

    Raises:
        OSError: If the file cannot be written.
    """
    rows = (
        {
            "id": number,
            "prompt": frame.replace("{problem}", problem.text),
            "answer": problem.answer,
            "source": problem.source,
        }
        for number, problem in enumerate(kept, start=1)
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def report(out: Path, counts: Counts, kept: int) -> str:
    """Return one line about the rows read and the problems written."""
    line = f"{out}: {kept:,} problems from {counts.rows:,} rows, {counts.repeats:,} repeated rows omitted"
    if counts.instructed:
        line += f"; DAPO's instructions removed from {counts.instructed:,} rows"
    if counts.ambiguous:
        line += f"; problems with more than one answer, all kept: {counts.ambiguous:,}"
    return line


if __name__ == "__main__":
    main()
