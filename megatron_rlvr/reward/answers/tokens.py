"""Tokens of an expression in the notation of ``notation.py``; a character that is none makes all of it unreadable."""

import re
from fractions import Fraction
from typing import NamedTuple

from megatron_rlvr.reward.answers.notation import DEGREE, DIVIDE, DOTS, TEXT_MACROS, TIMES

MAX_EXPONENT = 10_000
"""Largest power of ten in a number such as 1e400; a larger one is not read."""


class Unreadable(Exception):
    """The text is not read as a whole, so it is not read at all."""


class Token(NamedTuple):
    """One token.

    Attributes:
        kind: "number", "word" (letters), "command" (with its backslash), "decorated" (a letter with an accent or a
            font of its own, such as a vector) or "mark" (one character).
        text: Text of the token.
        space: Whether white space stands before it.
        node: The number, for a number.
    """

    kind: str
    text: str
    space: bool
    node: tuple = ()


_TOKEN = re.compile(
    rf"(?P<space>\s*)(?:"
    rf"(?P<fraction>[0-9]*\.[0-9]*)(?P<repeat>\\(?:overline|bar)\s*\{{?[0-9]+\}}?"
    rf"|\\dot\s*\{{?[0-9]\}}?(?:[0-9]*\\dot\s*\{{?[0-9]\}}?)?|\([0-9]+\)|\s?{DOTS})"
    r"|(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
    r"(?P<exponent>[eE][+-]?[0-9]+(?![0-9A-Za-z.]))?"
    r"|\\(?:vec|mathbf|boldsymbol|bm|hat|bar|overline|overrightarrow|mathcal|mathfrak|tilde|mathscr|widehat|underline)"
    r"\s*(?P<decorated>\{\s*[A-Za-z]{1,3}\s*\}|(?<![a-z])[A-Za-z](?![A-Za-z]))"
    r"|\\(?P<shape>triangle|angle|square|arc)\s*(?P<points>[A-Z]{1,4}(?:')?)"
    rf"|(?P<macro>{TEXT_MACROS})\s*\{{(?P<content>[^{{}}]*)\}}"
    r"|(?P<command>\\[A-Za-z]+)"
    r"|(?P<word>[A-Za-z]+'*)"
    rf"|(?P<mark>[-+*/^_=(){{}}\[\]|!,:<>{TIMES}{DIVIDE}{DEGREE}{DOTS}])"
    r")"
)
_REPEATING = re.compile(r"([0-9]+?)\1+$")


def tokenize(text: str) -> list[Token]:
    """Return the tokens of ``text``.

    Raises:
        Unreadable: If a part of it is no token.
    """
    tokens: list[Token] = []
    position, text = 0, text.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or match.end() == position:
            raise Unreadable(text[position:])
        tokens += _tokens(match)
        position = match.end()
    return tokens


def _tokens(match: re.Match[str]) -> list[Token]:
    space = bool(match["space"])
    if match["number"]:
        return [Token("number", match["number"], space, _number(match["number"], match["exponent"]))]
    if match["fraction"]:
        whole, _, part = match["fraction"].partition(".")
        repeat = re.sub(rf"\\[a-z]+|[^0-9{DOTS}]", "", match["repeat"])
        return [Token("number", match["fraction"] + match["repeat"], space, _repeating(whole, part, repeat))]
    if match["decorated"]:
        macro = match[0].strip().split("{")[0].strip().lstrip("\\")
        name = match["decorated"].strip("{} ")
        return [Token("decorated", f"{_DECORATIONS.get(macro, macro)} {name}", space)]
    if match["shape"]:
        return [Token("decorated", f"{match['shape']} {match['points']}", space)]
    if match["macro"]:
        inner = match["content"].strip()
        if not re.fullmatch(r"[A-Za-z]+|[0-9.,]+", inner):
            raise Unreadable(inner)
        return [token._replace(space=True) for token in tokenize(inner)]
    for kind in ("command", "word", "mark"):
        if match[kind]:
            return [Token(kind, match[kind], space)]
    raise Unreadable(match[0])


# Fonts and arrows that mark vectors are one decoration.
_DECORATIONS = {
    **dict.fromkeys(("mathbf", "boldsymbol", "bm", "vec", "overrightarrow"), "vector"),
    **dict.fromkeys(("hat", "widehat"), "hat"),
}


def _number(digits: str, exponent: str | None) -> tuple:
    """Return ("num", value) or ("dec", value, significant digits, unit of the last place, truncated)."""
    if exponent and (len(exponent) > 8 or abs(int(exponent[1:])) > MAX_EXPONENT):
        raise Unreadable(digits)
    scale = Fraction(10) ** int(exponent[1:] if exponent else 0)
    whole, _, part = digits.replace(",", "").partition(".")
    if not part and not exponent:
        return ("num", Fraction(int(whole)))
    return _decimal(whole, part, scale, truncated=False)


def _decimal(whole: str, part: str, scale: Fraction, *, truncated: bool) -> tuple:
    unit = scale / 10 ** len(part)
    return ("dec", int(whole + part or "0") * unit, len((whole + part).lstrip("0")) or 1, unit, truncated)


def _repeating(whole: str, part: str, period: str) -> tuple:
    """Return the number of a decimal whose period is marked, or that ends in dots.

    Dots continue a period that is written at least twice, or three times if it is one digit; otherwise they mean that
    the decimal is truncated.
    """
    if period == DOTS:
        match = _REPEATING.search(part)
        if match is None or len(match[0]) < 3:
            return _decimal(whole, part, Fraction(1), truncated=True)
        part, period = part[: match.start()], match[1]
    fixed = Fraction(int(whole + part or "0"), 10 ** len(part))
    return ("num", fixed + Fraction(int(period), 10 ** len(part) * (10 ** len(period) - 1)))
