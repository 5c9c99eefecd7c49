"""Tests of the quickstart program at small size: the files it writes, and when it trains a base model."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from megatron_rlvr.startup.run_folder import RUN_FILES

PROGRAM = Path(__file__).parents[2] / "examples" / "quickstart" / "quickstart.py"


def run_quickstart(folder: Path) -> str:
    command = [sys.executable, str(PROGRAM), "--folder", str(folder), "--sequences", "300", "--steps", "2"]
    finished = subprocess.run(
        [*command, "--problems", "6"],
        env=tiny.environment(),
        cwd=PROGRAM.parents[2],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_the_quickstart_trains_exports_and_evaluates_the_export(tmp_path):
    output = run_quickstart(tmp_path)
    assert "accuracy of the export in transformers" in output

    summary = json.loads((tmp_path / "summary.json").read_text())
    for key in ("accuracy_before", "accuracy_after", "accuracy_reloaded"):
        assert 0 <= summary[key] <= 1
    assert summary["steps"] == 2
    assert summary["seconds"] > 0
    assert (Path(summary["export"]) / "model.safetensors").is_file()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]
    others = {path.name for path in tmp_path.iterdir()} - set(RUN_FILES)
    assert others == {"base_model", "data", "config.yaml"}, "nothing remains of the random model behind base_model"


def test_a_second_run_reuses_the_base_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    quickstart = importlib.import_module("quickstart")
    started: list[str] = []

    def record(*arguments: str) -> None:
        started.append(arguments[0])
        if arguments[0] == "-m":
            raise SystemExit

    monkeypatch.setattr(quickstart, "torchrun", record)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--folder", str(tmp_path)])
    for _ in range(2):
        with pytest.raises(SystemExit):
            quickstart.main()
        (tmp_path / "base_model").mkdir(exist_ok=True)
        (tmp_path / "base_model" / "model.safetensors").touch()
    assert started == [str(PROGRAM.parent / "make_base.py"), "-m", "-m"]
