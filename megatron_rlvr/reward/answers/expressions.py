r"""Expressions: a recursive-descent parser from tokens to trees, which reads everything or nothing.

A tree is a tuple whose first entry is its kind:

    ("num", value)  ("dec", value, significant digits, unit of the last place, truncated)  ("sym", name)
    ("const", "pi" | "e" | "i" | "inf")  ("add", *terms)  ("mul", *factors)  ("div", a, b)  ("pow", base, exponent)
    ("neg", a)  ("call", function, *arguments)  ("apply", name, *arguments): an unknown function
    ("sum" | "prod", variable, first, last, body)

Where people read one thing and LaTeX prints another (``\sqrt12``), or where a product of letters could be a word, the
expression is unreadable rather than guessed.
"""

import itertools
import re
from fractions import Fraction

from megatron_rlvr.reward.answers.notation import DEGREE, DIVIDE, DOTS, GREEK, TIMES
from megatron_rlvr.reward.answers.tokens import Token, Unreadable, tokenize

Tree = tuple

_FUNCTIONS = {
    **{name: name for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "exp", "ln")},
    **{f"arc{name}": f"a{name}" for name in ("sin", "cos", "tan", "cot")},
    **{f"a{name}": f"a{name}" for name in ("sin", "cos", "tan")},
    **{name: name for name in ("log", "lg", "gcd", "lcm", "max", "min", "sqrt", "abs", "cis")},
}
_INVERSES = {name: f"a{name}" for name in ("sin", "cos", "tan", "cot")}
_CONSTANTS = {
    "pi": ("const", "pi"),
    "e": ("const", "e"),
    "i": ("const", "i"),
    **dict.fromkeys(("infty", "infinity", "inf", "oo"), ("const", "inf")),
}
_LONG_CONSTANTS = tuple(name for name in _CONSTANTS if len(name) > 1)
_UNKNOWN_FUNCTIONS = "fghFGHPQY"
_PAIRS = {r"\lfloor": (r"\rfloor", "floor"), r"\lceil": (r"\rceil", "ceil")}
_MAX_DEPTH = 60
INFINITY: Tree = ("const", "inf")
_ONE = ("num", Fraction(1))


def parse(text: str) -> Tree:
    """Return the tree of ``text``, which is in the notation of ``notation.py``.

    Raises:
        Unreadable: If any of it is not read.
    """
    parser = _Parser(tokenize(text))
    tree = parser.chosen()
    if parser.next is not None:
        raise Unreadable(text)
    return tree


