"""Training checkpoints in a run folder: their names, when one is due, which are kept, and the latest one.

    checkpoints/settings.json     settings that the run started with (written by `resume`)
    checkpoints/step_000020/      a complete checkpoint; until it is complete, it is named step_000020.incomplete.
                                  Its manifest (manifest.py) has the digest of each file, and what the run has read
    checkpoints/step_000020.1/    the same weights, with what was sampled for step 21 before SIGTERM stopped the run
    checkpoints/latest            the name of the latest checkpoint; changed after everything else

If a run is killed, `latest` names a complete checkpoint or is absent; then the newest complete one is used. Checkpoints
newer than `latest` and unfinished folders are removed by the next run. Folders of other names and links belong to the
user and are never touched. Imports no torch.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_rlvr import atomic
from megatron_rlvr.checkpoint.manifest import (
    NAME,
    FileDigest,
    InvalidCheckpointError,
    Manifest,
    read_manifest,
    write_manifest,
)
from megatron_rlvr.checkpoint.state import STATE_FILES, encode_state, read_state
from megatron_rlvr.config import RunSettings, SettingsError
from megatron_rlvr.write_errors import WriteError, explained

FOLDER = "checkpoints"
LATEST = "latest"
_CHECKPOINT, _INPUTS = "checkpoint", "inputs"
_NAME = re.compile(r"step_(\d{6,})(?:\.(\d+))?")
_UNFINISHED = re.compile(_NAME.pattern + r"\.(?:incomplete|removing)")


class CheckpointError(WriteError):
    """A checkpoint or an export that cannot be written."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        folder: Folder of the checkpoint.
        step: Last training step that it includes.
        number: Number of earlier checkpoints with the same weights.
    """

    folder: Path
    step: int
    number: int = 0

    @classmethod
    def at(cls, folder: Path) -> "Checkpoint | None":
        """Return the checkpoint that a folder's name denotes, or None if it is not the name of a checkpoint."""
        found = _NAME.fullmatch(folder.name)
        return cls(folder, int(found[1]), int(found[2] or 0)) if found else None

    @property
    def order(self) -> tuple[int, int]:
        """Sort key by which checkpoints of a run are in the order in which they were saved."""
        return self.step, self.number

    def manifest(self) -> Manifest:
        """Return the manifest. Raises InvalidCheckpointError also if it is that of another checkpoint."""
        manifest = read_manifest(self.folder)
        if manifest.about.get(_CHECKPOINT) != self.folder.name:
            raise InvalidCheckpointError(f"{self.folder}: {NAME} is that of {manifest.about.get(_CHECKPOINT)}")
        return manifest

    def inputs(self) -> dict[str, Any]:
        """Return the ``inputs`` given to `Checkpoints`. Raises InvalidCheckpointError if there is no manifest."""
        return dict(self.manifest().about.get(_INPUTS) or {})

    def state(self) -> dict[str, Any]:
        """Return the ``state`` given to `Checkpoints.save`. Raises InvalidCheckpointError if it cannot be read."""
        return read_state(self.folder)


@dataclass
class RunTotals:
    """Totals of a run since its first step, over all of its processes.

    Attributes:
        step: Last finished training step.
        skipped: Number of optimizer steps that were skipped.
        before: Metrics of the first evaluation.
        after: Metrics of the last evaluation.
        seconds: Training time.
    """

    step: int = 0
    skipped: float = 0.0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def latest_checkpoint(root: Path) -> Checkpoint | None:
    """Return the checkpoint that ``latest`` names.

    Without ``latest`` the newest complete checkpoint is returned: either the run was killed just before it wrote its
    first ``latest``, or the folder was copied without it. Starting from scratch would remove the checkpoints.

    Raises:
        SettingsError: If ``latest`` does not name a checkpoint in the folder itself.
    """
    path = root / LATEST
    if not os.path.lexists(path):
        return max(complete_checkpoints(root), key=lambda c: c.order, default=None) if root.is_dir() else None
    name = _read_name(path)
    for found in complete_checkpoints(root):
        if found.folder.name == name:
            return found
    raise SettingsError(f"{path} names {name[:80]!r}, which is not a checkpoint; write the name of one into it")


