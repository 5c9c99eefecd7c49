"""What all sections of the settings are."""

from pydantic import BaseModel, ConfigDict

from megatron_rlvr.errors import InputError


class SettingsError(InputError):
    """Settings that cannot be used; the message is one sentence that names key, value and remedy."""


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
