"""Reward functions as the settings name them: a function, with options if it has some, or one for each source.

    math                                          a built-in function
    number(tolerance=0.01, last=True)             with options, written as in Python
    all(math, format("</think>"))                 a combination; own functions are quoted here: all(math, "my.code:f")
    my_package.rewards:score                      a function of the user, by module and name
    {gsm8k: math, mbpp: code(), "*": my.code:f}   by the source of the prompt; "*" for all other sources

Imports nothing but the standard library: the settings and the grader processes read this alike.
"""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

FunctionSetting = str | Mapping[str, str]
"""Value of `reward.function`."""

GYM = "reasoning_gym"
GYM_PREFIX = f"{GYM}:"
"""Beginning of the source of problems that reasoning-gym has generated; its own scorers grade them."""
OTHERS = "*"
"""Key of the function for all sources that have none of their own."""

_OWN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_MAX_CHARACTERS, _MAX_SOURCES = 2000, 1000
_MAX_SECONDS, _MAX_MEMORY_MB = 3600, 2**20


@dataclass(frozen=True)
class _Option:
    types: tuple[type, ...]
    default: Any = None
    low: float | None = None
    high: float | None = None
    required: bool = False


BUILT_IN: dict[str, dict[str, _Option]] = {
    "math": {},
    "exact": {"whole": _Option((bool,), False)},
    "choice": {},
    "number": {"tolerance": _Option((float, int), 0.0, 0, 1e12), "last": _Option((bool,), False)},
    "format": {"pattern": _Option((str,), required=True)},
    "code": {
        "seconds": _Option((float, int), 4.0, 0.1, _MAX_SECONDS),
        "memory_mb": _Option((int,), 1024, 64, _MAX_MEMORY_MB),
        "tests": _Option((str,)),
    },
    GYM: {},
    "all": {},
}
"""{name: its options by name}. The arguments of ``all`` are functions."""

_READS_ANSWERS = {"math", "exact", "choice", "number", "code", GYM}


@dataclass(frozen=True)
class Call:
    """A reward function with its options.

    Attributes:
        name: Name of a built-in function, or module:function.
        options: (name, value) of all options of a built-in function.
        parts: Functions that ``all`` combines.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    parts: tuple["Call", ...] = ()

    def walk(self) -> Iterator["Call"]:
        """Yield this call and those that it combines."""
        yield self
        for part in self.parts:
            yield from part.walk()

    @property
    def reads_answers(self) -> bool:
        """True if `reward.answer_after` has an effect on it."""
        return any(call.name in _READS_ANSWERS for call in self.walk())


@dataclass(frozen=True)
class Functions:
    """The reward functions of a run.

    Attributes:
        by_source: {source: function}.
        others: Function for all other sources; None if there is none.
    """

    by_source: Mapping[str, Call]
    others: Call | None

    def of(self, source: str) -> Call | None:
        """Return the function for prompts of a source; None if the settings name none.

        The scorer of reasoning-gym grades its own problems, unless the settings name a function for them: by their
        source, or one other than the default for everything.
        """
        if source in self.by_source:
            return self.by_source[source]
        by_default = bool(self.by_source) or self.others in (None, Call("math"))
        return Call(GYM) if source.startswith(GYM_PREFIX) and by_default else self.others

    @property
    def all(self) -> tuple[Call, ...]:
        """All functions that the settings name."""
        return (*self.by_source.values(), *([self.others] if self.others else []))


def parse_functions(setting: FunctionSetting) -> Functions:
    """Return the functions that a value of `reward.function` names.

    Raises:
        ValueError: With the problem and the remedy, without the name of the setting.
    """
    if isinstance(setting, str):
        return Functions({}, parse_call(setting))
    if not setting:
        raise ValueError("empty; give a function, or one for each source")
    if len(setting) > _MAX_SOURCES:
        raise ValueError(f"functions for {len(setting)} sources; give at most {_MAX_SOURCES}")
    calls = {}
    for source, text in setting.items():
        try:
            calls[source] = parse_call(text)
        except ValueError as error:
            raise ValueError(f"source {source!r:.80}: {error}") from None
    others = calls.pop(OTHERS, None)
    return Functions(calls, others)


def as_text(setting: FunctionSetting) -> str:
    """Return a value of `reward.function` as one text; see `from_text`."""
    return setting if isinstance(setting, str) else json.dumps(dict(setting))


def from_text(text: str) -> Functions:
    """Return the functions of a text that `as_text` has written."""
    return parse_functions(json.loads(text) if text.startswith("{") else text)


def parse_call(text: str) -> Call:
    """Return one function. Raises ValueError with the problem and the remedy."""
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"{len(text)} characters; give at most {_MAX_CHARACTERS}")
    if _OWN.fullmatch(text):
        return Call(text)
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(_unknown(text)) from None
    return _call(node, text)


def _unknown(text: str) -> str:
    return f"{_shown(text)} is neither {', '.join(BUILT_IN)} nor module:function; write one of them"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _call(node: ast.expr, text: str) -> Call:
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and _OWN.fullmatch(node.value):
        return Call(node.value)
    arguments, keywords = (node.args, node.keywords) if isinstance(node, ast.Call) else ([], [])
    named = node.func if isinstance(node, ast.Call) else node
    if not isinstance(named, ast.Name) or named.id not in BUILT_IN:
        raise ValueError(_unknown(ast.unparse(node)))
    name = named.id
    if name == "all":
        if keywords or len(arguments) < 2:
            raise ValueError("all() combines two or more functions; write all(math, format(PATTERN))")
        return Call(name, parts=tuple(_call(argument, text) for argument in arguments))
    given = {keyword.arg: keyword.value for keyword in keywords}
    known = BUILT_IN[name]
    if arguments:  # the required option may be written without its name
        first = next((key for key, option in known.items() if option.required), None)
        if len(arguments) > 1 or first is None or first in given:
            raise ValueError(f"{name}() takes no such arguments; its options are {_names(known)}")
        given[first] = arguments[0]
    for key in given:
        if key not in known:
            raise ValueError(f"{name}() has no option {key}; its options are {_names(known)}")
    return Call(name, tuple((key, _value(name, key, given.get(key), option)) for key, option in known.items()))


def _names(options: Mapping[str, _Option]) -> str:
    return ", ".join(options) or "none"


def _value(name: str, key: str, node: ast.expr | None, option: _Option) -> Any:
    """Return the value of an option."""
    if node is None:
        if option.required:
            raise ValueError(f"{name}() needs its option {key}; write {name}({key}=...)")
        return option.default
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{name}({key}=...): not a plain value; write it as in Python") from None
    wanted = " or ".join(kind.__name__ for kind in option.types)
    if type(value) not in option.types:
        raise ValueError(f"{name}({key}={_shown(value)}): not of type {wanted}; write one")
    if option.low is not None and option.high is not None and not option.low <= value <= option.high:
        raise ValueError(f"{name}({key}={_shown(value)}): not from {option.low:g} to {option.high:g}; choose one")
    if key == "pattern":
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{name}({key}={_shown(value)}): no regular expression ({error}); correct it") from None
    return value
