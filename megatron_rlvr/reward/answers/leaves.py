"""Readers of answers without structure: text, a number with a unit, a ratio, a number in a base, an expression."""

import re
from fractions import Fraction

from megatron_rlvr.reward.answers import notation as n
from megatron_rlvr.reward.answers.expressions import INFINITY, Tree, parse
from megatron_rlvr.reward.answers.structures import (
    Based,
    Expression,
    Intervals,
    Listing,
    Percent,
    Quantity,
    Ratio,
    Reading,
    Text,
)
from megatron_rlvr.reward.answers.tokens import Unreadable
from megatron_rlvr.reward.answers.units import CURRENCIES, Unit, number_word, parse_unit, phrase

OPEN, CLOSE = f"([{{{n.SET_OPEN}{n.ANGLE_OPEN}", f")]}}{n.SET_CLOSE}{n.ANGLE_CLOSE}"


_DEGREES = Unit(Fraction(1), ((n.DEGREE, 1),))


LINE = Intervals(((("neg", INFINITY), INFINITY, False, False),))


_TAIL_TEXT = re.compile(
    r"(?:(?:\s*(?:/|\u00d7|\\cdot)?\s*" + n.TEXT_MACROS + r"\s*\{[^{}]*\}(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?)+)\s*\.?$"
)


_TAIL_WORDS = re.compile(
    r"(?<=[0-9)}\s!])\s*((?:[A-Za-z" + CURRENCIES + r"\u00a2\u00b0./*^{}\d-]|\\mu|\s|\\cdot){1,40})$"
)


def read_text(plain: str) -> Reading:
    """Return text as a reading: a number word, a phrase that is a set, or the text."""
    words = phrase(plain)
    if (number := number_word(words)) is not None:
        return Expression(("num", Fraction(number)))
    if words in ("no solution", "empty set", "the empty set"):
        return Listing((), braces=True)
    if words == "infinitely many":
        return Expression(INFINITY)
    if words == "all real numbers":
        return LINE
    readable = bool(re.fullmatch(r"[^\W_][\w' .:,/-]*", words)) and len(words.split()) <= 6
    return Text(words, readable)


def split(text: str, separators: str) -> list[tuple[str, str]]:
    """Split at separators outside of brackets: (separator before the part, part), the first separator being empty."""
    parts, depth, start, before = [], 0, 0, ""
    for position, character in enumerate(text):
        if character in OPEN or text.startswith(r"\begin{", position):
            depth += 1
        elif character in CLOSE or text.startswith(r"\end{", position):
            depth -= 1
        elif depth == 0 and character in separators:
            parts.append((before, text[start:position].strip()))
            before, start = character, position + 1
    if depth != 0:
        raise Unreadable("unbalanced brackets")
    return [*parts, (before, text[start:].strip())]


def read_leaf(text: str) -> Reading | None:
    """A number with a unit, a percentage, a ratio, a number in a base, letters, or an expression."""
    text = text.strip()
    for reader in (_read_based, _read_money, _read_time, _read_ratio):
        if (reading := reader(text)) is not None:
            return reading
    if text.endswith(n.PERCENT):
        return Percent(parse(text[:-1]))
    if (percent := re.fullmatch(r"(.*[0-9}])\s*(?:\\text\{)?\s*percent\s*\}?", text)) is not None:
        return Percent(parse(percent[1]))
    if (quantity := _read_quantity(text)) is not None:
        return quantity
    if re.fullmatch(r"[A-Za-z]{2,}(?:'s)?", n.strip_text(text)) and not _is_word_of_mathematics(text):
        return read_text(n.strip_text(text))
    return _measured(parse(text))


def _measured(tree: Tree) -> Reading:
    """An expression, or a number of degrees: their sign is a unit, but not within the argument of a function."""
    number = _without_degrees(tree)
    return Expression(tree) if number == tree else Quantity(number, _DEGREES, tree)


def _without_degrees(tree: Tree) -> Tree:
    if tree[:2] == ("call", "degrees"):
        return tree[2]
    if tree[0] in ("call", "apply"):
        return tree
    return tuple(_without_degrees(part) if isinstance(part, tuple) else part for part in tree)


def _is_word_of_mathematics(text: str) -> bool:
    """Letters that are an expression: a constant, or variables whose order does not matter."""
    return re.fullmatch(r"pi|inf|infinity|[xyzt]+|[a-z]?[a-z]?pi", text) is not None


