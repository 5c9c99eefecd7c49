"""What checks find, and how it is shown: rows of a table as they come, one JSON file at the end. Imports no torch."""

import json
import os
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TextIO

Result = Literal["passed", "warned", "failed", "not tried"]

_COLOURS: dict[Result, str] = {"passed": "32", "warned": "33", "failed": "31", "not tried": "2"}
_RESULT_WIDTH, _NAME_WIDTH = 11, 14
_MOST_COLUMNS, _LEAST_COLUMNS = 140, 60


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        name: of the check.
        found: one sentence or two, with metrics and their units.
        remedy: what to do about it; "" where nothing is wrong.
        seconds: that the check took.
    """

    name: str
    result: Result
    found: str
    remedy: str = ""
    seconds: float = 0.0


def from_sentence(name: str, sentence: str) -> Finding:
    """A failure from an error message of ours: what is wrong, a semicolon, what to do about it."""
    found, _, remedy = sentence.rpartition("; ")
    return Finding(name, "failed", found or remedy, remedy if found else "see the lines above")


class Report:
    """Shows findings to a person on ``rows``, and what is being done on ``notes``.

    Args:
        enabled: whether this rank speaks.
    """

    def __init__(self, rows: TextIO, notes: TextIO, *, enabled: bool) -> None:
        self.findings: list[Finding] = []
        self._rows, self._notes = rows, notes
        self._enabled = enabled
        self._coloured = rows.isatty() and "NO_COLOR" not in os.environ
        # On a terminal a note stays only until the row that it announces.
        self._passing = notes.isatty()

    def say(self, text: str) -> None:
        """Lines above or below the table."""
        if self._enabled:
            self._rows.write(text + "\n")
            self._rows.flush()

    def note(self, name: str, what: str) -> None:
        """A check has begun."""
        if self._enabled:
            self._notes.write(f"\r\033[K{name}: {what} ..." if self._passing else f"checking {name}: {what}\n")
            self._notes.flush()

    def add(self, finding: Finding) -> None:
        """A check has ended."""
        self.findings.append(finding)
        if self._enabled and self._passing:
            self._notes.write("\r\033[K")
            self._notes.flush()
        self.say("\n".join(self._row(finding)))

    @property
    def passed(self) -> bool:
        """Whether nothing has failed."""
        return all(finding.result != "failed" for finding in self.findings)

    def close(self) -> None:
        """The last line."""
        counts = {result: sum(f.result == result for f in self.findings) for result in _COLOURS}
        seconds = sum(finding.seconds for finding in self.findings)
        self.say(", ".join(f"{count} {result}" for result, count in counts.items() if count) + f" in {seconds:.0f} s")

    def write_json(self, path: Path) -> None:
        """{"passed": ..., "checks": [{name, result, found, remedy, seconds}, ...]}"""
        if self._enabled:
            content = {"passed": self.passed, "checks": [asdict(finding) for finding in self.findings]}
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _row(self, finding: Finding) -> list[str]:
        columns = max(_LEAST_COLUMNS, min(_MOST_COLUMNS, shutil.get_terminal_size((120, 24)).columns))
        margin = _RESULT_WIDTH + _NAME_WIDTH
        text = textwrap.wrap(finding.found, columns - margin) or [""]
        if finding.remedy:
            text += textwrap.wrap(f"-> {finding.remedy}", columns - margin, subsequent_indent="   ")
        word = finding.result.ljust(_RESULT_WIDTH)
        if self._coloured:
            word = f"\033[{_COLOURS[finding.result]}m{word}\033[0m"
        first, *others = text
        return [f"{word}{finding.name.ljust(_NAME_WIDTH)}{first}", *(" " * margin + line for line in others)]


def in_spans(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as `0-2, 5`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


def some(names: Sequence[str], most: int = 8) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def in_gb(size: float) -> str:
    """Bytes, for a person."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
