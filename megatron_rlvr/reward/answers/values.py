"""Equality of expressions: constants at 50 digits and more, decimals by their digits, the others at sampled points."""

from collections.abc import Iterator, Mapping
from fractions import Fraction

from megatron_rlvr.reward.answers.evaluation import Evaluator, TooLarge, Undefined, Value
from megatron_rlvr.reward.answers.expressions import Tree
from megatron_rlvr.reward.answers.structures import symbols

ROUNDED_DIGITS = 6
"""Fewest significant digits with which a decimal may stand for the exact value that rounds to it."""
PRINTED_DIGITS = 9
"""Fewest significant digits at which another decimal counts as exact when a shorter one is its rounding."""
DOUBLE_DIGITS = 16
"""Significant digits from which a decimal is taken for a printed double, which has an error of its last digit."""
DOUBLE_ERROR = Fraction(4, 10**16)
"""Relative error of such a decimal."""

_REAL_POINTS, _INT_POINTS = 8, 6

_evaluators = (Evaluator(60), Evaluator(1100))


def same_value(a: Tree, b: Tree) -> bool:
    """Return whether two trees have the same value, whatever their symbols stand for; False if either has none.

    Raises:
        Nothing: an expression that is undefined, or too large to be computed, equals only its own copy if it is large,
        and nothing if it is undefined.
    """
    free = symbols(a) | symbols(b)
    if not free:
        return _same_constant(a, b)
    compared = 0
    for point in sample_points(sorted(free)):
        outcome = _compare_at(a, b, point)
        if outcome is False:
            return False
        compared += outcome is True
    return compared >= 3


def is_defined(tree: Tree) -> bool:
    """Return whether an expression has a value, at some point if it has symbols."""
    return any(_value(tree, point) is not None for point in sample_points(sorted(symbols(tree))))


def decimal(tree: Tree) -> tuple[Fraction, int, Fraction, bool] | None:
    """Return (value, significant digits, unit of the last place, truncated) of a decimal, also with a power of ten."""
    if tree[0] == "neg":
        inner = decimal(tree[1])
        return None if inner is None else (-inner[0], *inner[1:])
    if tree[0] == "dec":
        return tree[1], tree[2], tree[3], tree[4]
    if tree[0] == "mul" and len(tree) == 3 and tree[2][:2] == ("pow", ("num", Fraction(10))):
        exponent = _value(tree[2][2], {})
        inner = decimal(tree[1])
        if inner is None and tree[1][0] == "num" and tree[1][1].denominator == 1:
            inner = (tree[1][1], len(str(tree[1][1])), Fraction(1), False)
        if inner and isinstance(exponent, Fraction) and exponent.denominator == 1 and abs(exponent) < 10_000:
            scale = Fraction(10) ** int(exponent)
            return inner[0] * scale, inner[1], inner[2] * scale, inner[3]
    return None


def _same_constant(a: Tree, b: Tree) -> bool:
    first, second = decimal(a), decimal(b)
    if first is not None and second is not None:
        return _same_decimals(first, second)
    if first is not None or second is not None:
        written, other = (first, b) if first is not None else (second, a)
        assert written is not None
        return _rounds_to(written, other)
    outcome = _compare_at(a, b, {})
    return outcome is True


def _same_decimals(a: tuple[Fraction, int, Fraction, bool], b: tuple[Fraction, int, Fraction, bool]) -> bool:
    """Equal values; or one is the rounding of a longer one, or differs from a printed double by its rounding error."""
    if a[0] == b[0]:
        return a[3] == b[3]
    short, long = sorted((a, b), key=lambda each: each[1])
    if long[1] >= DOUBLE_DIGITS and abs(short[0] - long[0]) <= abs(long[0]) * DOUBLE_ERROR:
        return True
    if short[1] < ROUNDED_DIGITS or long[1] < PRINTED_DIGITS or short[0].denominator == 1:
        return False
    return abs(short[0] - long[0]) <= short[2] / 2


def _rounds_to(written: tuple[Fraction, int, Fraction, bool], exact: Tree) -> bool:
    """Return whether a decimal is an exact value, its rounding, or with dots its truncation."""
    value, digits, unit, truncated = written
    other = _value(exact, {})
    if other is None:
        return False
    if _compare_at(("num", value), exact, {}):
        return not truncated
    if isinstance(other, Fraction):
        whole = other.denominator == 1
        if whole and abs(other) >= 10 ** (DOUBLE_DIGITS - 1) and digits < DOUBLE_DIGITS:
            return Fraction(float(value)) == other
        error = other - value
    else:
        c = _evaluators[0].context
        if c.im(other) != 0 or c.isinf(other):
            return False
        error = other - _evaluators[0].number(value)
        whole = False
    if digits < ROUNDED_DIGITS or whole or value.denominator == 1:
        return False
    if truncated:
        return 0 <= (error if value > 0 else -error) < unit
    allowed = max(unit / 2, abs(value) * DOUBLE_ERROR if digits >= DOUBLE_DIGITS else Fraction(0))
    return bool(abs(error) <= (allowed if isinstance(error, Fraction) else _evaluators[0].number(allowed)))


