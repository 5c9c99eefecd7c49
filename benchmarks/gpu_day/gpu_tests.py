"""Runs tests/gpu, and writes a row for each test as soon as it has ended, so that a time limit costs no results.

Without a GPU none is selected; collecting them still imports their files.
"""

import argparse
import importlib.util
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from rows import Rows, options_of


class RowOfEachTest:
    """Plugin of pytest that adds a row for each test, for each file that cannot be imported, and for all together."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._reports: list[pytest.TestReport] = []
        """Of the test that runs: of its fixtures, of itself, and of their end."""
        self._counts: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)
        if report.when == "teardown":
            self._add(report.nodeid.rpartition("::")[2], self._reports)
            self._reports = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._add(report.nodeid, [report])

    def pytest_sessionfinish(self) -> None:
        counts = {outcome: self._counts[outcome] for outcome in ("passed", "failed", "skipped")}
        self._rows.add("all", ", ".join(f"{count} {outcome}" for outcome, count in counts.items()), **counts)

    def _add(self, name: str, reports: Sequence[pytest.TestReport | pytest.CollectReport]) -> None:
        worst = next((report for report in reports if report.outcome != "passed"), reports[-1])
        self._counts[worst.outcome] += 1
        if worst.failed:
            crash = getattr(worst.longrepr, "reprcrash", None)
            last_line = worst.longreprtext.strip().rpartition("\n")[2].removeprefix("E ")
            self._rows.fail(name, crash.message if crash else last_line)
            return
        seconds = sum(getattr(report, "duration", 0.0) for report in reports)
        reason = worst.longrepr[2] if isinstance(worst.longrepr, tuple) else ""
        self._rows.add(name, f"{worst.outcome}, {seconds:.1f} s", note=reason)


def run(arguments: Sequence[str], rows: Path) -> int:
    """Run pytest and return its exit status, 0 if no test was selected."""
    command = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", *arguments]
    status = pytest.main(command, plugins=[RowOfEachTest(Rows(rows))])
    return 0 if status == pytest.ExitCode.NO_TESTS_COLLECTED else int(status)


def main(options: argparse.Namespace) -> int:
    arguments = ["tests/gpu/test_head_on_gpu.py" if options.small else "tests/gpu"]
    if options.device == "cpu":
        arguments += ["-m", "not gpu"]
    if not all(importlib.util.find_spec(name) for name in ("hypothesis", "psutil")):  # for fixtures of whole runs
        arguments += ["--noconftest"]
    return run(arguments, options.rows)


if __name__ == "__main__":
    sys.exit(main(options_of(__doc__)))
