"""From a YAML file and flags to settings, and back: reading, errors in one sentence, ``--help``. Imports no torch."""

import difflib
import json
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megatron_rlvr.config import Settings, SettingsError


def load_settings(path: str | Path, overrides: list[str] | None = None) -> Settings:
    """Settings of a YAML file with flags (``--section.key value`` or ``--section.key=value``) on top.

    Raises: SettingsError, one sentence.
    """
    values = _read_yaml(Path(path))
    for key, value in _parse_flags(overrides or []):
        _set(values, key, value)
    return validate(values)


def validate(values: dict[str, Any]) -> Settings:
    """Settings from nested dictionaries; SettingsError names the first thing wrong."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(_explain(error.errors()[0])) from None


def to_yaml(settings: Settings) -> str:
    """The resolved settings as YAML that `load_settings` reads back to the same settings."""
    return yaml.dump(settings.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML with 1e-6 read as a number, and a key given twice refused."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, "a key is not plain text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML that `_Loader` reads back: a text that looks like a number to it is quoted."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*([eE][-+]?\d+)|\d[\d_]*\.[\d_]*|\.\d[\d_]*([eE][-+]?\d+)?"
                   r"|\.(inf|Inf|INF|nan|NaN|NAN))$"),
        list("-+0123456789."),
    )  # fmt: skip


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise SettingsError(f"{path} does not exist; give a settings file") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read ({error}); give a settings file") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise SettingsError(f"{path}, line {line}: not valid YAML ({error.problem}); correct it") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"{path} is not valid YAML ({' '.join(str(error).split())}); correct it") from None
    if not isinstance(values, dict):
        found = "is empty" if values is None else "holds no sections"
        raise SettingsError(f"{path} {found}; write sections such as run: and model: with keys below them")
    return values


def _parse_flags(arguments: list[str]) -> list[tuple[str, Any]]:
    flags, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or len(argument) == 2:
            raise SettingsError(f"unexpected argument {argument!r}; flags look like --section.key value")
        key, equals, text = argument[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise SettingsError(f"flag --{key} has no value; write --{key} VALUE")
            text = rest.pop(0)
        flags.append((key, _flag_value(key, text)))
    return flags


def _flag_value(key: str, text: str) -> Any:
    """YAML; but a key that holds text takes it as it stands, `Answer: x # 1`, unless it is null or in quotes."""
    if text != "null" and text[:1] not in ("'", '"') and _holds_text(key):
        return text
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise SettingsError(f"value {text!r} of flag --{key} is not valid YAML; quote it") from None


def _holds_text(key: str) -> bool:
    return any(f"{section}.{name}" == key and f.annotation in (str, str | None) for section, name, f in fields())


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    if not sections or not all((*sections, key)):
        raise SettingsError(f"unknown flag --{dotted}; {_nearest(dotted) or 'flags look like --section.key value'}")
    for depth, section in enumerate(sections, start=1):
        if values.get(section) is None:
            values[section] = {}
        if not isinstance(values[section], dict):
            raise SettingsError(f"unknown flag --{dotted}; {'.'.join(sections[:depth])} holds a value, not keys")
        values = values[section]
    values[key] = value


def _nearest(key: str) -> str:
    """`did you mean run.steps?`, or the keys of its section, or nothing where that is not known either."""
    if key in Settings.model_fields:
        return f"set one of its keys, such as {key}.{_example(key)}"
    section, _, name = key.rpartition(".")
    own = {other: f"{section}.{other}" for other in _keys(section)}
    elsewhere = {other: f"{there}.{other}" for there, other, _ in reversed(fields())}
    sections = {} if section else {other: other for other in Settings.model_fields}
    # Most likely a slip within the section; else the right name in the wrong one.
    for known, cutoff in ((own, 0.75), (sections, 0.6), (elsewhere, 0.75)):
        near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
        if near:
            return f"did you mean {known[near[0]]}?"
    return f"the keys of {section} are {', '.join(own)}" if own else ""


def _keys(section: str) -> list[str]:
    """Keys of a section such as `run`, or of an entry of a list such as `data.train.0`; none where it has none."""
    found: Any = Settings
    for part in section.split("."):
        if part.isdigit():
            found = get_args(found)[0]
        else:
            field = getattr(found, "model_fields", {}).get(part)
            found = field and field.annotation
    return list(getattr(found, "model_fields", {}))


def _example(section: str) -> str:
    return next(iter(_keys(section)), "FIELD")


# What pydantic complains of, as (what is wrong with the value, what would be right).
_WRONG = {
    "greater_than": ("is out of range", "give a value above {gt}"),
    "greater_than_equal": ("is out of range", "give at least {ge}"),
    "less_than": ("is out of range", "give a value below {lt}"),
    "less_than_equal": ("is out of range", "give at most {le}"),
    "finite_number": ("is not finite", "give a number"),
    "int_type": ("is not a whole number", "give one"),
    "int_from_float": ("is not a whole number", "give one"),
    "float_type": ("is not a number", "give one"),
    "bool_type": ("is not true or false", "give one of the two"),
    "string_type": ("is not text", "give text, in quotes if it looks like something else"),
    "string_too_short": ("is empty", "give a path"),
    "list_type": ("is not a list", "give one"),
    "too_short": ("is empty", "give at least one"),
    "dict_type": ("is not a section", "write its keys below it, or remove the line"),
    "model_type": ("is not a section", "write its keys below it, or remove the line"),
}


def _explain(error: ErrorDetails) -> str:
    """One sentence from pydantic's first complaint: key, value, what would be right."""
    key = ".".join(str(part) for part in error["loc"])
    value, kind, context = error["input"], error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key {key}; {_nearest(key) or 'see --help for the keys'}"
    if kind == "missing":
        if key in Settings.model_fields:
            return f"section {key} is missing; write it in the file, or set --{key}.{_example(key)}"
        entry = any(isinstance(part, int) for part in error["loc"])
        return f"{key} is missing; set it in the file" + ("" if entry else f" or with --{key}")
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        near = difflib.get_close_matches(str(value), re.findall(r"'([^']+)'", context["expected"]), n=1)
        hint = f"did you mean {near[0]}?" if near else "choose one"
        return f"{key} {_shown(value)} is not one of {context['expected'].replace(' or ', ', ')}; {hint}"
    if kind == "model_type" and key[-1:].isdigit():
        return f"{key} {_shown(value)} is not a path; give one, or a path and its options as {{path: ...}}"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"{key} {value} is not written as a whole number; write {int(value)}"
    if kind in _WRONG:
        wrong, right = _WRONG[kind]
        bounds = {name: f"{bound:.15g}" for name, bound in context.items() if isinstance(bound, int | float)}
        return f"{key} {_shown(value)} {wrong}; {right.format(**bounds)}"
    return f"{key} {_shown(value)} is not usable; {error['msg'][0].lower()}{error['msg'][1:]}"


