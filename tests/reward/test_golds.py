"""Tests of the gold answers that cannot be graded: their kinds, and the lines of the plan."""

import json
from pathlib import Path

import pytest

from megatron_rlvr.data.records import read_records
from megatron_rlvr.reward.golds import KINDS, gold_kind, is_simple
from megatron_rlvr.reward.math import MAX_EXPRESSION_CHARACTERS, equivalent, gold_answer

PROSE = "The set of all points that are closer to the origin than to the line is a parabola and its inside."
GOLDS = [
    ("42", "gradable"),
    (r"\frac{1}{2}", "gradable"),
    ("1e-05", "gradable"),
    ("no solution", "gradable"),
    ("BDCA", "gradable"),
    ("(-1, 1]", "gradable"),
    (PROSE + r" So it is \boxed{7}.", "gradable"),
    ('["7"]', "gradable"),
    ("x" * (MAX_EXPRESSION_CHARACTERS + 1), f"longer than {MAX_EXPRESSION_CHARACTERS} characters"),
    ('["7", "8"]', "a list of several answers in JSON"),
    (PROSE, "prose without a boxed answer"),
    (r"\int_0^1 f(x) dx", "an expression that cannot be read as a whole"),
    ("41 \u2192 42", "an expression that cannot be read as a whole"),
    (r"\frac{0}{0}", "an expression without a value"),
]


@pytest.mark.parametrize(("gold", "kind"), GOLDS, ids=[kind for _, kind in GOLDS])
def test_a_gold_answer_is_of_the_kind_read_by_hand(gold: str, kind: str) -> None:
    assert KINDS[gold_kind(gold)] == kind


def test_a_plain_number_is_known_without_reading_it() -> None:
    assert all(is_simple(text) for text in ("0", "-7", "12.50", "9" * 200))
    assert not any(is_simple(text) for text in ("", "007", "1,000", "1e5", "x", "\u0664", "1."))


@pytest.mark.parametrize(
    ("number", "answer"), [(0.00001, "10^{-5}"), (1.5e-07, "0.00000015"), (1e22, "10^{22}"), (0.1 + 0.2, "0.3")]
)
def test_a_number_of_the_data_file_is_matched(number: float, answer: str, tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"prompt": "?", "answer": number}) + "\n")
    (record,) = read_records(file)
    assert equivalent(gold_answer(record.answer), answer)
    assert not equivalent(gold_answer(record.answer), "2" + answer)
