"""The base of all sections of the settings, and the error of settings that cannot be used."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from megatron_rlvr.errors import InputError


class SettingsError(InputError):
    """Settings that cannot be used. The message is one sentence: `key=value: problem; remedy`."""


@dataclass(frozen=True)
class Unused:
    """A setting that was left out because a later file or flag switched its feature off.

    Attributes:
        key: The setting, such as "evaluate.group_size".
        value: Its value in the file.
        other: The setting that switched the feature off.
        other_value: The value of ``other``.
    """

    key: str
    value: Any
    other: str
    other_value: Any


class Section(BaseModel):
    """Keys with types, defaults and bounds; the docstring below a key is its text in ``--help``.

    Sections cannot be changed after validation, know no keys but their own, and convert no types: "1" is not an int.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
