"""Folders of checkpoints: which are removed, what a failure leaves and says, what outlasts the machine.

Policies are stand-ins: how weights are written is tested where they are.
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
from megatron_rlvr.checkpoint.store import (
    Checkpoint,
    CheckpointError,
    Checkpoints,
    latest_checkpoint,
    prepare,
    where_to_begin,
)
from megatron_rlvr.config import RunSettings, SettingsError
from megatron_rlvr.config.loading import load_settings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return folder


def run(root: Path, **changes: Any) -> RunSettings:
    return RunSettings(**{"dir": str(root.parent), "steps": 9, "save_every": 1, "keep_last": 1} | changes)


def write(folder: Path, finish: Callable[[Path], None], same: Path | None, *, background: bool) -> Callable[[], None]:
    """Stands for `Policy.save`."""
    folder.mkdir(parents=True)
    return lambda: finish(folder)


def raising(error: OSError) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise error

    return fail


def failing(error: OSError) -> Any:
    """Stands for `Policy.save` that fails while it writes."""
    return lambda *_, **__: raising(error)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is removed ----------------------------------------------------------------------------------------------------


def in_use(path: Any, ignore_errors: bool = False) -> None:
    """Stands for `shutil.rmtree` where somebody reads a file over NFS."""
    if not ignore_errors:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))


def test_an_old_checkpoint_that_cannot_be_removed_ends_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert names(root) == ["latest", "step_000002", "step_000003"], "what was left is removed with the next ones"
    checkpoints.save(4, {}, write)
    assert names(root) == ["latest", "step_000004"]

    (root / "step_000005").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(module.shutil, "rmtree", in_use)
        prepare(SimpleNamespace(run=run(root)), checkpoints.last)  # type: ignore[arg-type]
    assert latest_checkpoint(root) == checkpoints.last
    assert "step_000005" not in names(root), "it is no longer found by its name"


def test_folders_and_links_of_others_stay(root: Path) -> None:
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
    prepare(SimpleNamespace(run=run(root)), checkpoints.last)  # type: ignore[arg-type]
    assert names(root) == sorted([*theirs, "latest", "step_000002"])


def test_a_run_that_was_killed_before_its_settings_were_noted_begins_anew(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = tiny.settings_for(root.parent / "model", root.parent / "problems.jsonl", root.parent)
    settings = load_settings(tiny.write_settings(root.parent / "config.yaml", values))
    assert where_to_begin(settings, ["checkpoints"]) is None
    monkeypatch.setattr("megatron_rlvr.atomic.flush", raising(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        prepare(settings, None)
    assert names(root) == ["settings.json.incomplete"]
    assert where_to_begin(settings, ["checkpoints"]) is None
    monkeypatch.undo()
    prepare(settings, None)
    assert names(root) == ["settings.json"]
    for theirs in ("config.yaml", "metrics.jsonl"):
        (root / "settings.json").replace(root / "settings.json.incomplete")
        with pytest.raises(SettingsError, match=f"holds an earlier run .checkpoints, {theirs}. and no checkpoint"):
            where_to_begin(settings, ["checkpoints", theirs])
        prepare(settings, None)


def test_without_latest_the_last_checkpoint_counts(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = tiny.settings_for(root.parent / "model", root.parent / "problems.jsonl", root.parent)
    settings = load_settings(tiny.write_settings(root.parent / "config.yaml", values))
    (root / "settings.json").write_text(json.dumps(settings.model_dump()), encoding="utf-8")
    assert where_to_begin(settings, ["checkpoints"]) is None
    for name in ("step_000002", "step_000010", "step_000010.1", "step_000011.incomplete", "step_000012.removing"):
        (root / name).mkdir()
    (root / "step_000030").symlink_to("step_000002")
    last = Checkpoint(root / "step_000010.1", 10, 1)
    with caplog.at_level(logging.WARNING, "megatron_rlvr"):
        assert where_to_begin(settings, ["checkpoints"]) == last
    assert caplog.messages == [f"{root / 'latest'} is missing; the last checkpoint there is step_000010.1"]
    prepare(settings, last)
    assert names(root) == ["settings.json", "step_000002", "step_000010", "step_000010.1", "step_000030"]
    (root / "settings.json").unlink()
    with pytest.raises(SettingsError, match=r"holds an earlier run .* and no .*settings.json; choose another folder"):
        where_to_begin(settings, ["checkpoints"])
    (root / "latest").touch()
    assert latest_checkpoint(root / "latest") is None
    assert latest_checkpoint(root.parent / "nothing") is None
    with pytest.raises(SettingsError, match=r"latest names '', which is no checkpoint"):
        latest_checkpoint(root)


# What fails ---------------------------------------------------------------------------------------------------------


def test_latest_that_cannot_be_written_fails_on_all_ranks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Exception | None] = []

    def agree(failure: Exception | None) -> None:
        """The main rank is asked first."""
        told.append(failure)
        if told[0] is not None:
            raise told[0]

    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(atomic, "write_text", raising(full))
    ranks = [Checkpoints(run(root, dir=str(root.parent)), is_main=is_main, agree=agree) for is_main in (True, False)]
    for checkpoints in ranks:
        with pytest.raises(CheckpointError, match=r"^the checkpoint of step 1 could not be written to .*; make room, "):
            checkpoints.save(1, {}, lambda *_, **__: lambda: None)
        assert checkpoints.last is None
    assert told == [full, None]


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
def test_room_is_asked_for_where_there_is_none(error: OSError, full: bool, root: Path) -> None:
    checkpoints = Checkpoints(run(root), is_main=True)
    checkpoints.save(1, {}, write)
    with pytest.raises(CheckpointError) as raised:
        checkpoints.save(2, {}, failing(error))
    assert names(root) == ["latest", "step_000001"]
    begin, end = f"the checkpoint of step 2 could not be written to {root}", "and the same command goes on after step 1"
    what = "make room" if full else "put that right"
    assert str(raised.value).startswith(begin + (", where " if full else f" ({error})"))
    assert str(raised.value).endswith(f" ({error}); {what}, {end}")


def test_a_machine_without_the_folder_tells_the_same_failure(tmp_path: Path) -> None:
    checkpoints = Checkpoints(RunSettings(dir=str(tmp_path / "elsewhere"), steps=1), is_main=False)
    with pytest.raises(
        CheckpointError, match=r"elsewhere/checkpoints \(.Errno 28. Full\); make room, and .* begins again"
    ):
        checkpoints.save(1, {}, failing(OSError(errno.ENOSPC, "Full")))


def test_files_of_a_new_checkpoint_are_finished_and_those_of_another_left(root: Path) -> None:
    finished: list[Path] = []
    checkpoints = Checkpoints(run(root), is_main=True, finish=finished.append)
    for step in (1, 1, 2):
        checkpoints.save(step, {}, write)
    assert finished == [root / "step_000001", root / "step_000002"]
