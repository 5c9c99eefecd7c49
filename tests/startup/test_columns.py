"""Columns of each file: training files and evaluation sets are read by their own, and the plan says which."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from resolving import Resolve, refusal

from megatron_rlvr.startup.describe import describe_plan


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """A training file whose gold answers are in `solution`, beside an `answer` that is something else."""
    rows = [{"task": f"{text} (train)", "problem": "?", "solution": n, "answer": "none"} for text, n in tiny.PROBLEMS]
    return tiny.write_rows(tmp_path / "train.jsonl", rows)


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    return tiny.write_aime(tmp_path / "held_out.jsonl")  # problem, answer; `solution` is a text


def golds(prompts: Any) -> list[str]:
    return [prompt.answer for prompt in prompts.prompts]


GOLDS = [str(n) for _, n in tiny.PROBLEMS]
WORKED_OUT = [f"It is $\\boxed{{{n}}}$." for n in GOLDS]
COLUMNS = {"prompt_key": "task", "answer_key": "solution"}


@pytest.mark.parametrize(
    ("data", "sets", "expected"),
    [
        (lambda file: {"train": file, **COLUMNS}, lambda file: file, GOLDS),
        (lambda file: {"train": [{"path": file, **COLUMNS}]}, lambda file: [file], GOLDS),
        (lambda file: {"train": [{"path": file, "prompt_key": "task"}], "answer_key": "solution"},
         lambda file: [{"path": file, "answer_key": "solution"}], WORKED_OUT),
    ],
    ids=["keys of the section", "keys of the file", "both, and a set with its own"],
)  # fmt: skip
def test_each_file_is_read_by_its_own_columns(
    data: Callable[[str], Any], sets: Callable[[str], Any], expected: list[str], resolve_with: Resolve, train: Path,
    held_out: Path,
) -> None:  # fmt: skip
    resolved = resolve_with(data=data(str(train)), evaluate={"sets": sets(str(held_out)), "group_size": 1})
    assert golds(resolved.train) == GOLDS
    assert "(train)" in resolved.tokenizer.decode(resolved.train.prompts[0].token_ids)
    assert golds(resolved.evaluation["held_out"]) == expected
    read = "answer" if expected is GOLDS else "solution"
    assert f"train: task, solution; held_out: problem, {read}" in describe_plan(resolved)


def test_the_remedy_for_an_evaluation_set_is_its_own_key(resolve_with: Resolve, problems: Path, tmp_path: Path) -> None:
    odd = tiny.write_rows(tmp_path / "odd.jsonl", [{"problem": "1 + 1?", "result": "2"}])
    message = refusal(resolve_with, evaluate={"sets": [str(problems), str(odd)]})
    assert message.endswith("; set evaluate.sets.1.answer_key to the column of the answer")
    sets = [{"path": str(odd), "answer_key": "result"}]
    assert golds(resolve_with(evaluate={"sets": sets}).evaluation["odd"]) == ["2"]


def test_repeated_and_dropped_rows_are_counted_in_the_plan(resolve_with: Resolve, tmp_path: Path) -> None:
    rows = [{"problem": text, "answer": n} for text, n in tiny.PROBLEMS] * 3
    rows[25] = rows[25] | {"answer": -1}
    rows.append({"problem": "long " * 200, "answer": 1})
    file = str(tiny.write_rows(tmp_path / "repeats.jsonl", rows))
    plan = describe_plan(resolve_with(data={"train": file}, evaluate={"sets": file}))
    remarks = ", 1 left out as too long, 20 of them distinct, 1 with more than one gold answer"
    assert f"60 from 1 file(s){remarks}\n" in plan
    assert f"repeats (60 problems{remarks}, 60 OF THEM TRAINED ON)" in plan


def test_every_source_needs_a_reward_function_and_every_function_a_source(resolve_with: Resolve) -> None:
    def with_functions(**functions: str) -> str:
        return refusal(resolve_with, reward={"function": functions})

    assert with_functions(elsewhere="math").startswith(
        "reward.function: none for source additions of prompt additions/"
    )
    assert with_functions(elsewhere="math", additions="math").startswith(
        "reward.function.elsewhere: has no effect, as no"
    )
