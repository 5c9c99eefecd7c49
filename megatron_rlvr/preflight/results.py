"""Results of checks: a table that is printed row by row, and one JSON file at the end. Imports no torch."""

import json
import os
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TextIO

Status = Literal["passed", "warned", "failed", "not tried"]

_COLOURS: dict[Status, str] = {"passed": "32", "warned": "33", "failed": "31", "not tried": "2"}
_STATUS_WIDTH, _NAME_WIDTH = 11, 14
_MAX_COLUMNS, _MIN_COLUMNS = 140, 60


@dataclass(frozen=True)
class CheckResult:
    """Result of one check.

    Attributes:
        name: Name of the check.
        status: Outcome of the check.
        message: One or two sentences with the measured values and their units.
        remedy: Instruction for the user; "" if nothing is wrong.
        seconds: Duration of the check.
    """

    name: str
    status: Status
    message: str
    remedy: str = ""
    seconds: float = 0.0


def failure(name: str, sentence: str) -> CheckResult:
    """Return a failed result from an error message of the form `problem; remedy`."""
    problem, _, remedy = sentence.rpartition("; ")
    return CheckResult(name, "failed", problem or remedy, remedy if problem else "see the lines above")


class Report:
    """Prints results as a table, and the name of each check while it runs.

    Args:
        rows: Stream for the table.
        notes: Stream for the names of running checks.
        enabled: False on ranks that print nothing.
        json_path: File that `close` writes as well; None for no file.
    """

    def __init__(self, rows: TextIO, notes: TextIO, *, enabled: bool, json_path: Path | None = None) -> None:
        self.results: list[CheckResult] = []
        self._rows, self._notes = rows, notes
        self._enabled = enabled
        self._json_path = json_path
        self._coloured = rows.isatty() and "NO_COLOR" not in os.environ
        # On a terminal, the row of a check replaces its note.
        self._replaces_notes = notes.isatty()

    def print(self, text: str) -> None:
        """Print lines above or below the table."""
        if self._enabled:
            self._rows.write(text + "\n")
            self._rows.flush()

    def check_started(self, name: str, description: str) -> None:
        """Print a note that a check is running."""
        if self._enabled:
            note = f"\r\033[K{name}: {description} ..." if self._replaces_notes else f"checking {name}: {description}\n"
            self._notes.write(note)
            self._notes.flush()

    def add(self, result: CheckResult) -> None:
        """Record and print the result of a check."""
        self.results.append(result)
        if self._enabled and self._replaces_notes:
            self._notes.write("\r\033[K")
            self._notes.flush()
        self.print("\n".join(self._row(result)))

    @property
    def passed(self) -> bool:
        """True if no check failed."""
        return all(result.status != "failed" for result in self.results)

    def close(self) -> None:
        """Print the last line, and write the JSON file.

        Its content is {"passed": bool, "checks": [{name, status, message, remedy, seconds}, ...]}.
        """
        counts = {status: sum(r.status == status for r in self.results) for status in _COLOURS}
        seconds = sum(result.seconds for result in self.results)
        self.print(", ".join(f"{count} {status}" for status, count in counts.items() if count) + f" in {seconds:.0f} s")
        if self._enabled and self._json_path is not None:
            content = {"passed": self.passed, "checks": [asdict(result) for result in self.results]}
            self._json_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _row(self, result: CheckResult) -> list[str]:
        columns = max(_MIN_COLUMNS, min(_MAX_COLUMNS, shutil.get_terminal_size((120, 24)).columns))
        margin = _STATUS_WIDTH + _NAME_WIDTH
        text = textwrap.wrap(result.message, columns - margin) or [""]
        if result.remedy:
            text += textwrap.wrap(f"-> {result.remedy}", columns - margin, subsequent_indent="   ")
        status = result.status.ljust(_STATUS_WIDTH)
        if self._coloured:
            status = f"\033[{_COLOURS[result.status]}m{status}\033[0m"
        first, *others = text
        return [f"{status}{result.name.ljust(_NAME_WIDTH)}{first}", *(" " * margin + line for line in others)]


def first_few(names: Sequence[str], limit: int = 8) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def format_bytes(size: float) -> str:
    """Return a size in GB or MB, for people."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
