r"""Answers as structures: a list, a tuple, a set of numbers, an equation, a number with a unit, text, ...

`read` never guesses: what is not read as a whole in one of the forms below is text, which equals the same text only.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_rlvr.reward.answers import notation as n
from megatron_rlvr.reward.answers.expressions import Tree, parse
from megatron_rlvr.reward.answers.tokens import Unreadable
from megatron_rlvr.reward.answers.units import CURRENCIES, Unit, number_word, parse_unit, phrase


@dataclass(frozen=True)
class Text:
    """Text, in the form in which it is compared; ``readable`` if it is a short phrase and no failed formula."""

    text: str
    readable: bool


@dataclass(frozen=True)
class Expression:
    """An expression without structure; ``approximate`` if a sign such as the one of 3.14 for pi stands before it."""

    tree: Tree
    approximate: bool = False


@dataclass(frozen=True)
class Listing:
    """Values in any order: "1, 2", "1 or 2", "plus-minus 3"; with ``braces`` a set, in which repeats do not count."""

    items: tuple["Reading", ...]
    braces: bool = False


@dataclass(frozen=True)
class Sequence_:
    """Values in order: a tuple, a vector, or with ``brackets`` such as "[)" perhaps an interval."""

    items: tuple["Reading", ...]
    brackets: str = "()"


@dataclass(frozen=True)
class Matrix:
    """A matrix by rows."""

    rows: tuple[tuple["Reading", ...], ...]


@dataclass(frozen=True)
class Intervals:
    """A union of intervals (low, high, low is in it, high is in it), of the values of ``name`` if one is given."""

    parts: tuple[tuple[Tree, Tree, bool, bool], ...]
    name: str | None = None


@dataclass(frozen=True)
class Named:
    """A value with its name: "x = 3"."""

    name: str
    value: "Reading"


@dataclass(frozen=True)
class Relation:
    """Expressions with relations between them: an equation, an inequality, or a chain of them."""

    signs: tuple[str, ...]
    sides: tuple[Tree, ...]


@dataclass(frozen=True)
class Quantity:
    """A number with a unit; ``product`` is the reading in which the unit is a variable."""

    tree: Tree
    unit: Unit
    product: Tree | None = None


@dataclass(frozen=True)
class Percent:
    """A number of percent."""

    tree: Tree


@dataclass(frozen=True)
class Ratio:
    """A ratio a : b : c, or a time of day, as written."""

    parts: tuple[Tree, ...]
    clock: bool = False


@dataclass(frozen=True)
class Based:
    """Digits in a base other than ten."""

    digits: str
    base: int


@dataclass(frozen=True)
class Option:
    """The letter of an option with the content of the option."""

    letter: str
    content: "Reading"


@dataclass(frozen=True)
class Congruence:
    """A residue modulo a number, of the expression ``left`` if one is given."""

    left: Tree | None
    right: Tree
    modulus: Tree


@dataclass(frozen=True)
class Family:
    """Values for every int that the parameter stands for: pi/4 + k pi."""

    value: "Reading"
    parameter: str


@dataclass(frozen=True)
class Operation:
    """A union, intersection or difference of named sets, or the like."""

    sign: str
    items: tuple["Reading", ...]


Reading = (
    Text | Expression | Listing | Sequence_ | Matrix | Intervals | Named | Relation | Quantity | Percent | Ratio | Based
    | Option | Congruence | Family | Operation
)  # fmt: skip

_OPEN, _CLOSE = f"([{{{n.SET_OPEN}{n.ANGLE_OPEN}", f")]}}{n.SET_CLOSE}{n.ANGLE_CLOSE}"
_INFINITY = ("const", "inf")
_LINE = Intervals(((("neg", _INFINITY), _INFINITY, False, False),))
_OPTION = re.compile(r"(?:(?:option|choice|answer)\s*)?(?:\(([A-J])\)|([A-J])(?:[).:]|(?=$)))\s*(.*)", re.IGNORECASE)
_NAME = re.compile(
    r"(?:\\(?:angle|triangle)\s*[A-Z]{1,3}|m\s*\\angle\s*[A-Z]{1,3}|(?:[A-Za-z]|\\[a-z]+)'*(?:_\{?[A-Za-z0-9]+\}?)?"
    r"(?:\s*\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])*\s*\))?|[A-Z]{2,3}|\|[A-Z]{2}\||\\overline\{[A-Z]{2}\}|S_\{?\\triangle [A-Z]+\}?"
    r"|d[a-z]\s*/\s*d[a-z]|\\frac\{d[a-z]\}\{d[a-z]\})"
)
_CONDITION = re.compile(
    rf"(?:,|;|\(|\s)\s*\(?\s*(?:\b(?:where|for|with|and)\b|{n.AND})?\s*(?:\b(?:any|all|every|each|some)\b)?\s*(?:int(?:eger)?s?)?\s*"
    rf"([a-zA-Z])\s*(?:{n.IN}\s*\\mathbb\{{([ZNRQC])\}}(?:\^\+|_\+)?|(?:is|are)?\s*(?:an?|any)?\s*(int(?:eger)?s?))\s*\)?$"
)
_REMARK = re.compile(
    r"[,;]?\s*\(?(?:\bfor (?:all|any|every|each|some)\b|\bwhere\b|\\forall(?![a-z]))[A-Za-z ,'" + n.IN + r"\\{}]{0,60}\)?$"
)
_FINAL_STOP = re.compile(n.TEXT_MACROS + r"\s*\{[\s.,;]*\}$")
_REMARK_TEXT = re.compile(
    n.TEXT_MACROS + r"\s*\{\s*,?\s*((?:for|where|with|is|any|an?|all|integers?|ints?)\b[A-Za-z ]*?)\s*\}"
)
_TAIL_TEXT = re.compile(
    r"(?:(?:\s*(?:/|\u00d7|\\cdot)?\s*" + n.TEXT_MACROS + r"\s*\{[^{}]*\}(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?)+)\s*\.?$"
)
_TAIL_WORDS = re.compile(r"(?<=[0-9)}\s!])\s*((?:[A-Za-z" + CURRENCIES + r"\u00a2\u00b0./*^{}\d-]|\\mu|\s|\\cdot){1,40})$")


def read(text: str) -> Reading:
    """Return the reading of an answer, a string as its author wrote it."""
    text = _unwrap(n.normalize(text.strip(" *_`\n")))
    plain = _unwrap(n.strip_text(text))
    try:
        return _read_option(plain) or _read(text)
    except (Unreadable, RecursionError):
        return read_text(plain)


def read_text(plain: str) -> Reading:
    """Return text as a reading: a number word, a phrase that is a set, or the text."""
    words = phrase(plain)
    if (number := number_word(words)) is not None:
        return Expression(("num", Fraction(number)))
    if words in ("no solution", "empty set", "the empty set"):
        return Listing((), braces=True)
    if words == "all real numbers":
        return _LINE
    readable = bool(re.fullmatch(r"[^\W_][\w' .:,/-]*", words)) and len(words.split()) <= 6
    return Text(words, readable)


def _read_option(text: str) -> Reading | None:
    match = _OPTION.fullmatch(text)
    if match is None or not text[:1].isupper() and text[:1] != "(":
        return None
    letter, rest = (match[1] or match[2]), match[3].strip()
    if letter.islower():
        return None
    return Option(letter, read(rest)) if rest else Expression(("sym", letter))


def _read(text: str) -> Reading:
    """Return the reading of a normalized text. Raises Unreadable."""
    text = _unwrap(text)
    if not text:
        raise Unreadable("empty")
    text = _REMARK_TEXT.sub(r" \1 ", text)
    text = _REMARK.sub("", text).strip() or text
    if (condition := _CONDITION.search(text)) and condition.start() > 0:
        return _read_family(_unwrap(text[: condition.start()]), condition)
    for reader in (_read_environment, _read_list, _read_relation, _read_set, _read_brackets, _read_leaf):
        reading = reader(text)
        if reading is not None:
            return reading
    raise Unreadable(text)


def _unwrap(text: str) -> str:
    """Remove surrounding delimiters, emphasis, boxes and braces, and final punctuation."""
    while True:
        shorter = text.strip().strip("*`").strip().rstrip(".,;:").strip() if not text.endswith(n.DOTS) else text
        if shorter.count("$") % 2 == 0 and "\\$" not in shorter:
            shorter = shorter.replace("$", " ").strip()
        shorter = _FINAL_STOP.sub("", shorter)
        if (match := re.match(n.TEXT_MACROS + r"\s*\{|\\(?:boxed|fbox|bf|rm)\s*\{|\{", shorter)) and shorter.endswith("}"):
            if _closing(shorter, match.end() - 1) == len(shorter) - 1:
                shorter = shorter[match.end() : -1]
        if shorter == text:
            return text
        text = shorter


def _closing(text: str, start: int) -> int:
    """Return the offset of the bracket that closes the one at ``start``, of any kind; -1 if there is none."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] in _OPEN) - (text[position] in _CLOSE)
        if depth == 0:
            return position
    return -1


