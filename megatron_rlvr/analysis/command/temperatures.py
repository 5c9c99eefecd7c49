"""Decoding with one temperature above an entropy threshold and another one below it: accuracy over a grid of both.

Each point of the grid is an evaluation (`rlvr evaluate --two-temperatures`), with its samples, graders and standard
errors, in a folder of its own; the same command resumes the grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

from megatron_rlvr.analysis.command.sampling import sample
from megatron_rlvr.analysis.results import Cell, Curve, Plot, Result
from megatron_rlvr.evaluation.folder import SUMMARY
from megatron_rlvr.evaluation.records import RecordsError
from megatron_rlvr.input_files import read_json_object


class _Point(NamedTuple):
    problems: int
    completions: int
    accuracy: float
    standard_error: float
    response_tokens: float


@dataclass(frozen=True)
class Grid:
    """Temperatures to try.

    Attributes:
        threshold: Entropy in nats above which the high temperature is used.
        high: Temperatures above the threshold.
        low: Temperatures elsewhere.
    """

    threshold: float
    high: Sequence[float]
    low: Sequence[float]

    def folder(self, out: Path, high: float, low: float) -> Path:
        """Return the folder of a point's evaluation."""
        values = (str(float(value)).removesuffix(".0") for value in (self.threshold, high, low))  # all digits
        return out / "threshold_{}_high_{}_low_{}".format(*values)


def sample_grid(model: Path, step: int | None, out: Path, grid: Grid, words: Sequence[str]) -> int:
    """Evaluate every point of the grid; return the status of the first evaluation that fails, or 0."""
    for low, high in product(grid.low, grid.high):
        values = [str(value) for value in (grid.threshold, high, low)]
        status = sample(model, step, grid.folder(out, high, low), ["--two-temperatures", *values, *words])
        if status:
            return status
    return 0


def temperatures(model: str, out: Path, grid: Grid) -> list[Result]:
    """Return the accuracy on each set over the grid, as its evaluations have found it."""
    sets: dict[str, dict[tuple[float, float], _Point]] = {}
    for low, high in product(grid.low, grid.high):
        path = grid.folder(out, high, low) / SUMMARY
        summary = read_json_object(path, RecordsError, "remove its folder, and run the command again")
        for name, found in summary["sets"].items():
            accuracy, length = found["accuracy"], found["response_tokens"]["mean"]
            sets.setdefault(name, {})[high, low] = _Point(
                found["problems"], found["completions"], accuracy["value"], accuracy["standard_error"], length
            )
    return [_result(name, points, model, grid) for name, points in sets.items()]


def _result(name: str, points: dict[tuple[float, float], _Point], model: str, grid: Grid) -> Result:
    rows: list[Sequence[Cell]] = [(high, low, *values) for (high, low), values in points.items()]
    curves = [
        Curve(
            f"{low:g} elsewhere",
            [float(high) for high in grid.high],
            [points[high, low].accuracy for high in grid.high],
            [points[high, low].standard_error for high in grid.high],
        )
        for low in grid.low
    ]
    return Result(
        f"temperatures_{name}",
        f"Accuracy on {name} by two temperatures",
        {"model": model, "threshold": grid.threshold},
        ("high", "low", "problems", "completions", "accuracy", "standard error", "tokens of a response"),
        rows,
        Plot(f"temperature above {grid.threshold:g} nats", "accuracy", curves),
    )
