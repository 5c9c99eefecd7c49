"""An SGLang router in `rollout.servers` stands for its workers: the trainer asks it for them and talks to them itself.

A router serialises requests anew and drops fields on the way, and hands on neither weights, nor pauses, nor aborts.
What it is good for here is to know who the workers are; the pool spreads the requests.
"""

import asyncio
import re
import time
from collections.abc import Mapping

from megatron_rlvr.engines.sglang.client import Refused, Server, ServerFault, UnusableServer

_QUICK_SECONDS = 20.0
_ASK_AGAIN_SECONDS, _ALIKE = 1.0, 3
_HTTP_URL = re.compile(r"https?://[^/@]+")


async def workers_of(server: Server, patience_seconds: float) -> list[str] | None:
    """URLs of a router's workers in its order, those that it finds ill included; None if ``server`` is no router.

    A server that does not answer, and a router that has no workers yet, may be starting: they are asked again. So is
    a router whose workers are other ones than some seconds ago: it takes them in one by one.

    Raises: ServerFault if that does not help, or if a worker can only be used by way of the router.
    """
    deadline = time.monotonic() + patience_seconds
    before, alike = set[str](), 0
    while True:
        late = time.monotonic() > deadline
        fault: ServerFault = UnusableServer("it is a router that has no workers; add some to it")
        try:
            answer = await server.call("GET", "/workers", _QUICK_SECONDS)
        except Refused:
            return None
        except ServerFault as error:
            fault = error
        else:
            workers = [_url(worker) for worker in answer.get("workers") or ()]
            before, alike = set(workers), alike + 1 if set(workers) == before else 0
            if workers and (alike >= _ALIKE or late):
                return workers
        if late:
            raise fault
        await asyncio.sleep(_ASK_AGAIN_SECONDS)


def _url(worker: Mapping[str, object]) -> str:
    url, kind = str(worker.get("url")).removesuffix("/"), worker.get("worker_type")
    if not _HTTP_URL.fullmatch(url) or kind != "regular":
        raise UnusableServer(
            f"it is a router whose worker {url} ({kind}) cannot be asked alone; route to whole servers over HTTP, "
            "without --pd-disaggregation and --dp-aware"
        )
    return url


def expand(answers: Mapping[str, list[str] | ServerFault | None]) -> tuple[list[str], list[str]]:
    """The servers to talk to, and what is wrong, in sentences.

    Args:
        answers: for each URL of `rollout.servers` what `workers_of` said of it.

    Returns: every URL once, in order, with workers in the place of their router; and a sentence for each fault.
    """
    urls: dict[str, None] = {}
    problems = []
    for url, answer in answers.items():
        if isinstance(answer, ServerFault):
            problems.append(f"rollout.servers {url} cannot be used ({answer}); start it, or drop it from the list")
        else:
            urls |= dict.fromkeys([url] if answer is None else answer)
    return list(urls), problems
