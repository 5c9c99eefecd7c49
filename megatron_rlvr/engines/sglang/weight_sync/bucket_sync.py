"""Weight sync in buckets.

The leaders of the data-parallel replicas share the servers (`share_of`): each sends the same buckets to its own
servers, since every replica gathers all weights anyway.

Each server is updated by itself, in step with the others: all get a bucket at once, and one that fails is left out from
then on, while the others continue as if it had never been there. No server waits for another, because nothing can free
a server that waits for one that hangs. Until its last bucket has arrived, a server's weights have a name that is never
expected, so that a server left half-updated cannot pass for current.
"""

import asyncio
import time
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megatron_rlvr.distributed.collectives import gather
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.engines.sglang.client import RequestRefusedError, Server, ServerError, UnhealthyServerError
from megatron_rlvr.engines.sglang.membership import ExpectedWeights
from megatron_rlvr.engines.sglang.pool import ServerPool, failures_in
from megatron_rlvr.engines.sglang.weight_sync.base import WeightSync
from megatron_rlvr.engines.sglang.weight_sync.buckets import Bucket, buckets

# A server that takes longer than this to load a bucket is considered to hang.
_SECONDS_PER_BUCKET, _BYTES_PER_SECOND = 30.0, 10e6


@dataclass(frozen=True)
class PushMetrics:
    """Metrics of one push.

    Attributes:
        seconds: Duration of the push.
        bytes: Size of the weights.
        buckets: Number of buckets.
        largest_bucket: Size of the largest bucket in bytes; two of them are the extra memory of the push.
        servers: Number of this leader's servers that took the weights.
    """

    seconds: float
    bytes: int
    buckets: int
    largest_bucket: int
    servers: int


class BucketSync(WeightSync):
    """Pushes weights in buckets.

    A server that was not in rotation gets its weights with the next push, never in between: the trainer keeps no copy
    of the weights to give to it.

    Args:
        pool: Servers, on the leader of a data-parallel replica; None on other ranks.
        ranks: Ranks of the run.
        bucket_bytes: Size of a bucket, of which one is filled while another is sent; a larger tensor is sent as a
            bucket of its own.
        device: Device on which buckets are filled.

    Attributes:
        last_push: Metrics of the last push; None before the first, and on all ranks except leaders.
    """

    def __init__(self, pool: ServerPool | None, ranks: Ranks, bucket_bytes: int, device: torch.device) -> None:
        super().__init__(pool, ranks)
        self._pool = pool
        self._bucket_bytes = bucket_bytes
        self._device = device
        self.last_push: PushMetrics | None = None

    def push(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        version: int,
        exclude: Mapping[str, str] | None = None,
    ) -> tuple[ExpectedWeights, dict[str, str]]:
        """Push weights to all servers in buckets; see `WeightSync.push`."""
        label = self._announce_label(version)
        exclude = self._from_main(exclude)
        failures: dict[str, str] = {}
        if self._pool is not None:
            failures = self._push(self._pool, named_tensors, label, exclude)
        else:
            for _ in named_tensors:
                pass  # takes part in the collectives that gather each tensor for the leader
        everywhere = {url: why for part in gather(failures, self._ranks.data_objects) for url, why in part.items()}
        return ExpectedWeights(label, by_sync_only=True), everywhere

    def close(self) -> None:
        """Leave servers as they are."""

    # The part of each method; all of it but `_pack` runs in the pool's thread -----------------------------------------

    @abstractmethod
    async def _open(self, server: Server) -> None:
        """Prepare the connection to a server, which is not paused yet."""

    @abstractmethod
    def _pack(self, bucket: Bucket) -> Any:
        """Return a bucket in the form that `_send` takes; called once for all servers, while another one is sent."""

    @abstractmethod
    async def _send(self, server: Server, packed: Any, timeout_seconds: float) -> None:
        """Send a bucket, and return when the server has loaded it."""

    def _drop(self, server: Server) -> None:
        """Drop the connection to a server that has failed."""

    # The push, on a leader ------------------------------------------------------------------------------------------

    def _push(
        self,
        pool: ServerPool,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        label: str,
        exclude: Mapping[str, str] | None,
    ) -> dict[str, str]:
        """Push the weights to this leader's servers. Returns {URL: reason} of those that do not hold them."""
        start = time.perf_counter()
        failures: dict[str, str] = {}
        begin = partial(self._try, partial(self._begin, label))
        own = share_of([each.url for each in pool.status()], self._ranks.data_rank, self._ranks.data_size)
        servers = _split(pool.everywhere(begin, exclude=exclude, among=own), failures)
        sizes = []
        try:
            sending: Future[dict[str, Server | ServerError]] | None = None
            for bucket in buckets(named_tensors, self._bucket_bytes, self._device, buffers=2):
                sizes.append(bucket.bytes)
                if servers:
                    send = partial(self._send, packed=self._pack(bucket), timeout_seconds=_bucket_timeout(pool, bucket))
                    if sending:
                        servers = _split(sending.result(), failures)
                    # The next bucket is filled while this one is sent.
                    sending = pool.submit(self._try_all(servers, send)) if servers else None
            if sending:
                servers = _split(sending.result(), failures)
            end = partial(self._end, label, pool.patience_seconds)
            servers = _split(pool.run(self._try_all(servers, end)), failures)
        except BaseException:  # an error of the trainer itself, or Ctrl-C: do not leave servers paused
            pool.run(self._try_all(servers, self._give_up))
            raise
        self.last_push = PushMetrics(
            time.perf_counter() - start, sum(sizes), len(sizes), max(sizes, default=0), len(servers)
        )
        return failures

    async def _begin(self, label: str, server: Server) -> None:
        await self._open(server)
        await server.pause()
        await server.begin_update(label)

    async def _end(self, label: str, timeout_seconds: float, server: Server) -> None:
        await server.end_update(label, timeout_seconds)
        await server.resume()

    async def _try_all(
        self, servers: Sequence[Server], step: Callable[[Server], Awaitable[None]]
    ) -> dict[str, Server | ServerError]:
        """Run a step on all servers at once. Returns {URL: the server, or the error that it had}."""
        results = await asyncio.gather(*(self._try(step, server) for server in servers))
        return {server.url: result for server, result in zip(servers, results, strict=True)}

    async def _try(self, step: Callable[[Server], Awaitable[None]], server: Server) -> Server | ServerError:
        """Run a step on a server. Returns the server, or its error after giving it up."""
        try:
            await step(server)
        except (ServerError, RequestRefusedError) as error:
            await self._give_up(server)
            return UnhealthyServerError(str(error))
        return server

    async def _give_up(self, server: Server) -> None:
        """Drop the connection and resume the server, even if it is half-updated.

        A paused server fails its health check and would never be re-admitted.
        """
        self._drop(server)
        with suppress(ServerError, RequestRefusedError):
            await server.resume()


def share_of(urls: Collection[str], leader: int, leaders: int) -> list[str]:
    """Return the servers to which a leader sends weights; leaders may have the URLs in different orders."""
    return sorted(urls)[leader::leaders]


def _split(results: Mapping[str, Server | ServerError], failures: dict[str, str]) -> list[Server]:
    """Return the servers among ``results``, and add the errors of the others to ``failures``."""
    failures.update(failures_in(results))
    return [result for result in results.values() if isinstance(result, Server)]


def _bucket_timeout(pool: ServerPool, bucket: Bucket) -> float:
    """Return the seconds that a server may take to load a bucket."""
    return min(pool.patience_seconds, _SECONDS_PER_BUCKET + bucket.bytes / _BYTES_PER_SECOND)
