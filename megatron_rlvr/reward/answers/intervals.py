"""Sets of real numbers as unions of intervals: equality, intersection and difference."""

from typing import Any

from megatron_rlvr.reward.answers import notation as n
from megatron_rlvr.reward.answers.evaluation import Evaluator, TooLarge, Undefined
from megatron_rlvr.reward.answers.expressions import Tree
from megatron_rlvr.reward.answers.structures import (
    Expression,
    Intervals,
    Listing,
    Operation,
    Ordered,
    Reading,
    as_interval,
    symbols,
)
from megatron_rlvr.reward.answers.tokens import Unreadable
from megatron_rlvr.reward.answers.values import same_form


def same_intervals(a: Intervals, b: Intervals) -> bool:
    if a.name is not None and b.name is not None and a.name != b.name:
        return False
    first, second = _merged(a), _merged(b)
    return len(first) == len(second) and all(
        (x[2], x[3]) == (y[2], y[3]) and same_form(x[0], y[0]) and same_form(x[1], y[1])
        for x, y in zip(first, second, strict=True)
    )


_Part = tuple[Tree, Tree, bool, bool]


def _merged(reading: Intervals) -> list[_Part]:
    """The parts in ascending order, those that touch as one; as written if an end has a symbol."""
    try:
        located = [(evaluate_real(part[0]), evaluate_real(part[1]), part) for part in reading.parts]
    except (Undefined, TooLarge):
        return list(reading.parts)
    located = [each for each in located if each[0] < each[1] or (each[0] == each[1] and each[2][2] and each[2][3])]
    merged: list[tuple[Any, Any, _Part]] = []
    for low, high, part in sorted(located, key=lambda each: (each[0], not each[2][2])):
        if merged and (low < merged[-1][1] or (low == merged[-1][1] and (part[2] or merged[-1][2][3]))):
            _, top, last = merged[-1]
            if high > top:
                merged[-1] = (merged[-1][0], high, (last[0], part[1], last[2], part[3]))
            elif high == top:
                merged[-1] = (merged[-1][0], high, (last[0], last[1], last[2], last[3] or part[3]))
        else:
            merged.append((low, high, part))
    return [part for _, _, part in merged]


evaluate_number = Evaluator(60)


def evaluate_real(tree: Tree) -> Any:
    """Value of an end of an interval, for sorting. Raises Undefined, TooLarge."""
    if symbols(tree):
        raise Undefined("a symbol")
    value = evaluate_number.number(evaluate_number(tree, {}))
    if evaluate_number.context.im(value) != 0:
        raise Undefined("a complex end")
    return value


def as_intervals(reading: Reading) -> Intervals | None:
    """Return a reading as a set of reals, if it is one."""
    if isinstance(reading, Intervals):
        return reading
    if isinstance(reading, Ordered):
        try:
            return as_interval(reading)
        except Unreadable:
            return None
    if isinstance(reading, Operation):
        return computed(reading)
    return None


def computed(operation: Operation) -> Intervals | None:
    """Intersection or difference of sets of reals; None if an item is none."""
    items = [as_intervals(_points_as_intervals(item)) for item in operation.items]
    names = {item.name for item in items if item is not None and item.name}
    if None in items or operation.sign not in (n.CAP, n.MINUS_SET) or len(names) > 1:
        return None
    result = items[0]
    assert result is not None
    for item in items[1:]:
        assert item is not None
        other = item.parts if operation.sign == n.CAP else _complement(item)
        try:
            parts = [part for x in result.parts for y in other if (part := _overlap(x, y)) is not None]
        except (Undefined, TooLarge):
            return None
        result = Intervals(tuple(parts), next(iter(names), None))
    return result


def _points_as_intervals(reading: Reading) -> Reading:
    if isinstance(reading, Listing) and reading.items:
        trees = [item.tree for item in reading.items if isinstance(item, Expression)]
        if len(trees) == len(reading.items):
            return Intervals(tuple((tree, tree, True, True) for tree in trees))
    return reading


def _overlap(a: _Part, b: _Part) -> _Part | None:
    low = max(((a[0], a[2]), (b[0], b[2])), key=lambda end: (evaluate_real(end[0]), not end[1]))
    high = min(((a[1], a[3]), (b[1], b[3])), key=lambda end: (evaluate_real(end[0]), end[1]))
    bottom, top = evaluate_real(low[0]), evaluate_real(high[0])
    if bottom > top or (bottom == top and not (low[1] and high[1])):
        return None
    return (low[0], high[0], low[1], high[1])


def _complement(reading: Intervals) -> list[_Part]:
    infinity: Tree = ("const", "inf")
    parts, low, closed = [], ("neg", infinity), False
    for part in _merged(reading):
        parts.append((low, part[0], closed, not part[2]))
        low, closed = part[1], not part[3]
    return [*parts, (low, infinity, closed, False)]


def operation_otherwise(a: Operation, b: Reading) -> bool:
    first, second = computed(a), as_intervals(b)
    return first is not None and second is not None and same_intervals(first, second)


def interval_pair(a: Intervals, b: Ordered) -> bool:
    pair = as_intervals(b)
    return pair is not None and same_intervals(a, pair)
