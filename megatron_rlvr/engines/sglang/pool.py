"""A pool of SGLang servers: who may be used, who gets which request, and what becomes of a request that fails.

All connections live in the event loop of one background thread; the trainer's threads hand jobs in and take results
out, each through a `RequestStream` of its own. A server is *in* while it is healthy and holds the current weights.
Whatever casts doubt on it takes it out, with one line in the log, and its requests go to others; it comes back when it
is healthy again and holds the weights. Where weights are in a folder, the rank that may (`Weights.load`) gives them to
it once more; otherwise it gets them with the next sync. It is asked less often each time it had to be taken out.
"""

import asyncio
import logging
import queue
import random
import secrets
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp

from megatron_rlvr.engines.sglang.client import Refused, Server, ServerFault, UnusableServer
from megatron_rlvr.engines.sglang.request import GivenUp, ServerRequest
from megatron_rlvr.protocols import EngineError, WeightsMissingError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_KEPT_SECONDS = 2.0
# Failures in a row that each might have been the request's own.
_MOST_STRIKES = 3
_LONGEST_PAUSE = 32  # times the pause before a server is first asked again
_FIRST_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 0.25, 30.0
_LOOK_SECONDS, _PAST_A_PAUSE_SECONDS = 0.05, 0.5
# A request may reach its server after the order to abort it: the order is repeated.
_ABORT_AGAIN_SECONDS, _ABORT_ORDER_SECONDS, _ABORT_SECONDS = 1.0, 5.0, 20.0


@dataclass(frozen=True)
class Weights:
    """What servers have to sample from.

    Attributes:
        label: what they call it, unlike that of any other weights of this or another run.
        load: gives it to a server; None on ranks that leave this to another.
        by_sync_only: nobody can give it to a single server.
    """

    label: str
    load: Callable[[Server], Awaitable[None]] | None = None
    by_sync_only: bool = False


