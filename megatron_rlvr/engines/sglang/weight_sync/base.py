"""What the ways of handing over weights have in common.

Every rank calls `push` and goes through all tensors, since gathering them is a collective; the main rank alone
talks to servers. What servers call their weights has a part that is drawn anew for every run, so that weights of
another run, or of an earlier step, are told apart.

In buckets (`BucketSync`) each server is updated by itself, in step with the others: all get a bucket at once, and one
that fails is left out from then on, while the others go on as if it had never been there. No server waits for another,
because a server cannot be freed that waits for one that hangs. Until its last bucket is in, a server's weights have a
name that is never asked for: it cannot pass for current when it was left half-updated.
"""

import asyncio
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_rlvr.distributed.collectives import raise_on_all_ranks
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.engines.sglang.client import Refused, Server, ServerFault, UnusableServer
from megatron_rlvr.engines.sglang.pool import ServerPool, Weights, faults
from megatron_rlvr.engines.sglang.weight_sync.buckets import Bucket, buckets

T = TypeVar("T")

# A server that takes longer than this to load a bucket is taken to hang.
_SECONDS_A_BUCKET, _BYTES_A_SECOND = 30.0, 10e6


@dataclass(frozen=True)
class Sent:
    """The last update, as the main rank saw it.

    Attributes:
        seconds: of the whole update.
        bytes: of the weights, counted once.
        buckets: that they travelled in.
        largest_bucket: in bytes, the extra memory of the update.
        servers: that took the weights.
    """

    seconds: float
    bytes: int
    buckets: int
    largest_bucket: int
    servers: int


class Sync:
    """A way of handing over weights; see rollout.sglang.WeightSync.

    Args:
        pool: of the main rank; others pass their own or None.

    Attributes:
        announce: see rollout.sglang.WeightSync.
    """

    def __init__(self, pool: ServerPool | None, ranks: Ranks) -> None:
        self.announce: Callable[[str, int], None] = lambda label, version: None
        self._ranks = ranks
        self._main_pool = pool if ranks.is_main else None
        self._run = secrets.token_hex(4)

    def _label(self, version: int) -> str:
        """What servers call the weights of a version; announced on every rank when it returns on any."""
        label = self._from_main(f"{self._run}-{version}")
        self.announce(label, version)
        # A replica that lags behind has requests at servers, which may be given the weights before it.
        raise_on_all_ranks(None)
        return label

    def _from_main(self, value: T) -> T:
        """The main rank's ``value`` on every rank."""
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


class BucketSync(Sync, ABC):
    """Hands weights over in buckets.

    A server that was out gets its weights with the next call, never in between: there is no copy of them to give.

    Args:
        bucket_bytes: size of a bucket; one larger tensor travels alone.
        device: where buckets are filled.

    Attributes:
        sent: metrics of the last update; None before the first, and on other ranks than the main one.
    """

    def __init__(self, pool: ServerPool | None, ranks: Ranks, bucket_bytes: int, device: torch.device) -> None:
        super().__init__(pool, ranks)
        self._bucket_bytes = bucket_bytes
        self._device = device
        self.sent: Sent | None = None

    def push(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        version: int,
        without: Mapping[str, str] | None = None,
    ) -> tuple[Weights, dict[str, str]]:
        """Updates every server; a collective over the world in which every rank exhausts the iterator.

        Requests that are running wait, and go on with the new weights.

        Args:
            without: see rollout.sglang.WeightSync.

        Returns: what servers have to sample from, and {URL: why it does not}.
        """
        label = self._label(version)
        failures: dict[str, str] = {}
        if self._main_pool is not None:
            failures = self._update(self._main_pool, named_tensors, label, without)
        else:
            for _ in named_tensors:
                pass  # the main rank waits in its collectives
        return Weights(label, by_sync_only=True), self._from_main(failures)

    def close(self) -> None:
        """Leaves servers as they are."""

    # What a way of sending buckets adds; all but `_packed` in the pool's thread ---------------------------------------

    @abstractmethod
    async def _open(self, server: Server) -> None:
        """Readies the way to a server, which is not paused yet."""

    @abstractmethod
    def _packed(self, bucket: Bucket) -> Any:
        """A bucket as `_send` wants it, made once for all servers."""

    @abstractmethod
    async def _send(self, server: Server, packed: Any, timeout_seconds: float) -> None:
        """Returns when the server has loaded a bucket."""

    def _lose(self, server: Server) -> None:
        """Gives up the way to a server that has failed."""

    # The update, on the main rank -------------------------------------------------------------------------------------

    def _update(
        self,
        pool: ServerPool,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        label: str,
        without: Mapping[str, str] | None,
    ) -> dict[str, str]:
        """Gives servers the weights; {URL: why it does not have them}."""
        start = time.perf_counter()
        failures: dict[str, str] = {}
        begin = partial(self._try, partial(self._begin, label))
        servers = _sift(pool.everywhere(begin, without=without), failures)
        sizes = []
        try:
            for bucket in buckets(named_tensors, self._bucket_bytes, self._device):
                sizes.append(bucket.bytes)
                if servers:
                    send = partial(self._send, packed=self._packed(bucket), timeout_seconds=_patience(pool, bucket))
                    servers = _sift(pool.run(self._all(servers, send)), failures)
            end = partial(self._end, label, pool.patience_seconds)
            servers = _sift(pool.run(self._all(servers, end)), failures)
        except BaseException:  # of the trainer's own, such as Ctrl-C: servers are not left paused
            pool.run(self._all(servers, self._give_up))
            raise
        self.sent = Sent(time.perf_counter() - start, sum(sizes), len(sizes), max(sizes, default=0), len(servers))
        return failures

    async def _begin(self, label: str, server: Server) -> None:
        await self._open(server)
        await server.pause()
        await server.begin_update(label)

    async def _end(self, label: str, timeout_seconds: float, server: Server) -> None:
        await server.end_update(label, timeout_seconds)
        await server.resume()

    async def _all(
        self, servers: Sequence[Server], step: Callable[[Server], Awaitable[None]]
    ) -> dict[str, Server | ServerFault]:
        """{URL: the server, or the fault that it had in a step}; all take it at once."""
        results = await asyncio.gather(*(self._try(step, server) for server in servers))
        return {server.url: result for server, result in zip(servers, results, strict=True)}

    async def _try(self, step: Callable[[Server], Awaitable[None]], server: Server) -> Server | ServerFault:
        """The server once it has taken a step; or its fault, and it is given up."""
        try:
            await step(server)
        except (ServerFault, Refused) as error:
            await self._give_up(server)
            return UnusableServer(str(error))
        return server

    async def _give_up(self, server: Server) -> None:
        """It has to go on, half-updated as it may be: one that is paused looks unhealthy, and would never come back."""
        self._lose(server)
        with suppress(ServerFault, Refused):
            await server.resume()


def _sift(results: Mapping[str, Server | ServerFault], failures: dict[str, str]) -> list[Server]:
    """The servers among results; the others' faults go to ``failures``."""
    failures.update(faults(results))
    return [result for result in results.values() if isinstance(result, Server)]


def _patience(pool: ServerPool, bucket: Bucket) -> float:
    """How long a server may take to load a bucket, in seconds."""
    return min(pool.patience_seconds, _SECONDS_A_BUCKET + bucket.bytes / _BYTES_A_SECOND)
