"""Rows of the table: written one by one as they are measured, read even if their program was killed, and printed.

A row is a dictionary with `what` was measured, and `result` for people and `numbers` for programs, or an `error`;
`beside` is what to compare the result with, `note` a remark.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLUMNS = ("part", "what", "measured", "beside", "remark")


class Rows:
    """Writes rows to a file, each when it is known."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def add(self, what: str, result: str, beside: str = "", note: str = "", **numbers: float | None) -> None:
        """Add a row."""
        self._write({"what": what, "result": result, "beside": beside, "note": note, "numbers": numbers})

    @contextmanager
    def guarded(self, what: str, peer: bool = False) -> Iterator[None]:
        """Context in which an error becomes a row, and the program continues after it.

        Args:
            what: What is measured there.
            peer: True for a method of others, which may be missing or unable to do this.
        """
        try:
            yield
        except Exception as error:  # of any library: what does not work here is a result
            text = f"{type(error).__name__}: {error}"
            if peer:
                self.add(what, f"did not run: {_short(text)}")
            else:
                self.fail(what, text)

    def fail(self, what: str, error: str) -> None:
        """Add a row of something that failed."""
        self._write({"what": what, "error": _short(error)})

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; none if there is no file, and without a last one that is incomplete."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows


def table(found: dict[str, Any]) -> str:
    """Return all rows as a table in Markdown."""
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    for name, part in found["parts"].items():
        if part["error"]:
            lines.append(_line([name, "", f"FAILED after {part['seconds']:.0f} s: {part['error']}", "", ""]))
        for row in part["rows"]:
            result = f"FAILED: {row['error']}" if "error" in row else row["result"]
            lines.append(_line([name, row["what"], result, row.get("beside", ""), row.get("note", "")]))
    return "\n".join(lines)


def _short(text: str) -> str:
    """Return the beginning of a text, in one line."""
    return " ".join(text.split())[:300]


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def options_of(description: str | None) -> argparse.Namespace:
    """Return the options that every part has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--rows", type=Path, required=True, help="file for the rows")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    return parser.parse_args()
