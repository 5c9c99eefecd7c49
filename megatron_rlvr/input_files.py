"""Files that come from a user or from the internet, read within bounds. Imports no torch.

Whatever such a file is or holds, reading it ends soon, in bounded memory, and with a value or with a `BadFileError`: a
folder, a pipe, a device, a link to itself, a path that cannot exist, bytes that are no UTF-8, nesting without end,
integers of thousands of digits, a key that is given twice.
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

MAX_BYTES = 2**26
"""Size of the largest file that is read as a whole."""
MAX_DEPTH = 100
"""Deepest nesting: other programs that read the same files, and copies of a value, recurse."""


class BadFileError(ValueError):
    """A file that cannot be read or does not hold what it should; the message is a part of a sentence, without path.

    Attributes:
        line: Line of the file, counted from 1, if one is at fault.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def is_file(path: str | Path) -> bool:
    """Return whether there is a regular file; False also for a path that cannot exist."""
    return os.path.isfile(path)


def is_folder(path: str | Path) -> bool:
    """Return whether there is a folder; False also for a path that cannot exist."""
    return os.path.isdir(path)


def same_place(path: str | Path) -> Path:
    """Return the absolute path without links, of which one that leads back to itself stays as it is."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):  # a path that cannot exist
        return Path(path).absolute()


def read_bytes(path: str | Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises:
        FileNotFoundError: There is no file.
        BadFileError: It cannot be read, is no regular file, or is larger than ``max_bytes``.
    """
    with open_file(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise BadFileError(f"larger than {max_bytes} bytes")
    return content


@contextmanager
def open_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a regular file to read it within the block; errors are those of `read_bytes`, while it is read as well."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # without waiting for the writer of a pipe
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BadFileError(error.strerror or type(error).__name__) from None
    except ValueError as error:  # a NUL, or a character that no file name can hold
        raise BadFileError(str(error)) from None
    try:
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise BadFileError("not a regular file")
            yield file
    except OSError as error:  # a folder is one, too
        raise BadFileError(error.strerror or type(error).__name__) from None


def lines_of(file: IO[bytes], max_bytes: int = MAX_BYTES) -> Iterator[bytes]:
    """Yield the lines of a file with their line breaks. Raises BadFileError for one longer than ``max_bytes``."""
    number = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        if len(line) > max_bytes:
            raise BadFileError(f"longer than {max_bytes} bytes", number)
        yield line


def read_lines(path: str | Path, max_bytes: int = MAX_BYTES) -> Iterator[tuple[int, bytes]]:
    """Yield the number of each line of a regular file, from 1, and the line; errors are those of the two above."""
    with open_file(path) as file:
        yield from enumerate(lines_of(file, max_bytes), start=1)


def read_text(path: str | Path, max_bytes: int = MAX_BYTES) -> str:
    """Return the content of a UTF-8 file; errors are those of `read_bytes`, and BadFileError for other bytes."""
    return decode(read_bytes(path, max_bytes))


def decode(content: bytes) -> str:
    """Return UTF-8 as text. Raises BadFileError with the position of the first byte that is none."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadFileError(f"byte {error.start + 1} is not valid UTF-8") from None


def parse_json(text: str, parse_float: Callable[[str], float] = float) -> Any:
    """Return the value of a JSON text.

    Raises:
        BadFileError: The text is no JSON, is nested deeper than `MAX_DEPTH`, holds a key twice in one object, or an
            integer of thousands of digits.
    """
    problem, line, value = None, None, None
    try:
        value = json.loads(text, parse_float=parse_float, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        problem, line = f"{error.msg}, column {error.colno}", error.lineno
    except _RepeatedKeyError as error:
        problem = str(error)
    except ValueError:
        problem = "an integer of thousands of digits"
    except RecursionError:
        problem = f"nested more than {MAX_DEPTH} deep"
    if text.count("[") + text.count("{") > MAX_DEPTH and depth(value) > MAX_DEPTH:
        problem = f"nested more than {MAX_DEPTH} deep"
    if problem:
        raise BadFileError(f"not valid JSON ({problem})", line)
    return value


class _RepeatedKeyError(ValueError):
    """A key that is given twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise _RepeatedKeyError(f"key {key[:60]!r} is given twice")
    return found


def depth(value: Any) -> int:
    """Return how deep lists and dicts are nested in a value, which is a tree: 0 for a number, 1 for a list of them."""
    deepest, level = 0, [value]
    while level := [each for each in level if isinstance(each, list | dict)]:
        deepest += 1
        level = [inner for each in level for inner in _inner(each)]
    return deepest


def _inner(value: list[Any] | dict[Any, Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def read_json_object(path: str | Path, error: Callable[[str], Exception], remedy: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        error: Makes the exception to raise from a sentence.
        remedy: End of the sentence.

    Raises:
        FileNotFoundError: There is no file.
        Exception: As ``error`` makes it.
    """
    try:
        value = parse_json(read_text(path))
    except BadFileError as problem:
        where = f"{path}, line {problem.line}:" if problem.line else f"{path} cannot be read:"
        raise error(f"{where} {problem}; {remedy}") from None
    if not isinstance(value, dict):
        raise error(f"{path} holds no JSON object; {remedy}")
    return value
