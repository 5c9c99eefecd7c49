"""Readers of inequalities, which are sets of real numbers if they bound one variable, and of congruences."""

import re
from collections.abc import Sequence

from megatron_rlvr.reward.answers import notation as n
from megatron_rlvr.reward.answers.expressions import INFINITY, Tree, parse
from megatron_rlvr.reward.answers.structures import Congruence, Intervals, Reading, Relation, symbols
from megatron_rlvr.reward.answers.tokens import Unreadable


def read_congruence(sides: Sequence[str], between: Sequence[str]) -> Reading:
    last = re.fullmatch(r"(.*?)\s*,?\s*\(?\s*\\[pb]?mod\s*(?:\{(.*?)\}|(.*?))\s*\)?", n.strip_text(sides[-1]))
    if last is None or len(sides) > 2 or (between and between[0] not in (n.EQUIV, "=")):
        raise Unreadable("a congruence")
    left = parse(sides[0]) if len(sides) == 2 else None
    return Congruence(left, parse(last[1]), parse(last[2] or last[3] or ""))


_MIRRORED = {"<": ">", ">": "<", n.LE: n.GE, n.GE: n.LE}


def read_inequality(sides: Sequence[str], between: Sequence[str]) -> Reading:
    trees = [parse(side) for side in sides]
    if len(trees) == 2 and trees[1][0] == "sym" and trees[0][0] != "sym" and between[0] in _MIRRORED:
        trees, between = trees[::-1], [_MIRRORED[between[0]]]
    if len(trees) == 3 and set(between) <= {">", n.GE}:
        trees, between = trees[::-1], [_MIRRORED[sign] for sign in between[::-1]]
    below, above = ("neg", INFINITY), INFINITY
    if len(trees) == 2 and trees[0][0] == "sym" and not symbols(trees[1]):
        name, end, sign = trees[0][1], trees[1], between[0]
        if sign == n.NE:
            return Intervals(((below, end, False, False), (end, above, False, False)), name)
        if sign in "<" + n.LE:
            return Intervals(((below, end, False, sign == n.LE),), name)
        return Intervals(((end, above, sign == n.GE, False),), name)
    if len(trees) == 2 and trees[0][:2] == ("call", "abs") and trees[0][2][0] == "sym" and not symbols(trees[1]):
        return _absolute(trees[0][2][1], trees[1], between[0])
    middle = len(trees) == 3 and trees[1][0] == "sym" and not symbols(trees[0]) and not symbols(trees[2])
    if middle and set(between) <= {"<", n.LE}:
        return Intervals(((trees[0], trees[2], between[0] == n.LE, between[1] == n.LE),), trees[1][1])
    if len(trees) == 2 and between[0] in (">", n.GE):
        trees, between = trees[::-1], [_MIRRORED[between[0]]]
    return Relation(tuple(between), tuple(trees))


def _absolute(name: str, end: Tree, sign: str) -> Reading:
    """|x| < a as an interval, |x| > a as two; the sign of a is that of a bound that makes sense."""
    low, closed = ("neg", end), sign in n.LE + n.GE
    if sign in "<" + n.LE:
        return Intervals(((low, end, closed, closed),), name)
    if sign in ">" + n.GE:
        return Intervals(((("neg", INFINITY), low, False, closed), (end, INFINITY, closed, False)), name)
    raise Unreadable("an absolute value")