def _read_name(path: Path) -> str:
    """Return the line that a file contains."""
    try:
        if not path.is_file():
            raise OSError("not a regular file")
        with path.open("rb") as file:
            return file.read(1000).decode("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read ({error}); write the name of a checkpoint into a new one") from None


def older_checkpoints(checkpoint: Checkpoint) -> list[Checkpoint]:
    """Return the complete checkpoints of the same run from before ``checkpoint``, newest first."""
    older = [c for c in complete_checkpoints(checkpoint.folder.parent) if c.order < checkpoint.order]
    return sorted(older, key=lambda c: c.order, reverse=True)


def complete_checkpoints(root: Path) -> Iterator[Checkpoint]:
    """Yield the complete checkpoints of a folder, except links, which belong to the user."""
    for path in root.iterdir():
        found = Checkpoint.at(path)
        if found is not None and path.is_dir() and not path.is_symlink():
            yield found


def remove_checkpoints(root: Path, checkpoints: Iterable[Checkpoint]) -> None:
    """Remove checkpoints of a folder, and all unfinished folders in it.

    Checkpoints are renamed before they are removed, so that a checkpoint found by its name is complete. A folder that
    cannot be removed (over NFS, another process may have its files open) is no error: the next removal tries again.
    """
    for checkpoint in checkpoints:
        with suppress(OSError):
            checkpoint.folder.rename(checkpoint.folder.with_name(checkpoint.folder.name + ".removing"))
    for path in root.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


Finish = Callable[[Path, Mapping[str, FileDigest]], None]
"""Completes a folder before it gets its name, given its path and {name: digest} of files in it, as far as known."""


class SavePolicy(Protocol):
    """Starts to write the policy as a new folder; returns a function that waits until the folder is complete.

    Both are collectives over the world. The folder gets its name when everything in it is on the disk.

    Args:
        folder: Folder to write.
        finish: Called on the main rank when everything else is in the folder; writes the manifest.
        same: Checkpoint with the same weights, if there is one.
        background: If True, the policy may change while the folder is written.
    """

    def __call__(self, folder: Path, finish: Finish, same: Path | None, *, background: bool) -> Callable[[], None]: ...


@dataclass(frozen=True)
class _Started:
    """A checkpoint whose policy has been copied.

    Attributes:
        checkpoint: The checkpoint that it will be.
        content: {name: content} of the files of the state, on the main rank, once it is known.
        complete: Waits until the folder is complete.
    """

    checkpoint: Checkpoint
    content: dict[str, bytes]
    complete: Callable[[], None]


