"""Manifest of a checkpoint: size and SHA-256 of every file in its folder, and one identity of the whole.

    manifest.json    {"identity": "9f2c..", "version": 1, "about": {..}, "files": {"common.pt": [2221, "5d0c.."], ..}}

    identity = SHA-256 of everything else in the manifest, as JSON with sorted keys and without spaces

The manifest is written after all other files. It lists files by their paths and knows nothing of what they hold;
``about`` is what the checkpoint's writer notes. Checkpoints with the same identity have the same bytes.

SHA-256 is the fastest digest in the standard library for which no two files can be made that have the same one: server
processors have instructions for it. A checksum such as CRC-32 is faster, but a file can be changed without changing it.
hashlib releases Python's lock while it reads, so a few files are read at once. Imports no torch.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_rlvr.errors import InputError

NAME = "manifest.json"
_VERSION = 1
_THREADS = 4
_MOST_BYTES = 2**28  # of a manifest: enough for a million files


class InvalidCheckpointError(InputError):
    """A checkpoint that cannot be loaded: its files are not those that were saved, or do not hold what they should."""


class FileDigest(NamedTuple):
    """Size of a file in bytes, and the SHA-256 of its content in hexadecimal digits."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Content of a manifest.

    The methods raise InvalidCheckpointError with the folder and the file that is wrong; the caller adds what to do.

    Attributes:
        folder: Folder of the checkpoint.
        identity: Digest of all of the following.
        about: What the checkpoint's writer has noted, as JSON-compatible data.
        files: {path relative to the folder, with slashes: size and digest}
    """

    folder: Path
    identity: str
    about: Mapping[str, Any]
    files: Mapping[str, FileDigest]

    def check_names(self) -> None:
        """Check that exactly these files exist, with these sizes; none is read."""
        found = set(_files_in(self.folder))
        if missing := sorted(self.files.keys() - found):
            raise InvalidCheckpointError(f"{self.folder}: {missing[0]} is missing{_and_more(missing)}")
        if foreign := sorted(found - self.files.keys() - {NAME}):
            raise InvalidCheckpointError(
                f"{self.folder}: {foreign[0]} is not a file of this checkpoint{_and_more(foreign)}"
            )
        for name, wanted in self.files.items():
            path = self.folder / name
            if not path.is_file():
                raise InvalidCheckpointError(f"{self.folder}: {name} is not a regular file")
            if (size := path.stat().st_size) != wanted.bytes:
                raise InvalidCheckpointError(
                    f"{self.folder}: {name} has {size} bytes instead of {wanted.bytes}{self._origin(name)}"
                )

    def check_content(self, names: Iterable[str]) -> None:
        """Check the digests of files, which are read completely.

        Args:
            names: Keys of `files`.
        """
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(self._check_file, names):
                pass

    def _check_file(self, name: str) -> None:
        path = self.folder / name
        if not path.is_file():
            raise InvalidCheckpointError(f"{self.folder}: {name} is missing")
        try:
            same = digest_of(path) == self.files[name]
        except OSError as error:
            raise InvalidCheckpointError(f"{self.folder}: {name} cannot be read ({error.strerror})") from error
        if not same:
            raise InvalidCheckpointError(f"{self.folder}: {name} is not as it was saved{self._origin(name)}")

    def _origin(self, name: str) -> str:
        """Return which checkpoint beside this one a wrong file is from, as part of a sentence; "" if from none."""
        try:
            found = digest_of(self.folder / name)
            others = sorted(path for path in self.folder.parent.iterdir() if (path / NAME).is_file())
        except OSError:
            return ""
        for other in others:
            try:
                if other.name != self.folder.name and found in read_manifest(other).files.values():
                    return f", but a file of {other.name}"
            except InvalidCheckpointError:
                continue
        return ""


def digest_of(path: Path) -> FileDigest:
    """Return size and digest of a file. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return FileDigest(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def write_manifest(folder: Path, about: Mapping[str, Any], known: Mapping[str, FileDigest] | None = None) -> None:
    """Write the manifest of a folder in which nothing else will be changed any more.

    Args:
        folder: Folder of a checkpoint.
        about: JSON-compatible data that becomes part of the identity.
        known: {path: size and digest} of files in the folder that need not be read.

    Raises:
        OSError: If a file cannot be read, or the manifest cannot be written.
    """
    known = known or {}
    files = {name: known.get(name) or digest_of(folder / name) for name in sorted(_files_in(folder)) if name != NAME}
    content = {"version": _VERSION, "about": dict(about), "files": files}
    (folder / NAME).unlink(missing_ok=True)  # it may be a hard link to that of another checkpoint
    (folder / NAME).write_text(json.dumps({"identity": _identity(content), **content}, indent=1), encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint, and check its identity. No other file is opened.

    Raises:
        InvalidCheckpointError: If there is none, or it is not as it was written.
    """
    path = folder / NAME
    if not path.is_file():
        raise InvalidCheckpointError(f"{folder}: {NAME} is missing")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError
        content = json.loads(path.read_text(encoding="utf-8"))
        identity = content.pop("identity")
        if identity != _identity(content) or content["version"] != _VERSION:
            raise ValueError
        files = {name: FileDigest(int(size), str(sha256)) for name, (size, sha256) in content["files"].items()}
        return Manifest(folder, identity, dict(content["about"]), files)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise InvalidCheckpointError(f"{folder}: {NAME} is not as it was saved") from error


def _identity(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _files_in(folder: Path) -> Iterator[str]:
    """Yield the path of everything below a folder except folders; links to folders are not followed."""
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in (*files, *links):
            yield Path(parent, name).relative_to(folder).as_posix()


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