def split(text: str, separators: str) -> list[tuple[str, str]]:
    """Split at separators outside of brackets: (separator before the part, part), the first separator being empty."""
    parts, depth, start, before = [], 0, 0, ""
    for position, character in enumerate(text):
        if character in _OPEN:
            depth += 1
        elif character in _CLOSE:
            depth -= 1
        elif depth == 0 and character in separators:
            parts.append((before, text[start:position].strip()))
            before, start = character, position + 1
    if depth != 0:
        raise Unreadable("unbalanced brackets")
    return [*parts, (before, text[start:].strip())]


def _read_environment(text: str) -> Reading | None:
    r"""A matrix, or a system of equations in `cases` or `aligned`."""
    inner = text
    while inner[:1] in "([" and inner[:1] and _closing(inner, 0) == len(inner) - 1:
        inner = inner[1:-1].strip()
    match = re.fullmatch(r"\\begin\{(\w+)\*?\}(?:\{[lcr|]*\}|\[[lcr|]*\])?(.*)\\end\{\1\*?\}", inner)
    if match is None:
        if r"\begin" in text:
            raise Unreadable(text)
        return None
    kind, body = match[1], match[2]
    if r"\begin" in body:
        raise Unreadable(text)
    rows = [row.strip() for row in re.split(r"\\\\(?:\[\w+\])?|\\cr", body) if row.strip()]
    if kind in ("pmatrix", "bmatrix", "matrix", "array", "smallmatrix", "Bmatrix"):
        return Matrix(tuple(tuple(_read(cell) for cell in row.split("&")) for row in rows))
    if kind not in ("cases", "aligned", "align", "gathered", "split"):
        raise Unreadable(text)
    if kind == "cases" and all(row.count("&") == 1 for row in rows):
        cells = [[re.sub(r"^(?:if|for|when)\b", "", n.strip_text(c).strip(" ,")) for c in row.split("&")] for row in rows]
        return Listing(tuple(Sequence_(tuple(read(cell) for cell in row), "cases") for row in cells))
    return _listing([_read(row.replace("&", "").strip(" ,")) for row in rows])


