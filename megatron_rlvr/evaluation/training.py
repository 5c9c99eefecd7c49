"""Evaluation during training: a folder of records and metrics for each evaluated step, and its metrics for the log.

DIR/evaluations/step_000040/    an evaluation's folder (folder.py), for `rlvr evaluate --compare` and `--regrade`
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rlvr.distributed.collectives import on_main_rank
from megatron_rlvr.evaluation.evaluator import Evaluator
from megatron_rlvr.evaluation.folder import evaluation_folder, write_description, write_summary
from megatron_rlvr.evaluation.summary import SetSummary


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

    def start(self, step: int) -> None:
        """Make an empty folder for the evaluation after a step. A collective over the world."""
        on_main_rank(partial(self._make_folder, step))

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
        summaries = self._evaluator.own_summaries(self._evaluator.sample(folder, [], lambda tokens: None))
        _write(folder, step, summaries)
        return _metrics(summaries)

    def _make_folder(self, step: int) -> None:
        folder = evaluation_folder(self._run, step)
        if folder.exists():
            shutil.rmtree(folder)
        target = {**self._description["target"], "step": step}
        write_description(folder, {**self._description, "target": target})


def _write(folder: Path, step: int, summaries: Mapping[str, SetSummary]) -> None:
    complete = all(summary.complete for summary in summaries.values())
    content = {"complete": complete, "step": step, "sets": {name: s.as_json() for name, s in summaries.items()}}
    write_summary(folder, content)


def _metrics(summaries: Mapping[str, SetSummary]) -> dict[str, float]:
    return {f"eval/{name}/{key}": value for name, s in summaries.items() for key, value in s.metrics().items()}
