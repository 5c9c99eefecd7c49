"""SGLang routers: a router in `rollout.servers` is replaced by its workers, to which the trainer talks directly.

A router serialises requests again and drops fields on the way, and passes on no weights, pauses or aborts. Its only use
here is that it knows its workers; the pool distributes the requests.
"""

import asyncio
import re
import time
from collections.abc import Mapping

from megatron_rlvr.engines.sglang.answers import shown
from megatron_rlvr.engines.sglang.client import (
    QUICK_SECONDS,
    RequestRefusedError,
    Server,
    ServerError,
    UnhealthyServerError,
)

_POLL_SECONDS, _EQUAL_ANSWERS = 1.0, 3
_MAX_WORKERS = 1024
_HTTP_URL = re.compile(r"https?://[^/@\s]{1,300}")


async def workers_of(server: Server, patience_seconds: float) -> list[str] | None:
    """Return the URLs of a router's workers in its order, unhealthy ones included; None if ``server`` is no router.

    A server that does not answer, and a router without workers, may be starting, and are asked again. So is a router
    whose workers have changed within the last seconds, because a router that starts adds its workers one by one.

    Raises:
        ServerError: The server still does not answer, the router still has no workers, or a worker can only be used
            through the router.
    """
    deadline = time.monotonic() + patience_seconds
    before, equal = set[str](), 0
    while True:
        late = time.monotonic() > deadline
        error: ServerError = UnhealthyServerError("the server is a router without workers; add some to it")
        try:
            answer = await server.call("GET", "/workers", QUICK_SECONDS)
        except RequestRefusedError:
            return None
        except ServerError as caught:
            error = caught
        else:
            workers = _workers(answer)
            before, equal = set(workers), equal + 1 if set(workers) == before else 0
            if workers and (equal >= _EQUAL_ANSWERS or late):
                return workers
        if late:
            raise error
        await asyncio.sleep(_POLL_SECONDS)


def _workers(answer: Mapping[str, object]) -> list[str]:
    """Return the URLs of the workers in an answer. Raises UnhealthyServerError if they are none, or not usable."""
    workers = answer.get("workers") or []
    if not isinstance(workers, list) or not all(isinstance(worker, dict) for worker in workers):
        raise UnhealthyServerError(f"/workers answered no list of workers: {shown(answer)}")
    if len(workers) > _MAX_WORKERS:
        raise UnhealthyServerError(f"/workers answered {len(workers)} workers, more than {_MAX_WORKERS}")
    return [_url(worker) for worker in workers]


def _url(worker: Mapping[str, object]) -> str:
    url, kind = worker.get("url"), worker.get("worker_type")
    if not isinstance(url, str) or not _HTTP_URL.fullmatch(url.removesuffix("/")) or kind != "regular":
        raise UnhealthyServerError(
            f"the server is a router whose worker {shown(url)} ({shown(kind)}) cannot be used alone; route to whole "
            "servers over HTTP, without --pd-disaggregation and --dp-aware"
        )
    return url.removesuffix("/")