def _read_list(text: str) -> Reading | None:
    """Values separated by commas or words; conditions on one name are one set of numbers."""
    marked = re.sub(rf"\s*{n.TEXT_MACROS}\s*\{{\s*,?\s*(and|or)\s*,?\s*\}}\s*", r" \1 ", text)
    for word, sign in (("and", n.AND), ("or", n.OR)):
        marked = re.sub(rf",?\s*(?<![A-Za-z\\]){word}(?![A-Za-z])", sign, marked)
    if _is_thousands(marked):
        return None
    parts = split(marked, "," + ";" + n.AND + n.OR)
    if len(parts) == 1:
        return None
    texts = [re.sub(r"^\s*both\s|^either\s", "", part) for _, part in parts]
    if not all(texts):
        raise Unreadable(text)
    signs = {sign for sign, _ in parts[1:]}
    if re.match(r"\(?\s*[a-z]\s*\)?", texts[0]) and (chained := _name_of_list(texts)):
        return chained
    readings = [_item(part) for part in texts]
    if all(isinstance(item, Intervals) and item.name for item in readings):
        return _conditions(readings, signs)  # type: ignore[arg-type]
    if any(item == Expression(("sym", n.DOTS)) for item in readings):
        return Sequence_(tuple(readings), "list")
    return _listing(readings)


