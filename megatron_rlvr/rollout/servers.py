"""A pool of SGLang servers: who may be used, who gets which request, and what becomes of a request that fails.

All connections live in the event loop of one background thread; the trainer's thread hands jobs in and takes results
out. A server is *in* while it is healthy and holds the current weights. Whatever casts doubt on it takes it out, with
one line in the log, and its requests go to others; it comes back when it is healthy again and holds the weights, which
the rank that may (`Weights.load`) gives it once more. It is asked less often each time it had to be taken out.
"""

import asyncio
import logging
import queue
import random
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp

from megatron_rlvr.rollout.server import Refused, Server, ServerFault, UnusableServer

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Failures in a row that each might have been the request's own.
_MOST_STRIKES = 3
_LONGEST_PAUSE = 32  # times the pause before a server is first asked again
_FIRST_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 0.25, 30.0


class ServersError(RuntimeError):
    """The servers cannot answer: none is left, or a request failed everywhere."""


@dataclass(frozen=True)
class Weights:
    """What servers have to sample from.

    Attributes:
        label: what they call it, unlike that of any other weights of this or another run.
        load: gives it to a server; None on ranks that leave this to another.
    """

    label: str
    load: Callable[[Server], Awaitable[None]] | None = None


@dataclass(eq=False)
class Job:
    """One request.

    Attributes:
        name: for messages.
        body: of POST /generate.
        read: makes the result of the server's answer; raises ServerFault for one that cannot be used.
        timeout_seconds: of one attempt.
    """

    name: str
    body: dict[str, Any]
    read: Callable[[Any], Any]
    timeout_seconds: float
    failures: int = 0
    tried: set[str] = field(default_factory=set)


@dataclass(eq=False)
class _Member:
    """A server of the pool, and what it is doing."""

    server: Server
    usable: bool = True
    reason: str = ""
    removals: int = 0
    strikes: int = 0
    jobs: dict["asyncio.Task[None]", Job] = field(default_factory=dict)


@dataclass(eq=False)
class _Stream:
    """The jobs of one call, and where their results go: a result, or the error that ends the call."""

    waiting: deque[Job]
    results: "queue.SimpleQueue[Any]" = field(default_factory=queue.SimpleQueue)


