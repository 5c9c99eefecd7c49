"""The base of all sections of the settings, and the error of settings that cannot be used."""

from pydantic import BaseModel, ConfigDict

from megatron_rlvr.errors import InputError


class SettingsError(InputError):
    """Settings that cannot be used. The message is one sentence: `key=value: problem; remedy`."""


class Section(BaseModel):
    """Keys with types, defaults and bounds; the docstring below a key is its text in ``--help``.

    Sections cannot be changed after validation, know no keys but their own, and convert no types: "1" is not an int.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
