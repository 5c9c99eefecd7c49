"""The YAML of settings files: floats such as 1e-6, no key twice, and values as messages show them."""

import json
import re
from typing import Any

import yaml

_SHOWN_CHARACTERS = 60


class Loader(yaml.SafeLoader):
    """YAML that reads 1e-6 as a float and refuses a key that is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
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


def shown(value: Any) -> str:
    """Return a value as it is written in a settings file, shortened to 60 characters, for use in a message."""
    text = _written(value)
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
    return str(value)


def _is_plain(text: str) -> bool:
    """Return whether a str needs no quotes in YAML."""
    try:
        return yaml.load(text, Loader=Loader) == text
    except (yaml.YAMLError, ValueError, RecursionError):
        return False
