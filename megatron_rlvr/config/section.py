"""The base of all sections of the settings, and the error of settings that cannot be used."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, field_validator
from pydantic_core import PydanticCustomError

from megatron_rlvr.errors import InputError

MAX_INT = 2**53
"""Largest int of a setting: larger ones are no longer exact in other programs that read them."""
MAX_FLOAT, MIN_FLOAT = 1e18, 1e-18
"""Largest and smallest size of a float that is not 0: the squares of both are normal numbers in fp32."""
_PATH_BYTES, _NAME_BYTES = 2000, 255


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
    No number is so large or so small that computing with it gives infinity or 0, and every text can be written.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_used(cls, value: Any) -> Any:
        for each in value if isinstance(value, list) else [value]:
            _check_scalar(each)
        return value


def _check_scalar(value: Any, at: str = "") -> None:
    """Raise PydanticCustomError for a number or text that no setting can have.

    Args:
        at: End of the key, if the value is inside of the setting's value.
    """
    problem = None
    if isinstance(value, str):
        if not _is_unicode(value):
            problem, value, at = "not_text", _escaped(value), _escaped(at)
    elif isinstance(value, int):
        problem = "too_large" if abs(value) > MAX_INT else None
    elif isinstance(value, float):
        problem = "too_large" if abs(value) > MAX_FLOAT else "too_small" if 0 < abs(value) < MIN_FLOAT else None
        problem = "finite_number" if value != value or abs(value) == float("inf") else problem
    if problem:  # pydantic renders the context as UTF-8
        raise PydanticCustomError(problem, "a value that cannot be used", {"at": at, "value": value})  # type: ignore[arg-type]


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a pair of UTF-16, or a byte of the command line that is no UTF-8
        return False
    return True


def _escaped(text: str) -> str:
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def check_tree(value: Any) -> Any:
    """Check every number and text of nested lists and mappings."""
    to_do = [("", value)]
    while to_do:
        at, each = to_do.pop()
        if isinstance(each, dict):
            to_do += [(f"{at}.{key}", inner) for key, inner in each.items()]
            for key in each:
                _check_scalar(key, f"{at}.{key}")
        elif isinstance(each, list):
            to_do += [(f"{at}.{index}", inner) for index, inner in enumerate(each)]
        elif each is not None and not isinstance(each, str | int | float):
            raise PydanticCustomError("not_json", "a value that cannot be used", {"at": at, "value": each})
        else:
            _check_scalar(each, at)
    return value


def _check_path(path: str | None) -> str | None:
    if path is None:
        return None
    if "\0" in path:
        raise PydanticCustomError("not_text", "a value that cannot be used")
    parts = [len(part.encode()) for part in path.split("/")]
    if max(parts) > _NAME_BYTES or sum(parts) + len(parts) > _PATH_BYTES:
        raise PydanticCustomError("path_too_long", "a path that is too long")
    return path


PathText = Annotated[str, AfterValidator(_check_path)]
"""Path of a file or folder, which need not exist, but can."""
OptionalPath = Annotated[str | None, AfterValidator(_check_path)]
"""As `PathText`, or None."""
FreeForm = Annotated[dict[str, Any], BeforeValidator(check_tree)]
"""Mapping with any keys."""
