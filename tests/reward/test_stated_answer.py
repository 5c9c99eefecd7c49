"""Built-in reward functions for texts, choices, numbers and formats, by literal verdicts; and their names."""

from pathlib import Path

import numpy as np
import pytest

from megatron_rlvr.reward.functions import load
from megatron_rlvr.reward.stated_answer import choice_grade, exact_grade, number_grade, stated_answer
from megatron_rlvr.reward_spec import GYM, Call, as_text, from_text, parse_call, parse_functions
from megatron_rlvr.types import Graded, Prompt


def prompt(answer: str, question: str = "", source: str = "test", **extra: object) -> Prompt:
    return Prompt("p", np.zeros(0, np.int32), answer, source, extra, question)


def test_the_stated_answer_is_the_last_tag_box_or_line_after_the_thoughts() -> None:
    assert stated_answer("<answer> 4 </answer> or <answer>5</answer>") == "5"
    assert stated_answer("so \\boxed{B}") == "B"
    assert stated_answer("Answer: Paris\n") == "Paris"
    assert stated_answer("<think>Answer: 1</think>I do not know") is None
    assert stated_answer("<answer>1</answer>", "</think>") is None
    assert stated_answer("<answer>1</answer></think><answer>2</answer>", "</think>") == "2"


def test_exact_compares_texts_without_case_space_and_marks_around_them() -> None:
    gold = prompt("New York")
    for answer in ("new  york", '"New York".', "\\text{New York}", "**New\u00a0York**"):
        assert exact_grade(gold, f"<answer>{answer}</answer>").value is True
    for answer in ("York New", "New York City", ""):
        assert exact_grade(gold, f"<answer>{answer}</answer>").value is False
    assert exact_grade(gold, "New York").value is False
    assert exact_grade(gold, "<think>Rome</think>New York", whole=True).value is True


def test_a_choice_is_its_letter_its_text_or_both_that_agree() -> None:
    listed = "Which?\nA) Rome\nB) Paris\nC) Oslo"
    golds = [
        prompt("B", listed),
        prompt("(B) Paris", listed),
        prompt("Paris", choices=["Rome", "Paris", "Oslo"]),
        prompt("1", choices=["Rome", "Paris", "Oslo"]),
        prompt("B", choices={"label": ["A", "B", "C"], "text": ["Rome", "Paris", "Oslo"]}),
        prompt("B", options={"A": "Rome", "B": "Paris", "C": "Oslo"}),
    ]
    for gold in golds:
        for answer in ("B", "b", "(B)", "B.", "B) Paris", "B: paris", "Paris", "Option B", "\\text{B}"):
            assert choice_grade(gold, f"\\boxed{{{answer}}}").value is True, (gold, answer)
        for answer in ("A", "B) Rome", "A or B", "B or C", "Rome", "D", "Be", "AB"):
            assert choice_grade(gold, f"\\boxed{{{answer}}}").value is False, (gold, answer)
    without_texts = prompt("B")
    assert choice_grade(without_texts, "\\boxed{B) Paris}").value is True
    assert choice_grade(without_texts, "\\boxed{B, C}").value is False
    labels = prompt("2", choices={"label": ["1", "2"], "text": ["hot", "cold"]})
    assert choice_grade(labels, "\\boxed{2}").value is True
    with pytest.raises(ValueError, match="none of the choices"):
        choice_grade(prompt("E", listed), "\\boxed{A}")


