"""The queue of a pool's requests: the server that gets each, retries, and aborts.

A request is sent to the healthy server with the fewest running requests. An attempt that fails is repeated after an
exponential backoff, if possible on a server where the request has not failed yet; requests of a server that is removed
from rotation are repeated, too. After too many failures the stream gets an EngineError. A refusal is such a failure:
requests are valid when they are sent, so that a server which refuses one may be the only one that does.
"""

import asyncio
import logging
import math
import random
from collections import deque
from collections.abc import Sequence

from megatron_rlvr import open_files
from megatron_rlvr.engines.sglang.client import (
    NoConnectionError,
    RequestRefusedError,
    ServerError,
    UnhealthyServerError,
)
from megatron_rlvr.engines.sglang.event_loop import EventLoopThread, cancel, this_task
from megatron_rlvr.engines.sglang.membership import Member, Membership
from megatron_rlvr.engines.sglang.request import AbortedRequestError, QueuedRequest, RequestStream, ServerRequest
from megatron_rlvr.protocols import EngineError

logger = logging.getLogger(__name__)

# Consecutive failures of one server, each of which might have been the request's own fault.
_MAX_CONSECUTIVE_FAILURES = 3
_FIRST_RETRY_SECONDS, _MAX_RETRY_SECONDS = 0.25, 30.0
_POLL_SECONDS, _AFTER_PUSH_SECONDS = 0.05, 0.5
# The order to abort a request may reach the server before the request does, so it is repeated.
_REPEAT_ABORT_SECONDS, _ABORT_ORDER_SECONDS, _ABORT_ORDERS = 1.0, 5.0, 16
# Requests are given up when none of them has been answered for this long after the order to abort them.
_SILENT_SECONDS = 20.0