def _item(text: str) -> Reading:
    if text == n.DOTS:
        return Expression(("sym", n.DOTS))
    try:
        return _read(text)
    except Unreadable:
        plain = n.strip_text(text)
        if not re.fullmatch(r"[^\W\d_]+(?:[ -][^\W\d_]+){0,3}", plain):
            raise
        return read_text(plain)


def _is_thousands(text: str) -> bool:
    return re.fullmatch(r"[-+]?\s*(?:\\?\$)?\s*[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]*)?(?:\s*[^0-9,].*)?", text) is not None and not (
        re.search(r",\s|,\D", text)
    )


def _name_of_list(texts: Sequence[str]) -> Reading | None:
    """n = 2, 3, 4: one name for several values."""
    name, sign, first = texts[0].partition("=")
    if not sign or "=" in first or not _NAME.fullmatch(name.strip()):
        return None
    if any(re.search(f"[=<>{n.LE}{n.GE}{n.NE}{n.IN}]", other) for other in texts[1:]):
        return None
    return Named(_plain_name(name), _listing([_item(text) for text in (first.strip(), *texts[1:])]))


def _conditions(readings: Sequence[Intervals], signs: set[str]) -> Reading:
    names = {reading.name for reading in readings}
    if len(names) > 1:
        return Listing(tuple(readings))
    if signs == {n.OR}:
        return Intervals(tuple(part for reading in readings for part in reading.parts), readings[0].name)
    return Operation(n.CAP, tuple(readings))


def _listing(items: Sequence[Reading]) -> Reading:
    """A list; the same name for every item is the name of the list."""
    flat: list[Reading] = []
    for item in items:
        if isinstance(item, Listing) and not item.braces:
            flat += item.items
        elif isinstance(item, Named) and isinstance(item.value, Listing) and not item.value.braces:
            flat += [Named(item.name, value) for value in item.value.items]
        else:
            flat.append(item)
    names = {item.name if isinstance(item, Named) else None for item in flat}
    if len(names) == 1 and None not in names and len(flat) > 1:
        return Named(names.pop() or "", Listing(tuple(item.value for item in flat if isinstance(item, Named))))
    return Listing(tuple(flat)) if len(flat) != 1 else flat[0]


def _plain_name(name: str) -> str:
    name = re.sub(r"[\s{}]", "", name)
    return re.sub(r"^m\\angle", r"\\angle", name)


def _read_relation(text: str) -> Reading | None:
    signs = f"=<>{n.LE}{n.GE}{n.NE}{n.IN}{n.APPROX}{n.EQUIV}"
    parts = split(text, signs)
    if len(parts) == 1:
        return None
    sides, between = [part for _, part in parts], [sign for sign, _ in parts[1:]]
    if between == [n.APPROX] and not sides[0]:
        return _approximate(_read(sides[1]))
    if not all(sides):
        raise Unreadable(text)
    if n.EQUIV in between or re.search(r"\\[pb]?mod", text):
        return _read_congruence(sides, between)
    if between == [n.IN]:
        return _membership(*sides)
    if set(between) <= {"=", n.APPROX}:
        return _read_equation(sides, between)
    if n.IN in between or n.APPROX in between:
        raise Unreadable(text)
    return _read_inequality(sides, between)


def _approximate(reading: Reading) -> Reading:
    if isinstance(reading, Expression):
        return Expression(reading.tree, approximate=True)
    if isinstance(reading, Quantity | Percent):
        return reading
    raise Unreadable("an approximate structure")


def _membership(left: str, right: str) -> Reading:
    value = _read(right)
    name = _plain_name(left)
    if not _NAME.fullmatch(left):
        raise Unreadable(left)
    if isinstance(value, Sequence_):
        value = as_interval(value)
    if isinstance(value, Intervals):
        return Intervals(value.parts, name)
    return Named(name, value)


