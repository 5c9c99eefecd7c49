"""The YAML of settings files: floats such as 1e-6, no key twice, and values as messages show them."""

import json
import re
from collections.abc import Callable
from typing import Any

import yaml

_SHOWN_CHARACTERS = 60
MAX_DEPTH, MAX_VALUES = 20, 100_000
"""Deepest nesting and largest number of values; the settings of the program have four levels and about 130 values."""
_MAX_INT = 2**63
_SCALARS = {"int": "int", "float": "float", "bool": "true or false", "timestamp": "date", "binary": "base64"}


class Loader(yaml.SafeLoader):
    """YAML that reads 1e-6 as a float, and refuses a key that is given twice.

    An alias (*a) counts as often as it is used: with them a few lines could become gigabytes, or contain themselves.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = self._values = 0
        self._extent: dict[int, tuple[int, int]] = {}  # {identity of a node: (its values, its depth)}

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark, before = self.peek_event().start_mark, self._values
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        self._refuse(self._depth > MAX_DEPTH, f"nested more than {MAX_DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        if is_alias:
            self._refuse(id(node) not in self._extent, "a value that contains itself", mark)
            values, depth = self._extent[id(node)]
            self._values += values
            self._refuse(self._depth + depth > MAX_DEPTH, f"nested more than {MAX_DEPTH} deep", mark)
        else:
            self._values += 1
            parts = [] if isinstance(node, yaml.ScalarNode) else node.value
            inner = [each for part in parts for each in (part if isinstance(part, tuple) else (part,))]
            deepest = max((self._extent[id(each)][1] for each in inner), default=-1)
            self._extent[id(node)] = self._values - before, deepest + 1
        self._refuse(self._values > MAX_VALUES, f"more than {MAX_VALUES} values", mark)
        self._depth -= 1
        return node

    def _refuse(self, refused: bool, problem: str, mark: Any) -> None:
        if refused:
            raise yaml.composer.ComposerError(None, None, problem, mark)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a plain str", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """YAML that `Loader` reads back: a str that looks like a float to it is quoted."""


for _yaml in (Loader, Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*([eE][-+]?\d+)|\d[\d_]*\.[\d_]*|\.\d[\d_]*([eE][-+]?\d+)?"
                   r"|\.(inf|Inf|INF|nan|NaN|NAN))$"),
        list("-+0123456789."),
    )  # fmt: skip


def _checked(tag: str, construct: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return a constructor that raises a YAMLError with a line for a scalar that is none of its tag.

    PyYAML's own raise what int(), float() and datetime() raise, or a KeyError or AttributeError.
    """

    def checked(loader: Any, node: Any) -> Any:
        try:
            value = construct(loader, node)
        except (ValueError, LookupError, AttributeError, ArithmeticError):
            value = None
        if value is None:
            raise yaml.constructor.ConstructorError(
                None, None, f"{_shortened(str(node.value))!r} is no {_SCALARS[tag]}", node.start_mark
            )
        if isinstance(value, int) and abs(value) >= _MAX_INT:
            raise yaml.constructor.ConstructorError(
                None, None, f"the int {_shortened(str(node.value))} has more than 64 bits", node.start_mark
            )
        return value

    return checked


for _tag in _SCALARS:
    _full = f"tag:yaml.org,2002:{_tag}"
    Loader.add_constructor(_full, _checked(_tag, yaml.SafeLoader.yaml_constructors[_full]))


def load_yaml(text: str) -> Any:
    """Return the value of a YAML text, made of dict, list, str, int, float, bool, None, dates and bytes.

    Raises:
        yaml.YAMLError: For any text that is not such a value.
    """
    try:
        return yaml.load(text, Loader=Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except TypeError as error:  # a mapping as a key
        raise yaml.YAMLError(str(error)) from None


def shown(value: Any) -> str:
    """Return a value as it is written in a settings file, shortened to 60 characters, for use in a message."""
    return _shortened(_written(value))


def _shortened(text: str) -> str:
    text = text.encode("utf-8", errors="backslashreplace").decode("utf-8")
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return value if _is_plain(value) else repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_written(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, int) and abs(value) >= _MAX_INT:
        return f"an int of {value.bit_length()} bits"
    return str(value)


def _is_plain(text: str) -> bool:
    """Return whether a str needs no quotes in YAML."""
    try:
        return load_yaml(text) == text
    except yaml.YAMLError:
        return False
