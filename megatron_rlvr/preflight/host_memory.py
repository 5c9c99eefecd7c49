"""Memory that processes can still take on a host: of the machine, or within a limit of their cgroups. Imports no torch.

A container's limit is that of a cgroup. A process is killed if it exceeds the limit, although the machine may have
memory left. Cached pages of files that are not in use count as used by a cgroup, and can be taken.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

_UNLIMITED = 2**60  # version 1 writes nearly 2**63 where there is no limit
# {version: names of the files with the limit and the use, of the entry in memory.stat for cached pages}
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


class HostMemory(NamedTuple):
    """Bytes that can be taken, and what limits them: "the machine" or "its cgroup, limited to 512.0 GB"."""

    available: int
    limited_by: str


def host_memory(process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> HostMemory:
    """Return what this process can take of the host's memory.

    Args:
        process: File with the cgroups of a process.
        root: Folder at which the cgroup file system is mounted.
    """
    found = [HostMemory(psutil.virtual_memory().available, "the machine")]
    with suppress(OSError):
        for line in process.read_text(encoding="ascii", errors="replace").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                found += _limits(2, root, path)
            elif "memory" in controllers.split(","):
                found += _limits(1, root / "memory", path)
    return min(found)


def _limits(version: int, mounted: Path, path: str) -> Iterator[HostMemory]:
    """Yield the limits of a cgroup and of those that contain it; in a container, the mounted folder is its own."""
    limit_file, usage_file, cached = _FILES[version]
    group = mounted / path.strip("/")
    while True:
        with suppress(OSError, ValueError):  # a folder without such files, or with "max" for no limit
            limit, usage = (int((group / name).read_text(encoding="ascii")) for name in (limit_file, usage_file))
            entries = (line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
            free = limit - usage + next((int(value) for name, value in entries if name == cached), 0)
            if limit < _UNLIMITED:
                yield HostMemory(max(0, free), f"its cgroup, limited to {limit / 1e9:.1f} GB")
        if group == mounted:
            return
        group = group.parent
