"""Rows of a JSON lines or parquet file, each with its line or row number for error messages."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rlvr.errors import InputError


class DataError(InputError):
    """Invalid prompt file or cursor state; the message gives the file and line, the problem and the remedy."""


def read_rows(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield each row of a .jsonl, .json (one object per line) or .parquet file.

    Yields:
        ("line" or "row", the line or row number counted from 1, the row as {column: value}). Blank lines of JSON lines
        are skipped but counted; a byte order mark and CRLF are allowed.

    Raises:
        DataError: If the file does not exist, has another extension, or cannot be read.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file; check the path")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".json"):
        yield from _json_lines(path)
    elif suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        raise DataError(f"{path}: unknown extension {suffix!r}; give a .jsonl, .json (lines) or .parquet file")


def _json_lines(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    # Read bytes, not text: an invalid byte is then reported with its line, and only "\n" ends a line (not U+2028).
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield "line", number, _json_object(line, f"{path}, line {number}")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start + 1} is not valid UTF-8; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where}: not valid JSON ({reason}); write one JSON object per line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON {type(row).__name__}, not an object; write one JSON object per line")
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield "row", number, row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise DataError(f"{path} cannot be read as parquet after row {number} ({reason}); create it again") from error
