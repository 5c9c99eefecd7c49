"""Fixtures for tests of the launchers."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from cluster_runs import Run


@pytest.fixture(scope="module")
def new_run(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Callable[..., Any]]:
    """Creates runs on the tiny model, with a reward by which half of the responses are correct."""
    place = tmp_path_factory.mktemp("cluster")
    (place / "rewards.py").write_text(tiny.REWARDS, encoding="utf-8")
    tiny.write_gsm8k(place / "problems.jsonl")
    (place / "model").symlink_to(model)

    made = []

    def make(name: str, kind: type[Run] = Run, **sections: Any) -> Any:
        made.append(kind(place, name, sections))
        return made[-1]

    yield make
    for process in [process for run in made for process in run.processes()]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
