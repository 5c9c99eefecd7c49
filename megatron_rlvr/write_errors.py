"""Errors of the file system while something is written, in one sentence: a full disk, a folder that became read-only.

    with explained("metrics.jsonl", folder): ...

The owner of a file uses it, as only it knows what the file is. Imports no torch.
"""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_rlvr.errors import FaultError

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class WriteError(FaultError):
    """A file or folder that cannot be written."""


@contextmanager
def explained(
    subject: str, folder: Path, then: str = "the same command resumes", kind: type[WriteError] = WriteError
) -> Iterator[None]:
    """Turn an OSError of the block into a WriteError that says what to do.

    Args:
        subject: Subject of the message, such as ``the checkpoint of step 20``.
        folder: Folder that could not be written.
        then: End of the message: what follows when that is corrected.
        kind: Class of the error.
    """
    try:
        yield
    except OSError as error:
        full = disk_is_full(error)
        raise kind(
            f"{subject} could not be written to {folder}{_free_space(folder) if full else ''} ({error}); "
            f"{'make room' if full else 'correct that'}, and {then}"
        ) from error


def disk_is_full(error: OSError) -> bool:
    """Return whether the error numbers in the message are those of a full disk.

    Only the message is reliable: the error may have been sent by another process, or list failures of several files.
    torch sometimes hides the number, and does so when a disk is full, so a message without numbers counts as well.
    """
    numbers = {int(number) for number in re.findall(r"\[Errno (\d+)\]", str(error))}
    return not numbers or not numbers.isdisjoint(_DISK_FULL)


def _free_space(folder: Path) -> str:
    """Return the free space as part of a sentence, or "" if this rank's machine does not have the folder."""
    try:
        return f", where {shutil.disk_usage(folder).free / 1e9:.1f} GB are free"
    except OSError:
        return ""
