"""When a checkpoint copies the policy, beside what the engine does in the same step. The parts are stand-ins."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import tiny

from megatron_rlvr import trainer as module
from megatron_rlvr.checkpoint.store import Checkpoints, Finish, latest_checkpoint
from megatron_rlvr.config.loading import validate
from megatron_rlvr.trainer import Trainer

SHARED_GPUS: dict[str, Any] = {
    "rollout": {"engine": "sglang", "servers": ["http://server:1"], "colocated": True},
    "sync": {"method": "disk"},
}
"""Servers release their memory for training."""
OTHER_GPUS: dict[str, Any] = {"rollout": {"engine": "sglang", "servers": ["http://server:1"]}}


def run_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, servers: dict[str, Any], *, background: bool
) -> tuple[Trainer, list[str]]:
    """Return a run of three steps that saves after the second and the third, and the list of what will happen in it."""
    happened: list[str] = []
    values = tiny.settings_for(folder / "model", folder / "problems.jsonl", folder)
    values["run"] |= {"steps": 3, "save_every": 2, "async_save": background}
    values["rollout"] = {"group_size": 4, "max_response_tokens": 16} | servers["rollout"]
    settings = validate(values | {key: value for key, value in servers.items() if key != "rollout"})

    def save_policy(
        policy: Any, folder: Path, finish: Finish, same: Path | None, *, background: bool
    ) -> Callable[[], None]:
        happened.append("copy")
        folder.mkdir(parents=True)

        def complete() -> None:
            happened.append("write")
            finish(folder, {})

        return complete

    def learn(step: int, rollout: Any) -> dict[str, float]:
        happened.append(f"learn {step}")
        return {}

    def sync(tensors: Any, version: int) -> None:
        happened.append(f"sync {version}")

    monkeypatch.setattr(module, "save_policy", save_policy)
    monkeypatch.setattr(module, "saved_form", lambda state: {})
    parts = {name: MagicMock() for name in ("engine", "collector", "log", "progress", "signals", "report", "export")}
    parts["engine"].release_memory = lambda: happened.append("release")
    parts["engine"].update_weights = sync
    parts["collector"].collect.return_value = SimpleNamespace(
        metrics={"rollout/response_tokens": 1.0}, size=1, sampled=[], groups=[]
    )
    parts["log"].write = lambda step, metrics: happened.append(f"log {step}" if "time/sync" in metrics else "")
    parts["signals"].saving = contextlib.nullcontext
    trainer = Trainer(
        settings,
        policy=MagicMock(learning_rate=0.1),
        prompts=[],
        learner=SimpleNamespace(skipped_in_a_row=0, entropy_coefficient=0.0),  # type: ignore[arg-type]
        evaluation={},  # type: ignore[arg-type]
        background=None,
        checkpoints=Checkpoints(settings.run, is_main=True),
        recorder=MagicMock(),
        **parts,
    )
    replacements = {"_learn": learn, "_most": lambda value: 0.0, "_stop_is_wanted": lambda: False}
    for name, replacement in replacements.items():
        monkeypatch.setattr(trainer, name, replacement)
    return trainer, happened


def check_checkpoint(folder: Path) -> None:
    """The checkpoint has the state of after the step, of which the policy's part may be from within it."""
    last = latest_checkpoint(folder / "checkpoints")
    assert last is not None
    assert last.step == 3
    assert last.state()["totals"]["step"] == 3


def test_the_policy_is_copied_before_servers_take_the_memory_of_shared_gpus_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, happened = run_of(tmp_path, monkeypatch, SHARED_GPUS, background=False)
    trainer.run()
    first = ["release", "learn 1", "sync 1", "log 1"]
    second = ["release", "learn 2", "copy", "sync 2", "log 2", "write"]
    third = ["release", "learn 3", "copy", "sync 3", "log 3", "write"]
    assert happened == ["sync 0", *first, *second, *third]
    check_checkpoint(tmp_path)


def test_a_checkpoint_in_the_background_is_complete_before_the_next_one_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, happened = run_of(tmp_path, monkeypatch, SHARED_GPUS, background=True)
    trainer.run()
    third = ["release", "learn 3", "write", "copy", "sync 3", "log 3", "write"]
    assert happened[happened.index("log 2") + 1 :] == third
    check_checkpoint(tmp_path)


def test_servers_with_gpus_of_their_own_do_not_wait_for_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, happened = run_of(tmp_path, monkeypatch, OTHER_GPUS, background=False)
    trainer.run()
    assert happened[-6:] == ["release", "learn 3", "sync 3", "log 3", "copy", "write"]
    check_checkpoint(tmp_path)