class Dispatcher:
    """Sends requests to the servers in rotation. All methods run in the pool's event loop.

    Args:
        membership: Servers of the pool.
        loop: Event loop of the pool.
        max_inflight: Maximum number of requests of this pool that run on one server at once.
        retries: Number of attempts of a request after the first.

    Attributes:
        streams: Open streams.
        connections: Maximum number of requests that run at once, on all servers together; see `fit_open_files`.
    """

    def __init__(self, membership: Membership, loop: EventLoopThread, *, max_inflight: int, retries: int) -> None:
        self.streams: list[RequestStream] = []
        self.connections = open_files.limit()
        self._membership = membership
        self._loop = loop
        self._max_inflight = max_inflight
        self._retries = retries
        self._queue: deque[QueuedRequest] = deque()
        self._attempts = 0
        self._random = random.Random()
        membership.on_removed = self._reassign
        membership.on_readmitted = self._dispatch
        loop.on_failure = self._fail_streams

    def fit_open_files(self) -> None:
        """Let no more requests run than this process may open connections for; the others wait in the queue."""
        members = self._membership.members
        self.connections = open_files.room() + sum(len(member.running) for member in members)
        wanted = self._max_inflight * len(members)
        if self.connections < wanted:
            logger.warning(
                "the limit of %d open files leaves %d connections for requests, of the %d that rollout.max_inflight "
                "allows; raise it (ulimit -Hn)",
                open_files.limit(),
                self.connections,
                wanted,
            )

    def submit(self, stream: RequestStream, requests: Sequence[ServerRequest]) -> None:
        """Queue requests of a stream."""
        self._queue.extend(QueuedRequest(stream, request) for request in requests)
        self._dispatch()

    async def abort(self, stream: RequestStream, *, wait: bool = True) -> None:
        """End a stream's requests.

        Args:
            wait: Wait for the servers' answers to the running requests, which have the tokens so far, as long as any
                of them arrives every 20 s. What is given up is logged.
        """
        stream.aborting = True
        self._queue = deque(queued for queued in self._queue if queued.stream is not stream)
        members = self._membership.members
        if wait and self._membership.pushing:
            # A request that reached a paused server waits there, and orders to abort it would have no effect, the
            # repeated ones included.
            while self._membership.pushing:
                await asyncio.sleep(_POLL_SECONDS)
            await asyncio.sleep(_AFTER_PUSH_SECONDS)
        silent, left = 0.0, math.inf
        while running := [member for member in members if _tasks_of(stream, member)]:
            start = self._now()
            await asyncio.gather(*(_abort(m, _ids_of(stream, m)) for m in running if m.healthy))
            tasks = [task for member in running for task in _tasks_of(stream, member)]
            if silent >= _SILENT_SECONDS or not wait:
                if wait and tasks:
                    _log_given_up([q for m in running for q in m.running.values() if q.stream is stream])
                for member in running:
                    member.running = {t: queued for t, queued in member.running.items() if queued.stream is not stream}
                return await cancel(tasks)
            if tasks:
                await asyncio.wait(tasks, timeout=_REPEAT_ABORT_SECONDS)
            silent, left = (0.0 if len(tasks) < left else silent + self._now() - start), len(tasks)

    def _now(self) -> float:
        """Return the seconds during which this thread has not been behind."""
        return self._loop.time() - self._loop.late()

    # Sending ----------------------------------------------------------------------------------------------------------

    def _dispatch(self, finished_on: Member | None = None) -> bool:
        """Send queued requests as far as servers have room.

        Args:
            finished_on: Server whose request the current task has just finished. The task continues with the first
                request that this server gets.

        Returns:
            True if the current task has another request.
        """
        held_back: list[QueuedRequest] = []
        continues = False
        while self._queue:
            queued = self._queue.popleft()
            in_rotation = self._membership.in_rotation
            untried = [member for member in in_rotation if member.server.url not in queued.request.tried]
            member = min(untried or in_rotation, key=lambda m: len(m.running), default=None)
            running = sum(len(each.running) for each in self._membership.members)
            if member is not None and len(member.running) < self._max_inflight and running < self.connections:
                own = member is finished_on and not continues
                continues |= own
                task = this_task() if own else self._loop.start(self._send_requests(member))
                member.running[task] = queued
            else:
                held_back.append(queued)
                if not queued.request.tried:
                    break  # there is no room for the rest either, of which no request was tried
        self._queue.extendleft(reversed(held_back))
        return continues

    async def _send_requests(self, member: Member) -> None:
        """Send this task's request, then further ones: a new task for each would let the server wait."""
        continues = True
        while continues:
            queued = member.running[this_task()]
            continues = await self._attempt(queued, member) and self._dispatch(member)

    async def _attempt(self, queued: QueuedRequest, member: Member) -> bool:
        """Send a request once. Returns whether it still was this task's request at the end."""
        stream, request = queued
        self._attempts += 1
        # A server refuses an id that it still works on, for example after a timeout, so each attempt has an id of its
        # own. An order to abort an id also ends all requests whose ids begin with it, so no id is a prefix of another.
        request.rid = f"{stream.id}.{self._attempts:012d}"
        error: ServerError | RequestRefusedError | None = None
        try:
            answer = await member.server.generate(request.body | {"rid": request.rid}, request.timeout_seconds)
            result = request.read(answer)
        except AbortedRequestError as aborted:
            error, result = (None, aborted.partial) if stream.aborting else (aborted, None)
        except (ServerError, RequestRefusedError) as caught:
            error = caught
        if member.running.pop(this_task(), None) is None:
            # The request was reassigned. The cancellation of this task can surface as a timeout that it overtook.
            return False
        if error is None:
            member.consecutive_failures = 0
            stream.results.put(result)
        elif isinstance(error, NoConnectionError):
            if not stream.aborting:
                self._queue.append(queued)
        else:
            member.consecutive_failures += 1
            self._retry(queued, member, error)
            if isinstance(error, UnhealthyServerError) or member.consecutive_failures >= _MAX_CONSECUTIVE_FAILURES:
                self._membership.remove(member, str(error))
        return True

    # Failures ---------------------------------------------------------------------------------------------------------

    def _retry(self, queued: QueuedRequest, member: Member, reason: Exception | str) -> None:
        """Queue a failed request again after an exponential backoff, unless it has failed too often."""
        stream, request = queued
        if stream.aborting:
            return
        request.failures += 1
        request.tried.add(member.server.url)
        if request.failures > self._retries:
            times = f"{request.failures} times, last " if request.failures > 1 else ""
            verb = "was refused" if isinstance(reason, RequestRefusedError) else "failed"
            stream.results.put(EngineError(f"{request.name} {verb} {times}on {member.server.url}: {reason}"))
            return

        def requeue() -> None:
            if not stream.aborting:
                self._queue.appendleft(queued)
                self._dispatch()

        backoff = min(_MAX_RETRY_SECONDS, _FIRST_RETRY_SECONDS * 2**request.failures)
        self._loop.call_later(backoff * self._random.uniform(0.5, 1.5), requeue)

    def _reassign(self, member: Member, lost: dict["asyncio.Task[None]", QueuedRequest], reason: str) -> None:
        """Send the requests of a server that was removed from rotation to other servers."""
        for task, queued in lost.items():
            task.cancel()
            self._retry(queued, member, reason)

    def _fail_streams(self, task: "asyncio.Task[None]", error: BaseException) -> None:
        """Give an unexpected exception of a task to all streams, whose threads would wait forever otherwise."""
        for member in self._membership.members:
            member.running.pop(task, None)  # no task waits for its answer any more
        for stream in self.streams:
            stream.results.put(error)


async def _abort(member: Member, rids: Sequence[str]) -> None:
    """Order a server to abort requests, as long as it takes the orders.

    Each request has an order of its own: a server ignores one for a mere prefix of its requests' ids.
    """
    remaining = iter(rids)

    async def order() -> None:
        for rid in remaining:
            async with asyncio.timeout(_ABORT_ORDER_SECONDS):
                await member.server.abort(rid)

    await asyncio.gather(*(order() for _ in range(_ABORT_ORDERS)), return_exceptions=True)


def _log_given_up(lost: Sequence[QueuedRequest]) -> None:
    tokens = sum(queued.request.body["sampling_params"]["max_new_tokens"] for queued in lost)
    logger.warning(
        "%d responses of at most %d new tokens are given up: no server has answered their abortion for %.0f s",
        len(lost),
        tokens,
        _SILENT_SECONDS,
    )


def _ids_of(stream: RequestStream, member: Member) -> list[str]:
    return [queued.request.rid for queued in member.running.values() if queued.stream is stream]


def _tasks_of(stream: RequestStream, member: Member) -> list["asyncio.Task[None]"]:
    return [task for task, queued in member.running.items() if queued.stream is stream]
