"""Runs the parts that need one GPU, each in a process with a time limit, and writes one JSON file and one table.

    tools/gpu_day.sh [--out DIR] [--only PART ...] [--device cpu --small]

    machine    what is installed and what is missing; the speed of a matrix product and of a copy
    nccl       collectives on one GPU, and a process group whose other rank never arrives
    head       the output layer's head beside other methods, at 20,480 rows and an eighth of Qwen3's vocabulary
    threshold  the exact threshold beside gathering and sorting
    policy     a policy of 1.7 or 4 billion random parameters through a whole step, beside the planner's estimates
    tests      tests/gpu

The limits of all parts add up to 25 minutes. A part that fails or takes too long is a row of the table with its error,
and the others follow. Files are written after each part; parts of an earlier run in the same folder are kept unless
they are run again, so a machine that is lent for minutes at a time can take the parts in turns.

Exit status: 0; 1 if a part has failed; 2 and one line on stderr if an option is wrong.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rows import read_rows, table

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]


@dataclass(frozen=True)
class Part:
    """A part of the day.

    Attributes:
        name: Name of the part.
        seconds: Time limit.
        command: Returns the command, from the options and the file of its rows.
        needs: Modules without which it cannot run.
        read: Returns the rows of the file, which may be missing or incomplete.
    """

    name: str
    seconds: float
    command: Callable[[argparse.Namespace, Path], Sequence[str]]
    needs: tuple[str, ...] = ("torch",)
    read: Callable[[Path], list[dict[str, Any]]] = read_rows


def program(name: str) -> Callable[[argparse.Namespace, Path], Sequence[str]]:
    """Return the command of a program of this folder."""

    def command(options: argparse.Namespace, rows: Path) -> Sequence[str]:
        small = ["--small"] if options.small else []
        return [sys.executable, str(HERE / name), "--device", options.device, "--rows", str(rows), *small]

    return command


def pytest_command(options: argparse.Namespace, rows: Path) -> Sequence[str]:
    """Return the command of the tests. Without a GPU none is selected; collecting them still imports their files."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if missing("hypothesis", "psutil"):  # which the fixtures of whole runs need
        command += ["--noconftest"]
    files = "tests/gpu/test_head_on_gpu.py" if options.small else "tests/gpu"
    unselected = ["-m", "not gpu"] if options.device == "cpu" else []
    return [*command, files, f"--junitxml={rows}", *unselected]


def rows_of_tests(path: Path) -> list[dict[str, Any]]:
    """Return a row for each test of pytest's XML file, and one for all of them together."""
    if not path.is_file():
        return []
    rows, counts = [], {"passed": 0, "failed": 0, "skipped": 0}
    for case in xml.etree.ElementTree.parse(path).iter("testcase"):
        name = case.get("name", "")
        problem = next((case.find(tag) for tag in ("failure", "error") if case.find(tag) is not None), None)
        skipped = case.find("skipped")
        outcome = "failed" if problem is not None else "skipped" if skipped is not None else "passed"
        counts[outcome] += 1
        row: dict[str, Any] = {"what": name, "result": f"{outcome}, {float(case.get('time', 0)):.1f} s"}
        if problem is not None:
            row["error"] = " ".join(problem.get("message", "").split())[:300]
        if skipped is not None:
            row["note"] = skipped.get("message", "")
        rows.append(row)
    total = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return [{"what": "all", "result": total, "numbers": counts}, *rows]


OF_THE_POLICY = ("torch", "numpy", "megatron.core", "pydantic", "psutil", "yaml")
PARTS = (
    Part("machine", 90, program("machine.py")),
    Part("nccl", 90, program("groups.py")),
    Part("head", 360, program("head_speed.py")),
    Part("threshold", 120, program("threshold_speed.py")),
    Part("policy", 360, program("policy_step.py"), needs=OF_THE_POLICY),
    Part("tests", 420, pytest_command, needs=("torch", "pytest"), read=rows_of_tests),
)
_NO_TESTS = 5  # pytest's exit status if none was selected
_PATIENCE_ON_A_CPU = 10  # a trial, on a machine that may have much else to do


def missing(*modules: str) -> list[str]:
    """Return those of the modules that are not installed."""

    def absent(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is None
        except ModuleNotFoundError:  # of a parent package
            return True

    return [name for name in modules if absent(name)]


def run_part(part: Part, options: argparse.Namespace) -> dict[str, Any]:
    """Run a part; return its rows, its seconds, and its error, "" if there is none."""
    if absent := missing(*part.needs):
        return {"seconds": 0.0, "error": f"not installed: {', '.join(absent)}", "rows": []}
    logs = options.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    rows, log = logs / f"{part.name}.rows", logs / f"{part.name}.txt"
    rows.unlink(missing_ok=True)
    limit = part.seconds * (_PATIENCE_ON_A_CPU if options.device == "cpu" else 1)
    start, error = time.monotonic(), ""
    with log.open("wb") as output:
        process = subprocess.Popen(
            part.command(options, rows),
            cwd=CHECKOUT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status, error = 0, f"it did not end within {limit:.0f} s"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if status and not (part.read is rows_of_tests and status == _NO_TESTS):
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        error = f"exit status {status}: {lines[-1].strip()[:300] if lines else 'no output'}"
    return {"seconds": time.monotonic() - start, "error": error, "rows": part.read(rows)}


def write(found: dict[str, Any], out: Path) -> None:
    """Write both files, each at once."""
    for name, text in (("gpu_day.json", json.dumps(found, indent=1)), ("gpu_day.md", table(found))):
        (out / f"{name}.new").write_text(text + "\n", encoding="utf-8")
        (out / f"{name}.new").replace(out / name)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    before = options.out / "gpu_day.json"
    found = json.loads(before.read_text(encoding="utf-8")) if before.is_file() else {"parts": {}}
    found |= {"device": options.device, "small": options.small}
    for part in PARTS:
        if part.name in options.only:
            print(part.name, flush=True)
            found["parts"][part.name] = run_part(part, options)
            write(found, options.out)
    found["parts"] = {part.name: found["parts"][part.name] for part in PARTS if part.name in found["parts"]}
    write(found, options.out)
    print(table(found))
    print(f"written to {options.out / 'gpu_day.json'} and gpu_day.md")
    parts = (found["parts"][name] for name in options.only)
    return int(any(part["error"] or any("error" in row for row in part["rows"]) for part in parts))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; exits with status 2 and one line if one is wrong, or if there is no GPU and one is wanted."""
    names = [part.name for part in PARTS]
    parser = _Parser("gpu_day.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("build/gpu_day_results"), metavar="DIR", help="folder of the two files and of "
        "the logs (default %(default)s)")  # fmt: skip
    add("--only", nargs="+", choices=names, default=names, metavar="PART", help=f"of {', '.join(names)}")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try this program (default cuda)")
    add("--small", action="store_true", help="tiny sizes, for a trial on a CPU")
    options = parser.parse_args(arguments)
    if absent := missing("torch"):
        parser.error(f"{sys.executable} has no {absent[0]}; set PYTHON to one that has")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("no GPU is visible to torch; run it where there is one, or try it with --device cpu --small")
    return options


if __name__ == "__main__":
    sys.exit(main())