def _value(tree: Tree, point: Mapping[str, Fraction]) -> Value | None:
    try:
        return _evaluators[0](tree, point)
    except (Undefined, TooLarge):
        return None


def _compare_at(a: Tree, b: Tree, point: Mapping[str, Fraction]) -> bool | None:
    """Compare two trees at one point: None if either has no real value there (a constant may be complex)."""
    for evaluate in _evaluators:
        try:
            first = evaluate(a, point)
            unreal, lost = evaluate.complex, evaluate.lost
            second = evaluate(b, point)
            unreal, lost = unreal or evaluate.complex, lost or evaluate.lost
        except Undefined:
            return None if point else False
        except TooLarge:
            return canonical(a) == canonical(b)
        if unreal and point:
            return None
        if isinstance(first, Fraction) and isinstance(second, Fraction) and not lost:
            return first == second
        if point and any(evaluate.context.isinf(evaluate.number(value)) for value in (first, second)):
            return None
        close = _close(evaluate, first, second)
        if not lost and (point or not close):
            return close  # only constants are written to differ in late digits
    if lost and canonical(a) != canonical(b) and _absorbed(a, b, point):
        return False
    return close


def _close(evaluate: Evaluator, a: Value, b: Value) -> bool:
    c = evaluate.context
    first, second = evaluate.number(a), evaluate.number(b)
    if c.isinf(first) or c.isinf(second):
        return bool(first == second)
    size = max(abs(first), abs(second))
    tolerance = c.mpf(10) ** (12 - evaluate.digits)
    return bool(size == 0 or abs(first - second) <= size * tolerance)


def _absorbed(a: Tree, b: Tree, point: Mapping[str, Fraction]) -> bool:
    """Return whether a sum in either tree lost a term that may decide, even at the highest precision."""
    for tree in (a, b):
        evaluate = _evaluators[-1]
        evaluate(tree, point)
        if evaluate.absorbed:
            return True
    return False


def canonical(tree: Tree) -> Tree:
    """Return a tree with the terms of sums and the factors of products flattened and in one order."""
    parts = [canonical(part) if isinstance(part, tuple) else part for part in tree[1:]]
    if tree[0] in ("add", "mul"):
        flat: list[Tree] = []
        for part in parts:
            flat += part[1:] if part[0] == tree[0] else [part]
        parts = sorted(flat, key=hash)
    return (tree[0], *parts)


def sample_points(names: list[str]) -> Iterator[dict[str, Fraction]]:
    """Points at which expressions are compared: reals in (0, 1) and above, of both signs, and then ints."""
    if not names:
        yield {}
        return
    for k in range(_REAL_POINTS):
        scale = Fraction(1, 1) if k < 3 else Fraction(5)
        yield {name: scale * _fraction(k, i) * (-1 if k >= 5 and (k + i) % 2 else 1) for i, name in enumerate(names)}
    for k in range(_INT_POINTS):
        yield {name: Fraction((5 * k + 7 * i + 3 * i * k) % 11 + 2) for i, name in enumerate(names)}


def _fraction(k: int, i: int) -> Fraction:
    """A rational in (0, 1) that differs for each point and symbol, with a small denominator for exact arithmetic."""
    return Fraction((37 * k + 61 * i + 17 * i * k) % 97 + 1, 101)


_INTEGRATION_CONSTANTS = ("C", "c", "K", "k", "C_1", "c_1")


def same_form(a: Tree, b: Tree) -> bool:
    """Equality of trees; a constant of integration may have another name."""
    if same_value(a, b):
        return True
    first, second = _numbered_constants(a), _numbered_constants(b)
    if (first, second) != (a, b) and same_value(first, second):
        return True
    only_a, only_b = symbols(a) - symbols(b), symbols(b) - symbols(a)
    if (
        a[0] == b[0] == "add"
        and len(only_a) == len(only_b) == 1
        and (only_a | only_b) <= set(_INTEGRATION_CONSTANTS)
        and "C" in only_a | only_b
    ):
        return same_value(a, renamed(b, *only_b, *only_a))
    return False


def _numbered_constants(tree: Tree) -> Tree:
    """Return a tree with c_1, c_2, ... written as C_1, C_2, ..."""
    for k in range(1, 5):
        if f"C_{k}" not in symbols(tree):
            tree = renamed(tree, f"c_{k}", f"C_{k}")
    return tree


def renamed(tree: Tree, old: str, new: str) -> Tree:
    if tree == ("sym", old):
        return ("sym", new)
    return tuple(renamed(part, old, new) if isinstance(part, tuple) else part for part in tree)
