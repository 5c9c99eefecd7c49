"""Command lines of the report and the analyses: their errors are one line, status 2."""

import argparse
from typing import NoReturn

from megatron_rlvr.errors import InputError


class OptionError(InputError):
    """A wrong option."""


class Parser(argparse.ArgumentParser):
    """Parser that keeps the line breaks of its description and raises OptionError."""

    def __init__(self, **given: object) -> None:
        options: dict[str, object] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**(options | given))  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}; {self.prog} --help explains the options")


def positive(text: str) -> int:
    """Read an int above 0 and at most 10^9."""
    if not (text.isascii() and text.isdigit() and 0 < int(text[:12]) <= 10**9 and len(text) <= 12):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not an int above 0")
    return int(text)
