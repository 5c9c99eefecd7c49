"""A checkpoint proves itself: whatever is changed in its folder is named, and an older one that passes is offered."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launcher import Ranks

from megatron_rlvr.checkpoint import manifest as module
from megatron_rlvr.checkpoint.manifest import (
    FileDigest,
    InvalidCheckpointError,
    Manifest,
    digest_of,
    read_manifest,
    write_manifest,
)
from megatron_rlvr.checkpoint.resume import check_files
from megatron_rlvr.checkpoint.store import Checkpoint, latest_checkpoint
from megatron_rlvr.config import SettingsError

CONTENT = {
    "common.pt": b"common",
    "__0_0.distcp": bytes(range(256)) * 8,
    "hugging_face/config.json": b"{}",
    "empty": b"",
}


def write(root: Path, step: int) -> Checkpoint:
    """Write a checkpoint whose files have the same names and sizes in every step, and other bytes."""
    found = Checkpoint(root / f"step_{step:06d}", step)
    for name, content in CONTENT.items():
        path = found.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(byte ^ step for byte in content))
    write_manifest(found.folder, {"checkpoint": found.folder.name, "inputs": {"count": 3}})
    return found


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """The newest of three checkpoints."""
    return [write(tmp_path, step) for step in (2, 4, 6)][-1]


def check(checkpoint: Checkpoint) -> None:
    manifest = checkpoint.manifest()
    manifest.check_names()
    manifest.check_content(manifest.files)


def flip(name: str, at: int = 0) -> Callable[[Path], None]:
    def flipped(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 1
        (folder / name).write_bytes(content)

    return flipped


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the content of the manifest, and leave its identity as it is."""

    def edited(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        change(content)
        (folder / "manifest.json").write_text(json.dumps(content))

    return edited


def from_step_2(name: str) -> Callable[[Path], None]:
    def copied(folder: Path) -> None:
        shutil.copy(folder.with_name("step_000002") / name, folder / name)

    return copied


def link_to_elsewhere(folder: Path) -> None:
    (folder / "hugging_face").rename(folder.parent / "elsewhere")
    (folder / "hugging_face").symlink_to(folder.parent / "elsewhere")


def remove(*names: str) -> Callable[[Path], None]:
    def removed(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return removed


def loop(folder: Path) -> None:
    (folder / "empty").unlink()
    (folder / "empty").symlink_to("empty")


def fifo(folder: Path) -> None:
    (folder / "empty").unlink()
    os.mkfifo(folder / "empty")


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "first byte": (flip("__0_0.distcp"), "__0_0.distcp is not as it was saved"),
    "last byte": (flip("__0_0.distcp", -1), "__0_0.distcp is not as it was saved"),
    "below": (flip("hugging_face/config.json"), "hugging_face/config.json is not as it was saved"),
    "shorter": (lambda f: os.truncate(f / "common.pt", 5), "common.pt has 5 bytes instead of 6"),
    "longer": (lambda f: (f / "empty").write_bytes(b"x"), "empty has 1 bytes instead of 0"),
    "missing": (remove("common.pt"), "common.pt is missing"),
    "two missing": (remove("common.pt", "empty"), "common.pt is missing (and 1 more)"),
    "foreign": (lambda f: (f / "__1_0.distcp").touch(), "__1_0.distcp is not a file of this checkpoint"),
    "dangling": (lambda f: (f / "link").symlink_to("nothing"), "link is not a file of this checkpoint"),
    "loop": (loop, "empty is not a regular file"),
    "pipe": (fifo, "empty is not a regular file"),
    "folder elsewhere": (link_to_elsewhere, "hugging_face/config.json is missing"),
    "other step": (from_step_2("__0_0.distcp"), "__0_0.distcp is not as it was saved, but a file of step_000002"),
    "other manifest": (from_step_2("manifest.json"), "manifest.json is that of step_000002"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest, size": (edit(lambda c: c["files"]["common.pt"].__setitem__(0, 7)), "manifest.json is not as it was"),
    "manifest, inputs": (edit(lambda c: c["about"]["inputs"].clear()), "manifest.json is not as it was saved"),
    "manifest, identity": (edit(lambda c: c.pop("identity")), "manifest.json is not as it was saved"),
    "manifest, a list": (lambda f: (f / "manifest.json").write_text("[1]"), "manifest.json is not as it was saved"),
    "manifest, nested": (
        lambda f: (f / "manifest.json").write_text('{"a":' * 10**5),
        "manifest.json is not as it was saved",
    ),
    "manifest, digits": (
        lambda f: (f / "manifest.json").write_text('{"identity": ' + "1" * 5000 + "}"),
        "manifest.json is not as it was saved",
    ),
    "manifest, bytes": (
        lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"),
        "manifest.json is not as it was saved",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_is_named(name: str, checkpoint: Checkpoint) -> None:
    check(checkpoint)
    change, message = CHANGES[name]
    change(checkpoint.folder)
    with pytest.raises(InvalidCheckpointError) as raised:
        check(checkpoint)
    assert str(raised.value).startswith(f"{checkpoint.folder}: {message}")


def test_every_byte_of_every_file_counts(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 1)
    for path in [path for path in checkpoint.folder.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        for at in range(0, len(content), 41):
            flip(str(path.relative_to(checkpoint.folder)), at)(checkpoint.folder)
            with pytest.raises(InvalidCheckpointError, match=path.name):
                check(checkpoint)
            path.write_bytes(content)
    check(checkpoint)


def test_digests_and_identity_are_those_of_the_description(checkpoint: Checkpoint) -> None:
    content = json.loads((checkpoint.folder / "manifest.json").read_text())
    assert content["files"] == {
        name: [len(part), hashlib.sha256(bytes(byte ^ 6 for byte in part)).hexdigest()]
        for name, part in CONTENT.items()
    }
    identity = content.pop("identity")
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert identity == hashlib.sha256(text.encode()).hexdigest() == checkpoint.manifest().identity
    assert checkpoint.inputs() == {"count": 3}


def test_known_digests_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large").write_bytes(b"weights")
    (tmp_path / "small").write_bytes(b"state")
    known, read = {"large": digest_of(tmp_path / "large")}, []

    def noting(path: Path) -> FileDigest:
        read.append(path.name)
        return digest_of(path)

    monkeypatch.setattr(module, "digest_of", noting)
    write_manifest(tmp_path, {}, known)
    assert read == ["small"]
    manifest: Manifest = read_manifest(tmp_path)
    manifest.check_names()
    manifest.check_content(manifest.files)


# Which checkpoint a run resumes from ----------------------------------------------------------------------------------


def test_an_older_checkpoint_that_passes_is_offered_and_not_taken(checkpoint: Checkpoint) -> None:
    root = checkpoint.folder.parent
    check_files(checkpoint)
    (checkpoint.folder / "common.pt").unlink()
    message = f"{checkpoint.folder}: common.pt is missing; restore it, or write {{}} into {root / 'latest'} to resume "
    for offered in ("step_000004", "step_000002"):
        with pytest.raises(InvalidCheckpointError) as raised:
            check_files(checkpoint)
        assert str(raised.value) == message.format(offered) + "from there"
        (root / offered / "empty").unlink()
    with pytest.raises(
        InvalidCheckpointError, match=r"common.pt is missing; restore it, or set run.overwrite=true to "
    ):
        check_files(checkpoint)


def test_a_checkpoint_of_an_earlier_version_is_refused_with_the_way_to_its_weights(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 1)
    (checkpoint.folder / "manifest.json").unlink()
    with pytest.raises(InvalidCheckpointError, match=rf"is missing; .* rlvr convert to-hf {tmp_path}/step_"):
        check_files(checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        *("../../pristine/step_000002", "../step_000002", "/tmp/step_000002", "./step_000002", "step_000002/"),
        *("step_000002\nx", "step_000008", "..", "", "x" * 5000),
    ],
)
def test_latest_names_a_checkpoint_in_its_own_folder(name: str, tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    for folder in (root, tmp_path / "run", tmp_path / "pristine"):
        write(folder, 2)
    (root / "step_000008").symlink_to(tmp_path / "pristine" / "step_000002")
    (root / "latest").write_text(name, encoding="utf-8")
    with pytest.raises(SettingsError, match=r"latest names '.*, which is not a checkpoint; write the name"):
        latest_checkpoint(root)
    (root / "latest").write_text("step_000002\n", encoding="utf-8")
    assert latest_checkpoint(root) == Checkpoint(root / "step_000002", 2)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to(path),
        lambda path: os.mkfifo(path),
    ],
    ids=["bytes", "folder", "loop", "pipe"],
)
def test_latest_that_cannot_be_read_is_one_line(spoil: Callable[[Path], Any], tmp_path: Path) -> None:
    write(tmp_path, 2)
    spoil(tmp_path / "latest")
    with pytest.raises(SettingsError, match=r"latest cannot be read \(.*\); write the name of a checkpoint"):
        latest_checkpoint(tmp_path)


# All ranks ------------------------------------------------------------------------------------------------------------


def error_of_verifying(folder: str, damaged_for_rank: int | None = None) -> tuple[str, list[str]]:
    """Verify a checkpoint; return this rank's error and the names of the files that it has read."""
    from launcher import joined_process_group

    from megatron_rlvr.checkpoint.verification import verify

    read = []

    def noting(path: Path) -> FileDigest:
        read.append(f"{path.parent.name}/{path.name}")
        return digest_of(path)

    module.digest_of = noting
    try:
        with joined_process_group():
            verify(Checkpoint.at(Path(folder)))  # type: ignore[arg-type]
    except InvalidCheckpointError as error:
        return str(error), read
    finally:
        module.digest_of = digest_of
    return "", read


def test_ranks_share_the_files_and_agree_on_the_error(checkpoint: Checkpoint) -> None:
    ranks = Ranks(2)
    try:
        results = ranks.run(error_of_verifying, 2, str(checkpoint.folder))
        assert [error for error, _ in results] == ["", ""]
        assert sorted(name for _, read in results for name in read) == [
            "hugging_face/config.json", "step_000006/__0_0.distcp", "step_000006/common.pt", "step_000006/empty",
        ]  # fmt: skip
        for name in ("__0_0.distcp", "common.pt"):
            flip(name)(checkpoint.folder)
            errors = [error for error, _ in ranks.run(error_of_verifying, 2, str(checkpoint.folder))]
            assert errors[0] == errors[1]
            assert errors[0].startswith(
                f"{checkpoint.folder}: {name} is not as it was saved; restore it, or write step_000004 into "
            )
            flip(name)(checkpoint.folder)
        flip("common.pt")(checkpoint.folder)
        flip("__0_0.distcp")(checkpoint.folder.with_name("step_000004"))
        error, _ = ranks.run(error_of_verifying, 2, str(checkpoint.folder))[1]
        assert "write step_000002 into" in error, "every byte of what is offered is checked"
    finally:
        ranks.stop()