class ServerPool:
    """Servers, in a thread of their own.

    Args:
        urls: of the servers.
        max_inflight: requests that this pool has in flight to a server at once.
        retries: attempts after the first.
        patience_seconds: how long a stream goes on with no server in.
        watch_seconds: between two looks at a server's health.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        max_inflight: int,
        retries: int,
        patience_seconds: float,
        watch_seconds: float = 10.0,
    ) -> None:
        self.patience_seconds = patience_seconds
        self._max_inflight = max_inflight
        self._retries = retries
        self._watch_seconds = watch_seconds
        self._weights: Weights | None = None
        self._stream: _Stream | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._random = random.Random()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="servers", daemon=True)
        self._thread.start()
        self._members = self.run(self._open(urls))

    # From the trainer's thread --------------------------------------------------------------------------------------

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What a coroutine returns that runs in the pool's thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    @property
    def usable(self) -> list[str]:
        """URLs of the servers that are in."""
        return [member.server.url for member in self._members if member.usable]

    def everywhere(self, action: Callable[[Server], Awaitable[T]]) -> dict[str, T | ServerFault]:
        """{URL: what ``action`` returned for the server, or its fault}, at all servers at once.

        A server that is out is asked for its health first, so that a silent one costs no more than that.
        """

        async def one(member: _Member) -> T | ServerFault:
            try:
                if not member.usable:
                    await member.server.check_health()
                return await action(member.server)
            except ServerFault as fault:
                return fault
            except Refused as refusal:
                return UnusableServer(str(refusal))

        async def all_of_them() -> list[T | ServerFault]:
            return await asyncio.gather(*map(one, self._members))

        return dict(zip((m.server.url for m in self._members), self.run(all_of_them()), strict=True))

    def use(self, weights: Weights, failures: Mapping[str, str]) -> None:
        """From now on servers sample from ``weights``, which all have but those in ``failures`` ({URL: why not})."""

        async def use() -> None:
            self._weights = weights
            for member in self._members:
                reason = failures.get(member.server.url)
                if reason is None:
                    member.usable, member.removals, member.strikes = True, 0, 0
                else:
                    self._take_out(member, reason)

        self.run(use())

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The servers' health is watched, and those that are out are taken back."""

        async def start() -> None:
            self._watchers = [self._start(self._watch(member)) for member in self._members]

        async def stop() -> None:
            await _cancel(self._watchers)

        self.run(start())
        try:
            yield
        finally:
            self.run(stop())

    def stream(self, jobs: Sequence[Job]) -> Iterator[Any]:
        """Yields one result a job, as they come. What is left is cancelled when the iterator is dropped.

        Raises: ServersError if a job failed too often, if it is refused, or if all servers were out for too long.
        """
        stream = _Stream(deque(jobs))

        async def begin() -> "asyncio.Task[None]":
            self._stream = stream
            self._dispatch()
            return self._start(self._be_patient(stream))

        async def end() -> None:
            self._stream = None
            tasks = [task for member in self._members for task in member.jobs]
            for member in self._members:
                member.jobs.clear()
            await _cancel([patience, *tasks])

        patience = self.run(begin())
        try:
            for _ in jobs:
                result = stream.results.get()
                if isinstance(result, Exception):
                    raise result
                yield result
        finally:
            self.run(end())

    def close(self) -> None:
        """Ends the thread; what is in flight is dropped."""
        if self._loop.is_closed():
            return
        self.run(self._session.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # In the pool's thread -------------------------------------------------------------------------------------------

    async def _open(self, urls: Sequence[str]) -> list[_Member]:
        # A connection for each request: one that is kept may be closed by the server at the moment of its next use,
        # which looks like a server that died.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))
        return [_Member(Server(url, self._session)) for url in urls]

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """A task whose unforeseen end reaches the trainer's thread, which would wait for ever otherwise."""
        task = self._loop.create_task(coroutine)
        task.add_done_callback(self._report)
        return task

    def _report(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) and self._stream:
            self._stream.results.put(error)

    def _dispatch(self) -> None:
        """Sends what can be sent: each job to the freest server, one where it has not failed yet if there is one."""
        stream, held_back = self._stream, []
        while stream and stream.waiting:
            job = stream.waiting.popleft()
            usable = [member for member in self._members if member.usable]
            choice = [member for member in usable if member.server.url not in job.tried] or usable
            member = min(choice, key=lambda m: len(m.jobs), default=None)
            if member is not None and len(member.jobs) < self._max_inflight:
                member.jobs[self._start(self._attempt(job, member))] = job
            else:
                held_back.append(job)
                if not job.tried:
                    break  # nobody has room for the rest, which is as new
        if stream:
            stream.waiting.extendleft(reversed(held_back))

    async def _attempt(self, job: Job, member: _Member) -> None:
        stream, me = self._stream, asyncio.current_task()
        assert stream is not None
        assert me is not None
        fault: ServerFault | None = None
        try:
            result = job.read(await member.server.generate(job.body, job.timeout_seconds))
        except ServerFault as error:
            fault = error
        except Refused as refusal:
            result = ServersError(f"{job.name} is refused by {member.server.url}: {refusal}")
        member.jobs.pop(me, None)
        if fault is None:
            member.strikes = 0
            stream.results.put(result)
        else:
            member.strikes += 1
            self._again(job, member, str(fault))
            if isinstance(fault, UnusableServer) or member.strikes >= _MOST_STRIKES:
                self._take_out(member, str(fault))
        self._dispatch()

    def _again(self, job: Job, member: _Member, reason: str) -> None:
        """Puts a failed job in line once more, after a pause that doubles with each failure."""
        stream = self._stream
        assert stream is not None
        job.failures += 1
        job.tried.add(member.server.url)
        if job.failures > self._retries:
            stream.results.put(
                ServersError(f"{job.name} failed {job.failures} times, at last at {member.server.url}: {reason}")
            )
            return

        def requeue() -> None:
            if self._stream is stream:
                stream.waiting.appendleft(job)
                self._dispatch()

        pause = min(_LONGEST_RETRY_SECONDS, _FIRST_RETRY_SECONDS * 2**job.failures)
        self._loop.call_later(pause * self._random.uniform(0.5, 1.5), requeue)

    def _take_out(self, member: _Member, reason: str) -> None:
        if not member.usable:
            return
        member.usable, member.reason, member.strikes = False, reason, 0
        member.removals += 1
        lost, member.jobs = member.jobs, {}
        logger.warning("server %s is taken out (%d requests go to others): %s", member.server.url, len(lost), reason)
        for task, job in lost.items():
            task.cancel()
            self._again(job, member, reason)

    async def _watch(self, member: _Member) -> None:
        while True:
            pause = self._watch_seconds
            if not member.usable:
                pause *= min(2 ** max(0, member.removals - 1), _LONGEST_PAUSE)
            await asyncio.sleep(pause * self._random.uniform(0.8, 1.2))
            try:
                await member.server.check_health()
                if not member.usable:
                    await self._take_back(member)
            except (ServerFault, Refused) as error:
                self._take_out(member, str(error))

    async def _take_back(self, member: _Member) -> None:
        """A healthy server comes back if it has the weights, or gets them."""
        weights = self._weights
        if weights is None:
            return
        if await member.server.weight_version() != weights.label:
            if weights.load is None:
                return  # another rank will give it the weights
            await weights.load(member.server)
        member.usable = True
        logger.info("server %s is back", member.server.url)
        self._dispatch()

    async def _be_patient(self, stream: _Stream) -> None:
        last_usable = self._loop.time()
        while True:
            await asyncio.sleep(min(1.0, self.patience_seconds / 4))
            if self.usable:
                last_usable = self._loop.time()
            elif self._loop.time() - last_usable > self.patience_seconds:
                reasons = "; ".join(f"{member.server.url}: {member.reason}" for member in self._members)
                stream.results.put(
                    ServersError(
                        f"no server could be used for {self.patience_seconds:g} s (rollout.server_timeout_seconds); "
                        f"{reasons}"
                    )
                )
                return


async def _cancel(tasks: Sequence["asyncio.Task[None]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
