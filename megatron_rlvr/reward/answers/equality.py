"""Equality of two readings. The table of docs/rewards.md says which forms are equal; this module is that table.

A property counts where both sides state it: a name, an order, a unit, a base. A side that does not state it is compared
without it, so that 42, x = 42 and 42 cm are equal, and x = 42 and y = 42, or 42 cm and 42 m, are not.
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from megatron_rlvr.reward.answers import notation as n
from megatron_rlvr.reward.answers.evaluation import TooLarge, Undefined
from megatron_rlvr.reward.answers.expressions import Tree
from megatron_rlvr.reward.answers.intervals import (
    computed,
    evaluate_number,
    evaluate_real,
    interval_pair,
    operation_otherwise,
    same_intervals,
)
from megatron_rlvr.reward.answers.structures import (
    Based,
    Congruence,
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
    Ratio,
    Reading,
    Relation,
    Text,
    free_symbols,
    symbols,
)
from megatron_rlvr.reward.answers.values import decimal, is_defined, renamed, same_form, same_value, sample_points

_MAX_ITEMS = 60

_OF_A_NAME = ("abs", "sin", "cos", "tan", "cot", "sec", "csc")
"""Functions whose value at a name is what a problem asks for."""


def equal(a: Reading, b: Reading) -> bool:
    """Return whether two readings are equal; symmetric."""
    if type(a) is type(b):
        return _SAME_KIND[type(a)](a, b)
    for first, second in ((a, b), (b, a)):
        if (compare := _ACROSS.get((type(first), type(second)))) is not None:
            return compare(first, second)
    for kind in (Named, Option, Family, Quantity, Operation):  # the outermost structure first
        for first, second in ((a, b), (b, a)):
            if isinstance(first, kind):
                return _OTHERWISE[kind](first, second)
    return False


def _expressions(a: Expression, b: Expression) -> bool:
    for first, second in ((a, b), (b, a)):
        if first.approximate and not second.approximate:
            written, other = decimal(first.tree), decimal(second.tree)
            return written is not None and other is not None and same_value(first.tree, second.tree)
    return same_form(a.tree, b.tree)


def _listings(a: Listing, b: Listing) -> bool:
    """Equal values in any order. In braces, repeats do not count."""
    if a.braces and b.braces:
        return all(any(_items_equal(x, y) for y in b.items) for x in a.items) and all(
            any(_items_equal(x, y) for x in a.items) for y in b.items
        )
    return _any_order(a.items, b.items)


def _any_order(a: Sequence[Reading], b: Sequence[Reading]) -> bool:
    """Match each value of one side with one of the other. Names decide, so x = 2, y = 3 is no list of 3 and 2."""
    if len(a) != len(b) or len(a) > _MAX_ITEMS:
        return False
    named_a, named_b = _all_names(a), _all_names(b)
    if (named_a is None) != (named_b is None):
        names, values = (a, b) if named_a else (b, a)
        return _in_order(_by_name(names), values)
    remaining = list(b)
    for item in a:
        found = next((k for k, other in enumerate(remaining) if _items_equal(item, other)), None)
        if found is None:
            return False
        del remaining[found]
    return True


def _items_equal(a: Reading, b: Reading) -> bool:
    """Equality within a structure, where a set with one element is not that element."""
    return equal(a, b) and (type(a) is type(b) or not any(isinstance(x, Listing) and x.braces for x in (a, b)))


def _all_names(items: Sequence[Reading]) -> list[str] | None:
    """The names of the values if each has its own."""
    names = [item.name for item in items if isinstance(item, Named)]
    return names if len(names) == len(items) > 1 and len(set(names)) == len(names) else None


def _by_name(items: Sequence[Reading]) -> list[Reading]:
    """Values in the order of their names if these follow each other in the alphabet, else as written."""
    names = _all_names(items) or []
    letters = sorted(names)
    follow = all(len(name) == 1 for name in names) and ord(letters[-1]) - ord(letters[0]) == len(letters) - 1
    numbered = all(re.fullmatch(r"[A-Za-z]_\d", name) for name in names)
    ordered = (
        sorted(items, key=lambda item: item.name if isinstance(item, Named) else "") if follow or numbered else items
    )
    return [item.value for item in ordered if isinstance(item, Named)]


def _in_order(a: Sequence[Reading], b: Sequence[Reading]) -> bool:
    return len(a) == len(b) <= _MAX_ITEMS and all(map(_items_equal, a, b))


def _sequences(a: Ordered, b: Ordered) -> bool:
    if a.brackets != b.brackets and not {a.brackets, b.brackets} <= {"()", "<>"}:
        return False
    return _in_order(a.items, b.items)


def _matrices(a: Matrix, b: Matrix) -> bool:
    return len(a.rows) == len(b.rows) and all(_in_order(x, y) for x, y in zip(a.rows, b.rows, strict=True))


def _vector(a: Matrix, b: Ordered) -> bool:
    """A matrix with one column or one row equals a tuple."""
    if b.brackets not in ("()", "<>", "[]"):
        return False
    row = [row[0] for row in a.rows] if all(len(row) == 1 for row in a.rows) else list(a.rows[0])
    return len(row) == sum(map(len, a.rows)) and _in_order(row, b.items)


def _named(a: Named, b: Named) -> bool:
    return a.name == b.name and equal(a.value, b.value)


def _named_otherwise(a: Named, b: Reading) -> bool:
    """A named value and one without a name: the values; an equation of both is a relation."""
    if isinstance(b, Relation):
        return isinstance(a.value, Expression) and bool(symbols(a.value.tree)) and _relations(_as_relation(a), b)
    if a.name.startswith("set"):
        return False
    return equal(a.value, b)


def _as_relation(a: Named) -> Relation:
    assert isinstance(a.value, Expression)
    return Relation(("=",), (("sym", a.name), a.value.tree))


def _relations(a: Relation, b: Relation) -> bool:
    """The same chain, or equations and inequalities that differ by a constant factor."""
    if a.signs != b.signs:
        return False
    if a.signs == ("=",) and _in_either_order(a.sides, b.sides):
        return True
    if a.signs in (("=",), ("<",), (n.LE,)) and _proportional(a, b, positive=a.signs != ("=",)):
        return True
    return len(a.sides) == len(b.sides) and all(map(same_form, a.sides, b.sides))


def _in_either_order(a: Sequence[Tree], b: Sequence[Tree]) -> bool:
    return any(all(map(same_form, a, order)) for order in (b, b[::-1]))


def _proportional(a: Relation, b: Relation, *, positive: bool) -> bool:
    """Return whether left minus right of one is that of the other times a constant, which is not 0."""
    names = sorted(set().union(*map(symbols, (*a.sides, *b.sides))))
    if len(names) < 2:  # an equation in one unknown is a problem and not its solution
        return False
    ratios = []
    for point in sample_points(names):
        try:
            first, second = (evaluate_number(("add", each.sides[0], ("neg", each.sides[1])), point) for each in (a, b))
        except (Undefined, TooLarge):
            continue
        if first == 0 and second == 0:
            continue
        if first == 0 or second == 0:
            return False
        ratios.append(
            first / second
            if isinstance(first, Fraction) and isinstance(second, Fraction)
            else evaluate_number.number(first) / second
        )
    context = evaluate_number.context
    close = all(
        abs(context.mpf(1) * evaluate_number.number(r) / evaluate_number.number(ratios[0]) - 1) < 1e-40 for r in ratios
    )
    return len(ratios) >= 4 and close and (not positive or ratios[0] > 0)


def _equation_value(a: Relation, b: Expression) -> bool:
    r"""A chain of equal values such as 22/7 = 3 1/7 \approx 3.14 is its first value; m + n = 7 is 7."""
    if a.signs[0] == "=" and _names_value(a.sides[0]):
        rest = a.sides[1:]
        return _equation_value(Relation(a.signs[1:], rest), b) if rest[1:] else _expressions(Expression(rest[0]), b)
    if not set(a.signs) <= {"=", n.APPROX}:
        return False
    first = a.sides[0]
    for sign, side in zip(a.signs, a.sides[1:], strict=True):
        if sign == "=" and not same_value(first, side):
            return False
        if sign == n.APPROX and not _rounding(first, side):
            return False
    return _expressions(Expression(first), b)


def _names_value(side: Tree) -> bool:
    """Return whether a side of an equation names what is asked for: |S|, f(2), m + n, AB/CD or sin A, but not |x|."""
    if side[0] in ("add", "div"):
        return all(map(_is_name, side[1:]))
    return side[0] == "apply" or (side[0] == "call" and side[1] in _OF_A_NAME and all(map(_is_name, side[2:])))


def _is_name(tree: Tree) -> bool:
    """Return whether a tree is a symbol or a segment such as AB; x, y and z are unknowns of an equation."""
    if tree[0] == "mul":
        return all(part[0] == "sym" and re.fullmatch("[A-Z]", part[1]) for part in tree[1:])
    return tree[0] == "sym" and tree[1] not in "xyz"


def _rounding(exact: Tree, rounded: Tree) -> bool:
    written = decimal(rounded)
    try:
        value = evaluate_real(exact)
        unit = written[2] if written else Fraction(1)
        return abs(value - evaluate_real(rounded)) <= evaluate_number.number(unit / 2)
    except (Undefined, TooLarge):
        return False


def _quantities(a: Quantity, b: Quantity) -> bool:
    if a.unit.dimension != b.unit.dimension:
        radians = [_radians(each) for each in (a, b)]
        return None not in radians and same_value(*radians)  # type: ignore[arg-type]
    if a.unit.factor == b.unit.factor:
        return same_value(a.tree, b.tree)
    return same_value(*(("mul", each.tree, ("num", each.unit.factor)) for each in (a, b)))


def _radians(angle: Quantity) -> Tree | None:
    """Return the number of radians of an angle, whose factor to degrees is no rational; None of another quantity."""
    by_unit: dict[tuple, Tree] = {((n.DEGREE, 1),): ("call", "degrees", angle.tree), (("rad", 1),): angle.tree}
    return by_unit.get(angle.unit.dimension)


def _quantity_otherwise(a: Quantity, b: Reading) -> bool:
    """A number with a unit and one without: the numbers; or in the base unit if it is written as a power of ten."""
    if not isinstance(b, Expression | Ratio):
        return False
    if a.product is not None and equal(Expression(a.product), b):
        return True
    if equal(Expression(a.tree), b):
        return True
    scientific = isinstance(b, Expression) and b.tree[0] == "mul" and decimal(b.tree) is not None
    return scientific and a.unit.prefixed and same_value(("mul", a.tree, ("num", a.unit.factor)), b.tree)  # type: ignore[union-attr]


def _percent(a: Percent, b: Expression) -> bool:
    return same_value(a.tree, b.tree) or same_value(("div", a.tree, ("num", Fraction(100))), b.tree)


def _ratios(a: Ratio, b: Ratio) -> bool:
    if len(a.parts) != len(b.parts):
        return False
    if all(map(same_value, a.parts, b.parts)):
        return True
    if a.clock and b.clock:
        return False
    first = list(zip(a.parts, b.parts, strict=True))
    return all(is_defined(x) and same_value(("mul", x, first[0][1]), ("mul", y, first[0][0])) for x, y in first[1:])


def _ratio_value(a: Ratio, b: Expression) -> bool:
    return len(a.parts) == 2 and not a.clock and same_value(("div", *a.parts), b.tree)


def _based(a: Based, b: Based) -> bool:
    return a == b


def _based_value(a: Based, b: Expression) -> bool:
    """The digits as written, or the value; letters among the digits leave only the value."""
    if same_value(("num", Fraction(int(a.digits, a.base))), b.tree):
        return True
    return a.digits.isdecimal() and same_value(("num", Fraction(int(a.digits))), b.tree)


def _options(a: Option, b: Option) -> bool:
    return a.letter == b.letter and equal(a.content, b.content)


def _option_otherwise(a: Option, b: Reading) -> bool:
    if isinstance(b, Expression) and b.tree[0] == "sym" and re.fullmatch("[A-J]", b.tree[1]):
        return b.tree[1] == a.letter
    return equal(a.content, b)


def _congruences(a: Congruence, b: Congruence) -> bool:
    if a.left is not None and b.left is not None and not same_form(a.left, b.left):
        return False
    if not same_value(a.modulus, b.modulus):
        return False
    difference: Tree = ("div", ("add", a.right, ("neg", b.right)), a.modulus)
    return same_value(a.right, b.right) or same_value(difference, ("call", "floor", difference))


def _families(a: Family, b: Family) -> bool:
    """Values for every int: the same form after renaming, or a progression shifted by whole steps."""
    first, second = (_members(each.value, each.parameter) for each in (a, b))
    if first is None or second is None or len(first) != len(second):
        return False
    remaining = list(second)
    for x in first:
        found = next((k for k, y in enumerate(remaining) if _same_progression(x, a.parameter, y, b.parameter)), None)
        if found is None:
            return False
        del remaining[found]
    return True


def _members(reading: Reading, parameter: str) -> list[Tree] | None:
    items = reading.items if isinstance(reading, Listing) else (reading,)
    trees = [item.tree for item in items if isinstance(item, Expression)]
    return trees if len(trees) == len(items) else None


def _same_progression(a: Tree, name: str, b: Tree, other: str) -> bool:
    b = renamed(b, other, name) if other != name else b
    if same_value(a, b):
        return True
    steps = []
    for tree in (a, b):
        at = [_substituted(tree, name, ("num", Fraction(k))) for k in (0, 1, 2)]
        first: Tree = ("add", at[1], ("neg", at[0]))
        if not same_value(first, ("add", at[2], ("neg", at[1]))):
            return False
        steps.append((at[0], first))
    (start, step), (other_start, other_step) = steps
    if not any(same_value(step, each) for each in (other_step, ("neg", other_step))):
        return False
    shift: Tree = ("div", ("add", start, ("neg", other_start)), step)
    return same_value(shift, ("call", "floor", shift))


def _substituted(tree: Tree, name: str, value: Tree) -> Tree:
    if tree == ("sym", name):
        return value
    return tuple(_substituted(part, name, value) if isinstance(part, tuple) else part for part in tree)


def _family_otherwise(a: Family, b: Reading) -> bool:
    """A family and one that does not say what its parameter is."""
    names = free_symbols(b) - (free_symbols(a.value) - {a.parameter})
    if isinstance(b, Named):
        return False
    return len(names) == 1 and _families(a, Family(b, *names))


def _operations(a: Operation, b: Operation) -> bool:
    first, second = computed(a), computed(b)
    if first is not None and second is not None:
        return same_intervals(first, second)
    if a.sign != b.sign:
        return False
    return _in_order(a.items, b.items) if a.sign == n.MINUS_SET else _any_order(a.items, b.items)


def _singleton(a: Listing, b: Expression) -> bool:
    """A set with one element is that element."""
    return a.braces and len(a.items) == 1 and _items_equal(a.items[0], b)


def _named_tuple(a: Listing, b: Ordered) -> bool:
    """x = 1, y = 2 is (1, 2); a list without names is no tuple."""
    return b.brackets in ("()", "<>") and _all_names(a.items) is not None and _in_order(_by_name(a.items), b.items)


def _named_system(a: Listing, b: Named) -> bool:
    """x = 1, y = 2 is (x, y) = (1, 2); a list of values is a named list of them."""
    if b.name.startswith("(") and isinstance(b.value, Ordered):
        names = b.name.strip("()").split(",")
        own = {item.name: item.value for item in a.items if isinstance(item, Named)}
        return (
            len(own) == len(a.items)
            and sorted(own) == sorted(names)
            and _in_order([own[name] for name in names], b.value.items)
        )
    own_names = [item.name for item in a.items if isinstance(item, Named)]
    if own_names and all(re.fullmatch(re.escape(b.name) + r"_\d", name) for name in own_names):
        return equal(Listing(tuple(item.value for item in a.items if isinstance(item, Named))), b.value)
    if any(name != b.name for name in own_names):
        return False
    return isinstance(b.value, Listing) and _listings(a, b.value)


_SAME_KIND: dict[type, Callable[..., bool]] = {
    Text: lambda a, b: a.text == b.text != "",
    Expression: _expressions,
    Listing: _listings,
    Ordered: _sequences,
    Matrix: _matrices,
    Intervals: same_intervals,
    Named: _named,
    Relation: _relations,
    Quantity: _quantities,
    Percent: lambda a, b: same_value(a.tree, b.tree),
    Ratio: _ratios,
    Based: _based,
    Option: _options,
    Congruence: _congruences,
    Family: _families,
    Operation: _operations,
}


_ACROSS: dict[tuple[type, type], Callable[..., bool]] = {
    (Matrix, Ordered): _vector,
    (Intervals, Ordered): interval_pair,
    (Relation, Expression): _equation_value,
    (Percent, Expression): _percent,
    (Ratio, Expression): _ratio_value,
    (Based, Expression): _based_value,
    (Listing, Ordered): _named_tuple,
    (Listing, Named): _named_system,
    (Listing, Expression): _singleton,
}


_OTHERWISE: dict[type, Callable[..., bool]] = {
    Named: _named_otherwise,
    Option: _option_otherwise,
    Family: _family_otherwise,
    Quantity: _quantity_otherwise,
    Operation: operation_otherwise,
}