def test_a_number_is_one_number_within_the_tolerance() -> None:
    def graded(gold: str, answer: str, **options: object) -> object:
        return number_grade(prompt(gold), f"<answer>{answer}</answer>", **options).value  # type: ignore[arg-type]

    for gold, answer in (
        ("1234.5", "$1,234.50"),
        ("-3", "\u22123 m"),
        ("0.5", "1/2"),
        ("1e3", "1000"),
        ("42", "42 apples"),
    ):
        assert graded(gold, answer) is True, (gold, answer)
    for gold, answer in (("42", "41 or 42"), ("42", "42.0001"), ("1", "1/0"), ("7", "seven"), ("3", "")):
        assert graded(gold, answer) is False, (gold, answer)
    assert graded("3.1416", "3.14", tolerance=0.01) is True
    assert graded("0.1", "0.3", tolerance=0.1) is False
    assert graded("200", "203", tolerance=0.01) is False
    assert number_grade(prompt("7"), "3 and then 7.").value is False
    assert number_grade(prompt("7"), "3 and then 7.", last=True).value is True
    with pytest.raises(ValueError, match="not one number"):
        number_grade(prompt("1 or 2"), "")


def test_functions_by_source_combined_and_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards.py").write_text(
        "def words(prompt, response):\n    return len(response.split()) / 10, False, {'words': 1}\n"
        "def question(prompt, response):\n    return prompt.question == response\n"
        "def score(prompt, response):\n    return True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    setting = {
        "letters": "choice",
        "both": 'all(number(last=True), format("^So "))',
        "mixed": 'all(math, "own_rewards:words")',
        "named": 'all("own_rewards:score", exact, exact(whole=True))',
        "*": "own_rewards:question",
    }
    grade = load(as_text(setting))
    assert grade(prompt("B", source="letters"), "\\boxed{B}") == Graded(True, "B")
    assert grade(prompt("3", source="both"), "So 3") == Graded(True, "3", None, {"number": 1.0, "format": 1.0})
    assert grade(prompt("3", source="both"), "3") == Graded(False, "3", None, {"number": 1.0, "format": 0.0})
    mixed = grade(prompt("3", source="mixed"), "It is \\boxed{3}")
    assert mixed == Graded(0.3, "3", False, {"math": 1.0, "words": 0.3})
    named = grade(prompt("3", source="named"), "\\boxed{3}")
    assert named == Graded(True, "3", None, {"score_1": 1.0, "exact_2": 1.0, "exact_3": 1.0})
    assert grade(prompt("", "how?", source="else"), "how?") is True


def test_the_scorer_of_reasoning_gym_grades_its_problems_unless_the_settings_name_a_function() -> None:
    source = "reasoning_gym:chain_sum"
    assert parse_functions("math").of(source) == Call(GYM)
    assert parse_functions("math").of("gsm8k") == Call("math")
    assert parse_functions("own:f").of(source) == Call("own:f")
    assert parse_functions({"*": "math"}).of(source) == Call(GYM)
    assert parse_functions({source: "exact"}).of(source) == parse_call("exact")
    assert parse_functions({"gsm8k": "math"}).of("other") is None
    assert from_text(as_text({"a": "math", "*": "own:f"})) == parse_functions({"a": "math", "*": "own:f"})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("maths", "maths is neither math, exact, choice, number, format, code, reasoning_gym, all nor module:function"),
        ("a.b:", "neither math"),
        ("math(1)", "math() takes no such arguments; its options are none"),
        ("number(digits=3)", "number() has no option digits; its options are tolerance, last"),
        ("number(tolerance='a')", "number(tolerance=a): not of type float or int"),
        ("number(tolerance=-1)", "not from 0 to 1e+12"),
        ("number(tolerance=x)", "number(tolerance=...): not a plain value"),
        ("number(last=1)", "not of type bool"),
        ("format()", "format() needs its option pattern"),
        ("format('(')", "no regular expression"),
        ("all(math)", "all() combines two or more functions"),
        ("code(memory_mb=10**9)", "not a plain value"),
        ("code(seconds=0)", "not from 0.1 to 3600"),
        ("__import__('os')", "neither math"),
        ("(" * 1000, "neither math"),
        ("x" * 3000, "3000 characters; give at most 2000"),
    ],
)
def test_a_function_that_cannot_be_read_is_one_short_line(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        parse_call(text)
    assert complaint in str(raised.value)
    assert len(str(raised.value)) < 200
