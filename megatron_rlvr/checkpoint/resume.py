"""Resuming a run: which checkpoint it continues from, and which of its settings may differ. Imports no torch.

A checkpoint whose files are wrong is never replaced by an older one silently: the message names one that passes.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rlvr import atomic
from megatron_rlvr.checkpoint.manifest import NAME, InvalidCheckpointError
from megatron_rlvr.checkpoint.store import (
    FOLDER,
    LATEST,
    Checkpoint,
    complete_checkpoints,
    latest_checkpoint,
    older_checkpoints,
    remove_checkpoints,
)
from megatron_rlvr.config import Settings, SettingsError

logger = logging.getLogger(__name__)

_SETTINGS = "settings.json"
_SUMMARY = "summary.json"

# Settings that may differ when a run resumes: how long it lasts, what it writes, and where and how fast it runs.
_MAY_CHANGE = {
    *("run", "parallel", "sync", "log", "reward.workers", "reward.timeout_seconds", "optimizer.max_skipped_steps"),
    *("batch.tokens_per_micro_batch", "rollout.max_batch_rows", "rollout.max_batch_tokens", "rollout.servers"),
    *("rollout.api_key_file", "rollout.max_inflight", "rollout.retries", "rollout.server_timeout_seconds"),
    *("rollout.colocated", "evaluate.servers"),
}
_MUST_STAY = {"run.seed"}


def checkpoint_to_resume(settings: Settings, earlier: list[str]) -> Checkpoint | None:
    """Return the checkpoint from which a run resumes, or None if it starts from scratch.

    Args:
        settings: Settings of the run.
        earlier: Names in `run.dir` that an earlier run has written.

    Raises:
        SettingsError: If the earlier run may be neither continued nor replaced.
    """
    run, root = settings.run, Path(settings.run.dir) / FOLDER
    if run.overwrite:
        return None
    latest = latest_checkpoint(root)
    if run.resume == "must" and latest is None:
        raise SettingsError(
            f"run.resume=must: there is no checkpoint in {root}; correct run.dir, or set run.resume to auto"
        )
    if not earlier or (earlier == [FOLDER] and _is_unused(root)):
        return None
    started_with = _read_settings(root / _SETTINGS)
    if run.resume == "never" or started_with is None:
        lacks = "no checkpoint" if latest is None else f"no {root / _SETTINGS}"
        without = "" if run.resume == "never" else f" and {lacks}"
        raise SettingsError(
            f"run.dir={run.dir}: the folder holds an earlier run ({', '.join(earlier)}){without}; choose another "
            "folder, or set run.overwrite to true to replace it"
        )
    _check_settings(started_with, settings)
    if latest is not None and run.steps < latest.step:
        raise SettingsError(
            f"run.steps={run.steps}: the run in run.dir={run.dir} has done {latest.step} (its checkpoint "
            f"{latest.folder.name}); give {latest.step} or more, or start a new run in another folder"
        )
    if latest is None and _SUMMARY in earlier:
        raise SettingsError(
            f"run.dir={run.dir}: the folder holds a finished run without a checkpoint (run.save_every=0); choose "
            "another folder, or set run.overwrite to true to replace it"
        )
    if latest is not None and not (root / LATEST).exists():
        logger.warning("%s does not exist; the newest complete checkpoint is %s", root / LATEST, latest.folder.name)
    return latest  # None: the earlier run ended before its first checkpoint, and starts again


def check_files(checkpoint: Checkpoint) -> None:
    """Check that exactly the files of the manifest exist, with their sizes; only the manifest is read.

    Raises:
        InvalidCheckpointError: With the file that is wrong, and the name of the newest older checkpoint that passes.
    """
    check_or_offer_older(checkpoint, older_checkpoints(checkpoint), lambda one: one.manifest().check_names())


def check_or_offer_older(
    checkpoint: Checkpoint, older: Sequence[Checkpoint], check: Callable[[Checkpoint], None]
) -> None:
    """Check a checkpoint; if it fails, check older ones until one passes, and name it in the error.

    Args:
        checkpoint: Checkpoint to resume from.
        older: Checkpoints that could be used instead, in the order of preference.
        check: Raises InvalidCheckpointError.
    """
    try:
        check(checkpoint)
    except InvalidCheckpointError as error:
        raise InvalidCheckpointError(f"{error}; {_remedy(checkpoint, older, check)}") from error


def _remedy(checkpoint: Checkpoint, older: Sequence[Checkpoint], check: Callable[[Checkpoint], None]) -> str:
    for other in older:
        try:
            check(other)
        except InvalidCheckpointError:
            continue
        return f"restore it, or write {other.folder.name} into {checkpoint.folder.parent / LATEST} to resume from there"
    if not (checkpoint.folder / NAME).exists():
        return (
            "if an earlier version of this program wrote it, resume with that version, or export its weights with "
            f"rlvr convert to-hf {checkpoint.folder} and start a new run from them"
        )
    return "restore it, or set run.overwrite=true to start from scratch, as no older checkpoint is complete"


def prepare_checkpoints(settings: Settings, start: Checkpoint | None) -> None:
    """Prepare the checkpoint folder of a run that resumes from ``start``, or starts from scratch if it is None.

    A fresh run writes its settings. Checkpoints newer than ``start``, left by a run that was killed, are removed.
    """
    root = Path(settings.run.dir) / FOLDER
    root.mkdir(parents=True, exist_ok=True)
    if start is None:
        (root / LATEST).unlink(missing_ok=True)
        atomic.write_text(root / _SETTINGS, json.dumps(settings.model_dump(), indent=1))
    newer = [found for found in complete_checkpoints(root) if start is None or found.order > start.order]
    remove_checkpoints(root, newer)


def _is_unused(root: Path) -> bool:
    """Return whether the folder holds nothing, as after a kill before the settings were completely written."""
    return root.is_dir() and all(path == atomic.temporary_path(root / _SETTINGS) for path in root.iterdir())


def _read_settings(path: Path) -> dict[str, Any] | None:
    """Return settings by section and key; None if there is no file."""
    if not os.path.lexists(path):
        return None
    try:
        if not path.is_file():
            raise OSError("not a regular file")
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict) or not all(isinstance(section, dict) for section in settings.values()):
            raise ValueError("settings are objects of objects")
        return settings
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{path} is not valid JSON ({error}); restore it, or start a new run") from None


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
                    f"{name}={json.dumps(value)}: the run in run.dir={now.run.dir} started with {json.dumps(before)}; "
                    "set it back, or start a new run in another folder"
                )
