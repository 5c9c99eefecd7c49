"""Tests of what is known of rewards before a run: gold answers that cannot be graded, and where an answer begins."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from resolving import Resolve, refusal

from megatron_rlvr.reward.graders import GraderPool
from megatron_rlvr.startup.describe import describe_plan
from megatron_rlvr.startup.golds import describe_golds
from megatron_rlvr.types import Prompt

PROSE = "All points that are closer to the origin than to the line."


def problems_with(path: Path, *answers: str) -> Path:
    return tiny.write_rows(path, [{"prompt": f"Problem {n}?", "answer": answer} for n, answer in enumerate(answers)])


def test_check_counts_golds_by_kind_with_the_first_row_of_each(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    train = problems_with(tmp_path / "mixed.jsonl", "7", PROSE, "8", '["7", "8"]', PROSE, r"\frac{0}{0}")
    exam = problems_with(tmp_path / "exam.jsonl", "7", "x" * 2001)
    config = write_config(
        data={"train": [str(train)]}, batch={"prompts": 2}, evaluate={"sets": [str(exam)], "group_size": 2}
    )
    done = tiny.run_train(config, "--check", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    of_train, of_exam = [line for line in done.stdout.splitlines() if line.startswith("golds")]
    assert of_train == (
        "golds       data.train: 4 of 6 rows cannot be graded: 1 a list of several answers in JSON (first: mixed/4, "
        f'\'["7", "8"]\'); 2 prose without a boxed answer (first: mixed/2, {PROSE!r}); 1 an expression without a '
        "value (first: mixed/6, '\\\\frac{0}{0}')"
    )
    assert of_exam.startswith("golds       exam: 1 of 2 rows cannot be graded: 1 longer than 2000 characters (first: ")


def test_a_training_set_without_a_gradable_gold_is_refused(resolve_with: Resolve, tmp_path: Path) -> None:
    train = problems_with(tmp_path / "prose.jsonl", *[f"{PROSE} {n} {n}" for n in range(20)])
    message = refusal(describe_golds, resolve_with(data={"train": [str(train)]}))
    assert message.startswith("data.answer_key=null: none of the gold answers of data.train can be graded (20 of 20")


def test_golds_of_a_users_function_are_not_read(resolve_with: Resolve) -> None:
    assert describe_golds(resolve_with(reward={"function": "anything:at_all"})) == ""


def test_of_many_distinct_golds_an_even_sample_is_read_and_named(
    resolve_with: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_rlvr.startup.golds.MAX_READ", 300)
    resolved = resolve_with()
    ids = np.zeros(1, np.int32)
    golds = [rf"\frac{{{n % 600}}}{{7}}" if n % 2 else str(n % 600) for n in range(3000)]
    rows = [Prompt(f"p/{n}", ids, gold, "s") for n, gold in enumerate(golds)]
    object.__setattr__(resolved.train, "prompts", rows)
    assert describe_golds(resolved).endswith("all gold answers of 3000 rows can be graded")
    monkeypatch.setattr("megatron_rlvr.startup.golds.MAX_READ", 100)
    # 300 plain numbers need no reading, and every third of the 300 fractions is read.
    assert describe_golds(resolved) == (
        "golds       data.train: all gold answers of 2000 rows can be graded (read: 400 of 600 distinct gold answers)"
    )


def thinking(model: Path, folder: Path, opening: str) -> dict[str, Any]:
    """The section `model:` with a copy of the model whose generation prompt ends in ``opening``."""
    shutil.copytree(model, folder)
    path = folder / "tokenizer_config.json"
    template = tiny.TEMPLATE.replace("assistant\n{% endif %}", "assistant\n" + opening + "{% endif %}")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return {"path": str(folder), "dtype": "float32"}


@pytest.mark.parametrize(
    ("opening", "after"), [("", None), ("<think>\n", "</think>"), ("<think>\n\n</think>\n\n", None)]
)
def test_the_answer_begins_after_a_section_that_the_template_opens(
    resolve_with: Resolve, model: Path, tmp_path: Path, opening: str, after: str | None
) -> None:
    resolved = resolve_with(model=thinking(model, tmp_path / "thinking", opening))
    assert resolved.answer_after == after
    assert ("on what follows </think>" in describe_plan(resolved)) == (after is not None)


def test_answer_after_is_a_setting(resolve_with: Resolve, model: Path, tmp_path: Path) -> None:
    section = thinking(model, tmp_path / "thinking", "<think>\n")
    assert resolve_with(model=section, reward={"answer_after": "none"}).answer_after is None
    assert resolve_with(model=section, reward={"answer_after": "[/THINK]"}).answer_after == "[/THINK]"
    message = refusal(resolve_with, model=section, reward={"answer_after": "<|end|>"})
    assert message.startswith("reward.answer_after=<|end|>: <|end|> is a special token")
    message = refusal(resolve_with, reward={"answer_after": "</think>", "function": "anything:at_all"})
    assert "reward.answer_after=</think>: has no effect with reward.function=anything:at_all" in message


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        (r"perhaps \boxed{42}. Wait", False),
        (r"\boxed{42}</think>", False),
        (r"\boxed{41}</think> \boxed{42}", True),
        (r"</think> \boxed{41}</think> \boxed{42}", True),
        (r"</think> \boxed{42}</think> \boxed{41}", False),
    ],
)
def test_graders_read_what_follows_the_thinking_section(response: str, correct: bool) -> None:
    prompt = Prompt("p", np.zeros(1, np.int32), "42", "s")
    with GraderPool(workers=1, timeout_seconds=5.0, answer_after="</think>") as graders:
        assert graders.submit(prompt, response).result(timeout=60).value is correct
