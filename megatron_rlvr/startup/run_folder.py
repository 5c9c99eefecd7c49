"""The run folder, `run.dir`: its files, how far an earlier run got in it, and its preparation for a new run.

lease/             which run uses the folder (`lease.py`); gone when a run has ended in order
config.yaml        the resolved settings
metrics.jsonl      one object per training step
rollouts/          sampled responses as text, and what the tokens of those trained on did (megatron_rlvr/recording)
skipped/           mini-batches with a non-finite loss or gradient
tensorboard/       the metrics for TensorBoard
checkpoints/       training state (megatron_rlvr/checkpoint/store.py)
exports/, hf/      the model in Hugging Face format: on the way, and at the end
evaluations/       records and metrics of each evaluation (megatron_rlvr/evaluation/folder.py)
sync/              weights on their way to servers (`sync.method` disk)
sync_evaluation/   weights on their way to `evaluate.servers`
report.html        the run for a person to look at (`rlvr report`, `log.report_every`)
analysis/          results of `rlvr analyze`
summary.json       written when the last step is done
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from megatron_rlvr import atomic
from megatron_rlvr.checkpoint.resume import check_files, checkpoint_to_resume, prepare_checkpoints
from megatron_rlvr.checkpoint.store import FOLDER, Checkpoint, RunTotals
from megatron_rlvr.config import Settings, SettingsError
from megatron_rlvr.config.loading import to_yaml
from megatron_rlvr.evaluation.folder import EVALUATIONS, remove_later_evaluations
from megatron_rlvr.input_files import same_place
from megatron_rlvr.metrics import check_metrics
from megatron_rlvr.startup.process import is_main
from megatron_rlvr.write_errors import explained

RUN_FILES = (
    *("metrics.jsonl", "summary.json", "rollouts", "tensorboard", "hf", "exports", "sync", "skipped", "checkpoints"),
    *(EVALUATIONS, "sync_evaluation", "report.html", "analysis"),
)
"""Names that a run writes in `run.dir` besides config.yaml, and that a fresh run in the same folder replaces."""

_SUMMARY = "summary.json"
# Written again by a resumed run, so that no file of them may be left from before.
_REPLACED_ON_RESUME = (_SUMMARY, "sync", "sync_evaluation")


def check_run_folder(settings: Settings) -> Checkpoint | None:
    """Return the checkpoint that the run resumes from, or None for a fresh run.

    Raises:
        LogError: Its metrics.jsonl is damaged.
        SettingsError: The folder cannot be written, holds an earlier run that may be neither resumed nor replaced, or
            the run would replace a file that it reads.
        InvalidCheckpointError: A file of the checkpoint is missing, foreign or of another size.
    """
    folder = Path(settings.run.dir)
    earlier = [name for name in RUN_FILES if (folder / name).exists()]
    start = checkpoint_to_resume(settings, earlier)
    if start is not None and is_main():  # one process, because it looks at every file
        check_files(start)
    for key, needed in _inputs(settings):
        for name in earlier:
            if same_place(needed).is_relative_to(same_place(folder / name)):
                raise SettingsError(f"{key}={needed}: is in run.dir={folder}, where {name} is replaced; choose another")
    if start is not None:
        check_metrics(folder, start.step)
    _check_writable("run.dir", folder)
    if settings.sync.dir is not None:
        _check_writable("sync.dir", Path(settings.sync.dir))
    return start


def prepare_run_folder(settings: Settings, start: Checkpoint | None) -> None:
    """Remove files of an earlier run that the run does not resume from, and write config.yaml; for the main rank.

    Raises: WriteError if that is not possible.
    """
    folder = Path(settings.run.dir)
    with explained("the files that a run begins with", folder):
        _prepare(folder, settings, start)


def _prepare(folder: Path, settings: Settings, start: Checkpoint | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    replaced = [name for name in RUN_FILES if name != FOLDER]  # `prepare_checkpoints` removes those
    for name in replaced if start is None else _REPLACED_ON_RESUME:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if start is not None:
        remove_later_evaluations(folder, start.step)
    prepare_checkpoints(settings, start)
    (folder / "config.yaml").write_text(to_yaml(settings), encoding="utf-8")


def summarize(settings: Settings, totals: RunTotals, export: Path | None) -> dict[str, Any]:
    """Return the content of summary.json; the two accuracies are those of the first evaluation set."""
    before, after = totals.before, totals.after
    accuracy = [key for key in before or after if key.endswith("/accuracy")]
    return {
        "steps": settings.run.steps,
        "seconds": round(totals.seconds, 1),
        "accuracy_before": before.get(accuracy[0]) if accuracy else None,
        "accuracy_after": after.get(accuracy[0]) if accuracy else None,
        "before": before,
        "after": after,
        "export": str(export) if export is not None else None,
    }


def write_summary(settings: Settings, summary: dict[str, Any]) -> None:
    """Write summary.json; for the main rank. Raises WriteError if that is not possible."""
    folder = Path(settings.run.dir)
    with explained(_SUMMARY, folder):
        atomic.write_text(folder / _SUMMARY, json.dumps(summary, indent=2) + "\n")


def _check_writable(key: str, folder: Path) -> None:
    parent = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    try:  # file systems of the kernel, such as /proc, say that they can be written
        os.rmdir(tempfile.mkdtemp(prefix=".can_be_written_", dir=parent))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SettingsError(f"{key}={folder}: cannot be written ({parent}: {reason}); choose another folder") from None


def _inputs(settings: Settings) -> list[tuple[str, str]]:
    """(key, path) of every file and folder that the run reads."""
    return [
        ("model.path", settings.model.path),
        ("model.tokenizer", settings.model.tokenizer or settings.model.path),
        *(("data.train", file.path) for file in settings.data.train),
        *(("evaluate.sets", file.path) for file in settings.evaluate.sets),
    ]