def _raise_alone(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


class Checkpoints:
    """Saves checkpoints and removes those that are not kept. All ranks make the same calls; the main rank acts.

    Args:
        run: The `run` section of the settings.
        is_main: True on the main rank.
        start: Checkpoint from which the run resumes.
        raise_on_all_ranks: Raises on every rank what failed on any; a collective over the world.
        finish: Called with the folder of a new checkpoint before it gets its name, and may change files in it.
        inputs: JSON-compatible record of what the run reads, which becomes part of each checkpoint's identity.
    """

    def __init__(
        self,
        run: RunSettings,
        *,
        is_main: bool,
        start: Checkpoint | None = None,
        raise_on_all_ranks: Callable[[Exception | None], None] = _raise_alone,
        finish: Callable[[Path], None] = lambda folder: None,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        self._run = run
        self._root = Path(run.dir) / FOLDER
        self._is_main = is_main
        self._raise_on_all_ranks = raise_on_all_ranks
        self._finish = finish
        self._inputs = dict(inputs or {})
        self.last = start
        """Checkpoint from which the run would resume now."""
        self._started: _Started | None = None
        self._in_progress: _Started | None = None

    def due(self, step: int) -> bool:
        """Return whether to save after a step: every `run.save_every` steps and at the end, or never if that is 0."""
        every = self._run.save_every
        return bool(every) and (step == self._run.steps or step % every == 0)

    def start(self, step: int, save_policy: SavePolicy) -> None:
        """Copy the policy's part of a checkpoint to host memory, for `save` of the same step. A collective.

        `save` does so itself where it need not be done earlier. A checkpoint that is started and not saved is never
        completed.

        Raises:
            CheckpointError: On every rank. Earlier checkpoints are unchanged.
        """
        self.complete()
        same = self.last if self.last is not None and self.last.step == step else None
        number = same.number + 1 if same else 0
        saved = Checkpoint(self._root / (f"step_{step:06d}" + (f".{number}" if number else "")), step, number)
        content: dict[str, bytes] = {}
        about = {_CHECKPOINT: saved.folder.name, _INPUTS: self._inputs}

        def finish(building: Path, digests: Mapping[str, FileDigest]) -> None:
            if same is None:  # linked files are those of a finished checkpoint, and must not be changed
                self._finish(building)
            for name, part in content.items():
                (building / name).unlink(missing_ok=True)  # it may be a link to the other checkpoint's file
                (building / name).write_bytes(part)
            known = {name: digest for name, digest in digests.items() if name not in STATE_FILES}
            write_manifest(building, about, known)

        with self.explaining_errors(f"the checkpoint of step {step}", self._root):
            complete = save_policy(saved.folder, finish, same.folder if same else None, background=self._run.async_save)
        self._started = _Started(saved, content, complete)

    def save(self, step: int, state: Mapping[str, Any], save_policy: SavePolicy) -> None:
        """Write a checkpoint; with `run.async_save`, start to write it. A collective over the world.

        Args:
            step: Last finished training step.
            state: Values for `state.encode_state`; those of the main rank are saved.
            save_policy: Writes the policy's part, unless `start` was called for this step.

        Raises:
            CheckpointError: On every rank. Earlier checkpoints are unchanged.
        """
        if self._started is None or self._started.checkpoint.step != step:
            self.start(step, save_policy)
        assert self._started is not None
        self._in_progress, self._started = self._started, None
        if self._is_main:
            self._in_progress.content.update(encode_state(state))
        if not self._run.async_save:
            self.complete()

    def complete(self) -> None:
        """Wait for the checkpoint that `save` has started, if any. Collective and errors as for `save`."""
        if self._in_progress is None:
            return
        started, self._in_progress = self._in_progress, None
        saved = started.checkpoint
        with self.explaining_errors(f"the checkpoint of step {saved.step}", self._root):
            started.complete()
            self._raise_on_all_ranks(self._write_latest(saved))
        self.last = saved
        if self._is_main:
            with suppress(OSError):  # the next save tries again
                self._remove_old(saved)

    @contextmanager
    def explaining_errors(self, subject: str, folder: Path) -> Iterator[None]:
        """Turn an OSError, which all ranks raise when writing fails, into a CheckpointError that says what to do.

        Args:
            subject: Subject of the message, such as ``the checkpoint of step 20``.
            folder: Folder that could not be written.
        """
        then = f"resumes after step {self.last.step}" if self.last else "starts from the first step"
        with explained(subject, folder, f"the same command {then}", CheckpointError):
            yield

    def _write_latest(self, saved: Checkpoint) -> OSError | None:
        """Write the name of a checkpoint into ``latest``; return the failure, if any."""
        try:
            if self._is_main:
                atomic.write_text(self._root / LATEST, saved.folder.name + "\n")
        except OSError as error:
            return error
        return None

    def _remove_old(self, latest: Checkpoint) -> None:
        until = sorted((c for c in complete_checkpoints(self._root) if c.order <= latest.order), key=lambda c: c.order)
        every = self._run.keep_every
        old = [c for c in until[: -self._run.keep_last] if not (every and c.step % every == 0)]
        remove_checkpoints(self._root, old)
