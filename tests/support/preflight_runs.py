"""Preflights as a user starts them. Imports take longer than such a run, so one process forks several."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny

_TOOL = tiny.CHECKOUT / "tools" / "preflight.py"

# Runs argument lists, which are one file each; the output of a run goes to files beside its own.
_FORKING = """
import importlib, json, os, runpy, socket, sys, traceback
import megatron_rlvr.preflight.runner, megatron_rlvr.engines.embedded.engine
import megatron_rlvr.evaluation.evaluator, megatron_rlvr.learner, megatron_rlvr.rollout.synchronous
import megatron_rlvr.train, megatron_rlvr.trainer

TOOL, *paths = sys.argv[1:]
for path in paths:
    if not os.fork():
        for number, name in ((1, ".stdout"), (2, ".stderr")):
            os.dup2(os.open(path + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = [TOOL, *json.load(open(path))]
        status = 1
        try:
            if sys.argv[1] == "train":
                megatron_rlvr.train.main(sys.argv[2:-2])
            elif sys.argv[1] == "ranks":
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", 0))
                    port = probe.getsockname()[1]
                rank = os.fork() == 0
                os.environ |= {"RANK": str(int(rank)), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
                os.environ["MASTER_PORT"] = str(port)
                importlib.import_module(sys.argv[2]).together(*sys.argv[3:])
            else:
                os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}  # a launcher's, or the tool would start a process itself
                runpy.run_path(TOOL, run_name="__main__")
            status = 0
        except SystemExit as left:
            status = left.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    open(path + ".status", "w").write(str(os.waitstatus_to_exitcode(os.wait()[1])))
"""


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
        place: Folder for their output.
        runs: {name: arguments}. With "train" as the first argument, the others start a training run. With "ranks" and
            MODULE, two ranks call the module's function `together` with the other arguments.
    """
    for name, arguments in runs.items():
        words = [*map(str, arguments), "--json", str(place / f"{name}.results.json")]
        (place / f"{name}.args").write_text(json.dumps(words), encoding="utf-8")
    paths = [str(place / f"{name}.args") for name in runs]
    program = [sys.executable, "-c", _FORKING, str(_TOOL), *paths]
    subprocess.run(
        program,
        cwd=place,
        env=tiny.environment([place, Path(__file__).parent, tiny.CHECKOUT / "tests" / "preflight"]),
        check=True,
        timeout=400,
        capture_output=True,
    )
    return {name: _of(place, name) for name in runs}


def run_ranks(place: Path, name: str, ranks: int, *arguments: str | Path) -> Preflight:
    """Run one preflight under torchrun."""
    words = [*map(str, arguments), "--json", str(place / f"{name}.results.json")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), _TOOL, *words],
        cwd=place, env=tiny.environment([place]), capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    return Preflight(done.returncode, done.stdout, done.stderr, _checks(place, name))


def _of(place: Path, name: str) -> Preflight:
    status, out, err = ((place / f"{name}.args.{what}").read_text() for what in ("status", "stdout", "stderr"))
    return Preflight(int(status), out, err, _checks(place, name))


def _checks(place: Path, name: str) -> dict[str, Any]:
    path = place / f"{name}.results.json"
    return {check["name"]: check for check in json.loads(path.read_text())["checks"]} if path.exists() else {}
