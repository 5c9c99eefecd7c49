"""Tests of the extraction of the final answer and its comparison with the gold answer, against cases read by hand."""

import itertools
import subprocess
import sys
import time

import numpy as np
import pytest
from math_verify import parse, verify

from megatron_rlvr.reward.math import MAX_EXPRESSION_CHARACTERS, equivalent, final_answer, math_reward
from megatron_rlvr.types import Prompt


def prompt(answer: str) -> Prompt:
    return Prompt(id="p", token_ids=np.zeros(3, np.int32), answer=answer, source="test")


EXTRACTIONS = [
    (r"so \boxed{42}.", "42"),
    (r"\boxed{1} and then \boxed{2}", "2"),
    (r"\boxed{\frac{1}{\sqrt{2}}} is it", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{ 3 \right.} }", r"\left\{ 3 \right."),
    (r"\boxed {7}", "7"),
    (r"\fbox{7}", "7"),
    (r"{ an open brace, \boxed{7}", "7"),
    (r"Answer: 42", "42"),
    ("Answer: 1\nno,\nanswer: 2\n", "2"),
    ("**Answer:** 42\n", "42"),
    ("**Final Answer**: 42\n", "42"),
    (r"\textbf{Answer:} 42", "42"),
    ("Answer\uff1a42", "42"),
    ("Answer:\n\n42\nthat is it", "42"),
    ("Answer:\n\\[\n42\n\\]\nthat is it", "\\[\n42\n\\]"),
    ("a\n#### 42\n", "42"),
    ("#### 1\n#### 42", "42"),
    # The later of the box and the Answer line counts.
    (r"\boxed{41} was a step." + "\nAnswer: 42", "42"),
    ("Answer: 41\n" + r"no: \boxed{42}", "42"),
    (r"Answer: the sum is \boxed{42} metres", "42"),
    # A Markdown heading never overrides a box or an Answer line.
    (r"\boxed{42}" + "\n#### Remarks\nNone.", "42"),
    ("Answer: 42\n#### Remarks\nNone.", "42"),
    # A response truncated inside a box has no answer there.
    (r"\boxed{42} or rather \boxed{4", "42"),
    (r"Answer: \boxed{4", None),
    # No fallback to the last number.
    ("the answer is 42", None),
    ("42", None),
    ("", None),
    ("#### ", None),
    ("##### 42", None),
    ("Answer:", None),
]


@pytest.mark.parametrize(("text", "answer"), EXTRACTIONS)
def test_the_final_answer_is_the_last_one_given(text: str, answer: str | None) -> None:
    found = final_answer(text)
    assert (found.strip() if found is not None else None) == answer


@pytest.mark.parametrize("box", [r"$%s$", r"\(%s\)", r"\[ %s \]", r"$$%s$$", r"**%s**", "**$%s$**", "%s"])
def test_boxes_that_a_word_or_sign_joins_are_one_list_in_whatever_delimiters(box: str) -> None:
    """Otherwise the last of the boxes is paid for, and a response may list all the answers that it can think of."""
    one, other = (box % rf"\boxed{{{n}}}" for n in (41, 42))
    for joint in (
        *(", ", "; ", " / ", " and ", ", and ", " or ", " and/or ", " or else ", " or maybe ", "\n\nor\n\n"),
        *(r" \text{ and } ", r"\quad\text{or}\quad ", r"\;\textrm{, or }\;", r" \mathrm{or} ", r" \lor ", r" \\ or "),
        " or" + 100 * " ",
    ):
        response = f"So it is {one}{joint}{other}."
        assert not math_reward(prompt("42"), response), response
        assert math_reward(prompt("42, 41"), response), response
    for end in (". ", "\n", " Then ", " and so "):
        assert math_reward(prompt("42"), one + end + other)
    assert not math_reward(prompt("70"), " or ".join(box % rf"\boxed{{{n}}}" for n in range(71)))


CORRECT = [
    ("42", "42"),
    ("42", "42."),
    ("42", "$42$"),
    ("42", "**42**"),
    ("42", r"\(42\)"),
    ("42", r"\boxed{42}"),
    ("42", r"\text{42}"),
    ("42", r"42 \text{ cm}"),
    ("42", "42 cm"),
    ("42", r"x = 42"),
    ("42", "042"),
    ("27.0", "27"),
    ("-3", "-3.0"),
    ("1000", "1,000"),
    ("1000", r"1\,000"),
    ("1000", r"1{,}000"),
    ("10{,}000", "10000"),
    (r"10,\!000", "10000"),
    ("$5", "5"),
    (r"\frac{1}{2}", r"\frac12"),
    ("1/2", "0.5"),
    ("0.5", r"\dfrac{1}{2}"),
    (r"1\frac{1}{2}", "1.5"),
    (r"7\pi", r"7 \pi"),
    ("4a-2", "-2 + 4a"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    ("(1, 2)", "(1,2)"),
    (r"\left(1, \frac{3}{2}\right)", "(1, 1.5)"),
    (r"\{1, 2\}", r"\{2, 1\}"),
    ("1,2,3", "3, 2, 1"),
    (r"90^\circ", "90"),
    (r"\text{(A)}", "A"),
    ("50\\%", "50%"),
    ("4:30 p.m.", "4:30  p.m."),
    (r"\text{no solution}", r"\text{no solution}"),
    ("16 - 3 = 13\n#### 13", "13"),
    (r"hence the sum is $\boxed{13}$.", "13"),
]


@pytest.mark.parametrize(("gold", "answer"), CORRECT)
def test_a_correct_answer_is_correct_in_every_form(gold: str, answer: str) -> None:
    assert math_reward(prompt(gold), f"It is \\boxed{{{answer}}}.") is True
    assert math_reward(prompt(gold), f"It is\nAnswer: {answer}\n") is True


INCORRECT = [
    ("42", "43"),
    ("42", "-42"),
    ("42", "4.2"),
    ("42", "420"),
    ("42", "41 or 42"),
    ("42", "41, 42"),
    ("42", r"\{41, 42\}"),
    ("42", r"42\pi"),
    ("42", "42x"),
    ("42", "42.01"),
    ("42", ""),
    ("42", " "),
    ("42", "the usual"),
    ("12", "1 2"),
    ("", ""),
    ("1/2", "1/3"),
    ("1/3", "0.33"),
    ("(1, 2)", "(2, 1)"),
    ("(1, 2)", "[1, 2]"),
    ("4a-2", "4b-2"),
    (r"\sqrt{8}", r"\sqrt{6}"),
    ("1000", "1,00"),
    ("1234567890123456789", "1234567890123456788"),
    ("A", "B"),
    ("42", "\ud800"),
    ("42", "\x00"),
    ("42", "}{"),
    ("42", "\\"),
    ("42", "1/0"),
]


@pytest.mark.parametrize(("gold", "answer"), INCORRECT)
def test_an_incorrect_answer_is_incorrect_in_every_form(gold: str, answer: str) -> None:
    assert math_reward(prompt(gold), f"It is \\boxed{{{answer}}}.") is False
    assert math_reward(prompt(gold), f"It is\nAnswer: {answer}\n") is False


def test_an_unmarked_number_is_incorrect() -> None:
    assert math_reward(prompt("42"), "so it must be 42") is False


def test_numbers_are_compared_as_math_verify_compares_them() -> None:
    numbers = "0 -0 42 0,042 100 1,00 7 07 +7 -7 7.0 7.5 7.50 -7.5 0.1 0.10 1000 1,000 1,000.5 1000.5 100,200 200,100"
    for gold, answer in itertools.product([*numbers.split(), "12345678901234567890"], repeat=2):
        oracle = verify(parse(f"\\boxed{{{gold}}}"), parse(f"\\boxed{{{answer}}}"))
        assert equivalent(gold, answer) == oracle, (gold, answer)


def test_plain_numbers_are_compared_without_reading_an_expression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rlvr.reward.math._readings_equal", lambda *_: pytest.fail("an expression was read"))
    assert equivalent("1000", "1,000.0")
    assert not equivalent("1000", "1001")


def test_grading_imports_neither_sympy_nor_math_verify() -> None:
    program = (
        "import sys; from megatron_rlvr.reward.math import warm_up; warm_up(); "
        "print({'sympy', 'math_verify', 'torch'} & set(sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "set()\n"
    )


def test_an_answer_over_the_size_limit_is_incorrect_without_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = "x" * MAX_EXPRESSION_CHARACTERS
    assert equivalent(longest, longest)
    monkeypatch.setattr("megatron_rlvr.reward.math._readings_equal", lambda *_: pytest.fail("an expression was read"))
    assert not equivalent(longest, longest + "x")
    assert not math_reward(prompt("9"), "\\boxed{" + "9+" * 10**6 + "9}")


def test_extraction_takes_linear_time_on_degenerate_text() -> None:
    start = time.process_time()
    for unit in ("{", "}", "\\boxed{", "\\", "answer:", "answer: \\[", "####", "\\boxed{}", "answer: \\boxed{"):
        final_answer(unit * 40_000)
        final_answer(unit * 20_000 + "}" * 20_000)
    # Under a second on an idle machine; a search that is quadratic in the length would take many minutes.
    assert time.process_time() - start < 60.0
