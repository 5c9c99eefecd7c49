"""Results of an analysis: metrics, a table and a plot, written as JSON, CSV, PNG and SVG from the same numbers."""

import csv
import importlib.util
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_rlvr import atomic
from megatron_rlvr.errors import InputError

Cell = float | int | str | None
"""A value of a table."""


_CLOUD = 50
"""Number of tokens in a cloud."""
_MARGIN, _LINE = 0.03, 0.42
"""Space between words, as a share of the width; height of a line in inches."""


class MissingPlotsError(InputError):
    """matplotlib, which draws the plots, is not installed."""


@dataclass(frozen=True)
class Curve:
    """A curve of a plot: points [n] each, and their standard errors."""

    label: str
    x: list[float]
    y: list[float]
    errors: list[float] | None = None


@dataclass(frozen=True)
class Plot:
    """A plot of curves.

    Attributes:
        x, y: Labels of the axes, with units.
        curves: What is drawn.
        steps: Draw each curve as steps from x to the next x, as a histogram.
        log_y: Logarithmic vertical axis.
        marks: {label: x} of vertical lines.
    """

    x: str
    y: str
    curves: list[Curve]
    steps: bool = False
    log_y: bool = False
    marks: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """Result of an analysis.

    Attributes:
        name: Name of its files.
        title: Heading.
        metrics: {name: value} of single numbers.
        columns: Names of the table's columns.
        rows: Rows of the table.
        plot: The plot; None without one.
        cloud: Whether the rows are tokens (text, id, occurrences, mean entropy), of which the first are drawn, the
            larger the more often they occur.
    """

    name: str
    title: str
    metrics: dict[str, Cell]
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    plot: Plot | None = None
    cloud: bool = False


def write_result(folder: Path, result: Result) -> list[Path]:
    """Write the files of a result into a folder; return them.

    Raises: MissingPlotsError before anything is written, if there is a plot or a cloud and no matplotlib.
    """
    pyplot = _pyplot() if result.plot is not None or result.cloud else None
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{result.name}.json", folder / f"{result.name}.csv"]
    atomic.write_text(files[0], json.dumps(_clean(asdict(result)), ensure_ascii=False, indent=1) + "\n")
    with files[1].open("w", encoding="utf-8", newline="", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow(result.columns)
        writer.writerows(result.rows)
    if pyplot is not None:
        for suffix in (".png", ".svg"):
            files.append(folder / f"{result.name}{suffix}")
            drawing = _cloud(pyplot, result) if result.plot is None else _plot(pyplot, result.title, result.plot)
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # characters that the font lacks
                drawing.savefig(files[-1], dpi=130, metadata={"Date": None} if suffix == ".svg" else None)
            pyplot.close(drawing)
    return files


def check_plots() -> None:
    """Raise MissingPlotsError if there is no matplotlib, before an analysis takes its time."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPlotsError("matplotlib, which draws the plots, is missing; pip install matplotlib")


def _pyplot() -> Any:
    check_plots()
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "rlvr"  # the same numbers give the same bytes
    from matplotlib import pyplot

    return pyplot


def _plot(pyplot: Any, title: str, plot: Plot) -> Any:
    drawing, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for curve in plot.curves:
        style = {"drawstyle": "steps-post"} if plot.steps else {"marker": "."}
        if curve.errors is None:
            axes.plot(curve.x, curve.y, label=curve.label, **style)
        else:
            axes.errorbar(curve.x, curve.y, curve.errors, label=curve.label, capsize=3, **style)
    for number, (label, x) in enumerate(plot.marks.items()):
        axes.axvline(x, color="0.4", linestyle=("--", ":")[number % 2], label=f"{label} {x:.3g}")
    if plot.log_y:
        axes.set_yscale("log")
    axes.set(title=title, xlabel=plot.x, ylabel=plot.y)
    axes.grid(alpha=0.3)
    if len(plot.curves) + len(plot.marks) > 1:
        axes.legend()
    return drawing


def _cloud(pyplot: Any, result: Result) -> Any:
    """Draw tokens one after the other in lines, those of the first rows first."""
    rows = [(str(text), float(count or 0)) for text, _, count, *_ in result.rows[:_CLOUD]]
    most = max((count for _, count in rows), default=1.0)
    drawing = pyplot.figure(figsize=(7, 3.6))
    renderer, width = drawing.canvas.get_renderer(), drawing.bbox.width
    words, x, line = [], _MARGIN, 0
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        for text, count in rows:
            word = drawing.text(
                0, 0, _visible(text), size=8 + 14 * (count / most) ** 0.5, parse_math=False, va="center"
            )
            size = word.get_window_extent(renderer).width / width
            if x + size > 1 - _MARGIN and x > _MARGIN:
                x, line = _MARGIN, line + 1
            words.append((word, x, line))
            x += size + _MARGIN
    drawing.set_size_inches(7, _LINE * (line + 2))
    for word, left, number in words:
        word.set_position((left, 1 - (number + 1.5) / (line + 2)))
    drawing.suptitle(result.title, y=1 - 0.4 / (line + 2))
    return drawing


def _visible(text: str) -> str:
    """A token without the spaces around it, and with the numbers of characters that show nothing."""
    return "".join(c if c.isprintable() else f"<U+{ord(c):04X}>" for c in text.strip(" ") or "<space>")


def _clean(value: Any) -> Any:
    """Values that JSON has: a float that is not finite becomes null, a lone surrogate a question mark."""
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return None if isinstance(value, float) and not math.isfinite(value) else value