class _Parser:
    def __init__(self, tokens: list[Token]) -> None:
        self._tokens = tokens
        self._position = 0
        self._depth = 0
        self._bars = 0

    @property
    def next(self) -> Token | None:
        return self._tokens[self._position] if self._position < len(self._tokens) else None

    def at(self, *texts: str) -> bool:
        return self.next is not None and self.next.kind != "decorated" and self.next.text in texts

    def take(self) -> Token:
        token = self.next
        if token is None:
            raise Unreadable("it ends too early")
        self._position += 1
        return token

    def expect(self, text: str) -> None:
        if self.take().text != text:
            raise Unreadable(f"{text} is missing")

    def sum(self) -> Tree:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise Unreadable("it is nested too deeply")
        terms = [self._signed()]
        while self.at("+", "-"):
            sign = self.take().text
            if sign == "+" and self.at(DOTS):
                self.take()
                self.expect("+")
                terms = [_progression("sum", terms, self._product())]
                break
            term = self._signed() if self.at("-", "+") and sign == "+" else self._product()
            terms.append(_with_sign(sign, term))
        self._depth -= 1
        return terms[0] if len(terms) == 1 else ("add", *terms)

    def _signed(self) -> Tree:
        return _with_sign(self.take().text, self._product()) if self.at("+", "-") else self._product()

    def _product(self) -> Tree:
        result = self._implicit()
        factors = [result]
        while self.at("*", "/", TIMES, DIVIDE, DOTS):
            if self.at(DOTS) or self._at_dots_after_sign():
                while self.at("*", TIMES, DOTS):
                    self.take()
                return _progression("prod", factors, self._implicit())
            divides = self.take().text in ("/", DIVIDE)
            factor = ("neg", self._implicit()) if self.at("-") and self.take() else self._implicit()
            result = ("div", result, factor) if divides else ("mul", result, factor)
            factors.append(factor if not divides else ("const", "inf"))
        return result

    def _at_dots_after_sign(self) -> bool:
        tokens = self._tokens[self._position : self._position + 2]
        return len(tokens) == 2 and tokens[0].text in ("*", TIMES) and tokens[1].text == DOTS

    def _implicit(self, *, argument: bool = False) -> Tree:
        """Factors without a sign between them; of a function's ``argument``, only those before the next function."""
        mixed = self._mixed_number()
        if mixed is not None:
            return mixed
        factors = [self._power()]
        while self._starts_factor() and not (argument and self._at_function()):
            factors.append(self._power())
        return factors[0] if len(factors) == 1 else ("mul", *factors)

    def _mixed_number(self) -> Tree | None:
        r"""2 1/3 or 2\frac{1}{3}, of ints with a proper fraction, that stands alone; None if there is none."""
        tokens = self._tokens[self._position : self._position + 10]
        texts = [token.text for token in tokens]
        if not tokens or not _is_int(tokens[0]):
            return None
        if len(tokens) >= 4 and _is_int(tokens[1]) and tokens[1].space and texts[2] == "/" and _is_int(tokens[3]):
            whole, top, bottom = (int(texts[n].replace(",", "")) for n in (0, 1, 3))
            length = 4
        elif len(tokens) >= 3 and texts[1] == r"\frac":
            start = self._position
            self._position += 2
            first, second = self._argument(), self._argument()
            length, self._position = self._position - start, start
            if first[0] != "num" or second[0] != "num" or (first[1] * second[1]).denominator != 1:
                return None
            whole, top, bottom = int(texts[0].replace(",", "")), int(first[1]), int(second[1])
        else:
            return None
        if not 0 < top < bottom:
            return None
        self._position += length
        if self._starts_factor() or self.at("^", "!", "/"):
            raise Unreadable("a mixed number is followed by a factor")
        number: Tree = ("num", whole + Fraction(top, bottom))
        return ("call", "degrees", number) if self.at(DEGREE) and self.take() else number

    def _starts_factor(self) -> bool:
        token = self.next
        if token is None:
            return False
        if token.kind == "number":
            after = self._tokens[self._position + 1 : self._position + 2]
            if self._tokens[self._position - 1].text != "!" and not (after and after[0].text == "^"):
                raise Unreadable("a number follows without a sign")
            return True
        if token.kind in ("word", "decorated"):
            return True
        if token.kind == "command":
            return token.text not in (r"\rfloor", r"\rceil", r"\choose", r"\over", r"\to", r"\rightarrow")
        return token.text in "({[" or (token.text == "|" and not self._bars)

    def _at_function(self) -> bool:
        token = self.next
        return token is not None and token.kind in ("word", "command") and token.text.lstrip("\\") in _FUNCTIONS

    def _power(self) -> Tree:
        base = self._primary()
        while self.at("^", "!", DEGREE):
            sign = self.take().text
            if sign == "!":
                if self.at("!"):
                    raise Unreadable("!! has two meanings")
                base = ("call", "factorial", base)
            elif sign == DEGREE:
                base = ("call", "degrees", base)
            else:
                base = ("pow", base, self._exponent())
                if self.at("^"):
                    raise Unreadable("a^b^c has two meanings")
        return base

    def _exponent(self) -> Tree:
        if self.at("{"):
            return self._group("{", "}")
        if self.at("("):
            return self._group("(", ")")
        if self.at("-", "+"):
            return _with_sign(self.take().text, self._exponent())
        token = self.next
        if token is not None and token.kind == "word" and len(token.text) > 1 and token.text not in _CONSTANTS:
            raise Unreadable("x^ab has two meanings")
        if token is not None and token.kind in ("number", "word", "command", "decorated"):
            return self._primary()
        raise Unreadable("no exponent")

    def _group(self, opening: str, closing: str) -> Tree:
        self.expect(opening)
        bars, self._bars = self._bars, 0
        tree = self.chosen() if opening == "{" else self.sum()
        self._bars = bars
        self.expect(closing)
        return tree

    def chosen(self) -> Tree:
        r"""An expression, or n \choose k or a \over b, which fill a group."""
        tree = self.sum()
        if self.at(r"\over"):
            self.take()
            return ("div", tree, self.sum())
        if self.at(r"\choose"):
            self.take()
            return ("call", "binomial", tree, self.sum())
        return tree

    def _primary(self) -> Tree:
        token = self.next
        if token is None or (token.kind == "mark" and token.text not in "({[|"):
            raise Unreadable("a factor is missing")
        if token.kind == "mark":
            if token.text == "|":
                self.take()
                self._bars += 1
                tree = self.sum()
                self.expect("|")
                self._bars -= 1
                return ("call", "abs", tree)
            return self._group(token.text, {"(": ")", "{": "}", "[": "]"}[token.text])
        self.take()
        if token.kind == "number":
            return token.node
        if token.kind == "decorated":
            return self._subscripted(token.text)
        return self._command(token.text) if token.kind == "command" else self._word(token)

    def _argument(self) -> Tree:
        r"""Argument of \frac and the like: a group, or one digit, letter or command."""
        if self.at("{"):
            return self._group("{", "}")
        token = self.take()
        if token.kind in ("number", "word") and len(token.text) > 1:
            head, tail = token.text[0], token.text[1:]
            rest = tokenize(tail)
            self._tokens[self._position : self._position] = rest
            token = tokenize(head)[0]
        if token.kind == "number":
            return token.node
        if token.kind == "word":
            return _CONSTANTS.get(token.text, ("sym", token.text))
        if token.kind == "command":
            return self._command(token.text)
        raise Unreadable("an argument is missing")

    def _command(self, command: str) -> Tree:
        name = command[1:]
        if name == "frac":
            top = self._argument()
            return ("div", top, self._argument())
        if name == "binom":
            top = self._argument()
            return ("call", "binomial", top, self._argument())
        if name == "sqrt":
            return self._root()
        if command in _PAIRS:
            closing, function = _PAIRS[command]
            tree = self.sum()
            self.expect(closing)
            return ("call", function, tree)
        if name in ("sum", "prod"):
            return self._series(name)
        if name in _FUNCTIONS:
            return self._function(_FUNCTIONS[name])
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if name == "mathbb":
            self.expect("{")
            letter = self.take().text
            self.expect("}")
            return ("sym", f"set {letter}")
        if name in ("ell", "emptyset", "partial") or name.lower() in GREEK:
            return self._subscripted(name)
        raise Unreadable(command)

    def _root(self) -> Tree:
        degree = ("num", Fraction(2))
        if self.at("["):
            degree = self._group("[", "]")
        if self.at("("):
            return ("call", "root", self._group("(", ")"), degree)
        token = self.next
        if token is not None and token.kind == "number" and len(token.text) > 1:
            raise Unreadable("a root of several digits without braces has two meanings")
        return ("call", "root", self._argument(), degree)

    def _series(self, kind: str) -> Tree:
        self.expect("_")
        self.expect("{")
        variable = self.take().text
        self.expect("=")
        first = self.sum()
        self.expect("}")
        self.expect("^")
        last = self._exponent()
        return (kind, variable, first, last, _with_index(self._product(), variable))

    def _word(self, token: Token) -> Tree:
        name = token.text
        if name in _FUNCTIONS:
            return self._root() if name == "sqrt" else self._function(_FUNCTIONS[name])
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if len(name.rstrip("'")) == 1:
            return self._subscripted(name)
        for function in ("sin", "cos", "tan", "ln", "log"):
            if name.startswith(function) and len(name) == len(function) + 1:
                return ("call", _FUNCTIONS[function], ("sym", name[-1]))
        if name in GREEK:
            return self._subscripted(name)
        if len(name) == 2 and name[0] == "d" and name[1] in "xyztusr":
            return ("sym", name)
        if name.isalpha() and len(name) <= 3 and not token.space and not any(map(name.endswith, _LONG_CONSTANTS)):
            rest = [Token("word", letter, False) for letter in name[1:]]  # a power binds to the last letter only
            self._tokens[self._position : self._position] = rest
            return _CONSTANTS.get(name[0], ("sym", name[0]))
        raise Unreadable(name)

    def _subscripted(self, name: str) -> Tree:
        """A symbol with its subscript; an index that depends on a symbol makes it an unknown function."""
        if self.at("_"):
            self.take()
            index = self._argument()
            if index[0] != "num":
                return ("apply", f"{name}_", index)
            name = f"{name}_{index[1]}"
        if name == "C" and re.fullmatch(
            r"\([0-9]+,[0-9]+\)", "".join(t.text for t in self._tokens[self._position :][:5])
        ):
            return ("call", "binomial", *self._arguments())
        if name in _UNKNOWN_FUNCTIONS and self.at("(") and not self.next.space:  # type: ignore[union-attr]
            return ("apply", name, *self._arguments())
        return ("sym", name)

    def _function(self, name: str) -> Tree:
        power: Tree | None = None
        base: Tree | None = None
        if name == "log" and self.at("_"):
            self.take()
            base = self._argument()
        if self.at("^"):
            self.take()
            power = self._exponent()
            if power == ("neg", _ONE):
                if name not in _INVERSES:
                    raise Unreadable("an inverse without a name")
                name, power = _INVERSES[name], None
        if self.at("("):
            arguments = self._arguments()
        elif self.at("{"):
            arguments = [self._group("{", "}")]
        else:
            arguments = [self._implicit(argument=True)]
        if name not in ("gcd", "lcm", "max", "min") and len(arguments) != 1:
            raise Unreadable("too many arguments")
        if name == "sqrt":
            return ("call", "root", arguments[0], ("num", Fraction(2)))
        if name == "cis":
            tree: Tree = ("call", "exp", ("mul", _CONSTANTS["i"], arguments[0]))
        elif name in ("log", "lg"):
            ten = ("num", Fraction(10))
            tree = ("call", "log", arguments[0], base or ten)
        else:
            tree = ("call", name, *arguments)
        return tree if power is None else ("pow", tree, power)

    def _arguments(self) -> list[Tree]:
        self.expect("(")
        bars, self._bars = self._bars, 0
        arguments = [self.sum()]
        while self.at(","):
            self.take()
            arguments.append(self.sum())
        self.expect(")")
        self._bars = bars
        return arguments