@dataclass(eq=False)
class _Member:
    """A server of the pool, and what it is doing."""

    server: Server
    usable: bool = True
    reason: str = ""
    removals: int = 0
    strikes: int = 0
    lacks_weights: bool = False
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while it is given weights to come back with."""
    running: dict["asyncio.Task[None]", tuple["RequestStream", ServerRequest]] = field(default_factory=dict)


class RequestStream:
    """Jobs go in, results come out as they are ready; made by `ServerPool.open`, used by one thread."""

    def __init__(self, pool: "ServerPool") -> None:
        self.id = secrets.token_hex(8)
        """What the ids of all its requests begin with."""
        self.results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.aborting = False
        self._pool = pool

    def submit(self, jobs: Sequence[ServerRequest]) -> None:
        """Puts jobs in line."""
        self._pool.submit(self, jobs)

    def get(self, timeout_seconds: float | None = None) -> Any | None:
        """The next result, or None if there is none in time.

        Raises: EngineError if a job failed too often, if it is refused, or if all servers were out for too long.
        """
        try:
            result = self.results.get(timeout=timeout_seconds)
        except queue.Empty:
            return None
        if isinstance(result, Exception):
            raise result
        return result

    def abort(self) -> list[Any]:
        """Ends all jobs. Returns results that nobody has taken, and what is known of unfinished ones."""
        self._pool.run(self._pool.abort(self))
        results = []
        while not self.results.empty():
            results.append(self.results.get())
        return [result for result in results if not isinstance(result, Exception)]


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
        self.watch_seconds = watch_seconds
        self._max_inflight = max_inflight
        self._retries = retries
        self._weights: Weights | None = None
        self._streams: list[RequestStream] = []
        self._waiting: deque[tuple[RequestStream, ServerRequest]] = deque()
        self._watchers: list[asyncio.Task[None]] = []
        self._requests = 0
        self._changing, self._changes = False, 0
        self._random = random.Random()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="servers", daemon=True)
        self._thread.start()
        self._members = self.run(self._connect(urls))

    # From the trainer's threads -------------------------------------------------------------------------------------

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What a coroutine returns that runs in the pool's thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    @property
    def usable(self) -> list[str]:
        """URLs of the servers that are in."""
        return [member.server.url for member in self._members if member.usable]

    def everywhere(
        self,
        action: Callable[[Server], Awaitable[T]],
        *,
        healthy: bool = True,
        without: Mapping[str, str] | None = None,
    ) -> dict[str, T | ServerFault]:
        """{URL: what ``action`` returned for the server, or its fault}, at all servers at once.

        A server that is out is asked for its health first, so that a silent one costs no more than that. One that is
        held is not, since it is paused and looks unhealthy; with ``healthy`` false none is, for servers that may be
        paused by others.

        Args:
            without: {URL: why} of servers that nothing is asked of; the reason is their fault.
        """
        barred = without or {}

        async def one(member: _Member) -> T | ServerFault:
            if member.server.url in barred:
                return UnusableServer(barred[member.server.url])
            try:
                if healthy and not member.usable and not member.server.held:
                    await member.server.check_health()
                return await action(member.server)
            except ServerFault as fault:
                return fault
            except Refused as refusal:
                return UnusableServer(str(refusal))

        async def all_of_them() -> list[T | ServerFault]:
            return await asyncio.gather(*map(one, self._members))

        return dict(zip((m.server.url for m in self._members), self.run(all_of_them()), strict=True))

    @contextmanager
    def changing_weights(self) -> Iterator[None]:
        """Servers may be paused meanwhile: that they do not answer says nothing, and none is taken back.

        Begins when servers that are being given the weights until now have them, or fail to take them in time.
        """

        async def change(begins: bool) -> None:
            self._changing = begins
            self._changes += 1
            for member in self._members:
                async with member.loading:  # or it would end up with the older weights
                    pass

        self.run(change(True))
        try:
            yield
        finally:
            self.run(change(False))

    def use(self, weights: Weights, failures: Mapping[str, str]) -> None:
        """From now on servers sample from ``weights``, which all have but those in ``failures`` ({URL: why not})."""

        async def use() -> None:
            self._weights = weights
            for member in self._members:
                member.lacks_weights = False
                reason = failures.get(member.server.url)
                if reason is None:
                    member.usable, member.removals, member.strikes = True, 0, 0
                else:
                    self._take_out(member, reason)
            self._dispatch()

        self.run(use())

    @contextmanager
    def open(self) -> Iterator[RequestStream]:
        """A stream. While any is open the servers' health is watched, and those that are out are taken back.

        At the end what is left of its jobs is cancelled, on the servers too.
        """
        stream = RequestStream(self)

        async def begin() -> "asyncio.Task[None]":
            self._streams.append(stream)
            if not self._watchers:
                self._watchers = [self._start(self._watch(member)) for member in self._members]
            return self._start(self._be_patient(stream))

        async def end() -> None:
            await _cancel([patience])
            await self.abort(stream, wait=False)
            self._streams.remove(stream)
            if not self._streams:
                watchers, self._watchers = self._watchers, []
                await _cancel(watchers)

        patience = self.run(begin())
        try:
            yield stream
        finally:
            self.run(end())

    def submit(self, stream: RequestStream, jobs: Sequence[ServerRequest]) -> None:
        """Puts jobs of a stream in line."""

        def submit() -> None:
            self._waiting.extend((stream, job) for job in jobs)
            self._dispatch()

        self._loop.call_soon_threadsafe(submit)

    def close(self) -> None:
        """Ends the thread; what is in flight is dropped."""
        if self._loop.is_closed():
            return
        self.run(self._session.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # In the pool's thread -------------------------------------------------------------------------------------------

    async def _connect(self, urls: Sequence[str]) -> list[_Member]:
        # An idle connection is dropped before the server would do so (after 5 s), or could be another one at the same
        # port: a request that finds it closed looks like one to a server that died.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT_SECONDS)
        self._session = aiohttp.ClientSession(connector=connector)
        return [_Member(Server(url, self._session)) for url in urls]

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """A task whose unforeseen end reaches the trainer's threads, which would wait for ever otherwise."""
        task = self._loop.create_task(coroutine)
        task.add_done_callback(self._report)
        return task

    def _report(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()):
            for member in self._members:
                member.running.pop(task, None)  # nobody waits for it
            for stream in self._streams:
                stream.results.put(error)

    def _dispatch(self, free: _Member | None = None) -> bool:
        """Sends what can be sent: each job to the freest server, one where it has not failed yet if there is one.

        Args:
            free: whose request the running task has just finished; it goes on with the first that this server gets.

        Returns: whether there is one.
        """
        held_back, goes_on = [], False
        while self._waiting:
            stream, job = self._waiting.popleft()
            usable = [member for member in self._members if member.usable]
            choice = [member for member in usable if member.server.url not in job.tried] or usable
            member = min(choice, key=lambda m: len(m.running), default=None)
            if member is not None and len(member.running) < self._max_inflight:
                mine = member is free and not goes_on
                goes_on |= mine
                task = _this_task() if mine else self._start(self._work(member))
                member.running[task] = stream, job
            else:
                held_back.append((stream, job))
                if not job.tried:
                    break  # nobody has room for the rest, which is as new
        self._waiting.extendleft(reversed(held_back))
        return goes_on

    async def _work(self, member: _Member) -> None:
        """Sends the request that is noted for this task, and then others: a new task would let the server wait."""
        goes_on = True
        while goes_on:
            stream, job = member.running[_this_task()]
            goes_on = await self._attempt(stream, job, member) and self._dispatch(member)

    async def _attempt(self, stream: RequestStream, job: ServerRequest, member: _Member) -> bool:
        """One request; whether its place at the server was still this task's at the end."""
        self._requests += 1
        # A server refuses an id that it still works on, as after a timeout: each attempt has its own. An order to abort
        # one counts for all that begin with it: none begins another.
        job.rid = f"{stream.id}.{self._requests:012d}"
        fault: ServerFault | None = None
        try:
            result = job.read(await member.server.generate(job.body | {"rid": job.rid}, job.timeout_seconds))
        except GivenUp as given_up:
            fault, result = (None, given_up.partial) if stream.aborting else (given_up, None)
        except ServerFault as error:
            fault = error
        except Refused as refusal:
            result = EngineError(f"{job.name} is refused by {member.server.url}: {refusal}")
        if member.running.pop(_this_task(), None) is None:
            return False  # it goes elsewhere: a cancellation can turn into the timeout that it overtook
        if fault is None:
            member.strikes = 0
            stream.results.put(result)
        else:
            member.strikes += 1
            self._again(stream, job, member, str(fault))
            if isinstance(fault, UnusableServer) or member.strikes >= _MOST_STRIKES:
                self._take_out(member, str(fault))
        return True

    def _again(self, stream: RequestStream, job: ServerRequest, member: _Member, reason: str) -> None:
        """Puts a failed job in line once more, after a pause that doubles with each failure."""
        if stream.aborting:
            return
        job.failures += 1
        job.tried.add(member.server.url)
        if job.failures > self._retries:
            stream.results.put(
                EngineError(f"{job.name} failed {job.failures} times, at last at {member.server.url}: {reason}")
            )
            return

        def requeue() -> None:
            if not stream.aborting:
                self._waiting.appendleft((stream, job))
                self._dispatch()

        pause = min(_LONGEST_RETRY_SECONDS, _FIRST_RETRY_SECONDS * 2**job.failures)
        self._loop.call_later(pause * self._random.uniform(0.5, 1.5), requeue)

    async def abort(self, stream: RequestStream, *, wait: bool = True) -> None:
        """Ends a stream's jobs: what runs is aborted and, if ``wait``, given a while to answer with what it has."""
        stream.aborting = True
        self._waiting = deque(item for item in self._waiting if item[0] is not stream)
        if wait and self._changing:
            # What reached a paused server waits there, and an order to abort it would be lost, with all that repeat it.
            while self._changing:
                await asyncio.sleep(_LOOK_SECONDS)
            await asyncio.sleep(_PAST_A_PAUSE_SECONDS)
        deadline = self._loop.time() + (_ABORT_SECONDS if wait else 0)
        while running := [member for member in self._members if self._tasks(member, stream)]:
            # One by one: an order for what their ids begin with is not passed on.
            orders = [m.server.abort(job.rid) for m in running if m.usable for job in self._jobs(m, stream)]
            in_time = [asyncio.wait_for(order, _ABORT_ORDER_SECONDS) for order in orders]
            await asyncio.gather(*in_time, return_exceptions=True)
            tasks = [task for member in running for task in self._tasks(member, stream)]
            if self._loop.time() >= deadline:
                for member in running:
                    member.running = {t: item for t, item in member.running.items() if item[0] is not stream}
                return await _cancel(tasks)
            if tasks:
                await asyncio.wait(tasks, timeout=_ABORT_AGAIN_SECONDS)

    def _jobs(self, member: _Member, stream: RequestStream) -> list[ServerRequest]:
        return [job for owner, job in member.running.values() if owner is stream]

    def _tasks(self, member: _Member, stream: RequestStream) -> list["asyncio.Task[None]"]:
        return [task for task, (owner, _) in member.running.items() if owner is stream]

    def _take_out(self, member: _Member, reason: str) -> None:
        if not member.usable:
            return
        member.usable, member.reason, member.strikes = False, reason, 0
        member.removals += 1
        lost, member.running = member.running, {}
        logger.warning("server %s is taken out (%d requests go to others): %s", member.server.url, len(lost), reason)
        for task, (stream, job) in lost.items():
            task.cancel()
            self._again(stream, job, member, reason)

    async def _watch(self, member: _Member) -> None:
        while True:
            pause = self.watch_seconds
            if not member.usable:
                pause *= min(2 ** max(0, member.removals - 1), _LONGEST_PAUSE)
            await asyncio.sleep(pause * self._random.uniform(0.8, 1.2))
            changes = self._changes
            if self._changing:
                continue
            try:
                await member.server.check_health()
                if not member.usable:
                    await self._take_back(member, changes)
            except (ServerFault, Refused) as error:
                if changes == self._changes:  # or else it was paused
                    member.lacks_weights = False  # but more than that
                    self._take_out(member, str(error))

    async def _take_back(self, member: _Member, changes: int) -> None:
        """A healthy server comes back if it has the weights, or gets them."""
        if member.server.held:  # a new process where one had its memory taken: paused by any load, until the next sync
            member.lacks_weights = True
            return
        weights = self._weights
        if weights is None:
            return
        if await member.server.weight_version() != weights.label:
            if weights.load is None:
                member.lacks_weights = True
                return  # another rank may give it the weights, or else the next sync
            async with member.loading:
                if changes == self._changes:
                    await weights.load(member.server)
        if changes != self._changes:
            return  # newer ones are on their way
        member.usable, member.lacks_weights = True, False
        logger.info("server %s is back", member.server.url)
        self._dispatch()

    async def _be_patient(self, stream: RequestStream) -> None:
        last_usable = self._loop.time()
        while True:
            await asyncio.sleep(min(1.0, self.patience_seconds / 4))
            reasons = "; ".join(f"{member.server.url}: {member.reason}" for member in self._members)
            if self.usable or self._changing:
                last_usable = self._loop.time()
                continue
            over = self._loop.time() - last_usable > self.patience_seconds
            # A rank that can give single servers their weights does so only while it samples, and may have finished.
            by_sync = over or (self._weights is not None and self._weights.by_sync_only)
            if any(member.lacks_weights and (by_sync or member.server.held) for member in self._members):
                return stream.results.put(WeightsMissingError(f"no server holds the current weights; {reasons}"))
            if over:
                none = f"no server could be used for {self.patience_seconds:g} s (rollout.server_timeout_seconds)"
                return stream.results.put(EngineError(f"{none}; {reasons}"))


def faults(results: Mapping[str, Any]) -> dict[str, str]:
    """{URL: why} of the servers that failed, from what `ServerPool.everywhere` returns."""
    return {url: str(result) for url, result in results.items() if isinstance(result, ServerFault)}


def _this_task() -> "asyncio.Task[None]":
    task = asyncio.current_task()
    assert task is not None
    return task


async def _cancel(tasks: Sequence["asyncio.Task[None]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
