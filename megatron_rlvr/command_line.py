"""Command lines: a parser whose every error is one line on stderr and status 2, and types of arguments.

Imports no torch.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from megatron_rlvr.errors import one_line

_SHOWN_CHARACTERS = 60
_PIPE_CHARACTERS = 200
"""Width of tables that go to no terminal; lines are only as long as their columns."""


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations, and keeps the line breaks of its description.

    Args:
        program: Name of the command in messages.
        quiet: Print no errors, on ranks other than the main one.
        options: Further arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, prog: str, *, quiet: bool = False, **options: Any) -> None:
        super().__init__(prog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self._quiet = quiet

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line on stderr."""
        self.exit(2, "" if self._quiet else f"{self.prog}: {one_line(message)}\n")


def table_console() -> Console:
    """Return a console for tables on stdout, whose columns a pipe or a file does not cut to 80 characters."""
    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if narrow else _PIPE_CHARACTERS)


def positive_int(text: str) -> int:
    """Type of an argument that is an int from 1 to 10**9 - 1."""
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{_shown(text)} is not an int above 0 and below 10**9")
    return int(text)


def small_int(text: str) -> int:
    """Type of an argument that is an int of at most nine digits."""
    if not re.fullmatch("[+-]?[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{_shown(text)} is not an int of at most nine digits")
    return int(text)


def share(text: str) -> float:
    """Type of an argument that is a float above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{_shown(text)} is not a share; give a number above 0 and at most 1")
    return value


def path(text: str) -> Path:
    """Type of an argument that is a path, of a file or folder that may exist or not."""
    try:
        text.encode("utf-8")
        os.lstat(text or "\0")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:  # a name that is empty or too long, or has a NUL or no UTF-8
        reason = getattr(error, "strerror", None) or "no path"
        raise argparse.ArgumentTypeError(f"{_shown(text)} cannot be the path of a file ({reason})") from None
    return Path(text)


def _shown(text: str) -> str:
    shown = text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
    return ascii(shown) if not shown.isprintable() else repr(shown)
