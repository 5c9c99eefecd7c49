"""Errors that a person reads as one line, by the exit status of the command that they end.

    RlvrError            base of the following
      InputError         the user's input: settings, files, a layout that does not fit; status 2
      FaultError         a fault during a run: servers unhealthy, a full disk, weights that overflow; status 1

Messages are one sentence: `key=value: problem; remedy` if a setting is at fault. Each kind is also the built-in
exception that Python code expects, so that a caller need not know this module. Any other exception is a defect of the
program, and its traceback is printed.
"""


class RlvrError(Exception):
    """An error whose message says what happened and what to do.

    Attributes:
        exit_status: Exit status of a command that the error ends.
    """

    exit_status = 1


class InputError(RlvrError, ValueError):
    """Input that cannot be used: settings, model, data, reward function, or a layout that they do not fit."""

    exit_status = 2


class FaultError(RlvrError, RuntimeError):
    """A fault that ends a run and is not a defect of the program."""


_LONGEST_LINE = 2000


def one_line(error: object) -> str:
    """Return a message as one line that a terminal can print, of at most 2,000 characters.

    Messages quote what they are about: values, names of files, what a library says about them.
    """
    text = " ".join(str(error)[: 4 * _LONGEST_LINE].split())
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= _LONGEST_LINE else text[: _LONGEST_LINE - 3] + "..."
