"""Fixtures of whole-program tests: a tiny model, problems, and settings that would run.

Tests marked ``gpu`` run where there is a GPU; elsewhere they are skipped, and the summary names them.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest
import tiny
import torch
from launcher import forget_process_groups, stop_all

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: its kernels then run on the CPU


# A deadline would measure what else the machine does, and new examples each time would fail at others' changes.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


# Rooms whose tests share servers or daemons: a worker of pytest-xdist runs the whole room. Of other rooms it runs a
# file at a time.
SHARED_ROOMS = ("tests/sglang/", "tests/cluster/")
# What takes longest is started first, and short files fill the gaps at the end.
_WHOLE_RUNS = re.compile(r"tests/(?:multi_rank/|quickstart/|preflight/|convert/)?test_\w+\.py")


def room_of(name: str) -> str:
    """Return the scope in which one worker runs the test ``name``: a room or a file."""
    return next((room for room in SHARED_ROOMS if name.startswith(room)), name.split("::")[0])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Rooms(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return room_of(nodeid)

    return Rooms(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (room_of(item.nodeid) not in SHARED_ROOMS, not _WHOLE_RUNS.match(item.nodeid)))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = [report.nodeid for report in terminalreporter.stats.get("skipped", [])]
    if skipped:
        terminalreporter.section("not run on this machine")
        for name in skipped:
            terminalreporter.line(name)


@pytest.fixture(scope="module", autouse=True)
def _no_process_groups_are_left() -> Iterator[None]:
    """Process groups that a module leaves behind have threads that slow down all later tests."""
    yield
    if psutil.Process().num_threads() > 20:
        forget_process_groups()


@pytest.fixture(scope="session", autouse=True)
def _no_forked_processes_are_left() -> Iterator[None]:
    yield
    stop_all()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Qwen3 and its tokenizer; read only."""
    return tiny.write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 20 problems in GSM8K's format; read only."""
    return tiny.write_gsm8k(tmp_path_factory.mktemp("problems") / "additions.jsonl")


@pytest.fixture
def write_config(tmp_path: Path, model: Path, problems: Path) -> Callable[..., Path]:
    """Writes settings that would run, with ``sections`` merged over them."""

    def write(**sections: dict[str, Any]) -> Path:
        values = tiny.settings_for(model, problems, tmp_path / "run", **sections)
        return tiny.write_settings(tmp_path / "config.yaml", values)

    return write
