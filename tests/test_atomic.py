"""Files and folders appear complete or not at all, also after a kill of the process or a crash of the machine."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.atomic import flush, new_folder, write_text


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def raising(error: OSError) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise error

    return fail


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the paths flushed to the disk, and "old > new" for each rename, in order."""
    seen: list[str] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def note(handle: int) -> None:
        seen.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def named(move: Any) -> Any:
        def moved(path: Path, target: Path) -> Any:
            seen.append(f"{path.name} > {target.name}")
            return move(path, target)

        return moved

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "replace", named(replace))
    monkeypatch.setattr(Path, "rename", named(rename))
    return seen


def test_a_file_is_renamed_after_its_content_is_flushed(root: Path, flushed: list[str]) -> None:
    write_text(root / "latest", "step_000001\n")
    assert flushed == ["latest.incomplete", "latest.incomplete > latest", "checkpoints"]


@pytest.mark.parametrize("fsync", [True, False])
def test_a_folder_is_renamed_after_its_files_are_flushed(fsync: bool, root: Path, flushed: list[str]) -> None:
    for _ in range(2):
        with new_folder(root / "hf", fsync=fsync) as building:
            (building / "inner").mkdir()
            (building / "inner" / "file").touch()
            (building / "other").touch()
    files, folder = ["hf.incomplete", "inner", "file", "other"], ["checkpoints"]
    first = flushed.index("hf.incomplete > hf")
    assert sorted(flushed[:first]) == sorted(files if fsync else [])
    again = ["hf > hf.removing", "hf.incomplete > hf"]
    assert flushed[first + 1 :][-len(again + folder * fsync) :] == again + folder * fsync
    assert names(root) == ["hf"]


def test_a_file_system_that_cannot_flush_folders_is_accepted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", raising(OSError(errno.EINVAL, "Invalid argument")))
    with new_folder(root / "hf"):
        pass
    flush(root)
    monkeypatch.setattr(os, "fsync", raising(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        flush(root)


@pytest.mark.parametrize("name", ["hf > hf.removing", "hf.incomplete > hf"])
def test_a_kill_before_a_rename_leaves_the_old_folder_complete(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def killed(path: Path, target: Path) -> None:
        if f"{path.name} > {target.name}" == name:
            raise KeyboardInterrupt
        rename(path, target)

    (root / "hf").mkdir()
    (root / "hf" / "old").touch()

    def replace_it() -> None:
        with new_folder(root / "hf") as building:
            (building / "new").touch()

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            replace_it()
    assert [names(folder) for folder in root.iterdir()] == [["old"]], "the old folder, maybe under its temporary name"
    replace_it()
    assert names(root) == ["hf"]
    assert names(root / "hf") == ["new"]


def test_a_pipe_is_not_replaced_by_a_file(root: Path) -> None:
    os.mkfifo(root / "pipe")
    with pytest.raises(FileExistsError, match="not a regular file"):
        write_text(root / "pipe", "new")
    assert (root / "pipe").is_fifo()
    assert names(root) == ["pipe"]
