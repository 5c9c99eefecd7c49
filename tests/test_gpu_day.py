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


def test_each_test_of_pytest_is_a_row_also_one_that_cannot_be_imported(day: Any, tmp_path: Path):
    (tmp_path / "results.xml").write_text(
        '<testsuites><testsuite><testcase name="a" time="1.25"/><testcase name="b" time="0"><failure message="x\ny"/>'
        '</testcase><testcase name="c" time="0"><skipped message="needs two GPUs"/></testcase>'
        '<testcase name="d" time="0"><error message="collection failure"/></testcase></testsuite></testsuites>',
        encoding="utf-8",
    )
    total, *rows = day.rows_of_tests(tmp_path / "results.xml")
    assert total["result"] == "1 passed, 2 failed, 1 skipped"
    assert [row.get("error") for row in rows] == [None, "x y", None, "collection failure"]
    assert rows[2]["note"] == "needs two GPUs"
    assert day.rows_of_tests(tmp_path / "none.xml") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_program_says_so_in_one_line(tmp_path: Path):
    done = run("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--device cpu --small" in done.stderr
    assert not (tmp_path / "out").exists()
