"""Evaluation during training: a folder of records and metrics for each evaluated step, and its metrics for the log.

DIR/evaluations/step_000040/    an evaluation's folder (folder.py), for `rlvr evaluate --compare` and `--regrade`
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rlvr.distributed.collectives import on_main_rank
from megatron_rlvr.evaluation.evaluator import Evaluator
from megatron_rlvr.evaluation.folder import (
    SUMMARY,
    evaluation_folder,
    evaluations_in,
    holds,
    write_description,
    write_summary,
)
from megatron_rlvr.evaluation.records import RecordsError
from megatron_rlvr.evaluation.summary import SetSummary
from megatron_rlvr.input_files import read_json_object


class TrainingEvaluation:
    """Evaluates a run's policy after some of its steps; false without problem sets.

    Args:
        evaluator: Evaluates all sets.
        description: Description of the evaluations, without a step.
        run: Folder of the run.
    """

    def __init__(self, evaluator: Evaluator, description: Mapping[str, Any], run: Path) -> None:
        self._evaluator = evaluator
        self._description = description
        self._run = run

    def __bool__(self) -> bool:
        return bool(self._evaluator)

    def share_size(self) -> int:
        """Return the number of completions that this rank samples."""
        return self._evaluator.share_size()

    def start(self, step: int, *, resumed: bool = False) -> None:
        """Make a folder for the evaluation after a step. A collective over the world.

        Args:
            resumed: Keep the records of this evaluation that are there; otherwise the folder is empty.
        """
        on_main_rank(partial(self._make_folder, step, keep=resumed))

    def finished(self) -> dict[int, dict[str, float]]:
        """Return {step: metrics} of the finished evaluations in the run folder, by ascending step. A collective."""
        found: list[Any] = [None]
        if dist.get_rank() == 0:
            found = [{step: _metrics_in(folder) for step, folder in evaluations_in(self._run)}]
        dist.broadcast_object_list(found, src=0)
        return {step: metrics for step, metrics in found[0].items() if metrics}

    def run(self, step: int, on_finished: Callable[[int], None]) -> dict[str, float]:
        """Evaluate the engine's weights, without what `start` and an earlier call have recorded. A collective.

        Returns: metrics `eval/<set>/...`, the same on every rank.
        """
        folder = evaluation_folder(self._run, step)
        records = self._evaluator.run(folder, self._evaluator.recorded(folder), on_finished)
        summaries = self._evaluator.summaries(records)
        on_main_rank(partial(_write, folder, step, summaries))
        return _metrics(summaries)

    def run_alone(self, step: int) -> dict[str, float]:
        """Return the metrics as `run` does, sampled by this rank alone and not as a collective."""
        folder = evaluation_folder(self._run, step)
        recorded = self._evaluator.recorded_alone(folder)
        new = self._evaluator.sample(folder, recorded, lambda tokens: None)
        summaries = self._evaluator.own_summaries([*recorded, *new])
        _write(folder, step, summaries)
        return _metrics(summaries)

    def _make_folder(self, step: int, *, keep: bool) -> None:
        folder = evaluation_folder(self._run, step)
        description = {**self._description, "target": {**self._description["target"], "step": step}}
        if folder.exists() and not (keep and holds(folder, description)):
            shutil.rmtree(folder)
        write_description(folder, description)


def _write(folder: Path, step: int, summaries: Mapping[str, SetSummary]) -> None:
    complete = all(summary.complete for summary in summaries.values())
    sets = {name: s.as_json() for name, s in summaries.items()}
    write_summary(folder, {"complete": complete, "step": step, "metrics": _metrics(summaries), "sets": sets})


def _metrics_in(folder: Path) -> dict[str, float]:
    """Return the metrics of a finished evaluation; empty if it is not, or cannot be read."""
    try:
        summary = read_json_object(folder / SUMMARY, RecordsError, "remove it")
    except (FileNotFoundError, RecordsError):
        return {}
    metrics = summary.get("metrics")
    if summary.get("complete") is not True or not isinstance(metrics, dict):
        return {}
    return metrics if all(isinstance(value, float) for value in metrics.values()) else {}


def _metrics(summaries: Mapping[str, SetSummary]) -> dict[str, float]:
    return {f"eval/{name}/{key}": value for name, s in summaries.items() for key, value in s.metrics().items()}
