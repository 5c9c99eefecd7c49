"""Checkpoint folders: which are removed, and what a failed save leaves and reports.

Policies are stand-ins: writing weights is tested in tests/multi_rank/test_checkpoint.py.
"""

import errno
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from megatron_rlvr import atomic
from megatron_rlvr.checkpoint import store as module
from megatron_rlvr.checkpoint.resume import checkpoint_to_resume, prepare_checkpoints
from megatron_rlvr.checkpoint.store import Checkpoint, CheckpointError, Checkpoints, Finish, latest_checkpoint
from megatron_rlvr.config import RunSettings, SettingsError
from megatron_rlvr.config.loading import load_settings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return folder


def run(root: Path, **changes: Any) -> RunSettings:
    values: dict[str, Any] = {"dir": str(root.parent), "steps": 9, "save_every": 1, "keep_last": 1}
    return RunSettings(**values | changes)


def write(folder: Path, finish: Finish, same: Path | None, *, background: bool) -> Callable[[], None]:
    """Stand-in for `save_policy`."""
    folder.mkdir(parents=True)
    return lambda: finish(folder, {})


def raising(error: OSError) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise error

    return fail


def failing(error: OSError) -> Any:
    """Return a stand-in for a `save_policy` that fails while it writes."""
    return lambda *_, **__: raising(error)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Removal ----------------------------------------------------------------------------------------------------


def in_use(path: Any, ignore_errors: bool = False) -> None:
    """Stand-in for `shutil.rmtree` while another process reads a file over NFS."""
    if not ignore_errors:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))


def test_an_old_checkpoint_that_cannot_be_removed_is_no_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(run(root), is_main=True)
    checkpoints.save(1, {}, write)
    with monkeypatch.context() as patched:
        patched.setattr(module.shutil, "rmtree", in_use)
        checkpoints.save(2, {}, write)
    assert names(root) == ["latest", "step_000001.removing", "step_000002"]
    assert checkpoints.last == latest_checkpoint(root) == Checkpoint(root / "step_000002", 2)
    with monkeypatch.context() as patched:
        patched.setattr(module.Path, "rename", raising(OSError(errno.ESTALE, "Stale file handle")))
        checkpoints.save(3, {}, write)
    assert names(root) == ["latest", "step_000002", "step_000003"], "the next removal tries again"
    checkpoints.save(4, {}, write)
    assert names(root) == ["latest", "step_000004"]

    (root / "step_000005").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(module.shutil, "rmtree", in_use)
        prepare_checkpoints(SimpleNamespace(run=run(root)), checkpoints.last)  # type: ignore[arg-type]
    assert latest_checkpoint(root) == checkpoints.last
    assert "step_000005" not in names(root), "it must not be found by its name"


def test_folders_of_other_names_and_links_are_kept(root: Path) -> None:
    checkpoints = Checkpoints(run(root), is_main=True)
    (root / "best").symlink_to("step_000001")
    (root / "step_000000").symlink_to("step_000001")
    for name in ("hf_of_20", "step_20", "step_000020.mine", "step_000001.removing.not", "tensorboard.incomplete"):
        (root / name).mkdir()
    theirs = names(root)
    for step in (1, 2):
        checkpoints.save(step, {}, write)
    for name in ("step_000003", "step_000003.incomplete", "step_000001.1.removing"):
        (root / name).mkdir()
    prepare_checkpoints(SimpleNamespace(run=run(root)), checkpoints.last)  # type: ignore[arg-type]
    assert names(root) == sorted([*theirs, "latest", "step_000002"])


