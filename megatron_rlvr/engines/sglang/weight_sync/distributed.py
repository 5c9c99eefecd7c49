"""Weight sync through process groups with the servers: buckets are broadcast from the trainer's memory to theirs.

Each server has a process group of its own, of the leader that sends to it and the ranks of that server. One group of
all servers would send less data if there are many, but a server that hangs would make others hang: a broadcast passes
from rank to rank, and one that waits for a missing rank cannot be stopped before its own timeout (10 to 30 minutes in
torch). So a leader sends the weights once for each of its servers, to all of these at the same time.

A group is kept as long as its server is known to be the process that joined it: only that process holds the weights of
the last push, under a name that no other process knows. For any other process the group is created again.

Three threads take part. The trainer's thread fills a bucket, and waits until every server has loaded it or has failed
to do so in time. The pool's thread sends each server the description of the bucket. One more thread blocks in each
broadcast; if a broadcast never ends, nothing waits for its thread, not even the end of the program.

On CPUs the groups use gloo, on GPUs NCCL with buckets in GPU memory; the latter has not been run yet. Each NCCL group
has a stream of its own, which waits for the bucket and for nothing else, and no watchdog, which would end the trainer
with any server. Groups are aborted in a thread of their own when a server is given up, so that the pool's thread
continues to read the answers of the other servers.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.parse import urlsplit

from megatron_rlvr.distributed import accelerator, network, server_group
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.engines.sglang.client import Server, UnhealthyServerError
from megatron_rlvr.engines.sglang.pool import ServerPool
from megatron_rlvr.engines.sglang.weight_sync.bucket_sync import BucketSync
from megatron_rlvr.engines.sglang.weight_sync.buckets import Bucket

T = TypeVar("T")

_JOIN_SECONDS = 60.0


class DistributedSync(BucketSync):
    """Pushes weights through process groups; see `BucketSync`.

    Attributes:
        groups: {URL: process group with that server}, of this leader's servers.
    """

    def __init__(self, pool: ServerPool | None, ranks: Ranks, bucket_bytes: int) -> None:
        super().__init__(pool, ranks, bucket_bytes, accelerator.device())
        self.groups: dict[str, server_group.ServerGroup] = {}
        self._labels: dict[str, str] = {}  # {URL: name of the weights that the server took last}

    def close(self) -> None:
        """Have the servers leave their groups; the pool must still be open."""
        if self.groups:
            assert self._pool is not None
            self._pool.everywhere(self._leave)
        for group in self.groups.values():  # of servers that could not be reached
            group.close()
        self.groups = {}

    async def _leave(self, server: Server) -> None:
        if group := self.groups.get(server.url):
            await server.leave_group(group.name)
            self._drop(server)

    async def _open(self, server: Server) -> None:
        """Make sure that there is a group with the process that now serves at the URL."""
        if server.url in self.groups and await server.weight_version() == self._labels.get(server.url):
            return
        assert self._pool is not None
        seconds = min(_JOIN_SECONDS, self._pool.patience_seconds)
        self._drop(server)
        name = f"megatron_rlvr {urlsplit(server.url).netloc}"
        await server.leave_group(name)  # the server may have joined it for an earlier trainer
        host = urlsplit(server.url).hostname or ""
        address = await _in_thread(lambda: network.own_address_toward(host))
        group = server_group.ServerGroup(name, await server.tensor_parallel_size(), host, address)
        self.groups[server.url] = group
        joined = _in_thread(lambda: group.join(seconds))
        await server.join_group(name, address, group.port, group.size, group.backend, seconds)
        await joined

    def _pack(self, bucket: Bucket) -> tuple[Bucket, accelerator.Moment | None]:
        """Return the bucket, and the moment at which the GPU has filled it."""
        return bucket, accelerator.now()

    async def _send(
        self, server: Server, packed: tuple[Bucket, accelerator.Moment | None], timeout_seconds: float
    ) -> None:
        group = self.groups[server.url]
        bucket, filled = packed
        body = {
            "names": bucket.names,
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in bucket.dtypes],
            "shapes": [list(shape) for shape in bucket.shapes],
            "group_name": group.name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        sent = _in_thread(lambda: group.broadcast(bucket.data, timeout_seconds, filled))
        await server.take_bucket("/update_weights_from_distributed", body, timeout_seconds)
        await sent

    async def _end(self, label: str, timeout_seconds: float, server: Server) -> None:
        await super()._end(label, timeout_seconds, server)
        self._labels[server.url] = label

    def _drop(self, server: Server) -> None:
        self._labels.pop(server.url, None)
        if group := self.groups.pop(server.url, None):
            group.close()


def _in_thread(function: Callable[[], T]) -> "asyncio.Future[T]":
    """Run ``function`` in a daemon thread. An error of torch or of a socket becomes an UnhealthyServerError."""
    result: Future[T] = Future()
    result.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result.set_result(function())
        except (RuntimeError, OSError) as error:  # the errors of torch and of sockets
            result.set_exception(UnhealthyServerError(" ".join(str(error).split())))
        except Exception as error:  # a defect of the trainer is raised where the result is awaited
            result.set_exception(error)

    threading.Thread(target=run, name="weights", daemon=True).start()
    awaitable = asyncio.wrap_future(result)
    awaitable.add_done_callback(_retrieve)  # even if nothing awaits the result any more
    return awaitable


def _retrieve(future: "asyncio.Future[Any]") -> None:
    """Retrieve a future's exception, which asyncio would otherwise log as never retrieved."""
    if not future.cancelled():
        future.exception()
