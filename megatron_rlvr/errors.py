"""The errors that a person reads as one line, by who can put them right.

    RlvrError            any of them; ``exit_status`` is that of a command that it ends
      InputError         the user's input: settings, files, a layout that does not fit. Status 2, and no traceback.
      FaultError         something that happened to a run: servers gone, a full disk, weights that overflow. Status 1.

The message is one sentence, `key=value: problem; remedy` where a setting is at fault. Each kind is also the built-in
that Python code would expect, so that a caller need not know this module. Everything else that is raised is a defect
of the program, and keeps its traceback.
"""


class RlvrError(Exception):
    """An error whose message tells a person what happened and what to do."""

    exit_status = 1


class InputError(RlvrError, ValueError):
    """Input that cannot be used: settings, model, data, reward function, or a layout that they do not fit."""

    exit_status = 2


class FaultError(RlvrError, RuntimeError):
    """A run that cannot continue, through no defect of the program."""
