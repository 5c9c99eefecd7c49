"""One request as the pool of servers sees it: what to send, and what to make of the answer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_rlvr.engines.sglang.client import ServerFault


class GivenUp(ServerFault):
    """The server ended a request early. ``partial`` is the result as far as it got."""

    def __init__(self, message: str, partial: Any) -> None:
        super().__init__(message)
        self.partial = partial


@dataclass(eq=False)
class ServerRequest:
    """One request.

    Attributes:
        name: for messages.
        body: of POST /generate.
        read: makes the result of the server's answer; raises ServerFault for one that cannot be used, GivenUp for one
            that was ended early.
        timeout_seconds: of one attempt.
    """

    name: str
    body: dict[str, Any]
    read: Callable[[Any], Any]
    timeout_seconds: float
    failures: int = 0
    tried: set[str] = field(default_factory=set)
    rid: str = ""
    """Of the attempt that is running."""