def test_a_run_killed_before_its_settings_were_written_starts_from_scratch(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = tiny.settings_for(root.parent / "model", root.parent / "problems.jsonl", root.parent)
    settings = load_settings(tiny.write_settings(root.parent / "config.yaml", values))
    assert checkpoint_to_resume(settings, ["checkpoints"]) is None
    monkeypatch.setattr("megatron_rlvr.atomic.flush", raising(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        prepare_checkpoints(settings, None)
    assert names(root) == ["settings.json.incomplete"]
    assert checkpoint_to_resume(settings, ["checkpoints"]) is None
    monkeypatch.undo()
    prepare_checkpoints(settings, None)
    assert names(root) == ["settings.json"]
    for theirs in ("config.yaml", "metrics.jsonl"):
        (root / "settings.json").replace(root / "settings.json.incomplete")
        with pytest.raises(SettingsError, match=f"holds an earlier run .checkpoints, {theirs}. and no checkpoint"):
            checkpoint_to_resume(settings, ["checkpoints", theirs])
        prepare_checkpoints(settings, None)


def test_without_latest_the_newest_complete_checkpoint_is_used(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = tiny.settings_for(root.parent / "model", root.parent / "problems.jsonl", root.parent, run={"steps": 10})
    settings = load_settings(tiny.write_settings(root.parent / "config.yaml", values))
    (root / "settings.json").write_text(json.dumps(settings.model_dump()), encoding="utf-8")
    assert checkpoint_to_resume(settings, ["checkpoints"]) is None
    for name in ("step_000002", "step_000010", "step_000010.1", "step_000011.incomplete", "step_000012.removing"):
        (root / name).mkdir()
    (root / "step_000030").symlink_to("step_000002")
    last = Checkpoint(root / "step_000010.1", 10, 1)
    with caplog.at_level(logging.WARNING, "megatron_rlvr"):
        assert checkpoint_to_resume(settings, ["checkpoints"]) == last
    assert caplog.messages == [f"{root / 'latest'} does not exist; the newest complete checkpoint is step_000010.1"]
    prepare_checkpoints(settings, last)
    assert names(root) == ["settings.json", "step_000002", "step_000010", "step_000010.1", "step_000030"]
    (root / "settings.json").unlink()
    with pytest.raises(SettingsError, match=r"holds an earlier run .* and no .*settings.json; choose another folder"):
        checkpoint_to_resume(settings, ["checkpoints"])
    (root / "latest").touch()
    assert latest_checkpoint(root / "latest") is None
    assert latest_checkpoint(root.parent / "nothing") is None
    with pytest.raises(SettingsError, match=r"latest names '', which is not a checkpoint"):
        latest_checkpoint(root)


# Failures ---------------------------------------------------------------------------------------------------------


def test_latest_that_cannot_be_written_fails_on_all_ranks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[Exception | None] = []

    def raise_on_all_ranks(failure: Exception | None) -> None:
        """Stand-in for the collective; the main rank calls it first."""
        failures.append(failure)
        if failures[0] is not None:
            raise failures[0]

    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(atomic, "write_text", raising(full))
    for is_main in (True, False):
        checkpoints = Checkpoints(run(root), is_main=is_main, raise_on_all_ranks=raise_on_all_ranks)
        with pytest.raises(CheckpointError, match=r"^the checkpoint of step 1 could not be written to .*; make room, "):
            checkpoints.save(1, {}, lambda *_, **__: lambda: None)
        assert checkpoints.last is None
    assert failures == [full, None]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(f"Worker failure: [Errno {errno.EFBIG}] File too large"), True),
        (OSError("unexpected pos 704 vs 598"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "model/config.json"), False),
        (shutil.Error([("a", "b", f"[Errno {errno.EIO}] Input/output error")]), False),
    ],
)
def test_only_a_full_disk_asks_to_make_room(error: OSError, full: bool, root: Path) -> None:
    checkpoints = Checkpoints(run(root), is_main=True)
    checkpoints.save(1, {}, write)
    with pytest.raises(CheckpointError) as raised:
        checkpoints.save(2, {}, failing(error))
    assert names(root) == ["latest", "step_000001"]
    begin, end = f"the checkpoint of step 2 could not be written to {root}", "and the same command resumes after step 1"
    what = "make room" if full else "correct that"
    assert str(raised.value).startswith(begin + (", where " if full else f" ({error})"))
    assert str(raised.value).endswith(f" ({error}); {what}, {end}")


def test_a_machine_without_the_folder_reports_the_same_failure(tmp_path: Path) -> None:
    checkpoints = Checkpoints(RunSettings(dir=str(tmp_path / "elsewhere"), steps=1), is_main=False)
    with pytest.raises(
        CheckpointError,
        match=r"elsewhere/checkpoints \(.Errno 28. Full\); make room, and .* starts from the first step$",
    ):
        checkpoints.save(1, {}, failing(OSError(errno.ENOSPC, "Full")))


def test_finish_changes_files_of_a_new_checkpoint_but_not_linked_ones(root: Path) -> None:
    finished: list[Path] = []
    checkpoints = Checkpoints(run(root), is_main=True, finish=finished.append)
    for step in (1, 1, 2):
        checkpoints.save(step, {}, write)
    assert finished == [root / "step_000001", root / "step_000002"]


def test_a_run_does_not_resume_with_fewer_steps_than_its_checkpoint_has(root: Path) -> None:
    values = tiny.settings_for(root.parent / "model", root.parent / "problems.jsonl", root.parent)
    settings = load_settings(tiny.write_settings(root.parent / "config.yaml", values))
    (root / "settings.json").write_text(json.dumps(settings.model_dump()), encoding="utf-8")
    (root / "step_000020").mkdir()
    path = tiny.write_settings(root.parent / "config.yaml", values)
    for steps in (20, 30):
        found = checkpoint_to_resume(load_settings(path, [f"--run.steps={steps}"]), ["checkpoints"])
        assert found is not None
        assert found.step == 20
    with pytest.raises(SettingsError, match=r"run.steps=19: the run in .* has done 20 .*step_000020.; give 20 or more"):
        checkpoint_to_resume(load_settings(path, ["--run.steps=19"]), ["checkpoints"])


# No checkpoints --------------------------------------------------------------------------------------------


def test_without_save_every_nothing_is_saved_and_a_finished_run_is_not_started_again(root: Path) -> None:
    assert [step for step in range(1, 10) if Checkpoints(run(root, save_every=0), is_main=True).due(step)] == []
    assert [step for step in range(1, 10) if Checkpoints(run(root, save_every=4), is_main=True).due(step)] == [4, 8, 9]
    folder = root.parent
    values = tiny.settings_for(folder / "model", folder / "a.jsonl", folder, run={"save_every": 0})
    settings = load_settings(tiny.write_settings(folder / "settings.yaml", values))
    prepare_checkpoints(settings, None)
    stopped, finished = ["metrics.jsonl", "checkpoints"], ["metrics.jsonl", "summary.json", "checkpoints"]
    assert checkpoint_to_resume(settings, stopped) is None
    with pytest.raises(SettingsError, match=r"holds a finished run without a checkpoint \(run.save_every=0\); choose"):
        checkpoint_to_resume(settings, finished)
    values["run"]["overwrite"] = True
    again = load_settings(tiny.write_settings(folder / "settings.yaml", values))
    assert checkpoint_to_resume(again, finished) is None
