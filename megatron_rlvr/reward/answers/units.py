r"""Units, currencies, number words and phrases: the tables of the grader.

A unit is a factor to the base unit of its dimension and the dimension, a mapping from base units to exponents. A word
that is no unit here is a unit of its own (``18 \text{ eggs}``), equal to itself only.
"""

import re
from fractions import Fraction
from typing import NamedTuple

_PREFIXES = {"n": -9, "u": -6, r"\mu": -6, "m": -3, "c": -2, "d": -1, "k": 3, "M": 6, "G": 9, "T": 12, "p": -12}
_PREFIX_WORDS = {"nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1, "kilo": 3, "mega": 6, "giga": 9}
_F = Fraction


class Unit(NamedTuple):
    """A unit: ``factor`` base units of ``dimension``, as sorted pairs (base unit, exponent)."""

    factor: Fraction
    dimension: tuple[tuple[str, int], ...]
    prefixed: bool = False


def _table() -> dict[str, tuple[Fraction, str]]:
    """{name: (factor, base unit)} of all names that plain text may use."""
    metric = {
        "m": ("meter", "metre"),
        "g": ("gram", "gramme"),
        "s": ("second", "sec"),
        "L": ("liter", "litre"),
        "J": ("joule",),
        "W": ("watt",),
        "N": ("newton",),
        "V": ("volt",),
        "A": ("ampere", "amp"),
        "Pa": ("pascal",),
        "Hz": ("hertz",),
        "mol": ("mole",),
        "K": ("kelvin",),
        "C": ("coulomb",),
        "eV": ("electronvolt",),
        "B": ("byte",),
    }
    units: dict[str, tuple[Fraction, str]] = {}
    for symbol, words in metric.items():
        units[symbol] = (_F(1), symbol)
        for prefix, power in _PREFIXES.items():
            units[prefix + symbol] = (_F(10) ** power, symbol)
        for word in words:
            for prefix, power in {"": 0, **_PREFIX_WORDS}.items():
                for ending in ("", "s"):
                    units[prefix + word + ending] = (_F(10) ** power, symbol)
    units |= {"mL": units.pop("mL"), "ml": (_F(1, 1000), "L"), "l": (_F(1), "L"), "cc": (_F(1, 1000), "L")}
    for factor, base, names in (
        (_F(1), "\u00b0", "degree degrees deg \u00b0"),
        (_F(1), "\u00b0C", "\u00b0C celsius"),
        (_F(1), "\u00b0F", "\u00b0F fahrenheit"),
        (_F(1), "rad", "rad radian radians"),
        (_F(60), "s", "minute minutes min mins"),
        (_F(3600), "s", "hour hours hr hrs h"),
        (_F(86400), "s", "day days"),
        (_F(604800), "s", "week weeks"),
        (_F(1), "month", "month months"),
        (_F(12), "month", "year years yr yrs"),
        (_F(254, 10000), "m", "inch inches in"),
        (_F(3048, 10000), "m", "foot feet ft"),
        (_F(9144, 10000), "m", "yard yards yd yds"),
        (_F(1609344, 1000), "m", "mile miles mi"),
        (_F(1000000), "g", "ton tons tonne tonnes"),
        (_F(45359237, 100000), "g", "pound pounds lb lbs"),
        (_F(45359237, 1600000), "g", "ounce ounces oz"),
        (_F(3785411784, 1000000000), "L", "gallon gallons gal"),
        (_F(1), "dollar", "dollar dollars $ USD usd"),
        (_F(1, 100), "dollar", "cent cents \u00a2"),
        (_F(1), "euro", "euro euros \u20ac EUR"),
        (_F(1), "pound sterling", "\u00a3 GBP"),
        (_F(1), "yen", "yen \u00a5"),
        (_F(1), "rupee", "rupee rupees \u20b9"),
        (_F(1), "yuan", "yuan"),
        (_F(1), "unit", "unit units"),
        (_F(1), "person", "person people persons"),
        (_F(1), "ohm", "ohm ohms"),
        (_F(1), "decibel", "dB"),
    ):
        units |= dict.fromkeys(names.split(), (factor, base))
    return units


_UNITS = _table()
_HEDGES = (
    "or and not no is are to if about approximately approx maybe perhaps guess wrong plus minus times more less than "
    "over by either unless otherwise almost nearly between from through until but except mod modulo base"
)
CURRENCIES = "$\u20ac\u00a3\u00a5\u20b9"
_FACTOR = re.compile(
    r"(?P<times>\s*(?:/|\bper\b|\\cdot|\u00d7|\*|\.|-|\s))?\s*"
    r"(?P<square>square|cubic|sq\.?|cu\.?)?\s*(?P<name>\\mu\s?[A-Za-z]+|\u00b0[CF]?|["
    + CURRENCIES
    + r"\u00a2]|[A-Za-z]+)\.?"
    r"(?:\^?\s*\{?\s*(?P<power>-?[1-4])\s*\}?)?",
    re.ASCII,
)


def parse_unit(text: str, *, known: bool) -> Unit | None:
    """Return the unit that ``text`` names as a whole, or None.

    Args:
        text: Such as "cm^2", "km/h" or "square meters".
        known: Whether every word must be in the tables; otherwise a few unknown words are a unit of their own.
    """
    text = re.sub(r"\bmph\b", "mile/hour", text.strip().strip(".").strip())
    position, factor, dimension, prefixed = 0, Fraction(1), dict[str, int](), False
    while position < len(text):
        match = _FACTOR.match(text, position)
        if match is None or match.end() == position:
            return None
        name = re.sub(r"\\mu\s?", "u", match["name"])
        unit = _UNITS.get(name) or (_UNITS.get(name.lower()) if len(name) > 2 else None)
        if unit is None:
            return None if known else _own_unit(text)
        power = int(match["power"] or 1)
        power *= {"s": 2, "c": 3}.get((match["square"] or " ")[0], 1)
        if match["times"] and match["times"].strip() in ("/", "per"):
            power = -power
        factor *= unit[0] ** power
        prefixed = prefixed or (unit[0] != 1 and str(unit[0]).strip("1/0") == "")
        dimension[unit[1]] = dimension.get(unit[1], 0) + power
        position = match.end()
    return Unit(factor, tuple(sorted(dimension.items())), prefixed) if dimension else None


def _own_unit(text: str) -> Unit | None:
    """A unit of at most three words that are not in the tables, such as "eggs" or "square units"."""
    words, hedges = text.lower().split(), _HEDGES.split()
    plain = all(re.fullmatch(r"[a-z]{2,}|\([a-z]{2,}\)", word) and word not in hedges for word in words)
    if not plain or not 0 < len(words) <= 3 or set(words) & _NUMBER_WORDS.keys():
        return None
    return Unit(Fraction(1), ((" ".join(word.rstrip("s") for word in words), 1),))


_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_NUMBER_WORDS = (
    {word: number for number, word in enumerate(_ONES)}
    | {word: 10 * number for number, word in enumerate(_TENS, start=2)}
    | {
        f"{tens}-{ones}": 10 * a + b
        for a, tens in enumerate(_TENS, start=2)
        for b, ones in enumerate(_ONES[1:10], start=1)
    }
    | {"hundred": 100, "one hundred": 100, "thousand": 1000, "one thousand": 1000, "one million": 10**6}
)

# Phrases that say the same; the first of a row stands for all.
_PHRASES = (
    ("no solution", "no solutions", "no real solution", "no real solutions", "none"),
    ("does not exist", "dne", "doesn't exist", "limit does not exist", "the limit does not exist"),
    ("all real numbers", "all reals", "all real x"),
    ("infinitely many", "infinite", "infinitely many solutions", "infinite solutions", "infinite number of solutions"),
    ("diverges", "divergent", "it diverges", "the series diverges"),
    ("converges", "convergent", "it converges", "the series converges"),
)
_SAME = {phrase: row[0] for row in _PHRASES for phrase in row}


def number_word(text: str) -> int | None:
    """Return the number that an English number word names, or None."""
    return _NUMBER_WORDS.get(text.lower())


def phrase(text: str) -> str:
    """Return text in the form in which it is compared: without case and final punctuation, synonyms as one."""
    plain = re.sub(r"\s+", " ", text.casefold().strip(" .!$")).strip()
    plain = re.sub(r"^there (?:is|are) |(?<=solution) exists$|(?<=solutions) exist$", "", plain)
    return _SAME.get(plain, plain)
