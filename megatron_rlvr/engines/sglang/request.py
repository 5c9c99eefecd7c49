"""Requests to a pool of servers, and the streams through which a thread submits them and gets their results."""

import queue
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_rlvr.engines.sglang.client import ServerError


class AbortedRequestError(ServerError):
    """A server ended a request early.

    Attributes:
        partial: The result of the request so far.
    """

    def __init__(self, message: str, partial: Any) -> None:
        super().__init__(message)
        self.partial = partial


@dataclass(eq=False)
class ServerRequest:
    """One generation request, and its attempts so far.

    Attributes:
        name: Name of the request in messages.
        body: JSON body of POST /generate.
        read: Makes the result from a server's answer. Raises ServerError if the answer is unusable, and
            AbortedRequestError if the server ended the request early.
        timeout_seconds: Timeout of one attempt.
        failures: Number of failed attempts.
        tried: URLs of the servers on which an attempt has failed.
        rid: Request id of the attempt that is running.
    """

    name: str
    body: dict[str, Any]
    read: Callable[[Any], Any]
    timeout_seconds: float
    failures: int = 0
    tried: set[str] = field(default_factory=set)
    rid: str = ""


class RequestStream:
    """Accepts requests and returns results as they arrive; made by `ServerPool.open`, used by one thread.

    Args:
        submit: Queues requests of the stream.
        abort: Aborts all requests of the stream, and returns when they have ended.

    Attributes:
        id: Prefix of the ids of all requests of the stream.
        results: Results, and exceptions that end the stream.
        aborting: True once the stream's requests are being aborted.
    """

    def __init__(
        self,
        submit: Callable[["RequestStream", Sequence[ServerRequest]], None],
        abort: Callable[["RequestStream"], None],
    ) -> None:
        self.id = secrets.token_hex(8)
        self.results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.aborting = False
        self._submit = submit
        self._abort = abort

    def submit(self, requests: Sequence[ServerRequest]) -> None:
        """Queue requests."""
        self._submit(self, requests)

    def get(self, timeout_seconds: float | None = None) -> Any | None:
        """Return the next result, or None if there is none in time.

        Raises:
            EngineError: A request failed too often or was refused, or no server was healthy for too long.
        """
        try:
            result = self.results.get(timeout=timeout_seconds)
        except queue.Empty:
            return None
        if isinstance(result, Exception):
            raise result
        return result

    def abort(self) -> list[Any]:
        """End all requests. Returns the results not yet taken, and the partial results of unfinished requests."""
        self._abort(self)
        results = []
        while not self.results.empty():
            results.append(self.results.get())
        return [result for result in results if not isinstance(result, Exception)]


class QueuedRequest(NamedTuple):
    """A request and the stream that gets its result."""

    stream: RequestStream
    request: ServerRequest
