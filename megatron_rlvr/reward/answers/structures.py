"""Answers as structures: a list, a tuple, a set of numbers, an equation, a number with a unit, text, ..."""

from dataclasses import dataclass

from megatron_rlvr.reward.answers.expressions import Tree
from megatron_rlvr.reward.answers.tokens import Unreadable
from megatron_rlvr.reward.answers.units import Unit


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
class Ordered:
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
    """A ratio a : b : c as written, or with ``clock`` perhaps a time of day, in 24 hours."""

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
    Text | Expression | Listing | Ordered | Matrix | Intervals | Named | Relation | Quantity | Percent | Ratio | Based
    | Option | Congruence | Family | Operation
)  # fmt: skip


def as_interval(reading: Ordered) -> Intervals:
    """Return a pair as an interval.

    Raises:
        Unreadable: If it is no pair in such brackets.
    """
    ends = [item.tree for item in reading.items if isinstance(item, Expression)]
    if len(ends) != 2 or len(reading.items) != 2 or len(reading.brackets) != 2 or reading.brackets[0] not in "([":
        raise Unreadable("no interval")
    return Intervals(((ends[0], ends[1], reading.brackets[0] == "[", reading.brackets[1] == "]"),))


def symbols(tree: Tree) -> frozenset[str]:
    """Return the free symbols of a tree."""
    if tree[0] == "sym":
        return frozenset((tree[1],))
    if tree[0] in ("sum", "prod"):
        return symbols(tree[2]) | symbols(tree[3]) | (symbols(tree[4]) - {tree[1]})
    return frozenset().union(*(symbols(part) for part in tree[1:] if isinstance(part, tuple)))


def free_symbols(reading: Reading) -> frozenset[str]:
    """Return the free symbols of the expressions in a reading."""
    if isinstance(reading, Expression):
        return symbols(reading.tree)
    if isinstance(reading, Named):
        return free_symbols(reading.value)
    if isinstance(reading, Listing | Ordered):
        return frozenset().union(*(free_symbols(item) for item in reading.items))
    return frozenset()
