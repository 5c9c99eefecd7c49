"""A day with one GPU, tried on a CPU: every part gets through, and one that fails is a row while the others go on."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

CHECKOUT = Path(__file__).parents[1]
DAY = CHECKOUT / "benchmarks" / "gpu_day"
PARTS = ["machine", "nccl", "head", "threshold", "policy", "tests"]


@pytest.fixture(scope="module")
def day() -> Any:
    sys.path.insert(0, str(DAY))
    try:
        spec = importlib.util.spec_from_file_location("gpu_day", DAY / "__main__.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["gpu_day"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(DAY))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(CHECKOUT / "tools" / "gpu_day.sh"), *arguments],
        env=tiny.environment(PYTHON=sys.executable),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def numbers(found: dict[str, Any], part: str) -> dict[str, dict[str, Any]]:
    return {row["what"]: row["numbers"] for row in found["parts"][part]["rows"]}


def test_every_part_gets_through_on_a_cpu_and_is_in_both_files(tmp_path: Path):
    done = run("--device", "cpu", "--small", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_day.json").read_text(encoding="utf-8"))
    assert list(found["parts"]) == PARTS
    assert not any(part["error"] for part in found["parts"].values())
    assert all(row["error"] < 0.01 for row in numbers(found, "head").values())
    assert numbers(found, "threshold")["ours, 10,000 entropies"]["too_many"] == 0
    phases = numbers(found, "policy")
    names = ["model", "build", "score", "select", "train 1", "train 2", "export", "sync", "rollout"]
    assert list(phases) == names
    table = (tmp_path / "gpu_day.md").read_text(encoding="utf-8").splitlines()
    assert {line.split("|")[1].strip() for line in table[2:]} == set(PARTS)


def test_limits_of_all_parts_are_at_most_25_minutes(day: Any):
    assert sum(part.seconds for part in day.PARTS) <= 25 * 60
    assert [part.name for part in day.PARTS] == PARTS


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("import sys; print('no such device'); sys.exit(3)", "exit status 3: no such device"),
        ("import time; time.sleep(600)", "it did not end within 2 s"),
    ],
)
def test_a_part_that_fails_keeps_the_rows_that_it_had(day: Any, tmp_path: Path, program: str, error: str):
    options = argparse.Namespace(device="cuda", small=True, out=tmp_path)

    def command(_: argparse.Namespace, rows: Path) -> list[str]:
        line = json.dumps({"what": "first", "result": "1 s"})
        return [sys.executable, "-c", f"open({str(rows)!r}, 'w').write({line!r} + chr(10) + '{{half'); {program}"]

    part = day.run_part(day.Part("head", 2, command, needs=()), options)
    assert part["error"] == error
    assert part["rows"] == [{"what": "first", "result": "1 s"}]
    assert f"| head |  | FAILED after {part['seconds']:.0f} s: {error} |" in day.table({"parts": {"head": part}})


def test_a_part_whose_packages_are_missing_names_them(day: Any, tmp_path: Path):
    options = argparse.Namespace(device="cuda", small=True, out=tmp_path)
    part = day.run_part(day.Part("policy", 2, lambda *_: ["false"], needs=("json", "no_such.package")), options)
    assert part["error"] == "not installed: no_such.package"


def run_tests(folder: Path, *files: str) -> tuple[int, list[dict[str, Any]]]:
    """Run pytest as the part `tests` does, in a process of its own; return its exit status and the rows."""
    program = f"import sys; sys.path.insert(0, {str(DAY)!r}); import gpu_tests; from pathlib import Path; "
    program += f"sys.exit(gpu_tests.run([*{files!r}, '--noconftest', '-c', '/dev/null'], Path('rows')))"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, timeout=60, check=False)
    rows = [json.loads(line) for line in (folder / "rows").read_text(encoding="utf-8").splitlines()]
    return done.returncode, rows


def test_each_test_is_a_row_also_one_that_cannot_be_imported(tmp_path: Path):
    (tmp_path / "test_a.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2, 'x' + chr(10) + 'y'\n"
        "@pytest.mark.skip(reason='needs two GPUs')\n"
        "def test_skipped(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no device')\n"
        "def test_fixture(broken): pass\n",
        encoding="utf-8",
    )
    (tmp_path / "test_b.py").write_text("import no_such_module\n", encoding="utf-8")
    status, (imported, right, wrong, skipped, fixture, total) = run_tests(tmp_path, "test_a.py", "test_b.py")
    assert status == 1
    assert imported == {"what": "test_b.py", "error": "ModuleNotFoundError: No module named 'no_such_module'"}
    assert right["what"] == "test_right"
    assert right["result"].startswith("passed, ")
    assert wrong == {"what": "test_wrong", "error": "AssertionError: x y assert 1 == 2"}
    assert (skipped["what"], skipped["note"]) == ("test_skipped", "Skipped: needs two GPUs")
    assert fixture == {"what": "test_fixture", "error": "OSError: no device"}
    assert total["numbers"] == {"passed": 1, "failed": 3, "skipped": 1}


def test_tests_that_have_ended_are_rows_when_their_process_is_killed(tmp_path: Path):
    (tmp_path / "test_a.py").write_text(
        "import os\ndef test_right(): pass\ndef test_killed(): os.kill(os.getpid(), 9)\n", encoding="utf-8"
    )
    status, rows = run_tests(tmp_path, "test_a.py")
    assert status == -9
    assert [row["what"] for row in rows] == ["test_right"]


def test_a_relative_folder_is_where_the_caller_stands(day: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(day, "PARTS", [day.Part("machine", 60, day.program("machine.py"))])
    assert day.main(["--device", "cpu", "--small", "--only", "machine", "--out", "results"]) == 0
    found = json.loads((tmp_path / "results" / "gpu_day.json").read_text(encoding="utf-8"))
    assert found["parts"]["machine"]["rows"]


@pytest.mark.parametrize("given", [{"device": "cuda", "small": True}, {"device": "cpu", "small": False}, {}])
def test_rows_of_an_earlier_run_are_kept_only_if_its_device_and_sizes_are_those_of_this_one(
    day: Any, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    part = {"seconds": 1.0, "error": "", "rows": [{"what": "speed", "result": "fast"}]}
    same = {"device": "cpu", "small": True}
    parts = {"nccl": part | same, "head": part | given}
    (tmp_path / "gpu_day.json").write_text(json.dumps({"parts": parts}), encoding="utf-8")
    monkeypatch.setattr(day, "run_part", lambda _, options: part | same)
    assert day.main(["--device", "cpu", "--small", "--only", "machine", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu_day.json").read_text(encoding="utf-8"))
    assert found["parts"] == {"machine": part | same, "nccl": part | same}
    assert "head: its rows of an earlier run are dropped" in capsys.readouterr().out


@pytest.mark.parametrize("text", ['{"parts": {"head', "[]", "{}", '{"parts": {"head": 1}}', '{"parts": []}', "\udcff"])
def test_a_damaged_file_of_an_earlier_run_is_one_line(
    day: Any, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "gpu_day.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SystemExit) as stopped:
        day.main(["--device", "cpu", "--only", "machine", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "delete it or choose another --out" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_program_says_so_in_one_line(tmp_path: Path):
    done = run("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--device cpu --small" in done.stderr
    assert not (tmp_path / "out").exists()
