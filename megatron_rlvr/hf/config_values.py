"""Values of a ``config.json``, checked one by one: sizes that are ints above 0, floats that can be computed with."""

from collections.abc import Mapping
from typing import Any

from megatron_rlvr.errors import InputError

# Far beyond any model. Layers and experts are listed one by one; of floats, the squares must be numbers in fp32.
_LARGEST_SIZE = 2**31
_LARGEST_COUNTS = {"num_hidden_layers": 10_000, "num_experts": 10_000, "num_local_experts": 10_000}
_SMALLEST, LARGEST = 1e-18, 1e18
"""Smallest and largest float of a config."""


class ModelError(InputError):
    """A model folder that cannot be used."""


def positive_int(config: Mapping[str, Any], key: str) -> int:
    """Return a size or number. Raises ModelError if it is no int above 0, or beyond any model."""
    value, largest = config.get(key), _LARGEST_COUNTS.get(key, _LARGEST_SIZE)
    if type(value) is not int or not 0 < value <= largest:
        raise ModelError(f"{key} of config.json is {value!r}, not an integer above 0 and up to {largest}; copy its own")
    return value


def positive_float(values: Mapping[str, Any], key: str) -> float:
    """Return a float. Raises ModelError if it is none, or its square is not a positive number in fp32."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, float | int) or not _SMALLEST <= value <= LARGEST:
        raise ModelError(
            f"{key} of config.json is missing or not a number from {_SMALLEST:g} to {LARGEST:g} ({value!r}); copy the "
            "model's own"
        )
    return float(value)


def check_layer_lists(config: Mapping[str, Any]) -> None:
    """Raise ModelError unless the lists about single layers are lists of names, and of numbers of layers."""
    for key, kind in (("layer_types", str), ("mlp_only_layers", int)):
        value = config.get(key) or []
        if not isinstance(value, list) or not all(type(entry) is kind for entry in value):
            raise ModelError(f"{key} of config.json is no list of {kind.__name__}; copy the model's own")
