"""Command lines of all verbs: a wrong number or path is one printable line on stderr and status 2."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.command_line import path, positive_int, share, small_int
from megatron_rlvr.config import SettingsError
from megatron_rlvr.convert.command import main as convert
from megatron_rlvr.data.command import main as data
from megatron_rlvr.engines.sglang.launcher.command import main as serve
from megatron_rlvr.evaluation.command.options import parse as evaluate
from megatron_rlvr.evaluation.command.options import settings_of
from megatron_rlvr.planner.command import main as plan
from megatron_rlvr.preflight.command import parse as preflight
from megatron_rlvr.rehearsal.command import main as rehearse

PATHS = ["a\0b", "x" * 300, "a/" * 3000, "a\ud800b", "a\udcffb", ""]
NUMBERS = ["9" * 5000, "-" + "9" * 5000, "9" * 12, "1.5", "x", "\u0663", "", "nan", "1e400", "a\nb"]

# Options of each verb that take a path or a number, behind those that it needs.
CASES: dict[Callable[..., Any], tuple[list[str], list[str], list[str]]] = {
    plan: (["--gpu", "h100", "--gpus", "8"], ["--model"], ["--gpus", "--prompts", "--mfu", "--top", "--server-tensor"]),
    rehearse: (["c.yaml", "--world", "2"], ["--model"], ["--world", "--layers"]),
    preflight: (["c.yaml"], ["--json"], []),
    evaluate: (
        ["m", "--sets", "s", "--out", "o"],
        ["--out", "--like", "--compare"],
        ["--samples", "--step", "--ranks"],
    ),
    data: (["overlap", "t"], ["--sets"], []),
    convert: (["to-megatron", "m"], [""], ["--tensor", "--pipeline", "--expert"]),
    serve: (["m", "--device", "cpu"], ["--run-dir", "--python", "--api-key-file"], ["--servers", "--tensor", "--port"]),
}


@pytest.mark.parametrize("verb", CASES, ids=lambda verb: verb.__module__.split(".")[1])
def test_a_wrong_number_or_path_is_one_printable_line(
    verb: Callable[[Sequence[str], str], Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    needed, paths, numbers = CASES[verb]
    for option, value in [*((o, v) for o in paths for v in PATHS), *((o, v) for o in numbers for v in NUMBERS)]:
        with pytest.raises(SystemExit) as left:
            verb([*needed, *filter(None, [option]), value], "rlvr")
        assert left.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("rlvr")
        assert line.isprintable(), (option, value)
        assert len(line) < 300, (option, value)


def test_types_of_arguments_accept_what_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    for text in (".", "/", "missing/file", "loop", "pipe", "a b\nc", "\u6f22", "x" * 255):
        assert path(text) == Path(text)
    assert [positive_int("1"), positive_int("0009"), small_int("-1"), small_int("+7")] == [1, 9, -1, 7]
    assert [share("1"), share("1e-3")] == [1.0, 0.001]
    for kind, text in ((positive_int, "0"), (positive_int, "1_0"), (small_int, " 1"), (share, "0"), (share, "inf")):
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


def test_a_folder_for_logs_that_is_a_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("megatron_rlvr.engines.sglang.launcher.command._HAS_SGLANG", "")
    with pytest.raises(SystemExit) as left:
        serve([str(tmp_path), "--device", "cpu", "--run-dir", str(tmp_path / "config.json")], "rlvr serve")
    assert left.value.code == 2
    assert "Not a directory" in capsys.readouterr().err


def test_no_device_is_replaced_by_a_problem_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.jsonl").write_text('{"problem": "1 + 1", "answer": "2"}\n')
    for out in ("pipe", "."):
        with pytest.raises(SystemExit):
            data(["prepare", "math500", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / out)], "rlvr data")
        assert "a folder or device; give a .jsonl file" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "a\udcffb", ""])
def test_a_problem_set_that_cannot_exist_is_an_error_of_the_settings(name: str, tmp_path: Path) -> None:
    options = evaluate(["m", "--sets", name, "--out", str(tmp_path)], "rlvr evaluate")
    with pytest.raises(SettingsError):
        settings_of(options, tmp_path, None, [])
