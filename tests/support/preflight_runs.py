"""Preflights, as a user starts them."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import zygote

_TOOL = tiny.CHECKOUT / "tools" / "preflight.py"


@dataclass(frozen=True)
class Preflight:
    """Exit status and output of one preflight.

    Attributes:
        status: Exit status.
        stdout: Printed table.
        stderr: Printed notes and errors.
        checks: {check: its entry in the JSON file}; {} if the preflight wrote no file.
    """

    status: int
    stdout: str
    stderr: str
    checks: Mapping[str, Mapping[str, Any]]

    @property
    def results(self) -> dict[str, str]:
        """{check: status}"""
        return {name: check["status"] for name, check in self.checks.items()}


def run_all(place: Path, runs: Mapping[str, Sequence[str | Path]]) -> dict[str, Preflight]:
    """Run preflights of one rank each, one after the other.

    Args:
        place: Folder in which they run.
        runs: {name: arguments}. With "train" as the first argument, the others start a training run. With "ranks" and
            MODULE, two ranks call the module's function `together` with the other arguments.
    """
    return {name: _run(place, name, arguments) for name, arguments in runs.items()}


def _run(place: Path, name: str, arguments: Sequence[str | Path]) -> Preflight:
    first, *words = map(str, arguments)
    results = ["--json", str(place / f"{name}.results.json")]
    env = tiny.environment([place, Path(__file__).parent, tiny.CHECKOUT / "tests" / "preflight"])
    if first == "train":
        done = zygote.run(tiny.command(*words), cwd=place, env=env)
    elif first == "ranks":
        module, *words = words
        code = f"import sys, {module}; {module}.together(*sys.argv[1:])"
        done = zygote.run([sys.executable, "-c", code, *words, *results], cwd=place, env=env, ranks=2)
    else:
        env |= {"RANK": "0", "WORLD_SIZE": "1"}  # a launcher's, or the tool would start a process itself
        done = zygote.run([sys.executable, str(_TOOL), first, *words, *results], cwd=place, env=env)
    return Preflight(done.returncode, done.stdout, done.stderr, _checks(place, name))


def run_ranks(place: Path, name: str, ranks: int, *arguments: str | Path) -> Preflight:
    """Run one preflight under torchrun."""
    words = [*map(str, arguments), "--json", str(place / f"{name}.results.json")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), _TOOL, *words],
        cwd=place, env=tiny.environment([place]), capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    return Preflight(done.returncode, done.stdout, done.stderr, _checks(place, name))


def _checks(place: Path, name: str) -> dict[str, Any]:
    path = place / f"{name}.results.json"
    return {check["name"]: check for check in json.loads(path.read_text())["checks"]} if path.exists() else {}
