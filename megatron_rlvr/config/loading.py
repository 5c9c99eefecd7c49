"""Settings from a YAML file and flags, and back to YAML, with every error as one sentence. Imports no torch.

A flag is ``--section.key value`` or ``--section.key=value``. It wins over the file, and a later flag over an earlier. A
file may extend another, and a flag may switch off what a file has settings for (`layers.py`).
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megatron_rlvr.config import Settings, SettingsError
from megatron_rlvr.config.layers import Layers, read_layers
from megatron_rlvr.config.no_effect import NoEffectError
from megatron_rlvr.config.section import MAX_FLOAT, MAX_INT, MIN_FLOAT
from megatron_rlvr.config.yaml_format import Dumper, load_yaml, shown
from megatron_rlvr.errors import InputError
from megatron_rlvr.input_files import BadFileError, read_text

# A settings file is not larger, and a path is shown whole up to this length.
_MAX_BYTES, _LONG_PATH = 2**20, 300

RENAMED = {
    "evaluate.samples": "evaluate.group_size",
    "reward.wrong": "reward.incorrect",
    "rollout.samples_per_prompt": "rollout.group_size",
}
"""{earlier name of a key: its name now}. An earlier name is an error that says the new one."""


_LEFT_OUT = {
    f"rollout.{key}": "training samples from the whole distribution, whose probabilities train; remove it"
    for key in ("top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
}
"""{key that other trainers have and this one refuses: why}."""


def load_settings(path: str | Path, overrides: list[str] | None = None) -> Settings:
    """Read settings from a YAML file, with flags on top. `Settings.unused` lists what a later layer switched off.

    Args:
        path: The settings file.
        overrides: Flags, as from a command line.

    Raises: SettingsError for the first error found.
    """
    return merge(read_layers(Path(path), read_sections), overrides)


def merge(layered: Sequence[Mapping[str, Any]], overrides: list[str] | None = None) -> Settings:
    """Make settings from the content of files, of which a later one extends an earlier; as `load_settings`."""
    layers = Layers()
    for layer in layered:
        layers.add(layer)
    flags = parse_flags(overrides or [])
    for key, value in flags:
        set_key(layers.values, key, value)
    layers.close([".".join(key.split(".")[:2]) for key, _ in flags])
    layers.drop_settings_of_other_objectives()
    while True:
        try:
            settings = Settings.model_validate(layers.values)
        except ValidationError as error:
            found = error.errors()[0]
            cause = found.get("ctx", {}).get("error")
            if not (isinstance(cause, NoEffectError) and layers.drop(cause.row)):
                raise SettingsError(_explain(found)) from None
        else:
            settings._unused = tuple(layers.unused)
            return settings


def validate(values: dict[str, Any]) -> Settings:
    """Make settings from nested dictionaries. Raises: SettingsError for the first error found."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(_explain(error.errors()[0])) from None


