"""A process group of this process and the ranks of one SGLang server, apart from the trainer's own world."""

import contextlib
import os
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from megatron_rlvr.distributed.accelerator import has_gpu

WATCHDOG_OFF = "TORCH_NCCL_BLOCKING_WAIT"
_LEAVE_SECONDS = 10.0
_leaving: list[threading.Thread] = []
"""Threads that end connections with servers."""


def wait_for_closing() -> None:
    """Gives the connections that are being ended some seconds to end."""
    deadline = time.monotonic() + _LEAVE_SECONDS
    for thread in list(_leaving):
        thread.join(max(0.0, deadline - time.monotonic()))


class _NoWatchdog:
    """While any thread is in it, NCCL groups get no watchdog: whoever waits for their work learns how it went.

    The watchdog would end this process when a server dies or hangs. Torch reads the variable as it makes a group, and
    not again. Threads are not kept apart by a lock: one may be waiting for its server in there.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: str | None = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = os.environ.get(WATCHDOG_OFF)
                os.environ[WATCHDOG_OFF] = "1"
            self._inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            if self._before is None:
                os.environ.pop(WATCHDOG_OFF, None)
            else:
                os.environ[WATCHDOG_OFF] = self._before


_no_watchdog = _NoWatchdog()


class ServerGroup:
    """This process and the ranks of one server, apart from the world: what the one broadcasts the others receive.

    A server finds this process by the store at ``port``, where both make the group of torch's own parts, in the same
    way: SGLang with its init_custom_process_group, of which `join` is the other end.

    Args:
        name: of the group, which is the server's name for it too.
        server_ranks: of the server; this process is rank 0, before them.
    """

    def __init__(self, name: str, server_ranks: int) -> None:
        self.name = name
        self.size = 1 + server_ranks
        self.backend = "nccl" if has_gpu() else "gloo"
        self._group: torch.distributed.ProcessGroup | None = None
        self._closed = False
        # Port 0 is any that is free; the store listens on all addresses.
        self._store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    @property
    def port(self) -> int:
        return self._store.port

    def join(self, timeout_seconds: float) -> None:
        """Returns when the server has joined as well, on NCCL as soon as it can. RuntimeError if it does not in time.

        May run in any thread; what is closed meanwhile stays closed.
        """
        c10d = torch.distributed.distributed_c10d
        timeout = timedelta(seconds=timeout_seconds)
        self._store.set_timeout(timeout)
        with _no_watchdog:
            group, _ = c10d._new_process_group_helper(
                self.size,
                0,
                [],
                c10d.Backend(self.backend),
                c10d.PrefixStore(self.name, self._store),
                group_name=self.name,  # type: ignore[arg-type]
                timeout=timeout,
            )
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(self.size)}
        self._group = group
        if self._closed:
            self.close()

    def broadcast(self, data: torch.Tensor, timeout_seconds: float) -> None:
        """Returns when all of ``data`` is sent, and may be overwritten. RuntimeError if it is not in time."""
        group = self._group  # held until the end: who drops it last waits for what it still does
        assert group is not None
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = timedelta(seconds=timeout_seconds)
        # Given a time to wait, NCCL's too blocks this thread until the work is done.
        group.broadcast([data], options).wait(options.timeout)

    def close(self) -> None:
        """Leaves the group at once, which frees its name.

        A broadcast that is stuck ends by itself at its timeout, and its connections with it. NCCL's are aborted in a
        thread, for which only `wait_for_closing` waits, and only for a while.
        """
        self._closed = True
        group, self._group = self._group, None
        if group is None:
            return
        if self.backend != "nccl":
            torch.distributed.destroy_process_group(group)
            return
        _forget(group)
        thread = threading.Thread(target=_break_off, args=(group,), name="leaving", daemon=True)
        thread.start()
        _leaving[:] = [each for each in (*_leaving, thread) if each.is_alive()]


def _forget(group: torch.distributed.ProcessGroup) -> None:
    """Strikes a group off torch's books, as torch does when it has ended one: no end of all groups waits for it."""
    c10d = torch.distributed.distributed_c10d
    world: Any = c10d._world
    for book in (world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config, world.pg_coalesce_state):
        book.pop(group, None)
    tag = world.pg_to_tag.pop(group, None)
    for each in {tag, ""}:
        if group in world.tags_to_pg.get(each, ()):
            world.tags_to_pg[each].remove(group)
    c10d._unregister_process_group(group.group_name)


def _break_off(group: torch.distributed.ProcessGroup) -> None:
    """Ends a group without waiting for its work; an older torch can only shut it down."""
    with contextlib.suppress(RuntimeError):  # its server is given up as it is
        getattr(group, "abort", group.shutdown)()
