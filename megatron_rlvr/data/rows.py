"""Rows of a JSON lines or parquet file, each with its line or row number for error messages."""

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rlvr.errors import InputError
from megatron_rlvr.input_files import BadFileError, decode, is_file, parse_json, read_lines

_EXACT_CHARACTERS = 16
_MAX_LINE_BYTES = 2**26


class DataError(InputError):
    """Invalid prompt file or cursor state; the message gives the file and line, the problem and the remedy."""


class LongFloat(float):
    """Float of a JSON file with more digits than a float has, which remembers them.

    Attributes:
        literal: The number as the file has it.
    """

    literal: str

    def __new__(cls, literal: str) -> "LongFloat":
        number = super().__new__(cls, literal)
        number.literal = literal
        return number

    def __reduce__(self) -> tuple[type, tuple[str]]:  # for the way to a grader process
        return LongFloat, (self.literal,)


def read_rows(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield each row of a .jsonl, .json (one object per line) or .parquet file.

    Yields:
        ("line" or "row", the line or row number counted from 1, the row as {column: value}). Blank lines of JSON lines
        are skipped but counted; a byte order mark and CRLF are allowed.

    Raises:
        DataError: If the file does not exist, has another extension, or cannot be read.
    """
    if not is_file(path):
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
        for number, line in read_lines(path, _MAX_LINE_BYTES):
            row = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if row.strip():
                yield "line", number, _json_object(row, f"{path}, line {number}")
    except BadFileError as error:
        if error.line is not None:
            raise DataError(f"{path}, line {error.line}: {error}; write one JSON object per line") from error
        raise DataError(f"{path} cannot be read ({error}); check its permissions") from error


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = parse_json(decode(line), parse_float=_json_float)
    except BadFileError as error:
        raise DataError(f"{where}: {error}; write one JSON object per line, in UTF-8") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON {type(row).__name__}, not an object; write one JSON object per line")
    return row


def _json_float(literal: str) -> float:
    # A float keeps 15 digits, which 16 characters with a decimal point cannot exceed.
    return float(literal) if len(literal) <= _EXACT_CHARACTERS else LongFloat(literal)


def _parquet_rows(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                rows = _with_short_floats(batch).to_pylist()
                for row in rows:
                    number += 1
                    yield "row", number, row
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError, TypeError, ImportError) as error:
        # Not only of pyarrow: also dates that Python has not, nanoseconds, and text that is no UTF-8.
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise DataError(
            f"{path} cannot be read as parquet after row {number} ({reason}); create it again, without columns of "
            "types that are not needed"
        ) from error


def _with_short_floats(batch: Any) -> Any:
    """Return a record batch whose 32-bit and 16-bit floats have become the 64-bit floats of the same digits.

    Widening 0.1 as a 32-bit float gives 0.10000000149011612, which is not the number that was written.
    """
    import pyarrow

    for index, field in enumerate(batch.schema):
        if pyarrow.types.is_floating(field.type) and field.type != pyarrow.float64():
            exact = np.dtype(field.type.to_pandas_dtype()).type
            numbers = [None if x is None else float(str(exact(x))) for x in batch.column(index).to_pylist()]
            batch = batch.set_column(index, field.name, pyarrow.array(numbers, pyarrow.float64()))
    return batch
