"""Problems of reasoning-gym and their scores, compared with the library itself. Skipped where it is not installed."""

import random
import sys
from typing import Any

import numpy as np
import pytest

from megatron_rlvr.data.records import RecordFile
from megatron_rlvr.data.rows import DataError
from megatron_rlvr.reward.functions import load
from megatron_rlvr.types import Prompt

DATA_SETS: dict[str, dict[str, Any]] = {
    **{"chain_sum": {"min_terms": 2}, "basic_arithmetic": {}, "spell_backward": {}, "letter_counting": {}},
    **{"leg_counting": {}, "gcd": {}, "number_filtering": {}, "simple_equations": {}, "lcm": {}},
    "word_sequence_reversal": {},
}


def test_scores_of_200_responses_are_those_of_the_library() -> None:
    gym = pytest.importorskip("reasoning_gym")
    grade, draw, scores = load("math"), random.Random(0), []
    for name, options in DATA_SETS.items():
        problems = gym.create_dataset(name, size=20, seed=3, **options)
        rows = RecordFile(f"reasoning_gym:{name}", options={"size": 20, "seed": 3, **options})
        for entry, row in zip(problems, rows, strict=True):
            gold = entry["answer"]
            answer = draw.choice([gold, f"{gold}0", f"I think {gold}", "", gold[::-1], f"[{gold}]"])
            tagged = f"<think>{gold}</think> Not <answer>1</answer> but <answer> {answer} </answer>"
            prompt = Prompt(row.id, np.zeros(0, np.int32), row.answer, row.source, row.extra, row.question)
            expected = problems.score_answer(answer.strip(), entry)
            for response in (tagged, answer):
                found: Any = grade(prompt, response)
                assert (found.value, found.correct) == (pytest.approx(expected, abs=1e-12), expected >= 1 - 1e-9)
            scores.append(expected)
    assert len(scores) == 200
    assert sum(0 < score < 1 for score in scores) > 1


def refusal(path: str, options: dict[str, Any]) -> str:
    with pytest.raises(DataError) as raised:
        list(RecordFile(path, options=options))
    message = str(raised.value)
    assert message.startswith(path)
    assert "\n" not in message
    return message


def test_names_and_options_that_cannot_be_used_are_one_line() -> None:
    for size in (0, 10**7, "5", True):
        assert "is not an int from 1 to 1000000" in refusal("reasoning_gym:chain_sum", {"size": size})
    pytest.importorskip("reasoning_gym")
    assert "did you mean reasoning_gym:chain_sum?" in refusal("reasoning_gym:chain_sums", {})
    assert "cannot be used" in refusal("reasoning_gym:chain_sum", {"min_term": 2})
    assert "cannot be used" in refusal("reasoning_gym:chain_sum", {"min_terms": -1})
    assert "cannot be used" in refusal("reasoning_gym:chain_sum", {"min_terms": "two"})


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert "pip install reasoning-gym" in refusal("reasoning_gym:chain_sum", {})
