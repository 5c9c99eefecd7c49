"""Outcomes of finished runs: accuracy of each problem after the last step, curves, and what it took to get there."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rlvr.ablation.cells import unfinished
from megatron_rlvr.ablation.spec import Ablation, Cell
from megatron_rlvr.analysis.runs import RunError, read_runs
from megatron_rlvr.evaluation.folder import evaluation_folder, read_description, records_of
from megatron_rlvr.evaluation.records import RecordsError, by_problem, by_set


@dataclass(frozen=True)
class Reached:
    """First evaluated step of a run whose accuracy is the target or more.

    Attributes:
        seconds: Time of the training steps up to it, without that of evaluations and checkpoints.
        tokens: Response tokens that were sampled up to it, also in dropped groups.
    """

    step: int
    seconds: float
    tokens: float


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        metrics: {step: metrics} of the whole run.
        accuracy: {set: {problem: share of correct completions}} after the last step.
        reached: When it reached the target; None if it did not, or there is no target.
    """

    cell: Cell
    metrics: Mapping[int, Mapping[str, float]]
    accuracy: Mapping[str, Mapping[str, float]]
    reached: Reached | None

    def total(self, key: str) -> float:
        """Return the sum of a metric over all training steps."""
        return sum(values.get(key, 0.0) for values in self.metrics.values())

    def last(self, key: str) -> float | None:
        """Return the last value of a metric; None without any."""
        values = [values[key] for values in self.metrics.values() if key in values]
        return values[-1] if values else None


def read_outcomes(ablation: Ablation) -> tuple[list[Outcome], dict[int, str]]:
    """Return the outcomes of all finished runs, and {index: why it has none} of the other cells."""
    outcomes, missing = [], dict[int, str]()
    for cell in ablation.cells:
        if (why := unfinished(cell)) is not None:
            missing[cell.index] = why
            continue
        try:
            outcomes.append(_read(ablation, cell))
        except (RunError, RecordsError) as error:
            missing[cell.index] = str(error)
    return outcomes, missing


def _read(ablation: Ablation, cell: Cell) -> Outcome:
    metrics = read_runs([cell.folder])[0].metrics
    for step in range(1, cell.settings.run.steps + 1):
        if "time/step" not in metrics.get(step, {}):
            raise RunError(f"{cell.folder / 'metrics.jsonl'} has no step {step}; remove {cell.folder}, to run it again")
    folder = evaluation_folder(cell.folder, cell.settings.run.steps)
    description = read_description(folder)
    records = records_of(folder, description)
    expected = description["sampling"]["group_size"] * sum(each["problems"] for each in description["sets"].values())
    if len(records) != expected:
        raise RecordsError(f"{folder} is not complete: {len(records)} of {expected} completions")
    accuracy = {
        name: {problem: sum(r.correct for r in group) / len(group) for problem, group in by_problem(own).items()}
        for name, own in by_set(records).items()
    }
    return Outcome(cell, metrics, accuracy, _reached(metrics, ablation.evaluation, ablation.spec.target))


def _reached(metrics: Mapping[int, Mapping[str, float]], evaluation: str, target: float | None) -> Reached | None:
    if target is None:
        return None
    seconds = tokens = 0.0
    for step, values in sorted(metrics.items()):
        seconds += values.get("time/step", 0.0)
        tokens += values.get("rollout/response_tokens", 0.0)
        if values.get(f"eval/{evaluation}/accuracy", -1.0) >= target:
            return Reached(step, seconds, tokens)
    return None
