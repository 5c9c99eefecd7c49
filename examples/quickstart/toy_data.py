"""What is read of the quickstart's task: the warm-up that makes the base model, and the problems in files.

The warm-up is mostly traces, flawless ones before the author's. Drills are mixed in: sums, so that the arithmetic is
known, and events told in a given order, so that a plan can be followed. One problem in ten is reserved: the warm-up
and train.jsonl never hold it, held_out.jsonl and hard.jsonl hold nothing else.

All of it is drawn with ``random.Random`` seeded by strings: the same on every machine, whatever the process layout.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from toy_task import AUTHOR, FLAWLESS, PACK_SIZES, Habits, Problem, sample_problem, write_trace
from toy_tokenizer import EOS_ID, LARGEST_NUMBER, encode


def arithmetic_drill(rng: random.Random) -> tuple[str, str]:
    """A sheet of eight sums as (prompt, response), with the numbers that traces use: "7 + 5 ." -> "7 + 5 = 12 ."."""
    questions: list[str] = []
    solutions: list[str] = []
    while len(questions) < 8:
        sign = rng.choice("++--*")
        if sign == "*":
            left, right = rng.randint(2, 3), rng.choice(PACK_SIZES)
            result = left * right
        else:
            left = rng.randint(0, 30)
            right = rng.randint(1, 5) if rng.random() < 0.6 else rng.randint(2, 3) * rng.choice(PACK_SIZES)
            result = left + right if sign == "+" else left - right
        if 0 <= result <= LARGEST_NUMBER:
            questions.append(f"{left} {sign} {right} .")
            solutions.append(f"{left} {sign} {right} = {result} .")
    return " ".join(questions), " ".join(solutions)


def copy_drill(rng: random.Random) -> tuple[str, str]:
    """A problem and the order to tell its events in, "forward :" or "back :", with the events as the response.

    Half of the problems are of the hard length, so that the hard set is not the first text of that length to be read.
    """
    problem = _sample_in_part(rng, reserved=False, hard=rng.random() < 0.5)
    order = rng.choice(("forward", "back"))
    events = problem.events if order == "forward" else problem.events[::-1]
    return f"{problem.text} {order} :", " ".join(f"{event.text} ." for event in events)


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of the warm-up: its share of all sequences and what they are drawn from; the rest are traces."""

    share: float
    arithmetic_drills: float
    copy_drills: float
    habits: Habits


# Flawless traces teach what follows from what; imitating the author from the start leaves the arithmetic unlearned. A
# third of the first stage is sums: reinforcement learning repairs forks, and what then still goes wrong is arithmetic
# that the base model never knew.
WARM_UP = (
    Stage(share=0.65, arithmetic_drills=0.35, copy_drills=0.15, habits=FLAWLESS),
    Stage(share=0.35, arithmetic_drills=0.08, copy_drills=0.05, habits=AUTHOR),
)


def warm_up_stream(seed: int, sequences: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Training examples for the base model, stage by stage, without any problem kept for evaluation.

    Yields: ``sequences`` pairs of prompt ids [P] and response ids [T], int32; the response ends with the end token.
    """
    rng = random.Random(f"warm-up {seed}")
    first_stage, second_stage = WARM_UP
    boundary = round(first_stage.share * sequences)
    for index in range(sequences):
        prompt, response = _sample_example(rng, first_stage if index < boundary else second_stage)
        yield np.array(encode(prompt), np.int32), np.array([*encode(response), EOS_ID], np.int32)


def _sample_example(rng: random.Random, stage: Stage) -> tuple[str, str]:
    draw = rng.random()
    if draw < stage.arithmetic_drills:
        return arithmetic_drill(rng)
    if draw < stage.arithmetic_drills + stage.copy_drills:
        return copy_drill(rng)
    problem = _sample_in_part(rng, reserved=False)
    return problem.text, write_trace(rng, problem, stage.habits).text


def write_data(
    folder: str | Path, *, train: int = 4000, held_out: int = 150, hard: int = 150, seed: int = 0
) -> dict[str, Path]:
    """Writes train.jsonl, held_out.jsonl and hard.jsonl, one problem a line: id, prompt, answer, source.

    Args:
        train, held_out, hard: how many problems. Those of the last two are kept out of the warm-up of any seed.

    Returns: the path of each file by its source. No problem occurs twice, within a file or across files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    paths = {}
    for source, count in (("train", train), ("held_out", held_out), ("hard", hard)):
        rng = random.Random(f"{source} {seed}")
        rows: list[str] = []
        while len(rows) < count:
            problem = _sample_in_part(rng, reserved=source != "train", hard=source == "hard")
            if problem.text not in seen:
                seen.add(problem.text)
                row = {"id": f"{source}-{len(rows):05}", "prompt": problem.text, "answer": str(problem.answer)}
                rows.append(json.dumps({**row, "source": source}) + "\n")
        paths[source] = folder / f"{source}.jsonl"
        paths[source].write_text("".join(rows), encoding="ascii")
    return paths


def _sample_in_part(rng: random.Random, *, reserved: bool, hard: bool = False) -> Problem:
    while True:
        problem = sample_problem(rng, hard)
        if problem.is_reserved == reserved:
            return problem
