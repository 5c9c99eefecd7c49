r"""The reader of answers, which reads the whole of an answer or none of it.

`read` never guesses: what is not read as a whole in one of the forms of `structures.py` is text, which equals the same
text only.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from megatron_rlvr.reward.answers import notation as n
from megatron_rlvr.reward.answers.expressions import INFINITY, Tree
from megatron_rlvr.reward.answers.inequalities import read_congruence, read_inequality
from megatron_rlvr.reward.answers.leaves import LINE, read_compound, read_leaf, read_text, split
from megatron_rlvr.reward.answers.structures import (
    Expression,
    Family,
    Intervals,
    Listing,
    Matrix,
    Named,
    Operation,
    Option,
    Ordered,
    Percent,
    Quantity,
    Reading,
    Relation,
    Text,
    as_interval,
    free_symbols,
    symbols,
)
from megatron_rlvr.reward.answers.surroundings import bare, closing_of, unwrap
from megatron_rlvr.reward.answers.tokens import Unreadable

_OPTION = re.compile(r"(?:(?:option|choice|answer)\s*)?(?:\(([A-J])\)|([A-J])(?:[).:]|(?=$)))\s*(.*)", re.IGNORECASE)


_OPTION_TEXT = re.compile(
    r"(?!is\b)(?!.*\b(?:or|and|not|but|wrong|incorrect|maybe|perhaps|probably)\b)[\w' .:/-]{1,60}", re.ASCII
)
_NAME = re.compile(
    r"(?:\\(?:angle|triangle)\s*[A-Z]{1,3}|m\s*\\angle\s*[A-Z]{1,3}|(?:[A-Za-z]|\\[a-z]+)'*(?:_\{?[A-Za-z0-9]+\}?)?"
    r"(?:\s*\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])*\s*\))?|[A-Z]{2,3}|\|[A-Z]{2}\|"
    r"|\\(?:overline|overrightarrow|vec|hat|bar|mathbf)\{?(?<![a-z])[A-Za-z]{1,2}\}?"
    r"|[a-z]\s*\^\s*\{?\s*-1\s*\}?\s*\(\s*[a-z]\s*\)|S_\{?\\triangle [A-Z]+\}?"
    rf"|{n.TEXT_MACROS}\s*\{{(?!\s*(?:not?|wrong|false)\b)[A-Za-z ]{{1,40}}\}}"
    r"|d[a-z]\s*/\s*d[a-z]|\\frac\{d[a-z]\}\{d[a-z]\})"
)


_CONDITION = re.compile(
    rf"(?:,|;|\(|\s)\s*\(?\s*(?:\b(?:where|for|with|and)\b|{n.AND})?\s*(?:\b(?:any|all|every|each|some)\b)?"
    r"\s*(?P<int>int(?:eger)?s?)?\s*(?P<name>[a-zA-Z])\s*"
    rf"(?:{n.IN}\s*\\mathbb\{{(?P<field>[ZNRQC])\}}(?:\^\+|_\+)?|(?:is|are)?\s*(?:an?|any)?\s*(?P<ints>int(?:eger)?s?)"
    r"|(?(int)|(?!)))\s*\)?$"
)


_REMARK = re.compile(  # of known words only: "where it is wrong" is none
    rf"[,;]?\s*\(?(?:\bfor (?:all|any|every|each|some)\b|\bwhere\b|\\forall(?![a-z]))"
    rf"(?:[\s,{{}}{n.IN}]|\\mathbb\{{[A-Z]\}}|{n.TEXT_MACROS}|\b(?:[A-Za-z]|is|are|an|and|any|some|all|the|real|complex"
    r"|rational|positive|negative|non-?negative|non-?zero|arbitrary|fixed|numbers?|int(?:eger)?s?|constants?"
    r"|parameters?|reals?)\b)*\)?$"
)


_MODULUS = re.compile(r"\\[pb]?mod(?![A-Za-z])")


_QUANTIFIER = re.compile(
    r"(?:for )?(?:all|any|every|each)\s+(?:real numbers?|reals?|int(?:eger)?s?)?\s*"
    rf"(?=[a-zA-Z]\s*[=<>{n.LE}{n.GE}{n.NE}{n.IN}])"
)


_TRANSPOSED = re.compile(
    r"([(\[].*,.*[)\]])\s*\^\s*\{?\s*(?:T|\\top|\\intercal|\\mathsf\{T\}|\\mathrm\{T\}|\\text\{T\})\s*\}?"
)


_REMARK_TEXT = re.compile(
    n.TEXT_MACROS + r"\s*\{\s*,?\s*((?:for|where|with|is|any|an?|all|integers?|ints?)\b[A-Za-z ]*?)\s*\}"
)


def read(text: str) -> Reading:
    """Return the reading of an answer, a string as its author wrote it."""
    text = bare(text)
    plain = unwrap(n.strip_text(text))
    try:
        return _read_option(plain) or _read(text)
    except (Unreadable, RecursionError):
        return read_text(plain)


def _read_option(text: str) -> Reading | None:
    match = _OPTION.fullmatch(text)
    if match is None or (not text[:1].isupper() and text[:1] != "("):
        return None
    letter, rest = (match[1] or match[2]), match[3].strip()
    if letter.islower():
        return None
    try:
        content = _read(rest) if rest else None
    except Unreadable:
        content = read_text(rest)
    if isinstance(content, Listing) or (isinstance(content, Text) and not _OPTION_TEXT.fullmatch(rest)):
        return None  # a second answer beside the letter
    return Option(letter, content) if content else Expression(("sym", letter))


def _read(text: str) -> Reading:
    """Return the reading of a normalized text. Raises Unreadable."""
    text = unwrap(text)
    if not text:
        raise Unreadable("empty")
    text = _REMARK_TEXT.sub(r" \1 ", text)
    text = _REMARK.sub("", _QUANTIFIER.sub("", text.lstrip(), count=1)).strip() or text
    if (condition := _CONDITION.search(text)) and condition.start() > 0:
        return _read_family(unwrap(text[: condition.start()]), condition)
    for reader in (
        *(_read_environment, read_compound, _read_list, _read_both_signs),
        *(_read_relation, _read_set, _read_brackets, read_leaf),
    ):
        reading = reader(text)
        if reading is not None:
            return reading
    raise Unreadable(text)


def _read_both_signs(text: str) -> Reading | None:
    """Read a plus-minus sign as two answers, the upper signs and the lower ones; in a set it is about an element."""
    if not {n.PM, n.MP} & set(re.sub(f"{n.SET_OPEN}[^{n.SET_CLOSE}]*", "", text)):
        return None
    upper, lower = (_read(text.translate({ord(n.PM): a, ord(n.MP): b})) for a, b in ("+-", "-+"))
    if isinstance(upper, Intervals) and isinstance(lower, Intervals):
        if n.NE not in text:
            raise Unreadable("a bound with two signs")
        return Operation(n.CAP, (upper, lower))
    return _listing([upper, lower])


def _read_environment(text: str) -> Reading | None:
    r"""A matrix, or a system of equations in `cases` or `aligned`."""
    inner = text
    while inner[:1] in "([" and inner[:1] and closing_of(inner, 0) == len(inner) - 1:
        inner = inner[1:-1].strip()
    match = re.fullmatch(r"\\begin\{(\w+)\*?\}(?:\{[lcr|]*\}|\[[lcr|]*\])?(.*)\\end\{\1\*?\}", inner)
    if match is None:
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
        cells = [
            [re.sub(r"^(?:if|for|when)\b", "", n.strip_text(c).strip(" ,")) for c in row.split("&")] for row in rows
        ]
        return Listing(tuple(Ordered(tuple(read(cell) for cell in row), "cases") for row in cells))
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
    if signs == {n.OR} and any(isinstance(item, Ordered) and _is_no_point(item) for item in readings):
        return _read_set(n.CUP.join(texts)) or _listing(readings)
    if any(item == Expression(("sym", n.DOTS)) for item in readings):
        return Ordered(tuple(readings), "list")
    return _listing(readings)


def _is_no_point(pair: Ordered) -> bool:
    """Return whether a pair in brackets can only be an interval."""
    ends = (Expression(INFINITY), Expression(("neg", INFINITY)))
    return pair.brackets in ("[)", "(]") or any(item in ends for item in pair.items)


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
    return re.fullmatch(
        r"[-+]?\s*(?:\\?\$)?\s*[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]*)?(?:\s*[^0-9,].*)?", text
    ) is not None and not (re.search(r",\s|,\D", text))


def _name_of_list(texts: Sequence[str]) -> Reading | None:
    """n = 2, 3, 4: one name for several values."""
    name, sign, first = texts[0].partition(n.NE if n.NE in texts[0] else "=")
    if not sign or "=" in first or not _NAME.fullmatch(name.strip()):
        return None
    if any(re.search(f"[=<>{n.LE}{n.GE}{n.NE}{n.IN}]", other) for other in texts[1:]):
        return None
    if sign == n.NE:
        excluded = [_read(name + sign + value) for value in (first, *texts[1:])]
        return Operation(n.CAP, tuple(excluded))
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
    name = re.sub(r"[\s{}]", "", n.strip_text(name))
    return re.sub(r"^m\\angle", r"\\angle", name)


def _read_relation(text: str) -> Reading | None:
    signs = f"=<>{n.LE}{n.GE}{n.NE}{n.IN}{n.APPROX}{n.EQUIV}"
    parts = split(text, signs)
    if len(parts) == 1 and not _MODULUS.search(text):
        return None
    sides, between = [part for _, part in parts], [sign for sign, _ in parts[1:]]
    if between == [n.APPROX] and not sides[0]:
        return _approximate(_read(sides[1]))
    if not all(sides):
        raise Unreadable(text)
    if n.EQUIV in between or _MODULUS.search(text):
        return read_congruence(sides, between)
    if between == [n.IN]:
        return _membership(*sides)
    if set(between) <= {"=", n.APPROX}:
        return _read_equation(sides, between)
    if n.IN in between or n.APPROX in between:
        raise Unreadable(text)
    return read_inequality(sides, between)


def _approximate(reading: Reading) -> Reading:
    if isinstance(reading, Expression):
        return Expression(reading.tree, approximate=True)
    if isinstance(reading, Quantity | Percent):
        return reading
    raise Unreadable("an approximate structure")


def _membership(left: str, right: str) -> Reading:
    if reading := _tuple_of_names(left, right):
        return reading
    value = _read(right)
    name = _plain_name(left)
    if not _NAME.fullmatch(left):
        raise Unreadable(left)
    if isinstance(value, Ordered):
        value = as_interval(value)
    if isinstance(value, Intervals):
        return Intervals(value.parts, name)
    return Named(name, value)


def _read_equation(sides: Sequence[str], between: Sequence[str]) -> Reading:
    if len(sides) == 2 and between == ["="] and (reading := _tuple_of_names(*sides)):
        return reading
    *firsts, last = sides
    if _NAME.fullmatch(firsts[0]) and firsts[0] not in (r"\pi", "e"):
        name = _plain_name(firsts[0])
        if len(sides) == 2:
            value = _item(last) if between == ["="] else _approximate(_read(last))
            if "(" in name or not (isinstance(value, Expression) and _is_symbol(value.tree)):
                return Named(name, value)
        elif not (set(between[1:]) == {"="} and all(_NAME.fullmatch(side) for side in sides)):
            rest = _read_equation(sides[1:], between[1:]) if between[0] == "=" else None
            if rest is not None and not (isinstance(rest, Relation) and any(map(symbols, rest.sides))):
                return Named(name, rest)
    elif len(sides) == 2 and _NAME.fullmatch(last) and between == ["="] and last not in (r"\pi", "e"):
        return Named(_plain_name(last), _read(sides[0]))
    trees = tuple(_tree(side) for side in sides)
    return Relation(tuple(between), trees)


def _tree(text: str) -> Tree:
    """Return the tree of a side of a relation, which may be a number with a unit."""
    reading = read_leaf(text)
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
        return LINE
    if half := re.fullmatch(rf"\\mathbb\{{R\}}\s*[\^_]\s*\{{?\s*(\+|[>{n.GE}]\s*0)\s*\}}?", text):
        return Intervals(((("num", Fraction(0)), INFINITY, half[1][0] == n.GE, False),))
    if match := re.fullmatch(r"\\mathbb\{R\}\s*-\s*(" + n.SET_OPEN + ".*)", text):
        return Operation(n.MINUS_SET, (LINE, _read(match[1])))
    return None


def _read_element(text: str) -> Reading:
    item = _read(text)
    if isinstance(item, Ordered):
        return as_interval(item)
    if isinstance(item, Listing) and item.braces:
        points = [value.tree for value in item.items if isinstance(value, Expression)]
        if len(points) == len(item.items):
            return Intervals(tuple((point, point, True, True) for point in points))
    return item


def _read_brackets(text: str) -> Reading | None:
    """A tuple, interval, vector or set: brackets around the whole. The letter of a point may stand before it."""
    if (row := _TRANSPOSED.fullmatch(text)) and closing_of(row[1], 0) == len(row[1]) - 1:
        text = row[1]
    if re.match(r"[A-Z]\s*\(.*,", text) and closing_of(text, text.index("(")) == len(text) - 1:
        point = _read_brackets(text[1:].strip())
        return Named(text[0], point) if isinstance(point, Ordered) and text[0] != "C" else None
    if text[0] not in f"([{n.SET_OPEN}{n.ANGLE_OPEN}" or closing_of(text, 0) != len(text) - 1:
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
    return Ordered(items, kinds[opening + closing])


def _read_braces(inner: str) -> Reading:
    if not inner:
        return Listing((), braces=True)
    parts = split(inner, "|:")
    if len(parts) == 2:
        variable, text = parts[0][1], parts[1][1]
        if len(variable) > 1 and re.fullmatch(rf"[A-Za-z]\s*{n.IN}\s*\\mathbb\{{Z\}}", text):
            return _read(f"{variable}, {text}")
        if re.search(rf"{n.IN}\s*\\mathbb\{{[ZNQC]\}}", text):
            raise Unreadable(inner)  # a set of ints is no interval
        condition = _read(text)
        if not re.fullmatch(rf"[A-Za-z](?:\s*{n.IN}\s*\\mathbb\{{R\}})?", variable):
            raise Unreadable(inner)
        conditions = condition.items if isinstance(condition, Operation) else (condition,)
        sets = [
            Intervals(each.parts) for each in conditions if isinstance(each, Intervals) and each.name == variable[0]
        ]
        if len(sets) == len(conditions):
            return Operation(condition.sign, tuple(sets)) if isinstance(condition, Operation) else sets[0]
        return Named("set " + variable[0], condition)
    reading = _read_list(inner)
    if isinstance(reading, Ordered):
        return Named("set", reading)
    if isinstance(reading, Listing):
        return Listing(reading.items, braces=True)
    if reading is not None:
        raise Unreadable(inner)
    only = _read(inner)
    return Listing(only.items if isinstance(only, Listing) and not only.braces else (only,), braces=True)


def _read_family(text: str, condition: re.Match[str]) -> Reading:
    value = _read(text)
    parameter, field = condition["name"], condition["field"] or "Z"
    if field == "Z" and parameter in free_symbols(value):
        if isinstance(value, Named):
            return Named(value.name, Family(value.value, parameter))
        return Family(value, parameter)
    return value