def _shown(value: Any) -> str:
    """A value as it would be written in the file, shortened."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else str(value)
    text = repr(value) if isinstance(value, str) else text
    return text if len(text) <= 60 else text[:57] + "..."


def fields() -> list[tuple[str, str, Any]]:
    """(section, key, pydantic field) of every setting, in order; `megatron` has no fixed keys."""
    found = []
    for section, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += [(section, key, f) for key, f in field.annotation.model_fields.items()]
    return found


USAGE = """\
usage: torchrun --nproc-per-node N -m megatron_rlvr.train CONFIG.yaml [--check] [--section.key VALUE ...]

Trains a Hugging Face model by reinforcement learning with verifiable rewards on megatron-core: the policy gradient
touches only the forking tokens, the response tokens of highest entropy in the batch (arXiv 2506.01939).

  CONFIG.yaml            the settings of the run; every key below is also a flag, which wins over the file
  --check                resolve everything, print the plan in words and stop; needs no GPU and no torchrun
                         (WORLD_SIZE=64 before the command checks a layout for 64 ranks)
  --help                 this text
"""


def help_text() -> str:
    """Usage and every setting with its type, default and meaning."""
    lines, current = [USAGE], ""
    for section, key, field in fields():
        if section != current:
            current = section
            lines.append(f"{section}:")
        default = "required" if field.is_required() else f"default {_shown_default(field)}"
        lines.append(f"  --{section}.{key}  ({_shown_type(field.annotation)}, {default})")
        lines.append(f"        {field.description}")
    lines.append("megatron:")
    lines.append("  --megatron.FIELD VALUE")
    lines.append(f"        {Settings.model_fields['megatron'].description}")
    return "\n".join(lines) + "\n"


def _shown_default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return "empty" if value == "" else f"{value:g}" if isinstance(value, float) else str(value)


def _shown_type(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = re.sub(r"typing\.Literal\[(.*?)\]", lambda m: m.group(1).replace("'", "").replace(", ", " | "), text)
    text = re.sub(r"(list)\[[\w.]*?\.?(\w+)Settings\]", "paths", text)
    for python, word in (("bool", "true | false"), ("str", "text"), ("int", "whole number"), ("float", "number")):
        text = re.sub(rf"\b{python}\b", word, text)
    return text.replace("None", "null")