def as_interval(reading: Sequence_) -> Intervals:
    """Return a pair as an interval.

    Raises:
        Unreadable: If it is no pair in such brackets.
    """
    ends = [item.tree for item in reading.items if isinstance(item, Expression)]
    if len(ends) != 2 or len(reading.items) != 2 or len(reading.brackets) != 2 or reading.brackets[0] not in "([":
        raise Unreadable("no interval")
    return Intervals(((ends[0], ends[1], reading.brackets[0] == "[", reading.brackets[1] == "]"),))


def _read_congruence(sides: Sequence[str], between: Sequence[str]) -> Reading:
    last = re.fullmatch(r"(.*?)\s*,?\s*\(?\s*\\[pb]?mod\s*(?:\{(.*?)\}|(.*?))\s*\)?", n.strip_text(sides[-1]))
    if last is None or len(sides) > 2 or (between and between[0] not in (n.EQUIV, "=")):
        raise Unreadable("a congruence")
    left = parse(sides[0]) if len(sides) == 2 else None
    return Congruence(left, parse(last[1]), parse(last[2] or last[3]))


def _read_equation(sides: Sequence[str], between: Sequence[str]) -> Reading:
    if len(sides) == 2 and between == ["="] and (reading := _tuple_of_names(*sides)):
        return reading
    *firsts, last = sides
    if _NAME.fullmatch(firsts[0]) and firsts[0] not in (r"\pi", "e"):
        name = _plain_name(firsts[0])
        if len(sides) == 2:
            value = _item(last) if between == ["="] else _approximate(_read(last))
            if not (isinstance(value, Expression) and _is_symbol(value.tree)):
                return Named(name, value)
        elif not (set(between[1:]) == {"="} and all(_NAME.fullmatch(side) for side in sides)):
            rest = _read_equation(sides[1:], between[1:]) if between[0] == "=" else None
            if rest is not None and not isinstance(rest, Relation):
                return Named(name, rest)
    elif len(sides) == 2 and _NAME.fullmatch(last) and between == ["="] and last not in (r"\pi", "e"):
        return Named(_plain_name(last), _read(sides[0]))
    trees = tuple(_tree(side) for side in sides)
    return Relation(tuple(between), trees)


def _tree(text: str) -> Tree:
    """Return the tree of a side of a relation, which may be a number with a unit."""
    reading = _read_leaf(text)
    if not isinstance(reading, Expression):
        raise Unreadable(text)
    return reading.tree


def _is_symbol(tree: Tree) -> bool:
    return tree[0] == "sym" or (tree[0] == "const" and tree[1] != "inf" and tree[1] != "pi")


def _tuple_of_names(left: str, right: str) -> Reading | None:
    """(x, y) = (1, 2), and a list of such pairs."""
    match = re.fullmatch(r"\(\s*([A-Za-z](?:_\{?\w\}?)?(?:\s*,\s*[A-Za-z](?:_\{?\w\}?)?)+)\s*\)", left)
    if match is None:
        return None
    return Named("(" + re.sub(r"\s", "", match[1]) + ")", _read(right))


_MIRRORED = {"<": ">", ">": "<", n.LE: n.GE, n.GE: n.LE}


def _read_inequality(sides: Sequence[str], between: Sequence[str]) -> Reading:
    trees = [parse(side) for side in sides]
    if len(trees) == 2 and trees[1][0] == "sym" and trees[0][0] != "sym" and between[0] in _MIRRORED:
        trees, between = trees[::-1], [_MIRRORED[between[0]]]
    if len(trees) == 3 and set(between) <= {">", n.GE}:
        trees, between = trees[::-1], [_MIRRORED[sign] for sign in between[::-1]]
    below, above = ("neg", _INFINITY), _INFINITY
    if len(trees) == 2 and _is_name(sides, trees[0]) and not symbols(trees[1]):
        name, end, sign = trees[0][1], trees[1], between[0]
        if sign == n.NE:
            return Intervals(((below, end, False, False), (end, above, False, False)), name)
        if sign in "<" + n.LE:
            return Intervals(((below, end, False, sign == n.LE),), name)
        return Intervals(((end, above, sign == n.GE, False),), name)
    middle = len(trees) == 3 and trees[1][0] == "sym" and not symbols(trees[0]) and not symbols(trees[2])
    if middle and set(between) <= {"<", n.LE}:
        return Intervals(((trees[0], trees[2], between[0] == n.LE, between[1] == n.LE),), trees[1][1])
    if len(trees) == 2 and between[0] in (">", n.GE):
        trees, between = trees[::-1], [_MIRRORED[between[0]]]
    return Relation(tuple(between), tuple(trees))


