"""Files and folders that appear complete or not at all: write to a temporary name, fsync, rename. Imports no torch.

    write_text(path, text)          a file
    with new_folder(path) as tmp:   a folder; its files are written into ``tmp``
    AppendedFile(path)              a file that grows by whole lines or records

After a crash of the process or of the machine, a reader finds either all of the old content or all of the new content.
In an appended file, what was written last may be incomplete.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def temporary_path(target: Path) -> Path:
    """Return the path at which a file or folder is built before it is renamed to ``target``."""
    return target.with_name(target.name + ".incomplete")


def write_text(path: Path, text: str) -> None:
    """Replace the content of a file, in UTF-8.

    Raises:
        OSError: If the file cannot be written, or is a folder, device or pipe; it keeps its old content.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "not a regular file", str(path))
    building = temporary_path(path)
    building.write_text(text, encoding="utf-8")
    flush(building)
    building.replace(path)
    flush(path.parent)


@contextmanager
def new_folder(target: Path, *, fsync: bool = True) -> Iterator[Path]:
    """Yield an empty folder that replaces ``target`` when the block ends.

    If the block raises, the new folder is removed and ``target`` is unchanged.

    Args:
        target: Path of the complete folder.
        fsync: Flush everything first, so that ``target`` also survives a crash of the machine.
    """
    building, old = temporary_path(target), target.with_name(target.name + ".removing")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        yield building
        if fsync:
            flush_tree(building)
        shutil.rmtree(old, ignore_errors=True)  # exists if an earlier process was killed before it removed it
        if target.exists():
            target.rename(old)
        building.rename(target)
        if fsync:
            flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(building, ignore_errors=True)


class AppendedFile:
    """A file that is appended to without a buffer: an error of the disk is raised by the write that it belongs to."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, content: bytes) -> int:
        """Append all of the content, and return its length. Raises OSError, when a part may have been written."""
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest) :]
        return len(content)

    def flush(self) -> None:
        """Do nothing, for libraries that write to this file: there is no buffer."""

    def flush_to_disk(self) -> None:
        """Wait until the content is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. May be called repeatedly."""
        self._file.close()


def flush_tree(folder: Path) -> None:
    """Flush a folder and everything in it, at any depth, to the disk."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def flush(path: Path) -> None:
    """Flush a file's content, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot flush folders
            raise
    finally:
        os.close(handle)
