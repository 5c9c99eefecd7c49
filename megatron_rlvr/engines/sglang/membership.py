"""The servers of a pool: the state of each, health checks, removal from rotation and re-admission.

Only healthy servers are in rotation, which means that requests are sent to them:

             a request, a health check or a weight push fails
    HEALTHY --------------------------------------------------> UNHEALTHY
       ^                                                            |
       |                            a health check succeeds, and the server ...
       |                                                            |
       |<--------------------------------- holds the weights -------+
       |                                                            |
       |<---- LOADING_WEIGHTS <----------- lacks the weights, ------+
       |                                   which this rank loads    |
       |                                                            |
       +<---- NEEDS_WEIGHTS <------------- lacks the weights, ------+
                                           which another rank or the next push provides

    LOADING_WEIGHTS -> UNHEALTHY   the load fails, or newer weights are pushed meanwhile
    NEEDS_WEIGHTS   -> UNHEALTHY   a health check fails
    any             -> HEALTHY     at the start; and at the end of a weight push, if the server took the weights
    any             -> UNHEALTHY   at the end of a weight push, if the server did not take the weights

If the weights are in a folder, the rank with `ExpectedWeights.load` has single servers load them; otherwise a server
gets them with the next push. Health checks of an unhealthy server back off exponentially with its removals.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from megatron_rlvr.engines.sglang.answers import ON_TIME_SECONDS
from megatron_rlvr.engines.sglang.client import NoConnectionError, RequestRefusedError, Server, ServerError
from megatron_rlvr.engines.sglang.request import QueuedRequest

logger = logging.getLogger(__name__)

_MAX_BACKOFF = 32  # times the seconds between two health checks


class ServerState(Enum):
    """State of a server in the pool; the module's docstring has the transitions."""

    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    LOADING_WEIGHTS = "loading weights"
    NEEDS_WEIGHTS = "needs weights"


@dataclass(frozen=True)
class ExpectedWeights:
    """Weights that every server in rotation holds.

    Attributes:
        label: Name of the weights on servers; no other weights of this or another run have it.
        load: Has one server load the weights; None on ranks that leave this to another rank.
        by_sync_only: True if no rank can give the weights to a single server, so that only a weight sync can.
    """

    label: str
    load: Callable[[Server], Awaitable[None]] | None = None
    by_sync_only: bool = False


@dataclass(frozen=True)
class ServerStatus:
    """One server of a pool at one moment.

    Attributes:
        url: URL of the server.
        state: State of the server.
        reason: Reason of the last removal from rotation; empty if there was none.
        requests_running: Number of requests that this pool has sent to the server and that are not answered yet.
        removals: Number of removals from rotation since the last weight push that the server took.
        consecutive_failures: Number of failed requests since the last successful one.
    """

    url: str
    state: ServerState
    reason: str
    requests_running: int
    removals: int
    consecutive_failures: int


@dataclass(eq=False)
class Member:
    """A server of the pool; see `ServerStatus`.

    Attributes:
        running: Requests that are sent and not answered yet, each by the task that waits for the answer.
        loading: Lock that is held while the server loads weights in order to be re-admitted.
    """

    server: Server
    state: ServerState = ServerState.HEALTHY
    reason: str = ""
    removals: int = 0
    consecutive_failures: int = 0
    running: "dict[asyncio.Task[None], QueuedRequest]" = field(default_factory=dict)
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def healthy(self) -> bool:
        """True if the server is in rotation."""
        return self.state is ServerState.HEALTHY

    def status(self) -> ServerStatus:
        """Return a snapshot of the server."""
        return ServerStatus(
            self.server.url, self.state, self.reason, len(self.running), self.removals, self.consecutive_failures
        )


