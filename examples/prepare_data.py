#!/usr/bin/env python3
r"""Turns the published files of DAPO-Math-17k, AIME'24 and AIME'25 into the files that the recipes name.

    python examples/prepare_data.py dapo-math-17k.parquet --out data/dapo_math_17k.jsonl
    python examples/prepare_data.py aime24.parquet        --out data/aime24.jsonl
    python examples/prepare_data.py aime25.jsonl          --out data/aime25.jsonl

Nothing is fetched. The files are data sets on Hugging Face (`hf download --repo-type dataset NAME` gets one):

    BytedTsinghua-SIA/DAPO-Math-17k   data/dapo-math-17k.parquet       training; each problem about a hundred times
    HuggingFaceH4/aime_2024           data/train-*.parquet             AIME'24, 30 problems
    BytedTsinghua-SIA/AIME-2024       data/aime-2024.parquet           the same, each 32 times
    math-ai/aime25                    test.jsonl                       AIME'25, 30 problems
    opencompass/AIME2025              aime2025-I.jsonl, -II.jsonl      the same, 15 in each: name both files

All layouts that the trainer reads are read here, by the same rules. What is done, and told in numbers:

  1. DAPO's instructions around a problem ("The last line of your response should be of the form Answer: ...") go;
  2. of rows with the same problem and the same answer, to the character, the first stays. A problem that is there with
     several answers stays with each: nothing tells which one is right;
  3. each problem is put into the frame that the policy sees. The paper's (section 5.2, for base models) is the default.
     What follows {problem} in it asks for a \boxed answer, which is what the reward looks for.

The text in `prompt` is then what the policy reads, in training and evaluation alike: `data.template: plain`. DAPO's 1.8
million rows take a minute or two and 4.5 GB of memory. Exit status 2 and one line where something is wrong; OUT is then
as it was.
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
    """Whether DAPO's instructions stood around the text."""


@dataclass(frozen=True)
class Counts:
    """What became of the rows."""

    rows: int
    instructed: int
    repeats: int
    ambiguous: int
    """Problems that are left with more than one answer."""


def main() -> None:
    options = _parser().parse_args()
    if "{problem}" not in options.frame:
        _parser().error(f"--frame {options.frame!r} has no {{problem}} in it; write where the problem goes")
    try:
        counts, kept = distinct(problems(options.files, options.problem_key, options.answer_key))
        write(options.out, kept, options.frame)
    except (DataError, OSError) as error:
        _parser().error(str(error))
    print(in_words(options.out, counts, len(kept)))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )  # fmt: skip
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help=".parquet, .jsonl or .json (lines)")
    add("--out", type=Path, required=True, metavar="OUT", help="the .jsonl file to write, or to replace")
    add("--frame", default=PAPER_FRAME, metavar="TEXT", help="around each {problem}; default: the paper's")
    add("--problem-key", metavar="COLUMN", help="of the problem, where it is not one of the usual names")
    add("--answer-key", metavar="COLUMN", help="of the answer, where it is not one of the usual names")
    return parser


def problems(files: Sequence[Path], problem_key: str | None, answer_key: str | None) -> Iterator[Problem]:
    """The problems of all files, in their order, without DAPO's instructions. Raises: DataError."""
    for file in files:
        for record in read_records(file, prompt_key=problem_key, answer_key=answer_key):
            text = _only_text(record)
            bare = text.removeprefix(_DAPO_BEFORE).removesuffix(_DAPO_AFTER)
            yield Problem(bare, record.answer, record.source, instructed=bare != text)


def _only_text(record: Record) -> str:
    if isinstance(record.prompt, str):
        return record.prompt
    if len(record.prompt) > 1:
        raise DataError(f"{record.id} is a conversation of {len(record.prompt)} turns; give a file of single problems")
    return record.prompt[0]["content"]


def distinct(found: Iterable[Problem]) -> tuple[Counts, list[Problem]]:
    """The first of each problem and answer, in their order, and what became of the rest."""
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


def in_words(out: Path, counts: Counts, kept: int) -> str:
    words = f"{out}: {kept:,} problems from {counts.rows:,} rows, {counts.repeats:,} repeats left out"
    if counts.instructed:
        words += f"; DAPO's instructions removed from {counts.instructed:,} rows"
    if counts.ambiguous:
        words += f"; {counts.ambiguous:,} problems are there with different answers, and stay so"
    return words


if __name__ == "__main__":
    main()