def _read_based(text: str) -> Reading | None:
    plain = n.strip_text(text)
    match = re.fullmatch(r"\(?\s*([0-9A-F]+)\s*\)?\s*_\s*(?:\{\s*([0-9]{1,2}|[a-z]+)\s*\}|([0-9]))", plain)
    match = match or re.fullmatch(r"([0-9A-F]+)\s*\(?\s*(?:in )?base[ -]([0-9]{1,2}|[a-z]+)()\s*\)?", plain)
    if match is None:
        return None
    name = match[2] or match[3]
    base = number_word(name) if name.isalpha() else int(name)
    digits = match[1]
    if base is None or not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits):
        return None
    if base == 10:
        return Expression(("num", Fraction(int(digits))))
    return Based(digits.lstrip("0") or "0", base)


def _read_money(text: str) -> Reading | None:
    match = re.fullmatch(rf"([-+]?)\s*\\?([{CURRENCIES}])\s*(.+)", text)
    if match is None:
        return None
    unit = parse_unit(match[2], known=True)
    assert unit is not None
    tree = parse(match[3])
    return Quantity(("neg", tree) if match[1] == "-" else tree, unit)


def _read_time(text: str) -> Reading | None:
    plain = n.strip_text(text)
    match = re.fullmatch(r"(0?[1-9]|1[0-2])(?::([0-5][0-9]))?\s*([ap])\.?\s?m\.?", plain, re.IGNORECASE)
    if match is None:
        return None
    hour = int(match[1]) % 12 + (12 if match[3] in "pP" else 0)
    return Ratio((("num", Fraction(hour)), ("num", Fraction(match[2] or 0))), clock=True)


def _read_ratio(text: str) -> Reading | None:
    text = re.sub(rf"\s*{n.TEXT_MACROS}\s*\{{\s*to\s*\}}\s*|(?<=[0-9])\s+to\s+(?=[0-9])", ":", text)
    parts = [part for _, part in split(text, ":")]
    if len(parts) == 1:
        return None
    if not all(parts) or n.DOTS in parts:
        raise Unreadable(text)
    clock = len(parts) == 2 and re.fullmatch(r"[0-9]{1,2}", parts[0]) and re.fullmatch(r"[0-5][0-9]", parts[1])
    return Ratio(tuple(parse(part) for part in parts), bool(clock) and int(parts[0]) < 24)


def read_compound(text: str) -> Quantity | None:
    """A number in units of one dimension, the larger before the smaller: 2 hours and 30 minutes."""
    parts = re.split(r"\s+(?:and\s+)?(?=[0-9])", n.strip_text(text))
    found: list[tuple[int, Unit]] = []
    for part in parts:
        match = re.fullmatch(r"([0-9]+)\s*([A-Za-z]{2,})", part)
        unit = parse_unit(match[2], known=True) if match else None
        if match is None or unit is None:
            return None
        if found and (unit.dimension != found[-1][1].dimension or unit.factor >= found[-1][1].factor):
            return None
        found.append((int(match[1]), unit))
    smallest = found[-1][1]
    total = sum((number * unit.factor / smallest.factor for number, unit in found), Fraction(0))
    return Quantity(("num", total), smallest) if len(found) > 1 else None


def _read_quantity(text: str) -> Reading | None:
    match = _TAIL_TEXT.search(text)
    if match is not None and match.start() > 0:
        unit = parse_unit(n.strip_text(match[0]), known=False)
        return None if unit is None else Quantity(parse(text[: match.start()]), unit)
    match = _TAIL_WORDS.search(text)
    while match is not None and match.start() > 0:
        words = match[1]
        unit = parse_unit(words, known=True) if words != n.DEGREE else None
        body = text[: match.start()].strip()
        if (
            unit is not None
            and body
            and not (
                len(words.strip()) == 1
                and not words[0].isspace()
                and words.isalpha()
                and text[match.start(1) - 1] != " "
            )
        ):
            try:
                tree = parse(body)
            except Unreadable:
                tree = None
            if tree is not None:
                try:
                    product = parse(text)
                except Unreadable:
                    product = None
                return Quantity(tree, unit, product)
        match = _TAIL_WORDS.search(text, match.start() + 1)
    return None
