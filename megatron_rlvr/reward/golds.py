"""Gold answers that the math grader cannot grade, by kind: such a problem rewards no response, or one form only."""

import json
import re

from megatron_rlvr.reward.answers.equality import equal
from megatron_rlvr.reward.answers.readings import read
from megatron_rlvr.reward.answers.structures import Text
from megatron_rlvr.reward.math import MAX_EXPRESSION_CHARACTERS, gold_answer
from megatron_rlvr.types import Prompt

KINDS = (
    "gradable",
    f"longer than {MAX_EXPRESSION_CHARACTERS} characters",
    "a list of several answers in JSON",
    "prose without a boxed answer",
    "an expression that cannot be read as a whole",
    "an expression without a value",
    "not read in time",
)
"""The kinds; a gold answer of the first can be graded."""

GRADABLE, TOO_LONG, JSON_LIST, PROSE, UNREADABLE, UNDEFINED, TIMEOUT = range(len(KINDS))

_SIMPLE = re.compile(r"-?(?:0|[1-9][0-9]{0,200})(?:\.[0-9]{1,200})?", re.ASCII)
_PROSE_WORDS = 5


def gold_kind(text: str) -> int:
    """Return the index in `KINDS` of a gold answer. May take seconds; run it where it can be killed."""
    if is_simple(text):
        return GRADABLE
    gold = gold_answer(text)
    if len(gold) > MAX_EXPRESSION_CHARACTERS:
        return TOO_LONG
    if _is_json_list(gold):
        return JSON_LIST
    reading = read(gold)
    if isinstance(reading, Text) and not reading.readable:
        return PROSE if len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", gold)) >= _PROSE_WORDS else UNREADABLE
    return GRADABLE if equal(reading, reading) else UNDEFINED


def is_simple(text: str) -> bool:
    """Return whether a gold answer is a plain number, which is known without reading it."""
    return _SIMPLE.fullmatch(text) is not None


def gold_kind_of(prompt: Prompt, _: str) -> float:
    """Return `gold_kind` as a reward, so that grader processes compute it: those can be killed."""
    return float(gold_kind(prompt.answer))


def _is_json_list(text: str) -> bool:
    if not text.startswith("["):
        return False
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return any(isinstance(value, str | list | dict) for value in values)
