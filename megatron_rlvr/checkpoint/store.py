"""Training checkpoints in a run folder: their names, when one is due, which stay, and which one a run goes on from.

    checkpoints/settings.json     the settings that the run began with
    checkpoints/step_000020/      complete, or it would not have this name (policy/checkpoint.py builds it beside)
    checkpoints/step_000020.1/    the same weights, and what was sampled for step 21 until SIGTERM ended that
    checkpoints/latest            the name of the last one; changed after all else

Whoever is killed at any moment leaves a `latest` that names a complete checkpoint, or none: then the last one there is
counts. What is not older than it and not it, or has the name of something unfinished, is of no use and is removed by
the next run; folders of other names, and links, are somebody's own. Imports no torch.
"""

import errno
import json
import logging
import pickle
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_rlvr import atomic
from megatron_rlvr.atomic import temporary_path
from megatron_rlvr.config import RunSettings, Settings, SettingsError
from megatron_rlvr.errors import FaultError

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
_SETTINGS, _LATEST, _STATE = "settings.json", "latest", "training_state.pkl"
_NAME = re.compile(r"step_(\d{6,})(?:\.(\d+))?")
_UNFINISHED = re.compile(_NAME.pattern + r"\.(?:incomplete|removing)")

_OUT_OF_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# What may differ when a run goes on: how long it lasts, what it leaves behind, and where and how fast it runs.
_MAY_CHANGE = {
    *("run", "parallel", "sync", "log", "reward.workers", "reward.timeout_seconds", "optimizer.max_skipped_steps"),
    *("batch.tokens_per_micro_batch", "rollout.max_batch_rows", "rollout.max_batch_tokens", "rollout.servers"),
    *("rollout.max_inflight", "rollout.retries", "rollout.server_timeout_seconds", "rollout.colocated"),
}
_MUST_STAY = {"run.seed"}


