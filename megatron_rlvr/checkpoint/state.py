"""State of a run as JSON and safetensors: dicts, lists, numbers, text and NumPy arrays, and nothing that can run code.

    training_state.json           everything but the arrays; where one was, there is {"tensor": "12"}
    training_state.safetensors    the arrays by these names

Floats are written with as many digits as it takes to read the same float back. Imports no torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rlvr.checkpoint.manifest import InvalidCheckpointError

_JSON, _TENSORS = "training_state.json", "training_state.safetensors"
STATE_FILES = (_JSON, _TENSORS)
_TENSOR = "tensor"


def encode_state(state: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the content of each of `STATE_FILES`.

    Args:
        state: Nested dicts with str keys, lists, tuples (read back as lists), None, bool, int, float, str and arrays.
            No dict has "tensor" as its only key.
    """
    from safetensors.numpy import save

    arrays: dict[str, np.ndarray] = {}

    def reference(value: Any) -> dict[str, str]:
        assert isinstance(value, np.ndarray), f"{type(value)} in a state"
        name = str(len(arrays))
        arrays[name] = np.ascontiguousarray(value)
        return {_TENSOR: name}

    text = json.dumps(dict(state), default=reference, separators=(",", ":"))
    return {_JSON: text.encode(), _TENSORS: save(arrays)}


def read_state(folder: Path) -> dict[str, Any]:
    """Read a state whose `STATE_FILES` are in a folder.

    Raises:
        InvalidCheckpointError: If a file is missing or holds something else; the message names it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    name = _TENSORS
    try:
        arrays = load_file(folder / _TENSORS)
        name = _JSON

        def resolve(found: dict[str, Any]) -> Any:
            return arrays[found[_TENSOR]] if found.keys() == {_TENSOR} else found

        state = json.loads((folder / _JSON).read_text(encoding="utf-8"), object_hook=resolve)
        if not isinstance(state, dict):
            raise ValueError("no JSON object")
        return state
    except (OSError, ValueError, LookupError, TypeError, RecursionError, SafetensorError) as error:
        raise InvalidCheckpointError(f"{folder}: {name} cannot be read ({error})") from error
