"""A state is read back as it was saved, bit by bit, or refused in one line."""

import math
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rlvr.checkpoint.manifest import InvalidCheckpointError
from megatron_rlvr.checkpoint.state import STATE_FILES, encode_state, read_state


def write(folder: Path, state: dict[str, Any]) -> None:
    files = encode_state(state)
    assert tuple(files) == STATE_FILES
    for name, content in files.items():
        (folder / name).write_bytes(content)


def test_values_and_arrays_are_read_back_bit_by_bit(tmp_path: Path) -> None:
    rng = random.Random(0)
    floats = [struct.unpack("<d", rng.randbytes(8))[0] for _ in range(2000)]
    state = {
        "floats": [*(x for x in floats if not math.isnan(x)), 0.1, -0.0, 5e-324, 1e39, math.inf],
        "ints": [0, -1, 2**63, 10**40],
        "text": ["", "\ud800", "\0", "日本", 'a"\\'],
        "others": [None, True, False, {}, [], {"tensor": "0", "more": 1}],
        "arrays": [
            np.arange(5, dtype=np.int32),
            np.array([math.nan, -0.0, 1e-45], dtype=np.float32),
            np.empty(0, dtype=np.int64),
            np.arange(10)[::3],
        ],
    }
    write(tmp_path, state)
    found = read_state(tmp_path)
    for saved, wanted in zip(found.pop("arrays"), state.pop("arrays"), strict=True):  # type: ignore[call-overload]
        assert saved.dtype == wanted.dtype
        assert saved.tobytes() == wanted.tobytes()
    assert repr(found) == repr(state)


def test_an_object_of_another_class_is_not_saved() -> None:
    for value in (object(), np.int64(3), {1, 2}, Path("a")):
        with pytest.raises(AssertionError, match="in a state"):
            encode_state({"value": value})


@pytest.mark.parametrize("name", STATE_FILES)
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{", b"\xff", b'{"a": {"tensor": "7"}}', b'{"a":' * 10**5, b'{"a": ' + b"1" * 5000 + b"}"],
    ids=["empty", "list", "null", "open", "bytes", "no tensor", "nested", "digits"],
)
def test_a_damaged_state_is_one_line(name: str, content: bytes, tmp_path: Path) -> None:
    write(tmp_path, {"a": np.zeros(3)})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidCheckpointError, match=f"^{tmp_path}: {name} cannot be read"):
        read_state(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InvalidCheckpointError, match=f"^{tmp_path}: {name} cannot be read"):
        read_state(tmp_path)
