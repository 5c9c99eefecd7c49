"""tools/plot.py: a picture of metrics, and one line for logs that are none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import zygote

WHOLE = b'{"step": 1, "reward/accuracy": 0.5}\n{"step": 2, "reward/accuracy": null}\n'


def plot(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    tool = str(tiny.CHECKOUT / "tools" / "plot.py")
    output = ["--output", str(folder / "picture.svg")]
    return zygote.run([sys.executable, tool, str(folder), *arguments, *output], cwd=folder, env=tiny.environment())


def test_a_log_of_a_run_that_was_killed_within_a_line_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(WHOLE + b'{"step"')
    assert plot(tmp_path).returncode == 0
    assert b"reward/accuracy" in (tmp_path / "picture.svg").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; give the folder of a run"),
        (WHOLE + b"[" * 3000 + b"\n", "line 3 cannot be read"),
        (WHOLE + b"5\n", "line 3 cannot be read (no metrics of a step)"),
        (b'{"step": 1' + b"9" * 5000 + b"}\n", "line 1 cannot be read"),
        (b"\xff\n", "line 1 cannot be read (byte 1 is not valid UTF-8)"),
        (
            WHOLE.replace(b"accuracy", b"mean"),
            "--metrics reward/accuracy: no run has it; choose from reward/mean, step",
        ),
        (None, "cannot be read (not a regular file)"),
    ],
    ids=["empty", "nested", "no object", "a number of 5,000 digits", "no UTF-8", "another metric", "a pipe"],
)
def test_a_log_that_cannot_be_drawn_is_one_line(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is None:
        os.mkfifo(tmp_path / "metrics.jsonl")
    else:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    done = plot(tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr
    assert not (tmp_path / "picture.svg").exists()