def to_yaml(settings: Settings) -> str:
    """Return the resolved settings as YAML that `load_settings` reads back to the same settings."""
    return yaml.dump(settings.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def fields() -> list[tuple[str, str, Any]]:
    """Return (section, key, pydantic field) of every key, in order; `megatron` has no fixed keys."""
    found = []
    for section, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += [(section, key, f) for key, f in field.annotation.model_fields.items()]
    return found


# Reading ------------------------------------------------------------------------------------------------------------


def read_yaml(path: Path, wanted: str = "a settings file", error_type: type[InputError] = SettingsError) -> Any:
    """Return what a YAML file holds. Raises ``error_type``, with ``wanted`` as the remedy if there is no such file."""
    name = _shown_path(path)
    try:
        return load_yaml(read_text(path, _MAX_BYTES))
    except FileNotFoundError:
        raise error_type(f"{name} does not exist; give {wanted}") from None
    except BadFileError as error:
        raise error_type(f"{name} cannot be read ({error}); give {wanted}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise error_type(f"{name}, line {line}: not valid YAML ({error.problem}); correct it") from None
    except yaml.YAMLError as error:
        raise error_type(f"{name} is not valid YAML ({' '.join(str(error).split())}); correct it") from None


def _shown_path(path: Path) -> str:
    return shown(str(path)) if len(str(path)) > _LONG_PATH else str(path)


def read_sections(path: Path) -> dict[str, Any]:
    """Return the content of one settings file. Raises: SettingsError."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        found = "is empty" if values is None else "holds no sections"
        raise SettingsError(f"{_shown_path(path)} {found}; write sections such as run: and model: with keys below them")
    return values


def parse_flags(arguments: list[str]) -> list[tuple[str, Any]]:
    """Return (key, value) of each flag ``--section.key value`` or ``--section.key=value``. Raises SettingsError."""
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
    """Read a flag's value as YAML. A key of type str takes any text, such as `Answer: x # 1`.

    Null and text in quotes are YAML for such a key as well.
    """
    if text != "null" and text[:1] not in ("'", '"') and _holds_str(key):
        return text
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise SettingsError(f"value {shown(text)} of flag --{key} is not valid YAML ({problem}); quote it") from None


def _holds_str(key: str) -> bool:
    return any(f"{section}.{name}" == key and f.annotation in (str, str | None) for section, name, f in fields())


def set_key(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a key such as "run.steps" in nested dictionaries. Raises SettingsError if it has no section."""
    *sections, key = dotted.split(".")
    if not sections or not all((*sections, key)):
        raise SettingsError(f"unknown flag --{dotted}; {_suggestion(dotted) or 'flags look like --section.key value'}")
    for depth, section in enumerate(sections, start=1):
        if values.get(section) is None:
            values[section] = {}
        if not isinstance(values[section], dict):
            raise SettingsError(f"unknown flag --{dotted}; {'.'.join(sections[:depth])} holds a value, not keys")
        values = values[section]
    values[key] = value


# Errors -------------------------------------------------------------------------------------------------------------

# {kind of an error of pydantic, or of section.py: (problem, remedy)}
_PROBLEMS = {
    "too_large": ("too large to compute with", f"give at most {MAX_INT} as an int, {MAX_FLOAT:g} as a float"),
    "too_small": ("too small to compute with", f"give 0, or at least {MIN_FLOAT:g} in size"),
    "not_json": ("not a value of JSON", "give a bool, int, float, str, list or mapping"),
    "not_text": ("holds a character that no file can hold", "remove it"),
    "path_too_long": ("too long for a path", "give one of at most 2000 bytes, with names of at most 255"),
    "greater_than": ("out of range", "give a value above {gt}"),
    "greater_than_equal": ("out of range", "give at least {ge}"),
    "less_than": ("out of range", "give a value below {lt}"),
    "less_than_equal": ("out of range", "give at most {le}"),
    "finite_number": ("not finite", "give a finite float"),
    "int_type": ("not an int", "give one"),
    "int_from_float": ("not an int", "give one"),
    "float_type": ("not a float", "give one"),
    "bool_type": ("not true or false", "give one of the two"),
    "string_type": ("not a str", "give one, in quotes if it looks like something else"),
    "string_too_short": ("empty", "give a path"),
    "list_type": ("not a list", "give one"),
    "too_short": ("empty", "give at least one"),
    "dict_type": ("not a section", "write its keys below it, or remove the line"),
    "model_type": ("not a section", "write its keys below it, or remove the line"),
}


def _explain(error: ErrorDetails) -> str:
    """Turn pydantic's error into one sentence: `key=value: problem; remedy`."""
    key = ".".join(str(part) for part in error["loc"])
    value, kind, context = error["input"], error["type"], error.get("ctx", {})
    if "at" in context:  # inside of a value
        key, value = key + context["at"], context["value"]
    if kind == "extra_forbidden":
        if len(error["loc"]) == 1 and (path := _nested(key, value)):
            return f"unknown key {key}; files have keys below their section: {path}"
        return f"unknown key {key}; {_suggestion(key) or 'see --help for the keys'}"
    if kind == "missing":
        if key in Settings.model_fields:
            return f"section {key} is missing; write it in the file, or set --{key}.{_example(key)}"
        entry = any(isinstance(part, int) for part in error["loc"])
        return f"{key} is missing; set it in the file" + ("" if entry else f" or with --{key}")
    if kind == "string_unicode":  # of a key: `Section` looks at values first
        return f"{key or 'settings'}: the key {shown(value)} holds a character that no file can hold; remove it"
    if kind == "value_error":
        return str(context["error"])
    return f"{key}={shown(value)}: " + "; ".join(_problem(key, value, kind, context) or (error["msg"], "correct it"))


def _problem(key: str, value: Any, kind: str, context: dict[str, Any]) -> tuple[str, str] | None:
    """(problem, remedy) of a value, or None for a kind of error that is not known here."""
    if kind == "literal_error":
        choices = re.findall(r"'([^']+)'", context["expected"])
        near = difflib.get_close_matches(shown(value), choices, n=1)
        return f"not one of {', '.join(choices)}", f"did you mean {near[0]}?" if near else "choose one"
    if kind == "model_type" and key[-1:].isdigit():
        return "not a path", "give one, or {path: ...} with its options"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return "not an int", f"write {int(value)}"
    if kind not in _PROBLEMS:
        return None
    problem, remedy = _PROBLEMS[kind]
    bounds = {name: f"{context[name]:.15g}" for name in ("gt", "ge", "lt", "le") if name in context}
    return problem, remedy.format(**bounds)


def _nested(key: str, value: Any) -> str:
    """`run: {steps: 3}` for the key "run.steps"; empty if there is no such key."""
    section, _, name = key.rpartition(".")
    return f"{section}: {{{name}: {shown(value)}}}" if name in _keys(section) else ""


def _suggestion(key: str) -> str:
    """The new name of a key, `did you mean run.steps?`, or the keys of its section; empty if that is not known."""
    if key in RENAMED:
        return f"it is now {RENAMED[key]}"
    if key in _LEFT_OUT:
        return _LEFT_OUT[key]
    if key in Settings.model_fields:
        return f"set one of its keys, such as {key}.{_example(key)}"
    section, _, name = key.rpartition(".")
    own = {other: f"{section}.{other}" for other in _keys(section)}
    elsewhere = {other: f"{there}.{other}" for there, other, _ in reversed(fields())}
    sections = {} if section else {other: other for other in Settings.model_fields}
    # Most likely a misspelling within the section; else the right name in the wrong section.
    for known, cutoff in ((own, 0.75), (sections, 0.6), (elsewhere, 0.75)):
        near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
        if near:
            return f"did you mean {known[near[0]]}?"
    return f"the keys of {section} are {', '.join(own)}" if own else ""


def _keys(section: str) -> list[str]:
    """Keys of a section such as `run`, or of an entry of a list such as `data.train.0`; empty for anything else."""
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
