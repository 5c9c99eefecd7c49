"""The precision of SGLang servers: what the launcher asks for, and what is compared before a run."""

import json
from pathlib import Path

import pytest

from megatron_rlvr.engines.sglang.client import ServerInfo
from megatron_rlvr.engines.sglang.connect import _mismatch, _Wanted
from megatron_rlvr.engines.sglang.launcher.command import _dtype_of
from megatron_rlvr.engines.sglang.launcher.process import ServerProgram


def problem(option: str | None, weights: str | None, wanted: str | None) -> str | None:
    config = {"model_type": "qwen3", "vocab_size": 9} | ({} if weights is None else {"dtype": weights})
    info = ServerInfo("qwen3", [], 100, 9, None, dtype=option)
    return _mismatch(info, _Wanted(config, 50, wanted))


@pytest.mark.parametrize(
    ("option", "weights", "wanted"),
    [
        ("float32", "float32", "float32"),
        ("float", "bfloat16", "float32"),
        ("auto", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "bfloat16"),
        (None, "float32", "float32"),  # it does not report its option
        ("auto", "float32", None),
    ],
)
def test_servers_of_the_trainers_precision_are_accepted(option: str | None, weights: str, wanted: str | None) -> None:
    assert problem(option, weights, wanted) is None


@pytest.mark.parametrize(
    ("option", "weights", "wanted", "served"),
    [
        ("auto", "float32", "float32", "float16 (--dtype auto)"),
        ("auto", None, "float32", "float16 (--dtype auto)"),
        ("auto", "bfloat16", "float32", "bfloat16 (--dtype auto)"),
        ("half", "bfloat16", "bfloat16", "float16 (--dtype half)"),
        ("float32", "float32", "bfloat16", "float32"),
    ],
)
def test_another_precision_is_one_line_with_the_flag(
    option: str, weights: str | None, wanted: str, served: str
) -> None:
    assert problem(option, weights, wanted) == (
        f"the server computes in {served}, and model.dtype is {wanted}; start it with --dtype {wanted}"
    )


def test_the_launcher_names_the_dtype_of_the_weights(tmp_path: Path) -> None:
    for named, dtype in (("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "bfloat16"), (None, "bfloat16")):
        (tmp_path / "config.json").write_text(json.dumps({} if named is None else {"torch_dtype": named}))
        assert _dtype_of(tmp_path) == dtype
    command = ServerProgram(Path("python"), tmp_path, 30000, tmp_path / "log", dtype="float32").command
    assert command[command.index("--dtype") + 1] == "float32"
