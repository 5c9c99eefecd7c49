"""What a failure of the machine leaves of files: all that was flushed to the disk before. Imports no torch."""

import errno
import os
from pathlib import Path


def beside(target: Path) -> Path:
    """Where a file or folder is built before it gets its name."""
    return target.with_name(target.name + ".incomplete")


def to_disk(folder: Path) -> None:
    """Returns when all that is in a folder, at any depth, would survive a failure of the machine."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def flush(path: Path) -> None:
    """A file's content, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that do not know it for folders
            raise
    finally:
        os.close(handle)
