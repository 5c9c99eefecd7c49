r"""Where the final answer of a response is: the last one to which it commits.

1. The thinking section is no answer: what precedes the last ``</think>`` is not read, nor a section left open.
2. The last complete ``\boxed{...}``, or an ``Answer: ...`` after it: the later of the two counts, because a model
   that boxes an intermediate result and then ends with "Answer: 7" has answered 7. A box *on* the Answer line starts
   later than the line's label, so the content of the box is read, without the words around it. Boxes that only
   "and", "or" or a comma separates, in whatever delimiters, are one answer, the list of their contents.
3. ``#### ...`` only if there is neither: it is also a Markdown heading, and must not override a box above it.
4. Otherwise there is no answer, and the response is incorrect. The last number of the text is never taken as the
   answer: a reward for an unmarked number would reward guessing.
"""

import re
from typing import NamedTuple

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_OPEN_BOX = re.compile(r"\\(?:boxed|fbox)\b")
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s+([0-9]+(?:\.[0-9]+)?|[A-Za-z])(?![A-Za-z0-9])")
_LABELS = (
    "answer|r\u00e9ponse|respuesta|resposta|risposta|antwort|odpowied\u017a|cevap"
    "|\u043e\u0442\u0432\u0435\u0442|\u7b54\u6848|\u7b54\u3048"
)
_ANSWER = re.compile(
    rf"(?<![^\W_])(?:{_LABELS})(?:[*_\s]{{0,4}}is)?[*_\s]{{0,4}}[:\uff1a=][*_}}\s]*"  # also \textbf{Answer:}
    r"(\\\[(?s:.{1,2000}?)\\\]|\$\$(?s:.{1,2000}?)\$\$|[^\s*_}][^\n]*)",  # a displayed formula, or the (next) line
    re.IGNORECASE,
)
_EMPHASIS_END = re.compile(r"[*_\s]+$")  # of "**Answer: 42**"
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*([^\s][^\n]*)")
_EDGE = r"(?:[$*_~ ]|\\[()\[\],;:!\\ ]|\\q?quad(?![A-Za-z]))*"  # delimiters, emphasis and spacing
_WORDS = r"(?:and|or|and/or|or (?:else|also|maybe|perhaps|possibly))"
_BETWEEN_BOXES = re.compile(
    rf"{_EDGE}(?:[,;/&]|[,;]?{_EDGE}(?:{_WORDS}|\\(?:text|math)\w*\s*\{{\s*,?\s*{_WORDS}\s*\}}|\\(?:lor|land|vee|wedge)))"
    rf"{_EDGE}",
    re.IGNORECASE,
)
_MAX_BETWEEN_BOXES = 60  # characters, with a space for each run of spaces
_GOLD_SENTENCE = re.compile(r"(?:the|our|so the|final|the final|the correct)? ?answer is:? (\S.{0,80})", re.IGNORECASE)


class _Box(NamedTuple):
    """Offsets in the text of a box's backslash, of its content, and of the end of its closing brace."""

    start: int
    content: int
    end: int


def final_answer(text: str, *, answer_after: str | None = None, gold: bool = False) -> str | None:
    """Return the final answer of ``text`` as written, or None; the module docstring gives the rule.

    Args:
        answer_after: Text after whose last occurrence the answer begins; without an occurrence there is no answer.
        gold: Whether the text is a gold answer, of which "The answer is 42" is read too.
    """
    if answer_after is not None and answer_after not in text:
        return None
    text = text.rpartition(answer_after)[2] if answer_after is not None else text
    text = text.rpartition(THINK_CLOSE)[2].partition(THINK_OPEN)[0]
    boxes = _last_boxes(text)
    end = boxes[-1].end if boxes else 0
    bare = None if boxes else _BARE_BOX.search(text)
    lines = _ANSWER.findall(text, end)
    # A box on an Answer line after the last complete box was never closed: the response was truncated inside it.
    complete = [line for line in lines if not _OPEN_BOX.search(line) or _BARE_BOX.search(line)]
    if bare is not None:
        return bare[1]
    if complete:
        return _EMPHASIS_END.sub("", complete[-1])
    if boxes:
        contents = dict.fromkeys(text[box.content : box.end - 1].strip() for box in boxes)
        return ", ".join(contents) if len(contents) > 1 else text[boxes[-1].content : boxes[-1].end - 1]
    if gold and (sentence := _GOLD_SENTENCE.fullmatch(text.strip())):
        return sentence[1]
    hashes = _HASHES.findall(text)
    return hashes[-1] if hashes else None


def _last_boxes(text: str) -> list[_Box]:
    r"""Return the last balanced \boxed{...}, the outermost if nested, after those that a list joins to it.

    One pass over the text, because a degenerate response may consist of 100,000 braces.
    """
    open_braces: list[re.Match[str]] = []
    found: list[_Box] = []
    for token in _BRACES.finditer(text):
        if token.group() == "}":
            opening = open_braces.pop() if open_braces else None
            if opening and opening.group() != "{":
                box = _Box(opening.start(), opening.end(), token.end())
                while found and found[-1].start > box.start:
                    found.pop()
                if not (found and _are_joined(text[found[-1].end : box.start])):
                    found = []
                found.append(box)
        elif token.group().endswith("{") and token.group() != "\\{":
            open_braces.append(token)
    return found


def _are_joined(between: str) -> bool:
    """Return whether the text between two boxes makes them a list."""
    between = " ".join(between.split())
    return len(between) <= _MAX_BETWEEN_BOXES and _BETWEEN_BOXES.fullmatch(between) is not None
