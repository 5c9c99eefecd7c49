"""A pool of SGLang servers, used by the trainer's threads: streams of requests, orders to all servers, weight pushes.

All connections live in the event loop of one background thread (event_loop.py). Requests are queued, sent and retried
by dispatch.py; membership.py says which servers may be used.

    pool = ServerPool(urls, max_inflight=64, retries=3, patience_seconds=600.0)
    with pool.pushing_weights():
        ...                                        # push the weights
        pool.weights_pushed(weights, failures)
    with pool.open() as stream:
        stream.submit(requests)
        result = stream.get()
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import aiohttp

from megatron_rlvr.engines.sglang.client import (
    RequestRefusedError,
    Server,
    ServerError,
    UnhealthyServerError,
    new_session,
)
from megatron_rlvr.engines.sglang.dispatch import Dispatcher
from megatron_rlvr.engines.sglang.event_loop import EventLoopThread, cancel
from megatron_rlvr.engines.sglang.membership import ExpectedWeights, Member, Membership, ServerStatus
from megatron_rlvr.engines.sglang.request import RequestStream, ServerRequest
from megatron_rlvr.protocols import EngineError, WeightsMissingError

T = TypeVar("T")

_KEEP_ALIVE_SECONDS = 2.0


class ServerPool:
    """Servers that share the requests of this process.

    Args:
        urls: URLs of the servers.
        max_inflight: Maximum number of requests of this pool that run on one server at once.
        retries: Number of attempts of a request after the first.
        patience_seconds: Time after which a stream fails if no server is healthy.
        health_check_seconds: Time between two health checks of a healthy server.
        api_key: Key that the servers demand, sent with every request as a bearer token; None if they demand none.

    Attributes:
        membership: Servers and their states, in the pool's event loop.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        max_inflight: int,
        retries: int,
        patience_seconds: float,
        health_check_seconds: float = 10.0,
        api_key: str | None = None,
    ) -> None:
        self._api_key = api_key
        self.patience_seconds = patience_seconds
        self._loop = EventLoopThread("servers")
        self.membership = Membership(self.run(self._connect(urls)), health_check_seconds)
        self._dispatcher = Dispatcher(self.membership, self._loop, max_inflight=max_inflight, retries=retries)
        self._watchers: list[asyncio.Task[None]] = []

    async def _connect(self, urls: Sequence[str]) -> list[Server]:
        # Drop an idle connection before the server would do so (after 5 s), or before another server may be running on
        # the same port: a request on a connection that is found closed looks like one to a server that died.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS)
        self._session = new_session(connector, self._api_key)
        return [Server(url, self._session, self._loop.late) for url in urls]

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the pool's thread and return its result."""
        return self._loop.run(coroutine)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run a coroutine in the pool's thread and return a future of its result."""
        return self._loop.submit(coroutine)

    def status(self) -> list[ServerStatus]:
        """Return a snapshot of all servers, in the order of their URLs in the constructor."""

        async def snapshot() -> list[ServerStatus]:
            return [member.status() for member in self.membership.members]

        return self.run(snapshot())

    @property
    def in_rotation(self) -> list[str]:
        """URLs of the healthy servers, to which requests are sent."""
        return [member.server.url for member in self.membership.in_rotation]

    def everywhere(
        self,
        action: Callable[[Server], Awaitable[T]],
        *,
        check_health: bool = True,
        exclude: Mapping[str, str] | None = None,
        among: Collection[str] | None = None,
    ) -> dict[str, T | ServerError]:
        """Run ``action`` on all servers at once.

        Args:
            check_health: Check the health of a server that is not in rotation first, so that one that hangs costs no
                more than that check. Servers that stay paused are never checked, since they would look unhealthy.
                False for servers that others may have paused.
            exclude: {URL: reason} of servers on which the action is not run.
            among: URLs of the servers that are meant; None for all.

        Returns:
            {URL: result, or the error of the server}; the error of an excluded server is its reason.
        """
        excluded = exclude or {}

        async def one(member: Member) -> T | ServerError:
            server = member.server
            if server.url in excluded:
                return UnhealthyServerError(excluded[server.url])
            try:
                if check_health and not member.healthy and not server.keep_paused:
                    await server.check_health()
                return await action(server)
            except ServerError as error:
                return error
            except RequestRefusedError as refusal:
                return UnhealthyServerError(str(refusal))

        async def all_of_them() -> list[T | ServerError]:
            return await asyncio.gather(*map(one, members))

        members = [m for m in self.membership.members if among is None or m.server.url in among]
        urls = [member.server.url for member in members]
        return dict(zip(urls, self.run(all_of_them()), strict=True))

    # Weights ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def pushing_weights(self) -> Iterator[None]:
        """Context in which servers may be paused: that they do not answer means nothing, and none is re-admitted.

        Entered when servers that are loading the previous weights have loaded them, or have failed to in time.
        """
        self.run(self.membership.begin_push())
        try:
            yield
        finally:
            self.run(self.membership.end_push())

    def weights_pushed(self, weights: ExpectedWeights, failures: Mapping[str, str]) -> None:
        """Sample from ``weights`` from now on. All servers hold them except those in ``failures`` ({URL: reason})."""

        async def pushed() -> None:
            self.membership.weights_pushed(weights, failures)

        self.run(pushed())

    # Streams ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def open(self) -> Iterator[RequestStream]:
        """Open a stream. While any is open, the servers' health is watched and unhealthy servers are re-admitted.

        On exit the stream's unfinished requests are cancelled, on the servers too.
        """
        dispatcher = self._dispatcher
        stream = RequestStream(self._submit, self._abort)

        async def begin() -> "asyncio.Task[None]":
            dispatcher.streams.append(stream)
            dispatcher.fit_open_files()
            if not self._watchers:
                self._watchers = [self._loop.start(self.membership.watch(m)) for m in self.membership.members]
            return self._loop.start(self._fail_without_servers(stream))

        async def end() -> None:
            await cancel([patience])
            await dispatcher.abort(stream, wait=False)
            dispatcher.streams.remove(stream)
            if not dispatcher.streams:
                watchers, self._watchers = self._watchers, []
                await cancel(watchers)

        patience = self.run(begin())
        try:
            yield stream
        finally:
            self.run(end())

    def _submit(self, stream: RequestStream, requests: Sequence[ServerRequest]) -> None:
        self._loop.call_soon(lambda: self._dispatcher.submit(stream, requests))

    def _abort(self, stream: RequestStream) -> None:
        self.run(self._dispatcher.abort(stream))

    async def _fail_without_servers(self, stream: RequestStream) -> None:
        """Fail a stream if no server is in rotation for too long, or if only a weight sync can bring one back."""
        last_healthy = self._loop.time()
        while True:
            await asyncio.sleep(min(1.0, self.patience_seconds / 4))
            if self.membership.in_rotation or self.membership.pushing:
                last_healthy = self._loop.time()
                continue
            over = self._loop.time() - last_healthy > self.patience_seconds
            reasons = self.membership.reasons
            if self.membership.needs_sync(waited_long_enough=over):
                return stream.results.put(WeightsMissingError(f"no server holds the current weights; {reasons}"))
            if over:
                seconds = f"{self.patience_seconds:g}"
                return stream.results.put(
                    EngineError(
                        f"rollout.server_timeout_seconds={seconds}: no server was healthy for {seconds} s ({reasons}); "
                        "restart the servers, and resume the run"
                    )
                )

    def close(self) -> None:
        """End the pool's thread; requests in flight are dropped."""
        if self._loop.closed:
            return
        self.run(self._session.close())
        self._loop.close()


def failures_in(results: Mapping[str, Any]) -> dict[str, str]:
    """Return {URL: reason} of the servers that failed, from the results of `ServerPool.everywhere`."""
    return {url: str(result) for url, result in results.items() if isinstance(result, ServerError)}
