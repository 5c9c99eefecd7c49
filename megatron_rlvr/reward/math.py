r"""Reward function for mathematics: the final answer of the response is compared with the gold answer.

`final_answer.py` finds the answer, `answers/readings.py` reads it, as a whole or not at all, and `answers/equality.py`
compares it with the reading of the gold answer. docs/rewards.md says what is read and what is equal.

This is a verifier: an incorrect answer that it pays for is what the policy will learn to write. math-verify is
therefore not used. Its parser recovers from text that it cannot read by leaving out a part ("41 or 42" in a foreign
alphabet is then 42), it reads words as products of letters, and it compares with an absolute cut; sympy evaluates
powers and simplifies without a bound on its time. Here values are computed, exactly or with mpmath, which is the
arithmetic of sympy, and rewriting is not needed.

The effort is bounded by the size limits of `answers/evaluation.py`, but not the time in seconds:
``graders.GraderPool`` runs these functions in a process that it can kill.
"""

import contextlib
import functools
import json
import re
from decimal import Decimal

import numpy as np

from megatron_rlvr.reward.final_answer import final_answer as final_answer
from megatron_rlvr.types import Graded, Prompt

MAX_EXPRESSION_CHARACTERS = 2000
"""Longest answer that is compared; a longer one is incorrect. Gold answers of the usual data sets have hundreds."""

_NUMBER = re.compile(r"[+-]?(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?", re.ASCII)


def math_reward(prompt: Prompt, response: str, *, answer_after: str | None = None) -> bool:
    r"""Return whether the final answer of ``response`` equals the gold answer, ``prompt.answer``.

    The gold answer may itself be a complete solution that ends in ``\boxed{...}`` or ``#### ...``, as in MATH and
    GSM8K.

    Args:
        answer_after: Text that ends the thinking section, such as "</think>": only what follows its last occurrence
            is read, and a response without it has no answer. None if the template does not open such a section.
    """
    return bool(math_grade(prompt, response, answer_after=answer_after).value)


def math_grade(prompt: Prompt, response: str, *, answer_after: str | None = None) -> Graded:
    """Return the verdict of `math_reward` together with the answer in the response.

    A longer answer than `MAX_EXPRESSION_CHARACTERS`, which is incorrect, is truncated to that length.
    """
    answer = final_answer(response, answer_after=answer_after)
    if answer is None:
        return Graded(False, None)
    return Graded(equivalent(gold_answer(prompt.answer), answer), answer[:MAX_EXPRESSION_CHARACTERS])


def gold_answer(text: str) -> str:
    """Return the final answer of a gold answer: the text itself, unless it is a solution or a list of one text."""
    if text.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            match json.loads(text):
                case [str(only)]:
                    text = only
    return final_answer(text, gold=True) or text


def equivalent(gold: str, answer: str) -> bool:
    """Return whether two LaTeX or plain-text answers are equal; False if either is empty or too long."""
    if max(len(gold), len(answer)) > MAX_EXPRESSION_CHARACTERS:
        return False
    gold, answer = gold.strip(), answer.strip()
    gold_number, answer_number = _number(gold), _number(answer)
    if gold_number is not None and answer_number is not None:
        if gold_number == answer_number:
            return True
        if "." not in gold + answer:
            return False
    return _readings_equal(gold, answer)


def _readings_equal(gold: str, answer: str) -> bool:
    from megatron_rlvr.reward.answers.equality import equal

    return equal(_read_gold(gold), _read(answer))


def _read(text: str):  # type: ignore[no-untyped-def]
    from megatron_rlvr.reward.answers.readings import read

    return read(text)


_read_gold = functools.lru_cache(maxsize=4096)(_read)


def warm_up() -> None:
    """Import the reader of answers, so that no response is charged for it."""
    prompt = Prompt(id="", token_ids=np.zeros(0, np.int32), answer=r"\frac{1}{3}", source="")
    for answer in ("0.5", "x+1", "(1,2)"):
        math_reward(prompt, f"\\boxed{{{answer}}}")


def _number(text: str) -> Decimal | None:
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None
