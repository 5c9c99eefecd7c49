"""The run folder before a run: files of an earlier run, inputs in it, and whether it can be written."""

import shutil
from pathlib import Path

import pytest
from resolving import Resolve, refusal

from megatron_rlvr.hf.files import SINGLE
from megatron_rlvr.startup.run_folder import RUN_FILES


@pytest.mark.parametrize("name", RUN_FILES)
def test_files_of_an_earlier_run_are_kept_unless_overwrite_is_set(
    name: str, resolve_with: Resolve, tmp_path: Path
) -> None:
    left = tmp_path / "run" / name / "of the earlier run"
    left.mkdir(parents=True)
    message = refusal(resolve_with)
    assert f"run.dir={tmp_path}/run: the folder holds an earlier run ({name})" in message
    assert "run.overwrite" in message
    assert resolve_with(run={"overwrite": True}).settings.run.overwrite
    assert left.exists()


def test_a_folder_without_a_run_may_be_used(resolve_with: Resolve, tmp_path: Path) -> None:
    (tmp_path / "run" / "base_model").mkdir(parents=True)
    assert resolve_with().world_size == 1


def test_a_run_never_replaces_what_it_reads(resolve_with: Resolve, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "run" / "hf")
    message = refusal(
        resolve_with, run={"overwrite": True}, model={"path": str(tmp_path / "run" / ".." / "run" / "hf")}
    )
    assert message.startswith("model.path=")
    assert "hf is replaced" in message
    assert (tmp_path / "run" / "hf" / SINGLE).exists()


def test_a_run_folder_that_cannot_be_written_is_refused(resolve_with: Resolve, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in ("file", "file/run", "file/deep/run"):
        message = refusal(resolve_with, run={"dir": str(tmp_path / path)})
        assert f"run.dir={tmp_path / path}: cannot be written ({tmp_path}/file: Not a directory)" in message
    assert "run.dir=/proc/run: cannot be written (/proc: " in refusal(resolve_with, run={"dir": "/proc/run"})
    assert list(tmp_path.glob(".can_be_written*")) == []
