"""Limit on the files, sockets included, that this process may have open at once.

A run needs few on one host, and more than the 1,024 of many shells, services and containers with many ranks or
requests in flight. The hard limit is what the machine grants, so that a program raises its soft limit to it.
"""

import errno
import os
import resource

# Programs that close every possible descriptor would take minutes at the limits of a billion that some systems have.
_HIGHEST = 2**20
# Logs, checkpoints, health checks and orders to servers, besides what is open when the room is computed.
_RESERVE = 48

# By benchmarks/host_groups.py, and twice what it finds. Each process group has some files of its own, and connects
# ranks that exchange something: neighbours, distances of powers of two, and in exchanges and gathers all of the group.
_WITHOUT_RANKS, _EACH_RANK = 160, 2
_STORE_CLIENTS = 4  # connections of a rank to the store: its own, the heartbeat's, the engine's and the collector's

EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS})
"""Error numbers with which this machine, not a server, lacks files, ports or buffers for one more connection."""


def raise_limit() -> int:
    """Raise the soft limit of this process to the hard one, at most to 2^20, and return it. Children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _HIGHEST if hard == resource.RLIM_INFINITY else min(hard, _HIGHEST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return limit()


def limit() -> int:
    """Return the soft limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _HIGHEST if soft == resource.RLIM_INFINITY else soft


def is_open() -> int:
    """Return the number of files that this process has open."""
    return len(os.listdir("/proc/self/fd"))


def room() -> int:
    """Return how many connections this process may open besides its open files and a reserve; at least 1."""
    return max(1, limit() - is_open() - _RESERVE)


def needed(ranks: int, requests: int = 0, *, has_store: bool = False) -> int:
    """Return the number of files that a rank has open, as an upper bound.

    Args:
        ranks: Number of ranks.
        requests: Requests to servers in flight, each with a connection of its own.
        has_store: The rank listens for all others at their store, as rank 0 does where no launcher does.
    """
    return _WITHOUT_RANKS + _EACH_RANK * ranks + requests + (_STORE_CLIENTS * ranks if has_store else 0)


def too_low(wanted: int, where: str, setting: str) -> str | None:
    """Return a sentence if the soft limit is below ``wanted``, else None.

    Args:
        where: The process, for the sentence.
        setting: The setting that decides on the number of requests.
    """
    if limit() >= wanted:
        return None
    return (
        f"{where}: the limit of {limit()} open files is below the {wanted} that it may need; raise the hard limit "
        f"(ulimit -Hn, LimitNOFILE= of a service, --ulimit nofile of a container), or lower {setting}"
    )
