"""Progress of an evaluation on the main rank: a bar on a terminal, elsewhere a line now and then. Both have a rate."""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_LINE_SECONDS = 15.0


class EvaluationProgress:
    """Counts completions of all ranks; a context manager.

    Args:
        total: Number of completions to sample, over all ranks.
        enabled: True on the main rank.
        add: Adds to the number of completions and of tokens of all ranks, and returns both.
    """

    def __init__(self, total: int, *, enabled: bool, add: Callable[[int], tuple[int, int]]) -> None:
        self._total = total
        self._enabled = enabled
        self._add = add
        self._start = self._reported = time.monotonic()
        self._console = Console(file=sys.stderr, highlight=False)
        self._live = enabled and self._console.is_terminal
        self._bar = Progress(
            TextColumn("sampling"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("sampling", total=total, rate="")
        self.tokens = 0
        """Response tokens of all ranks so far, as this rank last heard."""

    @property
    def seconds(self) -> float:
        """Time since sampling started."""
        return time.monotonic() - self._start

    def finished(self, tokens: int) -> None:
        """Count a completion of this rank."""
        done, self.tokens = self._add(tokens)
        if not self._enabled:
            return
        if self._live:
            self._bar.update(self._task, completed=done, rate=self._rate(done))
        elif time.monotonic() - self._reported > _LINE_SECONDS:
            self._reported = time.monotonic()
            self._console.print(f"{done:,} of {self._total:,} completions, {self._rate(done)}", soft_wrap=True)

    def _rate(self, done: int) -> str:
        seconds = max(self.seconds, 1e-3)
        left = seconds / done * (self._total - done)
        return f"{done / seconds:.1f}/s, {self.tokens / seconds:,.0f} tokens/s, {_duration(left)} left"

    def __enter__(self) -> "EvaluationProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
