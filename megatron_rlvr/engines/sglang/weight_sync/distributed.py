"""Weights by way of process groups with the servers: buckets are broadcast from the trainer's memory to theirs.

There is one group for each server: the main rank, and the ranks of that server. One group with all of them would send
less where servers are many, but a server that hangs would hang others with it: a broadcast passes from rank to rank,
and one that waits for the missing one cannot be told to stop before its own patience ends (torch's: 10 to 30 minutes).
So the main rank sends the weights once for each server, to all at the same time.

A group is kept as long as its server is known to be the process that joined it: only that one holds the weights that
the last sync gave it, under a name that nobody else knows. For any other the group is made anew.

Three threads meet here. The trainer's fills a bucket, and waits until all servers have loaded it or have failed to do
so in time. The pool's tells each server what comes. A thread of its own blocks in each broadcast; should that be stuck
for good, nothing waits for it, not even the end of the program.

On CPUs the groups are gloo's, on GPUs NCCL's, with buckets in the GPU's memory; the latter has not been run yet. NCCL's
have no watchdog, which would end the trainer with any server, and are broken off in a thread of their own when a server
is given up: the pool's goes on reading the answers of the others.
"""

import asyncio
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.parse import urlsplit

from megatron_rlvr.distributed import accelerator, server_group
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.engines.sglang.client import Server, UnusableServer
from megatron_rlvr.engines.sglang.pool import ServerPool
from megatron_rlvr.engines.sglang.weight_sync.base import BucketSync
from megatron_rlvr.engines.sglang.weight_sync.buckets import Bucket

T = TypeVar("T")

_JOIN_SECONDS = 60.0


class DistributedSync(BucketSync):
    """Hands weights over by process groups; see `BucketSync`."""

    def __init__(self, pool: ServerPool | None, ranks: Ranks, bucket_bytes: int) -> None:
        super().__init__(pool, ranks, bucket_bytes, accelerator.device())
        self._groups: dict[str, server_group.ServerGroup] = {}
        self._held: dict[str, str] = {}

    def close(self) -> None:
        """Has the servers leave their groups; the pool must still be open."""
        if self._groups:
            assert self._main_pool is not None
            self._main_pool.everywhere(self._leave)
        for group in self._groups.values():  # of servers that could not be asked
            group.close()
        self._groups = {}

    async def _leave(self, server: Server) -> None:
        if group := self._groups.get(server.url):
            await server.leave_group(group.name)
            self._lose(server)

    async def _open(self, server: Server) -> None:
        """Makes sure that there is a group with the server as it is now."""
        if server.url in self._groups and await server.weight_version() == self._held.get(server.url):
            return
        assert self._main_pool is not None
        seconds = min(_JOIN_SECONDS, self._main_pool.patience_seconds)
        self._lose(server)
        name = f"megatron_rlvr {urlsplit(server.url).netloc}"
        await server.leave_group(name)  # that it joined for an earlier trainer, say
        group = server_group.ServerGroup(name, await server.tensor_parallel_size())
        self._groups[server.url] = group
        address = await _in_thread(lambda: _address_toward(server.url))
        joined = _in_thread(lambda: group.join(seconds))
        await server.join_group(name, address, group.port, group.size, group.backend, seconds)
        await joined

    def _packed(self, bucket: Bucket) -> Bucket:
        return bucket

    async def _send(self, server: Server, packed: Bucket, timeout_seconds: float) -> None:
        group = self._groups[server.url]
        body = {
            "names": packed.names,
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in packed.dtypes],
            "shapes": [list(shape) for shape in packed.shapes],
            "group_name": group.name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        sent = _in_thread(lambda: group.broadcast(packed.data, timeout_seconds))
        await server.take_bucket("/update_weights_from_distributed", body, timeout_seconds)
        await sent

    async def _end(self, label: str, timeout_seconds: float, server: Server) -> None:
        await super()._end(label, timeout_seconds, server)
        self._held[server.url] = label

    def _lose(self, server: Server) -> None:
        self._held.pop(server.url, None)
        if group := self._groups.pop(server.url, None):
            group.close()


def _address_toward(url: str) -> str:
    """This machine's address as seen from that of ``url``: the near end of a way there, on which nothing is sent."""
    parts = urlsplit(url)
    family, kind, protocol, _, far_end = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as way:
        way.connect(far_end)
        address: str = way.getsockname()[0]
        return address


def _in_thread(function: Callable[[], T]) -> "asyncio.Future[T]":
    """What ``function`` returns in a thread that need not end; its failure is its server's, an UnusableServer."""
    result: Future[T] = Future()
    result.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result.set_result(function())
        except (RuntimeError, OSError) as error:  # what torch and sockets raise
            result.set_exception(UnusableServer(" ".join(str(error).split())))
        except Exception as error:  # a fault of ours goes to the one who waits
            result.set_exception(error)

    threading.Thread(target=run, name="weights", daemon=True).start()
    awaitable = asyncio.wrap_future(result)
    awaitable.add_done_callback(_look)  # also where nobody waits for it any more
    return awaitable


def _look(future: "asyncio.Future[Any]") -> None:
    """Takes note of a failure, which asyncio would log otherwise."""
    if not future.cancelled():
        future.exception()