def _is_name(sides: Sequence[str], tree: Tree) -> bool:
    return tree[0] == "sym"


def symbols(tree: Tree) -> frozenset[str]:
    """Return the free symbols of a tree."""
    if tree[0] == "sym":
        return frozenset((tree[1],))
    if tree[0] in ("sum", "prod"):
        return symbols(tree[2]) | symbols(tree[3]) | (symbols(tree[4]) - {tree[1]})
    return frozenset().union(*(symbols(part) for part in tree[1:] if isinstance(part, tuple)))


def _read_set(text: str) -> Reading | None:
    """Unions, intersections and differences."""
    for sign in (n.CUP, n.CAP, n.MINUS_SET):
        parts = split(text, sign)
        if len(parts) == 1:
            continue
        items = [_read_element(part) for _, part in parts]
        if sign == n.CUP and all(isinstance(item, Intervals) for item in items):
            return Intervals(tuple(part for item in items for part in item.parts))  # type: ignore[union-attr]
        return Operation(sign, tuple(items))
    if text in (r"\mathbb{R}", r"\mathbb {R}"):
        return _LINE
    if match := re.fullmatch(r"\\mathbb\{R\}\s*-\s*(" + n.SET_OPEN + ".*)", text):
        return Operation(n.MINUS_SET, (_LINE, _read(match[1])))
    return None


def _read_element(text: str) -> Reading:
    item = _read(text)
    if isinstance(item, Sequence_):
        return as_interval(item)
    if isinstance(item, Listing) and item.braces:
        points = [value.tree for value in item.items if isinstance(value, Expression)]
        if len(points) == len(item.items):
            return Intervals(tuple((point, point, True, True) for point in points))
    return item


def _read_brackets(text: str) -> Reading | None:
    """A tuple, interval, vector or set: brackets around the whole."""
    if text[0] not in f"([{n.SET_OPEN}{n.ANGLE_OPEN}" or _closing(text, 0) != len(text) - 1:
        return Listing((), braces=True) if text == r"\emptyset" else None
    opening, inner, closing = text[0], text[1:-1].strip(), text[-1]
    if opening == n.SET_OPEN:
        if closing != n.SET_CLOSE:
            raise Unreadable(text)
        return _read_braces(inner)
    parts = [part for _, part in split(inner, ",;")]
    if len(parts) == 1 or _is_thousands(inner):
        if opening == "[" and closing == "]":
            return _read(inner.strip('"'))
        if opening + closing != "()":
            raise Unreadable(text)
        return None
    kinds = {"()": "()", "[]": "[]", "[)": "[)", "(]": "(]", n.ANGLE_OPEN + n.ANGLE_CLOSE: "<>"}
    if opening + closing not in kinds:
        raise Unreadable(text)
    items = tuple(_item(part) for part in parts)
    return Sequence_(items, kinds[opening + closing])


def _read_braces(inner: str) -> Reading:
    if not inner:
        return Listing((), braces=True)
    parts = split(inner, "|:")
    if len(parts) == 2:
        variable, condition = parts[0][1], _read(parts[1][1])
        if not re.fullmatch(rf"[A-Za-z](?:\s*{n.IN}\s*\\mathbb\{{R\}})?", variable):
            raise Unreadable(inner)
        if isinstance(condition, Intervals) and condition.name == variable[0]:
            return Intervals(condition.parts)
        return Named("set " + variable[0], condition)
    reading = _read_list(inner)
    if isinstance(reading, Sequence_):
        return Named("set", reading)
    if isinstance(reading, Listing):
        return Listing(reading.items, braces=True)
    if reading is not None:
        raise Unreadable(inner)
    only = _read(inner)
    return Listing(only.items if isinstance(only, Listing) and not only.braces else (only,), braces=True)


