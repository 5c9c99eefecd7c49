"""Progress of a run on the console: a live bar on a terminal, one line per step elsewhere. The main rank prints."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

# (heading, metric, format) of each column in the line of a step.
_COLUMNS = (
    ("reward", "reward/mean", "{:.3f}"),
    ("accuracy", "reward/accuracy", "{:.3f}"),
    ("threshold", "selection/threshold", "{:.3f}"),
    ("entropy", "entropy/mean", "{:.3f}"),
    ("tokens/s", "rollout/tokens_per_second", "{:,.0f}"),
)


class Progress:
    """Progress of steps, phases and evaluations; a context manager.

    Args:
        steps: Number of training steps.
        enabled: True on the main rank. On other ranks nothing is shown.
        console: Console to print to; default: stdout.
    """

    def __init__(self, steps: int, *, enabled: bool, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._enabled = enabled
        self._steps = steps
        self._live = enabled and self._console.is_terminal
        self._count = 0
        self._phase = ""
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            disable=not self._live,
            transient=False,
        )
        self._task = self._bar.add_task("training", total=steps, status="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._enabled:
            self._console.print(text, soft_wrap=True, markup=False)

    def phase(self, name: str) -> None:
        """Show the current phase of the step."""
        self._phase, self._count = name, 0
        self._show()

    def sampled(self, count: int) -> None:
        """Count completions that this rank has sampled."""
        self._count += count
        self._show()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Print the line of a finished step, with a dash for a metric that it lacks, as no group was informative."""
        shown = "  ".join(
            f"{name} {form.format(metrics[key]) if key in metrics else '-'}" for name, key, form in _COLUMNS
        )
        self._bar.update(self._task, completed=step)
        self.say(f"step {step:>{len(str(self._steps))}}/{self._steps}  {shown}  {metrics['time/step']:.1f} s")

    @contextmanager
    def evaluating(self, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar for ``total`` completions on this rank; yields a function to call with the tokens of each."""
        task = self._bar.add_task("evaluation", total=total, status="")
        try:
            yield lambda tokens: self._bar.advance(task)
        finally:
            self._bar.remove_task(task)

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Print the result of an evaluation: the accuracy of each set with its standard error."""
        accuracies = [key for key in sorted(metrics) if key.endswith("/accuracy")]
        errors = {key: metrics.get(f"{key}_standard_error") for key in accuracies}
        shown = "  ".join(
            f"{key.removeprefix('eval/')} {metrics[key]:.3f}" + ("" if error is None else f" +- {error:.3f}")
            for key, error in errors.items()
        )
        self.say(f"evaluation after step {step}: {shown}")

    def _show(self) -> None:
        if self._live:
            status: Any = f"{self._phase} ({self._count} sampled)" if self._count else self._phase
            self._bar.update(self._task, status=status)
