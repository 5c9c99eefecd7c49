"""Values of expressions: exact rationals as long as possible, else numbers of a given precision, never a double.

Equality is decided by values and not by rewriting. Rewriting has no bound on its time, and a floating-point comparison
has an absolute cut: both have paid for incorrect answers. A value here is a Fraction, or an mpmath number with a
relative precision; the evaluator notices when a sum loses a term, and the caller then tries a higher precision.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from mpmath.ctx_mp import MPContext

from megatron_rlvr.reward.answers.expressions import Tree

_MAX_BITS = 40_000
_MAX_LOG2 = 2.0**62
_MAX_FACTORIAL = 3000
_MAX_SERIES = 2000

Value = Any
"""A Fraction, or a number of mpmath (real, infinite or complex)."""


class Undefined(Exception):
    """The expression has no value, such as 0/0, or none at these values of its symbols."""


class TooLarge(Exception):
    """The value cannot be computed with bounded effort, or not to this precision."""


class Evaluator:
    """Evaluates trees at one precision.

    Attributes:
        lost: True if a sum cancelled or absorbed a term within the precision, so that a higher one may differ.
        absorbed: True if a sum absorbed a term: it has no effect on the value at this precision.
        complex: True if a root or logarithm of a negative number occurred.
    """

    def __init__(self, digits: int) -> None:
        self.context: Any = MPContext()
        self.context.dps = digits + 15
        self.digits = digits
        self.lost = self.absorbed = self.complex = False

    def __call__(self, tree: Tree, symbols: Mapping[str, Fraction]) -> Value:
        """Return the value of ``tree``.

        Args:
            symbols: Value of each symbol.

        Raises:
            Undefined, TooLarge: If it has none.
        """
        self._symbols, self._terms = dict(symbols), 0
        self.lost = self.absorbed = self.complex = False
        try:
            value = self._value(tree)
        except (ZeroDivisionError, ValueError, OverflowError, RecursionError) as error:
            raise Undefined(str(error)) from error
        if not isinstance(value, Fraction) and self.context.isnan(value):
            raise Undefined("not a number")
        return value

    def number(self, value: Value) -> Any:
        """Return the value as a number of mpmath."""
        if isinstance(value, Fraction):
            return self.context.mpf(value.numerator) / value.denominator
        return value

    def _value(self, tree: Tree) -> Value:
        kind, *rest = tree
        match kind:
            case "num" | "dec":
                return rest[0]
            case "sym":
                return self._symbols[rest[0]]
            case "const":
                return self._constant(rest[0])
            case "neg":
                return -self._value(rest[0])
            case "add":
                return self._sum([self._value(term) for term in rest])
            case "mul":
                product: Value = Fraction(1)
                for factor in rest:
                    product = self._times(product, self._value(factor))
                return product
            case "div":
                bottom = self._value(rest[1])
                if bottom == 0:
                    raise Undefined("division by zero")
                return self._times(self._value(rest[0]), 1 / bottom)
            case "pow":
                return self._power(self._value(rest[0]), self._value(rest[1]))
            case "sum" | "prod":
                return self._series(kind, *rest)
            case "apply":
                return self._unknown(rest[0], [self._value(argument) for argument in rest[1:]])
            case "call":
                return self._call(rest[0], rest[1:])
        raise Undefined(kind)

    def _constant(self, name: str) -> Value:
        c = self.context
        return {"pi": c.pi, "e": c.e, "i": c.mpc(0, 1), "inf": c.inf}[name] * c.mpf(1)

    def _sum(self, terms: list[Value]) -> Value:
        if all(isinstance(term, Fraction) for term in terms):
            return sum(terms, Fraction(0))
        exact = sum((term for term in terms if isinstance(term, Fraction)), Fraction(0))
        numbers = [self.number(exact)] + [term for term in terms if not isinstance(term, Fraction)]
        total = self.context.fsum(numbers)
        if self.context.isinf(total) or self.context.isnan(total):
            return total
        sizes = [self.context.mag(number) for number in numbers if number != 0]
        bits = self.digits * 3.32
        if sizes and max(sizes) - min(sizes) > bits:
            self.lost = self.absorbed = True
        if sizes and (total == 0 or max(sizes) - self.context.mag(total) > bits - 20):
            self.lost = True
            return Fraction(0)
        return total

    def _times(self, a: Value, b: Value) -> Value:
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return self._bounded(a * b)
        if (isinstance(a, Fraction) and a == 0 and not self.context.isinf(b)) or (
            isinstance(b, Fraction) and b == 0 and not self.context.isinf(a)
        ):
            return Fraction(0)
        return self.number(a) * self.number(b)

    def _bounded(self, value: Fraction) -> Value:
        size = value.numerator.bit_length() + value.denominator.bit_length()
        return value if size <= 2 * _MAX_BITS else self.number(value)

    def _power(self, base: Value, exponent: Value) -> Value:
        if base == 0:
            if isinstance(exponent, Fraction) and exponent > 0:
                return Fraction(0)
            raise Undefined("a power of zero")
        if isinstance(base, Fraction) and isinstance(exponent, Fraction):
            if exponent.denominator == 1:
                bits = max(base.numerator.bit_length(), base.denominator.bit_length())
                if bits <= 1 or bits * abs(exponent.numerator) <= _MAX_BITS:
                    return Fraction(base) ** self._small(exponent, base)
            elif exponent.denominator < 1000:
                return self._power(self._root(base, exponent.denominator), Fraction(exponent.numerator))
        base, power = self.number(base), self.number(exponent)
        if self.context.isinf(base) or self.context.isinf(power):
            raise Undefined("a power with infinity")
        if abs(power) * max(1, abs(self.context.mag(base))) > _MAX_LOG2:
            raise TooLarge("a power")
        if isinstance(exponent, Fraction) and exponent.denominator == 1:
            return base ** int(exponent)
        if self.context.im(base) != 0 or base < 0:
            self.complex = True
        return self.context.power(base, power)

    def _small(self, exponent: Fraction, base: Fraction) -> int:
        """Return an int exponent; of 1 and -1 only its parity matters."""
        n = exponent.numerator
        return n if abs(base) != 1 else n % 2

    def _root(self, value: Value, degree: int) -> Value:
        """Real root: of a negative number if the degree is odd, else complex."""
        if isinstance(value, Fraction):
            negative = value < 0
            if not negative or degree % 2:
                exact = [_int_root(n, degree) for n in (abs(value.numerator), value.denominator)]
                if None not in exact:
                    return Fraction(-exact[0] if negative else exact[0], exact[1])  # type: ignore[operator, arg-type]
        number = self.number(value)
        if self.context.im(number) == 0 and number < 0 and degree % 2:
            return -self.context.root(-number, degree)
        if self.context.im(number) != 0 or number < 0:
            self.complex = True
        return self.context.root(number, degree)

    def _series(self, kind: str, variable: str, first: Tree, last: Tree, body: Tree) -> Value:
        low, high = self._value(first), self._value(last)
        if not all(isinstance(bound, Fraction) and bound.denominator == 1 for bound in (low, high)):
            raise Undefined("bounds that are not ints")
        self._terms += max(0, int(high - low))
        if self._terms > (_MAX_SERIES if self.digits < 100 else _MAX_SERIES // 20):
            raise TooLarge("a series")
        outer, values = self._symbols, []
        for number in range(int(low), int(high) + 1):
            self._symbols = outer | {variable: Fraction(number)}
            values.append(self._value(body))
        self._symbols = outer
        if kind == "sum":
            return self._sum(values or [Fraction(0)])
        product: Value = Fraction(1)
        for value in values:
            product = self._times(product, value)
        return product

    def _unknown(self, name: str, arguments: list[Value]) -> Fraction:
        """Value of a function that is not known: a hash of its name and arguments, so that only equal ones agree."""
        texts = [str(a) if isinstance(a, Fraction) else self.context.nstr(a, 40) for a in arguments]
        digest = hashlib.blake2b("\0".join([name, *texts]).encode(), digest_size=6).digest()
        return Fraction(int.from_bytes(digest, "little"), 2**48) + Fraction(1, 2)

    def _call(self, function: str, trees: list[Tree]) -> Value:
        if function in ("sin", "cos", "tan", "cot", "sec", "csc"):
            return self._circular(function, self._value(trees[0]))
        values = [self._value(tree) for tree in trees]
        if function in _DISCRETE:
            return _DISCRETE[function](self, *values)
        c, x = self.context, self.number(values[0])
        match function:
            case "degrees":
                return self.number(values[0]) * c.pi / 180
            case "root":
                degree = values[1]
                if not (isinstance(degree, Fraction) and degree.denominator == 1 and 1 < degree < 1000):
                    return self._power(values[0], 1 / degree)
                return Fraction(0) if values[0] == 0 else self._root(values[0], int(degree))
            case "abs":
                return abs(values[0])
            case "exp":
                return self._power(c.e * c.mpf(1), values[0])
            case "ln" | "log":
                base = values[1] if function == "log" else c.e
                if x == 0 or base in (0, 1):
                    raise Undefined("a logarithm")
                if c.im(x) != 0 or x < 0:
                    self.complex = True
                return self._clean(c.log(x) / c.log(self.number(base)) if function == "log" else c.log(x), x)
            case "asin" | "acos" if c.im(x) == 0 and abs(x) > 1:
                self.complex = True
        if function in ("sinh", "cosh", "tanh") and c.im(x) == 0 and abs(x) > 1e6:
            raise TooLarge(function)
        return self._clean(getattr(c, function)(x), x)

    def _circular(self, function: str, angle: Value) -> Value:
        c, x = self.context, self.number(angle)
        if c.isinf(x) or c.mag(x) > 60 + self.digits:
            raise Undefined(function)
        sine, cosine = self._clean(c.sin(x), x), self._clean(c.cos(x), x)
        top, bottom = {
            "sin": (sine, 1),
            "cos": (cosine, 1),
            "tan": (sine, cosine),
            "cot": (cosine, sine),
            "sec": (1, cosine),
            "csc": (1, sine),
        }[function]
        if bottom == 0:
            raise Undefined(function)
        return top / bottom

    def _clean(self, value: Any, argument: Any) -> Value:
        """Return 0 for a value that is 0 up to rounding, as of sin(pi)."""
        if value == 0:
            return Fraction(0)
        tiny = self.context.mag(value) < min(0, self.context.mag(argument)) - self.digits * 3.32 + 10
        if tiny and not self.context.isinf(value):
            self.lost = True
            return Fraction(0)
        return value

    def integer(self, value: Value) -> int:
        """Return an int that the value is.

        Raises:
            Undefined: If it is none.
        """
        if isinstance(value, Fraction) and value.denominator == 1:
            return int(value)
        raise Undefined("not an int")

    def factorial(self, value: Value) -> Value:
        if isinstance(value, Fraction) and value.denominator == 1 and value < 0:
            raise Undefined("a factorial")
        if isinstance(value, Fraction) and value.denominator == 1 and value <= _MAX_FACTORIAL:
            return Fraction(math.factorial(int(value)))
        if self.context.im(self.number(value)) != 0 or abs(self.number(value)) > 1e15:
            raise TooLarge("a factorial")
        if self.digits > 100:  # the coefficients of the gamma function take seconds
            raise TooLarge("a factorial to this precision")
        return self.context.gamma(self.number(value) + 1)

    def binomial(self, n: Value, k: Value) -> Value:
        if all(isinstance(v, Fraction) and v.denominator == 1 and v >= 0 for v in (n, k)):
            if n <= _MAX_FACTORIAL or min(k, n - k) <= 300:
                return Fraction(math.comb(int(n), int(k)))
            if k > n:
                return Fraction(0)
        return self._times(self.factorial(n), 1 / self._times(self.factorial(k), self.factorial(self._sum([n, -k]))))

    def rounded(self, value: Value, *, up: bool) -> Fraction:
        if not isinstance(value, Fraction):
            if self.context.im(value) != 0 or self.context.mag(value) > self.digits * 3:
                raise TooLarge("rounding")
            near = self.context.nint(value)
            if abs(value - near) < self.context.mpf(10) ** (10 - self.digits):
                self.lost = True
                return Fraction(int(near))
            return Fraction(int(self.context.ceil(value) if up else self.context.floor(value)))
        return Fraction(math.ceil(value) if up else math.floor(value))


_DISCRETE: dict[str, Callable[..., Value]] = {
    "factorial": Evaluator.factorial,
    "binomial": Evaluator.binomial,
    "floor": lambda self, x: self.rounded(x, up=False),
    "ceil": lambda self, x: self.rounded(x, up=True),
    "gcd": lambda self, *values: Fraction(math.gcd(*map(self.integer, values))),
    "lcm": lambda self, *values: Fraction(math.lcm(*map(self.integer, values))),
    "max": lambda self, *values: max(values, key=self.number),
    "min": lambda self, *values: min(values, key=self.number),
}


def _int_root(n: int, degree: int) -> int | None:
    """Return the int whose power is n, or None; by Newton's method, since a double has too few digits."""
    if n < 2:
        return n
    if degree == 2:
        root = math.isqrt(n)
    else:
        root = 1 << -(-n.bit_length() // degree)
        while (closer := ((degree - 1) * root + n // root ** (degree - 1)) // degree) < root:
            root = closer
    return root if root**degree == n else None
