"""A run folder as the report reads it: settings, metrics by step, totals."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlvr.config import Settings, SettingsError
from megatron_rlvr.config.loading import load_settings
from megatron_rlvr.errors import InputError
from megatron_rlvr.input_files import is_file

_MAX_LINE = 2**24


class RunError(InputError):
    """A folder that is not that of a run, or whose metrics cannot be read."""


@dataclass(frozen=True)
class RunFolder:
    """Content of a run folder so far.

    Attributes:
        folder: The run folder.
        name: Name that distinguishes it from the other runs of the report.
        settings: Resolved settings; None if this version cannot read them.
        settings_text: config.yaml.
        metrics: {key: value} of each step, in the order of steps; lines of the same step are merged.
    """

    folder: Path
    name: str
    settings: Settings | None
    settings_text: str
    metrics: dict[int, dict[str, float]]

    @property
    def steps(self) -> list[int]:
        """Steps that have a line in metrics.jsonl; step 0 is the evaluation before training."""
        return list(self.metrics)


def read_runs(folders: list[Path]) -> list[RunFolder]:
    """Read run folders. RunError if one of them has no metrics; names are made distinct by their parents' names."""
    resolved = [folder.resolve() for folder in folders]
    names = [folder.name for folder in resolved]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in resolved]
    if len(set(names)) < len(names):
        raise RunError(f"{folders[0]} and others: a run folder is given twice; give each once")
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read_run(folder: Path, name: str) -> RunFolder:
    metrics = _read_metrics(folder / "metrics.jsonl")
    path, settings, text = folder / "config.yaml", None, ""
    if is_file(path):
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            settings = load_settings(path)
        except SettingsError:  # of another version: the text is shown all the same
            settings = None
    return RunFolder(folder, name, settings, text, metrics)


def _read_metrics(path: Path) -> dict[int, dict[str, float]]:
    if not is_file(path):
        raise RunError(f"{path} does not exist; give the folder of a run (run.dir) that has finished a step")
    by_step: dict[int, dict[str, float]] = {}
    with path.open("rb") as file:
        while line := file.readline(_MAX_LINE):
            values = _object(line)
            step = values.get("step")
            if type(step) is int:
                numbers = {k: float(v) for k, v in values.items() if k != "step" and type(v) in (int, float)}
                by_step.setdefault(step, {}).update(
                    {key: value for key, value in numbers.items() if math.isfinite(value)}
                )
    if not by_step:
        raise RunError(f"{path} has no step; give the folder of a run that has finished a step")
    return dict(sorted(by_step.items()))


def _object(line: bytes) -> dict[str, Any]:
    """Return the object of a line; {} of one that is incomplete, as the last line of a run that was killed may be."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
