"""Fields of megatron-core's dataclasses that the section `megatron` of the settings may set, and their types.

YAML has text, numbers and lists; some fields are members of an enumeration or dtypes. Megatron compares these by
identity, and takes a text that it does not know for none of them, so that `attention_backend: flash` would be ignored.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import cache
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_rlvr.config import SettingsError
from megatron_rlvr.config.yaml_format import shown

_CONFIGS = (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig)
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
}


@cache
def _types() -> dict[str, Any]:
    """Return {field: its type} of all dataclasses."""
    return {
        field.name: typing.get_type_hints(config)[field.name]
        for config in _CONFIGS
        for field in dataclasses.fields(config)
        if field.init and not field.name.startswith("_")
    }


def read_field(key: str, value: Any) -> Any:
    """Return a value of the section `megatron` in the type of its field.

    Args:
        key: Name of the field.
        value: As YAML has it; a member of an enumeration or a dtype by its name.

    Raises:
        SettingsError: If no dataclass has the field, or the value is not of its type.
    """
    if key not in _types():
        near = difflib.get_close_matches(key, _types(), n=1)
        raise SettingsError(
            f"unknown key megatron.{key}" + (f"; did you mean megatron.{near[0]}?" if near else "; remove it")
        )
    names = _names(_types()[key])
    if names and isinstance(value, str):
        if value not in names:
            raise SettingsError(
                f"megatron.{key}={shown(value)}: not one of {', '.join(sorted(names))}; choose one of them"
            )
        return names[value]
    try:
        adapter = TypeAdapter(_types()[key], config=ConfigDict(arbitrary_types_allowed=True))
        return adapter.validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise SettingsError(f"megatron.{key}={shown(value)}: {reason[:1].lower()}{reason[1:]}; correct it") from None


def read_fields(megatron: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section `megatron` with each value in the type of its field; see `read_field`."""
    return {key: read_field(key, value) for key, value in megatron.items()}


def _names(hint: Any) -> dict[str, Any]:
    """Return {name: value} of the enumerations and dtypes that a field takes, unless it takes any text."""
    options = list(_options(hint))
    if str in options:
        return {}
    found: dict[str, Any] = {}
    for option in options:
        if isinstance(option, type) and issubclass(option, Enum):
            found |= option.__members__
        elif option is torch.dtype:
            found |= _DTYPES
    return found


def _options(hint: Any) -> Iterator[Any]:
    """Return the types of a union, or the type itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            yield from _options(option)
    else:
        yield hint


def build_config(config: type, *parts: Mapping[str, Any]) -> Any:
    """Build one of the dataclasses from the fields that it has; later parts override earlier ones."""
    names = {field.name for field in dataclasses.fields(config) if field.init}
    values: dict[str, Any] = {}
    for part in parts:
        values |= part
    return config(**{key: value for key, value in values.items() if key in names})