class CheckpointError(FaultError):
    """A checkpoint that cannot be written or read, or an export that cannot be written; one sentence."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        step: the last one that is done.
        number: how often one with the same weights was saved before.
    """

    folder: Path
    step: int
    number: int = 0

    @classmethod
    def at(cls, folder: Path) -> "Checkpoint | None":
        """What the name of a folder says; None where it is another's."""
        found = _NAME.fullmatch(folder.name)
        return cls(folder, int(found[1]), int(found[2] or 0)) if found else None

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands among the others of its run."""
        return self.step, self.number

    def state(self) -> dict[str, Any]:
        """What `Checkpoints.save` was given beside the policy. A pickle: load checkpoints of people you trust."""
        path = self.folder / _STATE
        try:
            return pickle.loads(path.read_bytes())
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); write the name of an older checkpoint into "
                f"{self.folder.parent / _LATEST}"
            ) from error


@dataclass
class Done:
    """What a run has done so far, over all of its lives.

    Attributes:
        step: the last one.
        skipped: optimizer steps.
        before, after: metrics of the first and of the last evaluation.
    """

    step: int = 0
    skipped: float = 0.0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


# Before a run -------------------------------------------------------------------------------------------------------


def where_to_begin(settings: Settings, earlier: list[str]) -> Checkpoint | None:
    """The checkpoint to go on from; None for a fresh run.

    Args:
        earlier: names in `run.dir` that an earlier run has written.

    Raises: SettingsError where an earlier run may be neither continued nor replaced.
    """
    run, root = settings.run, Path(settings.run.dir) / FOLDER
    if run.overwrite:
        return None
    latest = latest_checkpoint(root)
    if run.resume == "must" and latest is None:
        raise SettingsError(
            f"run.resume must finds no checkpoint in {root}; correct run.dir, or set run.resume to auto"
        )
    if not earlier or (earlier == [FOLDER] and not _holds_anything(root)):
        return None
    began_with = _read_settings(root / _SETTINGS)
    if run.resume == "never" or began_with is None:
        lacks = "no checkpoint" if latest is None else f"no {root / _SETTINGS}"
        without = "" if run.resume == "never" else f" and {lacks}"
        raise SettingsError(
            f"run.dir {run.dir} holds an earlier run ({', '.join(earlier)}){without}; choose another folder, or set "
            "run.overwrite to true to replace it"
        )
    _check_settings(began_with, settings)
    if latest is not None and not (root / _LATEST).exists():
        logger.warning("%s is missing; the last checkpoint there is %s", root / _LATEST, latest.folder.name)
    return latest  # None: it ended before its first checkpoint, and begins again


def _holds_anything(root: Path) -> bool:
    """Not so where a run was killed before it had noted its settings."""
    return not root.is_dir() or any(path != temporary_path(root / _SETTINGS) for path in root.iterdir())


def latest_checkpoint(root: Path) -> Checkpoint | None:
    """The one that ``latest`` names, if there is one.

    Without it the last of the complete ones: the run was killed just before it wrote its first ``latest``, or the
    folder was copied without. Beginning anew would remove them.
    """
    try:
        name = (root / _LATEST).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return max(_complete_ones(root), key=lambda c: c.place, default=None) if root.is_dir() else None
    found = Checkpoint.at(root / name)
    if not found or not found.folder.is_dir():
        raise SettingsError(f"{root / _LATEST} names {name!r}, which is no checkpoint; write the name of one into it")
    return found


def prepare(settings: Settings, start: Checkpoint | None) -> None:
    """Notes the settings of a fresh run; removes what a killed run has left after the checkpoint it goes on from."""
    root = Path(settings.run.dir) / FOLDER
    root.mkdir(parents=True, exist_ok=True)
    if start is None:
        (root / _LATEST).unlink(missing_ok=True)
        atomic.write_text(root / _SETTINGS, json.dumps(settings.model_dump(), indent=1))
    _remove(root, [found for found in _complete_ones(root) if start is None or found.place > start.place])


def _complete_ones(root: Path) -> Iterator[Checkpoint]:
    """The checkpoints of a folder, but links, which are not ours."""
    for path in root.iterdir():
        found = Checkpoint.at(path)
        if found is not None and path.is_dir() and not path.is_symlink():
            yield found


def _remove(root: Path, checkpoints: Iterable[Checkpoint]) -> None:
    """Removes checkpoints of a folder, and whatever is unfinished there.

    They lose their names first: whoever finds one by name finds it whole. What does not go, as where others have its
    files open over NFS, is tried again with the next ones: a run does not end for it.
    """
    for checkpoint in checkpoints:
        with suppress(OSError):
            checkpoint.folder.rename(checkpoint.folder.with_name(checkpoint.folder.name + ".removing"))
    for path in root.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _read_settings(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise SettingsError(f"{path} is not valid JSON ({error}); restore it or start a new run") from None


def _check_settings(then: Mapping[str, Any], now: Settings) -> None:
    for section, values in now.model_dump().items():
        if section == "megatron":
            values = {key: values.get(key) for key in values | then.get(section, {})}
        for key, value in values.items():
            before = then.get(section, {}).get(key, None if section == "megatron" else value)
            name = f"{section}.{key}"
            may_change = not {section, name}.isdisjoint(_MAY_CHANGE) and name not in _MUST_STAY
            if not may_change and before != value:
                raise SettingsError(
                    f"{name} was {json.dumps(before)} when the run in run.dir {now.run.dir} began, and is "
                    f"{json.dumps(value)} now; set it back, or start a new run in another folder"
                )


# During a run -------------------------------------------------------------------------------------------------------


class SavePolicy(Protocol):
    """Begins to write the policy as a new folder, and returns what waits for the end; both are collectives.

    The folder has its name when all in it is on the disk. ``finish`` is called with it before that. ``same`` is a
    checkpoint with the same weights, where there is one. With ``background`` the policy may change meanwhile.
    """

    def __call__(
        self, folder: Path, finish: Callable[[Path], None], same: Path | None, *, background: bool
    ) -> Callable[[], None]: ...


def _alone(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


class Checkpoints:
    """Saves when it is due, and removes what is not kept. All ranks call it alike; the main rank acts.

    Args:
        is_main: whether this rank is the main one.
        start: what the run goes on from.
        agree: raises on every rank what failed on any; a collective over the world.
        finish: is called with a new checkpoint's folder before it gets its name, and may change files of it.
    """

    def __init__(
        self,
        run: RunSettings,
        *,
        is_main: bool,
        start: Checkpoint | None = None,
        agree: Callable[[Exception | None], None] = _alone,
        finish: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        self._run = run
        self._root = Path(run.dir) / FOLDER
        self._is_main = is_main
        self._agree = agree
        self._finish = finish
        self.last = start
        """What the run would go on from now."""
        self._begun: tuple[Checkpoint, Callable[[], None]] | None = None

    def due(self, step: int) -> bool:
        """Whether to save after a step: every `run.save_every` and at the end."""
        every = self._run.save_every
        return step == self._run.steps or bool(every and step % every == 0)

    def save(self, step: int, state: Mapping[str, Any], policy: SavePolicy) -> None:
        """Writes a checkpoint, or with `run.async_save` begins to; a collective over the world.

        Args:
            step: the last one that is done.
            state: plain values, of the main rank.
            policy: writes the policy's part.

        Raises: CheckpointError on every rank; earlier checkpoints are as they were.
        """
        self.complete()
        same = self.last if self.last is not None and self.last.step == step else None
        number = same.number + 1 if same else 0
        saved = Checkpoint(self._root / (f"step_{step:06d}" + (f".{number}" if number else "")), step, number)
        content = pickle.dumps(dict(state)) if self._is_main else b""

        def finish(building: Path) -> None:
            if same is None:  # files of another checkpoint are finished, and must stay as they are
                self._finish(building)
            path = building / _STATE
            path.unlink(missing_ok=True)  # it may be another checkpoint's file
            path.write_bytes(content)

        with self.explaining(f"the checkpoint of step {step}", self._root):
            complete = policy(saved.folder, finish, same.folder if same else None, background=self._run.async_save)
        self._begun = saved, complete
        if not self._run.async_save:
            self.complete()

    def complete(self) -> None:
        """Waits for what `save` has begun; like it otherwise."""
        if self._begun is None:
            return
        (saved, complete), self._begun = self._begun, None
        with self.explaining(f"the checkpoint of step {saved.step}", self._root):
            complete()
            self._agree(self._write_latest(saved))
        self.last = saved
        if self._is_main:
            with suppress(OSError):  # it is tried again the next time
                self._remove_old(saved)

    @contextmanager
    def explaining(self, what: str, folder: Path) -> Iterator[None]:
        """Raises CheckpointError, which says what to do, for an OSError: all ranks raise it while they write."""
        try:
            yield
        except OSError as error:
            full = _out_of_room(error)
            goes_on = f"goes on after step {self.last.step}" if self.last else "begins again"
            raise CheckpointError(
                f"{what} could not be written to {folder}{_room_in_words(folder) if full else ''} ({error}); "
                f"{'make room' if full else 'put that right'}, and the same command {goes_on}"
            ) from error

    def _write_latest(self, saved: Checkpoint) -> OSError | None:
        """What has failed."""
        try:
            if self._is_main:
                atomic.write_text(self._root / _LATEST, saved.folder.name + "\n")
        except OSError as error:
            return error
        return None

    def _remove_old(self, latest: Checkpoint) -> None:
        until = sorted((c for c in _complete_ones(self._root) if c.place <= latest.place), key=lambda c: c.place)
        every = self._run.keep_every
        _remove(self._root, [c for c in until[: -self._run.keep_last] if not (every and c.step % every == 0)])


def _out_of_room(error: OSError) -> bool:
    """By its numbers: only words may have come from another process, or a list of what happened to several files.

    torch hides the number at times, and does so where a disk is full.
    """
    numbers = {int(number) for number in re.findall(r"\[Errno (\d+)\]", str(error))}
    return not numbers or not numbers.isdisjoint(_OUT_OF_ROOM)


def _room_in_words(folder: Path) -> str:
    """Nothing where this rank's machine does not have the folder."""
    try:
        return f", where {shutil.disk_usage(folder).free / 1e9:.1f} GB are free"
    except OSError:
        return ""