def _progression(kind: str, terms: list[Tree], last: Tree) -> Tree:
    """Return a sum or product that dots abbreviate: of an arithmetic progression of which two terms or more are shown.

    Raises:
        Unreadable: If the terms before the dots are no such progression.
    """
    values = [term[1] for term in terms if term[0] == "num"]
    steps = {b - a for a, b in itertools.pairwise(values)}
    if len(values) != len(terms) or len(steps) != 1 or 0 in steps:
        raise Unreadable("dots after terms of which the next is not known")
    step = ("num", steps.pop())
    count: Tree = ("div", ("add", last, ("neg", terms[0])), step)
    return (kind, "#", ("num", Fraction(0)), count, ("add", terms[0], ("mul", ("sym", "#"), step)))


def _with_index(tree: Tree, variable: str) -> Tree:
    """Return the terms of a series, in which a variable i or e is no constant."""
    if tree == ("const", variable):
        return ("sym", variable)
    return tuple(_with_index(part, variable) if isinstance(part, tuple) else part for part in tree)


def _is_int(token: Token) -> bool:
    return token.kind == "number" and token.node[0] == "num" and token.text.replace(",", "").isdecimal()


def _with_sign(sign: str, tree: Tree) -> Tree:
    return ("neg", tree) if sign == "-" else tree
