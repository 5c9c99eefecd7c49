r"""Reward function for mathematics: the final answer is extracted by rule and compared with math-verify.

The final answer is the last one to which the response commits:
  1. The last complete ``\boxed{...}``, or an ``Answer: ...`` after it: the later of the two counts, because a model
     that boxes an intermediate result and then ends with "Answer: 7" has answered 7. A box *on* the Answer line starts
     later than the line's label, so the content of the box is read, without the words around it.
  2. ``#### ...`` only if there is neither: it is also a Markdown heading, and must not override a box above it.
  3. Otherwise there is no answer, and the response is incorrect. The last number of the text is never taken as the
     answer: a reward for an unmarked number would reward guessing. For the same reason both the answer and the gold
     answer reach math-verify inside a box: given bare text, math-verify picks the last number of "41 or 42".

One cost of these strict rules: an answer with an unknown unit in plain text is incorrect ("18 eggs", but not
"18 \text{ eggs}" or "18 hours").

These functions have no time limit: sympy may run for minutes in one integer power, holding the interpreter lock, and
math-verify's own alarms cannot interrupt it. ``graders.GraderPool`` therefore runs them in a process that it can kill.
"""

import functools
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from megatron_rlvr.types import Prompt

MAX_EXPRESSION_CHARACTERS = 2000
"""Longest answer that is compared; a longer one is incorrect. Gold answers of the usual data sets have hundreds."""

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_OPEN_BOX = re.compile(r"\\(?:boxed|fbox)\b")
_ANSWER = re.compile(
    r"\banswer[*_\s]{0,4}[:\uff1a][*_}\s]*"  # "Answer:", "**Answer**:", "\textbf{Answer:}", the full-width colon
    r"(\\\[(?s:.{1,2000}?)\\\]|\$\$(?s:.{1,2000}?)\$\$|[^\s*_}][^\n]*)",  # a displayed formula, or the (next) line
    re.IGNORECASE,
)
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*([^\s][^\n]*)")
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_THOUSANDS = re.compile(r"(?<=[0-9])(?:,?\\!|\{,\}|\\,|\\ )(?=[0-9]{3}(?![0-9]))")
_SPACING = re.compile(r"(?:(?<!\\)\\(?:[,;:!]|q?quad\b|(?=\s))|~|\s)+")
_NUMBER = re.compile(r"[+-]?(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")


class _Box(NamedTuple):
    """Offsets in the text of a box's backslash, of its content, and of the end of its closing brace."""

    start: int
    content: int
    end: int


def math_reward(prompt: Prompt, response: str) -> bool:
    r"""Return whether the final answer of ``response`` equals the gold answer, ``prompt.answer``.

    The gold answer may itself be a complete solution that ends in ``\boxed{...}`` or ``#### ...``, as in MATH and
    GSM8K.
    """
    answer = final_answer(response)
    return answer is not None and equivalent(final_answer(prompt.answer) or prompt.answer, answer)


def final_answer(text: str) -> str | None:
    """Return the final answer of ``text`` as written, or None; the module docstring gives the rule."""
    box = _last_box(text)
    lines = _ANSWER.findall(text, box.end if box else 0)
    # A box on an Answer line after the last complete box was never closed: the response was truncated inside it.
    complete = [line for line in lines if not _OPEN_BOX.search(line)]
    if complete:
        return complete[-1]
    if box:
        return text[box.content : box.end - 1]
    hashes = _HASHES.findall(text)
    return hashes[-1] if hashes else None


def equivalent(gold: str, answer: str) -> bool:
    """Return whether two LaTeX or plain-text expressions are equal; False if either is empty or too long.

    Equal text and plain numbers are compared here, for speed; math-verify compares the rest, and decimals up to
    rounding.
    """
    if max(len(gold), len(answer)) > MAX_EXPRESSION_CHARACTERS:
        return False
    gold, answer = _clean(gold), _clean(answer)
    if not gold or not answer:
        return False
    if gold == answer:
        return True
    gold_number, answer_number = _number(gold), _number(answer)
    if gold_number is not None and answer_number is not None:
        if gold_number == answer_number:
            return True
        if "." not in gold and "." not in answer:
            return False
    parse, verify = _math_verify()
    parsed_gold, parsed_answer = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer))
    return bool(verify(parsed_gold, parsed_answer, timeout_seconds=None))


def warm_up() -> None:
    """Import math-verify and let it build its parser (about a second), so that no response is charged for it."""
    prompt = Prompt(id="", token_ids=np.zeros(0, np.int32), answer=r"\frac{1}{3}", source="")
    for answer in ("0.5", "x+1", "(1,2)"):
        math_reward(prompt, f"\\boxed{{{answer}}}")


@functools.cache
def _math_verify() -> tuple[Callable[..., Any], Callable[..., Any]]:
    import logging

    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its alarms are switched off
    return math_verify.parse, math_verify.verify


def _last_box(text: str) -> _Box | None:
    r"""Return the last balanced \boxed{...}, the outermost if nested, or None.

    One pass over the text, because a degenerate response may consist of 100,000 braces.
    """
    open_braces: list[re.Match[str]] = []
    found = None
    for token in _BRACES.finditer(text):
        if token.group() == "}":
            opening = open_braces.pop() if open_braces else None
            if opening and opening.group() != "{":
                found = _Box(opening.start(), opening.end(), token.end())
        elif token.group().endswith("{") and token.group() != "\\{":
            open_braces.append(token)
    return found


def _clean(expression: str) -> str:
    """Remove surrounding Markdown emphasis, math delimiters and boxes, final punctuation and LaTeX spacing."""
    expression = _SPACING.sub(" ", _THOUSANDS.sub(",", expression))
    while True:
        shorter = expression.strip(" *_`").rstrip(" .,;:")
        for opening, closing in _DELIMITERS:
            inner = shorter[len(opening) : -len(closing)]
            if shorter == opening + inner + closing and closing not in inner:
                shorter = inner
        box = _last_box(shorter)
        if box and (box.start, box.end) == (0, len(shorter)):
            shorter = shorter[box.content : -1]
        if shorter == expression:
            return expression
        expression = shorter


def _number(text: str) -> Decimal | None:
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None
