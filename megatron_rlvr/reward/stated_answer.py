"""Reward functions for answers that are a text, a letter or a number, and for the form of a response.

The answer is what the response states as such: the last <answer>...</answer>, else what `final_answer.py` finds, which
is a box, "Answer: ...", or "#### ...". A thinking section is never read. docs/rewards.md says what is equal.
"""

import re
import unicodedata
from fractions import Fraction
from typing import Any

from megatron_rlvr.reward.final_answer import THINK_CLOSE, THINK_OPEN, final_answer
from megatron_rlvr.types import Graded, Prompt

_MAX_CHARACTERS = 2000
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_TEXT_MACRO = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\s*\{([^{}]*)\}")
_EDGE = " \t\r\n.,;:!?\"'`*_$"
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,400})(?:\.[0-9]{1,400})?(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
    r"(?:\s?/\s?[0-9]{1,400})?"
)
_LETTER = re.compile(r"[(\[]?([A-Za-z0-9])(?:\s*[.:),\]-]+\s*(.*)|\s+(.+))?", re.DOTALL)
_OPTION_WORD = re.compile(r"(?:option|choice)\s+", re.IGNORECASE)
_LISTED = re.compile(r"^\s*[(\[]?([A-J])[)\].:]\s+(\S.*?)\s*$", re.MULTILINE)


def stated_answer(response: str, answer_after: str | None = None) -> str | None:
    """Return the answer that a response states, as written, or None.

    Args:
        answer_after: Text after whose last occurrence the answer begins; without an occurrence there is no answer.
    """
    if answer_after is not None and answer_after not in response:
        return None
    text = without_thoughts(response, answer_after)
    tagged = _TAG.findall(text)
    answer = tagged[-1] if tagged else final_answer(text)
    return None if answer is None else answer.strip()


def without_thoughts(response: str, answer_after: str | None = None) -> str:
    """Return what follows the thinking section of a response."""
    text = response.rpartition(answer_after)[2] if answer_after is not None else response
    return text.rpartition(THINK_CLOSE)[2].partition(THINK_OPEN)[0]


def exact_grade(prompt: Prompt, response: str, *, answer_after: str | None = None, whole: bool = False) -> Graded:
    """Return whether the answer is the gold answer, as a normalised text.

    Args:
        whole: Whether a response that states no answer is an answer as a whole.
    """
    answer = stated_answer(response, answer_after)
    if answer is None and whole:
        answer = without_thoughts(response, answer_after).strip()
    if answer is None or len(answer) > _MAX_CHARACTERS:
        return Graded(False, None)
    return Graded(normalised(answer) == normalised(prompt.answer), answer)


def normalised(text: str) -> str:
    """Return a text without case, forms of characters, kinds of white space, and marks around it."""
    text = _TEXT_MACRO.sub(r"\1", unicodedata.normalize("NFKC", text))
    return " ".join(text.strip(_EDGE).casefold().split())


def choice_grade(prompt: Prompt, response: str, *, answer_after: str | None = None) -> Graded:
    """Return whether the answer is the gold choice: its letter, its text, or both.

    Raises:
        ValueError: The gold answer is none of the choices.
    """
    choices = _choices(prompt)
    gold = _choice(prompt.answer, choices)
    if gold is None and prompt.answer.isdecimal() and int(prompt.answer) < len(choices):
        gold = list(choices)[int(prompt.answer)]
    if gold is None:
        raise ValueError(f"the gold answer {prompt.answer[:60]!r} is none of the choices; correct it")
    answer = stated_answer(response, answer_after)
    if answer is None or len(answer) > _MAX_CHARACTERS:
        return Graded(False, None)
    return Graded(_choice(answer, choices) == gold, answer)


def _choices(prompt: Prompt) -> dict[str, str]:
    """Return {letter: text} of the choices: of the column choices or options, else as the question lists them."""
    column: Any = prompt.extra.get("choices", prompt.extra.get("options"))
    if isinstance(column, dict) and {"text", "label"} <= set(column):
        column = dict(zip(column["label"], column["text"], strict=True))
    if isinstance(column, list):
        column = {chr(ord("A") + number): text for number, text in enumerate(column[:26])}
    if isinstance(column, dict):
        return {str(letter).upper(): str(text) for letter, text in column.items()}
    listed = _LISTED.findall(prompt.question[-20_000:])
    return dict(listed) if [letter for letter, _ in listed] == sorted({letter for letter, _ in listed}) else {}


def _choice(text: str, choices: dict[str, str]) -> str | None:
    """Return the letter that a text chooses, or None."""
    text = _OPTION_WORD.sub("", _TEXT_MACRO.sub(r"\1", text).strip(_EDGE), count=1)
    by_text = {normalised(choice): letter for letter, choice in choices.items()}
    if normalised(text) in by_text:
        return by_text[normalised(text)]
    match = _LETTER.fullmatch(text)
    if match is None:
        return None
    letter, rest = match[1].upper(), match[2] or match[3]
    if (choices and letter not in choices) or not (choices or letter.isalpha()):
        return None
    if not rest:
        return letter
    if choices:
        return letter if by_text.get(normalised(rest)) == letter else None
    return letter if match[2] and _LETTER.fullmatch(rest.strip(_EDGE)) is None else None


def number_grade(
    prompt: Prompt, response: str, *, answer_after: str | None = None, tolerance: float = 0.0, last: bool = False
) -> Graded:
    """Return whether the answer is the gold number, up to ``tolerance`` times the larger of 1 and its size.

    Args:
        last: Whether the last number of a response is its answer if it states none.

    Raises:
        ValueError: The gold answer is not one number.
    """
    gold = _only_number(prompt.answer)
    if gold is None:
        raise ValueError(f"the gold answer {prompt.answer[:60]!r} is not one number; correct it")
    answer = stated_answer(response, answer_after)
    if answer is None and last:
        found = _NUMBER.findall(_plain(without_thoughts(response, answer_after)))
        answer = found[-1] if found else None
    if answer is None or len(answer) > _MAX_CHARACTERS:
        return Graded(False, None)
    value = _only_number(answer)
    close = value is not None and abs(value - gold) <= Fraction(tolerance) * max(Fraction(1), abs(gold))
    return Graded(close, answer)


def _only_number(text: str) -> Fraction | None:
    """Return the number of a text that has exactly one; units and other words may surround it."""
    found = _NUMBER.findall(_plain(text))
    if len(found) != 1:
        return None
    above, _, below = found[0].replace(",", "").partition("/")
    try:
        return Fraction(above.strip()) / Fraction(below.strip() or 1)
    except ZeroDivisionError:
        return None


def _plain(text: str) -> str:
    """Return a text whose minus signs, digits and thousands separators are those of ASCII."""
    return unicodedata.normalize("NFKC", text).replace("\u2212", "-").replace("{,}", ",")


def format_grade(prompt: Prompt, response: str, *, pattern: str) -> bool:
    """Return whether a response, its thinking section included, has a match of a regular expression.

    The dot matches line breaks as well.
    """
    return re.search(pattern, response, re.DOTALL) is not None
