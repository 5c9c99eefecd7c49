"""Removal of what surrounds an answer and is no part of it: delimiters, emphasis, boxes, a label, a full stop."""

import re

from megatron_rlvr.reward.answers import notation as n
from megatron_rlvr.reward.answers.leaves import CLOSE, OPEN

_LABEL = re.compile(
    rf"^(?:{n.TEXT_MACROS}\s*\{{)?\s*(?:the )?(?:final |correct )?answer\s*(?:is\s*:?|:|=)\s*(?:\}})?", re.IGNORECASE
)

_EMPHASIS = re.compile(r"(\*\*|\*|__|_|``?)(.*)\1\.?", re.DOTALL)

_WRAPPER = re.compile(n.TEXT_MACROS + r"\s*\{|\\(?:boxed|fbox|underline|bf|rm)\s*\{|\{")

_FINAL_STOP = re.compile(n.TEXT_MACROS + r"\s*\{[\s.,;]*\}$")


def bare(text: str) -> str:
    """Return an answer as its author wrote it in the notation of ``notation.py``, without what surrounds it."""
    emphasis = _EMPHASIS.fullmatch(text.strip())
    return unwrap(_LABEL.sub("", unwrap(n.normalize(emphasis[2] if emphasis else text.strip()))))


def unwrap(text: str) -> str:
    """Remove surrounding delimiters, emphasis, boxes and braces, and final punctuation."""
    while True:
        shorter = text.strip().rstrip(".,;:").strip() if not text.endswith(n.DOTS) else text
        if shorter.count("$") % 2 == 0 and "\\$" not in shorter:
            shorter = shorter.replace("$", " ").strip()
        shorter = _FINAL_STOP.sub("", shorter)
        opening = _WRAPPER.match(shorter)
        if opening and closing_of(shorter, opening.end() - 1) == len(shorter) - 1:
            shorter = shorter[opening.end() : -1]
        if shorter == text:
            return text
        text = shorter


def closing_of(text: str, start: int) -> int:
    """Return the offset of the bracket that closes the one at ``start``, of any kind; -1 if there is none."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] in OPEN) - (text[position] in CLOSE)
        if depth == 0:
            return position
    return -1
