"""Runs the parts that need one GPU, each in a process with a time limit, and writes one JSON file and one table.

    tools/gpu_day.sh [--out DIR] [--only PART ...] [--device cpu --small]

    machine    what is installed and what is missing; the speed of a matrix product and of a copy
    nccl       collectives on one GPU, and a process group whose other rank never arrives
    head       the output layer's head beside other methods, at 20,480 rows and an eighth of Qwen3's vocabulary
    threshold  the exact threshold beside gathering and sorting
    policy     a policy of 1.7 or 4 billion random parameters through a whole step, beside the planner's estimates
    tests      tests/gpu

The limits of all parts add up to 25 minutes. A part that fails or takes too long is a row of the table with its error,
and the others follow. Files are written after each part; parts of an earlier run in the same folder, with the same
--device and --small, are kept unless they are run again, so a machine that is lent for minutes at a time can take the
parts in turns.

Exit status: 0; 1 if a part has failed; 2 and one line on stderr if an option is wrong or gpu_day.json is damaged.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rows import read_rows, table

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
PROGRAM = "gpu_day.sh"


@dataclass(frozen=True)
class Part:
    """A part of the day.

    Attributes:
        name: Name of the part.
        seconds: Time limit.
        command: Returns the command, from the options and the file of its rows.
        needs: Modules without which it cannot run.
    """

    name: str
    seconds: float
    command: Callable[[argparse.Namespace, Path], Sequence[str]]
    needs: tuple[str, ...] = ("torch",)


def program(name: str) -> Callable[[argparse.Namespace, Path], Sequence[str]]:
    """Return the command of a program of this folder."""

    def command(options: argparse.Namespace, rows: Path) -> Sequence[str]:
        small = ["--small"] if options.small else []
        return [sys.executable, str(HERE / name), "--device", options.device, "--rows", str(rows), *small]

    return command


OF_THE_POLICY = ("torch", "numpy", "megatron.core", "pydantic", "psutil", "yaml")
PARTS = (
    Part("machine", 90, program("machine.py")),
    Part("nccl", 90, program("groups.py")),
    Part("head", 360, program("head_speed.py")),
    Part("threshold", 120, program("threshold_speed.py")),
    Part("policy", 360, program("policy_step.py"), needs=OF_THE_POLICY),
    Part("tests", 420, program("gpu_tests.py"), needs=("torch", "pytest")),
)
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
    """Run a part; return its rows, its seconds, its error, "" if there is none, and the options that rows depend on."""
    given = {"device": options.device, "small": options.small}
    if absent := missing(*part.needs):
        return given | {"seconds": 0.0, "error": f"not installed: {', '.join(absent)}", "rows": []}
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
    if status:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        error = f"exit status {status}: {lines[-1].strip()[:300] if lines else 'no output'}"
    return given | {"seconds": time.monotonic() - start, "error": error, "rows": read_rows(rows)}


def earlier_parts(options: argparse.Namespace) -> dict[str, Any]:
    """Return the parts of an earlier run in the same folder, and name those that ran with other options.

    Raises:
        SystemExit: If the file is damaged.
    """
    path = options.out / "gpu_day.json"
    if not path.is_file():
        return {}
    given, kept = {"device": options.device, "small": options.small}, {}
    try:
        for name, part in json.loads(path.read_text(encoding="utf-8"))["parts"].items():
            if given.items() <= part.items():
                kept[name] = part
            else:
                print(f"{name}: its rows of an earlier run are dropped, with another --device or --small")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        _fail(f"{path}: cannot be read ({type(error).__name__}: {error}); delete it or choose another --out")
    return kept


def write(found: dict[str, Any], out: Path) -> None:
    """Write both files, each at once."""
    for name, text in (("gpu_day.json", json.dumps(found, indent=1)), ("gpu_day.md", table(found))):
        (out / f"{name}.new").write_text(text + "\n", encoding="utf-8")
        (out / f"{name}.new").replace(out / name)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    found = {"parts": earlier_parts(options)}
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


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"{PROGRAM}: {message}\n")
    sys.exit(2)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _fail(message)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; exits with status 2 and one line if one is wrong, or if there is no GPU and one is wanted."""
    names = [part.name for part in PARTS]
    parser = _Parser(PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("build/gpu_day_results"), metavar="DIR", help="folder of the two files and of "
        "the logs (default %(default)s)")  # fmt: skip
    add("--only", nargs="+", choices=names, default=names, metavar="PART", help=f"of {', '.join(names)}")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try this program (default cuda)")
    add("--small", action="store_true", help="tiny sizes, for a trial on a CPU")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()  # parts run in the checkout
    if absent := missing("torch"):
        parser.error(f"{sys.executable} has no {absent[0]}; set PYTHON to one that has")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("no GPU is visible to torch; run it where there is one, or try it with --device cpu --small")
    return options


if __name__ == "__main__":
    sys.exit(main())