class Membership:
    """The servers of a pool and their states. All methods run in the pool's event loop.

    Args:
        servers: Servers of the pool.
        health_check_seconds: Time between two health checks of a healthy server.

    Attributes:
        members: Servers and their states.
        expected: Weights that servers must hold; None before the first push.
        pushing: True while weights are being pushed.
        on_removed: Called with a server's lost requests and the reason, after it was removed from rotation.
        on_readmitted: Called after servers came back into rotation.
    """

    def __init__(self, servers: Sequence[Server], health_check_seconds: float) -> None:
        self.members = [Member(server) for server in servers]
        self.health_check_seconds = health_check_seconds
        self.expected: ExpectedWeights | None = None
        self.pushing = False
        self.on_removed: Callable[[Member, dict[asyncio.Task[None], QueuedRequest], str], None]
        self.on_removed = lambda member, lost, reason: None
        self.on_readmitted: Callable[[], object] = lambda: None
        self._pushes = 0  # counts the beginnings and the ends
        self._random = random.Random()

    @property
    def in_rotation(self) -> list[Member]:
        """Servers to which requests are sent."""
        return [member for member in self.members if member.healthy]

    @property
    def reasons(self) -> str:
        """Reason of each server's last removal from rotation, in one line."""
        return "; ".join(f"{member.server.url}: {member.reason}" for member in self.members)

    def needs_sync(self, *, waited_long_enough: bool) -> bool:
        """Return whether only a weight sync can still bring a server back into rotation.

        A rank that can load weights into single servers does so only while it samples, and may have finished. So
        after a long enough wait, any server that needs weights needs a sync.
        """
        by_sync = waited_long_enough or (self.expected is not None and self.expected.by_sync_only)
        return any(
            member.state is ServerState.NEEDS_WEIGHTS and (by_sync or member.server.keep_paused)
            for member in self.members
        )

    # Weight pushes ----------------------------------------------------------------------------------------------------

    async def begin_push(self) -> None:
        """Stop judging servers by their health until `end_push`, and wait until those that load weights have ended.

        Otherwise a server could load the older weights after it has taken the new ones.
        """
        await self._set_pushing(True)

    async def end_push(self) -> None:
        """Judge servers by their health again."""
        await self._set_pushing(False)

    async def _set_pushing(self, pushing: bool) -> None:
        self.pushing = pushing
        self._pushes += 1
        for member in self.members:
            async with member.loading:
                pass

    def weights_pushed(self, weights: ExpectedWeights, failures: Mapping[str, str]) -> None:
        """Expect ``weights`` from now on; all servers hold them except those in ``failures`` ({URL: reason})."""
        self.expected = weights
        for member in self.members:
            reason = failures.get(member.server.url)
            if reason is None:
                member.state, member.removals, member.consecutive_failures = ServerState.HEALTHY, 0, 0
            else:
                self.remove(member, reason)
        self.on_readmitted()

    # Removal and re-admission -----------------------------------------------------------------------------------------

    def remove(self, member: Member, reason: str) -> None:
        """Mark a server as unhealthy. If it was in rotation, its running requests go to other servers."""
        was_healthy, member.state = member.healthy, ServerState.UNHEALTHY
        if not was_healthy:
            return
        member.reason, member.consecutive_failures = reason, 0
        member.removals += 1
        lost, member.running = member.running, {}
        logger.warning(
            "server %s is removed from rotation (%d requests go to other servers): %s",
            member.server.url,
            len(lost),
            reason,
        )
        self.on_removed(member, lost, reason)

    async def watch(self, member: Member) -> None:
        """Check a server's health forever: remove it from rotation when it fails, re-admit it when it recovers."""
        while True:
            pause = self.health_check_seconds
            if not member.healthy:
                pause *= min(2 ** max(0, member.removals - 1), _MAX_BACKOFF)
            await asyncio.sleep(pause * self._random.uniform(0.8, 1.2))
            pushes, late = self._pushes, member.server.late()
            if self.pushing:
                continue  # a paused server fails its health check, which means nothing
            try:
                await member.server.check_health()
                if not member.healthy:
                    await self._readmit(member, pushes)
            except NoConnectionError:
                continue
            except (ServerError, RequestRefusedError) as error:
                if member.server.late() - late > ON_TIME_SECONDS:
                    continue  # the answer may have come in time
                if pushes == self._pushes:  # otherwise the server may have been paused during the check
                    self.remove(member, str(error))

    async def _readmit(self, member: Member, pushes: int) -> None:
        """Re-admit a server that has passed its health check, if it holds the expected weights or can load them.

        Args:
            pushes: Value of ``_pushes`` before the health check.
        """
        if member.server.keep_paused:
            # A new process at the address of a server whose memory was released: every way of loading weights pauses
            # it, and it is not resumed before the next sync.
            member.state = ServerState.NEEDS_WEIGHTS
            return
        weights = self.expected
        if weights is None:
            return
        if await member.server.weight_version() != weights.label:
            if weights.load is None:
                if pushes == self._pushes:
                    member.state = ServerState.NEEDS_WEIGHTS
                return
            async with member.loading:
                if pushes == self._pushes:
                    member.state = ServerState.LOADING_WEIGHTS
                    try:
                        await weights.load(member.server)
                    finally:
                        member.state = ServerState.UNHEALTHY
        if pushes != self._pushes:
            return  # newer weights are being pushed
        member.state = ServerState.HEALTHY
        logger.info("server %s is re-admitted", member.server.url)
        self.on_readmitted()
