"""Data of the quickstart's task: training sequences for the base model (the warm-up), and problem files.

The warm-up is mostly traces, first flawless ones, then the author's. Drills are mixed in: sums, which teach arithmetic,
and events copied in a given order, which teach following a plan. One problem in ten is reserved for evaluation: the
warm-up and train.jsonl never contain it, held_out.jsonl and hard.jsonl contain only such problems.

All data is drawn with ``random.Random`` seeded by strings, so it is the same on every machine and in every layout.
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
    """Return eight sums as (prompt, response), with the numbers that traces use: "7 + 5 ." -> "7 + 5 = 12 ."."""
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
    """Return (prompt, response): a problem with "forward :" or "back :", and its events in that order.

    Half of the problems have the length of hard ones, so that the model has seen text of the hard set's length.
    """
    problem = _sample_in_part(rng, reserved=False, hard=rng.random() < 0.5)
    order = rng.choice(("forward", "back"))
    events = problem.events if order == "forward" else problem.events[::-1]
    return f"{problem.text} {order} :", " ".join(f"{event.text} ." for event in events)


@dataclass(frozen=True, slots=True)
class Stage:
    """Stage of the warm-up.

    Attributes:
        share: Fraction of all sequences that belong to the stage.
        arithmetic_drills, copy_drills: Fractions of the stage's sequences that are drills; the others are traces.
        habits: Habits of the traces' author.
    """

    share: float
    arithmetic_drills: float
    copy_drills: float
    habits: Habits


# Flawless traces first, because a model that imitates the author from the start does not learn the arithmetic. A third
# of the first stage is sums: reinforcement learning corrects the forks, and the errors that remain after it are in
# arithmetic that the base model never learned.
WARM_UP = (
    Stage(share=0.65, arithmetic_drills=0.35, copy_drills=0.15, habits=FLAWLESS),
    Stage(share=0.35, arithmetic_drills=0.08, copy_drills=0.05, habits=AUTHOR),
)


def warm_up_stream(seed: int, sequences: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield training sequences for the base model, stage by stage, without any problem reserved for evaluation.

    Yields:
        ``sequences`` pairs of prompt ids [P] and response ids [T], int32; the response ends with the end token.
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
    """Write train.jsonl, held_out.jsonl and hard.jsonl, one problem per line: id, prompt, answer, source.

    Args:
        folder: Folder of the files.
        train, held_out, hard: Numbers of problems. Those of the last two are in no warm-up, whatever its seed.
        seed: Seed of the problems.

    Returns:
        The path of each file by its source. No problem occurs twice, within a file or across files.
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
