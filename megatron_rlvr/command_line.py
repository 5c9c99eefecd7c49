"""From a YAML file and flags to settings, and back: reading, errors in one sentence, ``--help``. Imports no torch."""

import dataclasses
import difflib
import math
import re
from pathlib import Path
from typing import Any

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
    return yaml.safe_dump(settings.model_dump(exclude_unset=False), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML with 1e-6 read as a number, and a key given twice refused."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
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
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not valid YAML ({' '.join(str(error).split())}); correct it") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path} must hold sections such as run: and model:, not {type(values).__name__}")
    return values


def _parse_flags(arguments: list[str]) -> list[tuple[str, Any]]:
    flags, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or len(argument) == 2:
            raise SettingsError(f"unexpected argument {argument!r}; flags look like --section.key value")
        key, equals, text = argument[2:].partition("=")
        if not equals:
            if not rest:
                raise SettingsError(f"flag --{key} has no value; write --{key} VALUE")
            text = rest.pop(0)
        try:
            flags.append((key, yaml.load(text, Loader=_Loader)))
        except yaml.YAMLError:
            raise SettingsError(f"value {text!r} of flag --{key} is not valid YAML; quote it") from None
    return flags


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    if not sections:
        raise SettingsError(f"unknown flag --{dotted}; flags look like --section.key value{_nearest(dotted)}")
    for section in sections:
        if not isinstance(values.setdefault(section, {}), dict):
            raise SettingsError(f"{section} is not a section, so --{dotted} cannot be set; remove one of them")
        values = values[section]
    values[key] = value


def _nearest(key: str) -> str:
    """`; did you mean run.steps?`, or nothing when no key is near."""
    known = [f"{section}.{name}" for section, name, _ in fields()] + list(Settings.model_fields)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:  # the right name in the wrong section
        near = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]][:1]
    return f"; did you mean {near[0]}?" if near else ""


def _explain(error: ErrorDetails) -> str:
    """One sentence from pydantic's first complaint: key, value, what would be right."""
    key = ".".join(str(part) for part in error["loc"])
    value, kind, context = error["input"], error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key {key}{_nearest(key) or '; see --help for the keys'}"
    if kind == "missing":
        return f"{key} is missing; set it in the file or with --{key}"
    if kind == "value_error":
        return str(context["error"])
    if isinstance(value, float) and not math.isfinite(value):
        return f"{key} {value} is not a finite number; give one"
    shown = repr(value) if isinstance(value, str) else str(value)
    if len(shown) > 60:
        shown = shown[:57] + "..."
    if kind == "literal_error":
        near = difflib.get_close_matches(str(value), re.findall(r"'([^']+)'", context["expected"]), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{key} {shown} is not one of {context['expected']}{hint}"
    return f"{key} {shown} is not usable: {error['msg'][0].lower()}{error['msg'][1:]}"


def fields() -> list[tuple[str, str, Any]]:
    """(section, key, pydantic field) of every setting, in order; `megatron` has no fixed keys."""
    found = []
    for section, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += [(section, key, f) for key, f in field.annotation.model_fields.items()]
    return found


def megatron_fields(*classes: type) -> dict[str, type]:
    """Field name -> the dataclass of ``classes`` that has it (the first, where several do)."""
    return {f.name: cls for cls in reversed(classes) for f in dataclasses.fields(cls) if f.init}


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
    return {None: "none", True: "true", False: "false", "": "empty"}.get(value, str(value)) if not isinstance(
        value, list
    ) else "none"  # fmt: skip


def _shown_type(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = re.sub(r"typing\.Literal\[(.*?)\]", lambda m: m.group(1).replace("'", "").replace(", ", " | "), text)
    text = re.sub(r"(list)\[[\w.]*?\.?(\w+)Settings\]", "paths", text)
    return text.replace("bool", "true | false").replace("str", "text").replace("int", "whole number")