def _read_family(text: str, condition: re.Match[str]) -> Reading:
    value = _read(text)
    parameter, field = condition[1], condition[2] or ("Z" if condition[3] else "")
    if field == "Z" and parameter in free_symbols(value):
        if isinstance(value, Named):
            return Named(value.name, Family(value.value, parameter))
        return Family(value, parameter)
    return value


def free_symbols(reading: Reading) -> frozenset[str]:
    """Return the free symbols of the expressions in a reading."""
    if isinstance(reading, Expression):
        return symbols(reading.tree)
    if isinstance(reading, Named):
        return free_symbols(reading.value)
    if isinstance(reading, Listing | Sequence_):
        return frozenset().union(*(free_symbols(item) for item in reading.items))
    return frozenset()


def _read_leaf(text: str) -> Reading | None:
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
    tree = parse(text)
    if _has_sign(tree):
        return Listing(tuple(Expression(with_sign(tree, sign)) for sign in (1, -1)))
    return Expression(tree)


def _is_word_of_mathematics(text: str) -> bool:
    """Letters that are an expression: a constant, or variables whose order does not matter."""
    return re.fullmatch(r"pi|inf|infinity|[xyzt]+|[a-z]?[a-z]?pi", text) is not None


def _has_sign(tree: Tree) -> bool:
    return tree[0] == "pm" or any(isinstance(part, tuple) and _has_sign(part) for part in tree[1:])


def with_sign(tree: Tree, sign: int) -> Tree:
    """Return a tree with each plus-minus sign replaced by one of the two."""
    if tree[0] == "pm":
        inner = with_sign(tree[2], sign)
        return inner if tree[1] * sign > 0 else ("neg", inner)
    return tuple(with_sign(part, sign) if isinstance(part, tuple) else part for part in tree)


def _read_based(text: str) -> Reading | None:
    plain = n.strip_text(text)
    match = re.fullmatch(r"\(?\s*([0-9A-F]+)\s*\)?\s*_\s*(?:\{\s*([0-9]{1,2}|two|three|eight|ten|sixteen)\s*\}|([0-9]))", plain)
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
    match = re.fullmatch(rf"([-+]?)\s*\\?([{CURRENCIES}])\s*([0-9.,]+)", text)
    if match is None:
        return None
    unit = parse_unit(match[2], known=True)
    assert unit is not None
    tree = parse(match[3])
    return Quantity(("neg", tree) if match[1] == "-" else tree, unit)


def _read_time(text: str) -> Reading | None:
    plain = n.strip_text(text)
    match = re.fullmatch(r"([0-9]{1,2})(?::([0-5][0-9]))?\s*([ap])\.?\s?m\.?", plain, re.IGNORECASE)
    if match is None:
        return None
    return Text(f"{int(match[1])}:{match[2] or '00'} {match[3].lower()}m", readable=True)


def _read_ratio(text: str) -> Reading | None:
    text = re.sub(rf"\s*{n.TEXT_MACROS}\s*\{{\s*to\s*\}}\s*|(?<=[0-9])\s+to\s+(?=[0-9])", ":", text)
    parts = [part for _, part in split(text, ":")]
    if len(parts) == 1:
        return None
    if not all(parts) or n.DOTS in parts:
        raise Unreadable(text)
    clock = len(parts) == 2 and re.fullmatch(r"[0-9]{1,2}", parts[0]) and re.fullmatch(r"[0-5][0-9]", parts[1])
    return Ratio(tuple(parse(part) for part in parts), bool(clock) and int(parts[0]) < 24)


def _read_quantity(text: str) -> Reading | None:
    match = _TAIL_TEXT.search(text)
    if match is not None and match.start() > 0:
        unit = parse_unit(n.strip_text(match[0]), known=False)
        return None if unit is None else Quantity(parse(text[: match.start()]), unit)
    match = _TAIL_WORDS.search(text)
    while match is not None and match.start() > 0:
        words = match[1]
        unit = parse_unit(words, known=True)
        body = text[: match.start()].strip()
        if unit is not None and body and not (len(words.strip()) == 1 and not words[0].isspace() and words.isalpha() and text[match.start(1) - 1] != " "):
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
