"""Servers that share the GPUs with training: who holds the memory, and recovery after a crash at any moment.

A training step runs between `release` and `resume_weights`. Then the weights are pushed, and `resume_all` gives the KV
cache back and lets the server sample. A server must not sample while memory is missing, and crashes if it is ordered to
resume memory that it has not released. It does not report what it has released, and a marker file written before or
after the order would leave a moment in which the trainer may be killed between the file and the order. But a server
that runs with --enable-metrics counts the requests that it has answered, and loses the counts together with its memory.
Here one release is always of everything and is followed by two resumptions, weights first:

    resumptions due = 2 * releases - resumptions     0: nothing is missing, 1: the KV cache is, 2: everything is

From the pause before a release to the last resumption the server is paused: a health check or a request waits and
touches no memory. The weights, which must not be sampled from any more, lose their name before they are released.
"""

import asyncio
import math
import re
import time
from enum import IntEnum

from megatron_rlvr.engines.sglang.answers import shown
from megatron_rlvr.engines.sglang.client import (
    QUICK_SECONDS,
    RequestRefusedError,
    Server,
    ServerError,
    UnhealthyServerError,
)

RELEASED = "released"
"""Name of a server's weights from a release to the next push."""

# The time for weights to return from the CPU, and for a process that waits for its turn on a busy GPU.
_MEMORY_SECONDS = 120.0
_POLL_SECONDS = 0.2

_RELEASE, _RESUME = "/release_memory_occupation", "/resume_memory_occupation"
_WEIGHTS, _CACHE = "weights", "kv_cache"
_LABEL = re.compile(r'(?:^|,)(\w+)="([^"]*)"')
_MAX_COUNT = 2**53
_METRIC = re.compile(r"^(sglang:http_\w+)\{(.*)\} (\S+)$", re.MULTILINE)


class Missing(IntEnum):
    """Memory that a server has released and not resumed; the value is the number of resumptions due."""

    NOTHING = 0
    CACHE = 1
    ALL = 2


async def release(server: Server) -> None:
    """Have the server release its memory. Its requests wait from now on, with the tokens that they have.

    Raises:
        ServerError: The server may still hold its memory; `resume_all` is correct in that case, too.
    """
    missing = await missing_memory(server)
    if missing is Missing.CACHE:
        await _order(server, _RESUME, _CACHE)
    server.keep_paused = True
    if missing is Missing.ALL:
        return
    await server.pause()
    await server.call(
        "POST", "/update_weight_version", QUICK_SECONDS, {"new_version": RELEASED, "abort_all_requests": False}
    )
    await _order(server, _RELEASE, _CACHE, _WEIGHTS)


async def resume_weights(server: Server) -> None:
    """Resume the memory of the weights if it is missing; the next push writes the weights into it."""
    if await missing_memory(server) is Missing.ALL:
        await _order(server, _RESUME, _WEIGHTS)


async def resume_all(server: Server) -> None:
    """Resume all missing memory and let the server sample, even if an earlier trainer released the memory."""
    await resume_weights(server)
    if await missing_memory(server) is Missing.CACHE:
        await _order(server, _RESUME, _CACHE)
    server.keep_paused = False
    await server.resume()


async def recover(server: Server, patience_seconds: float) -> None:
    """Call `resume_all` on a server that may still be starting, before any other request, even a health check.

    Raises:
        ServerError: The server does not answer in time, or does not report what it has released.
    """
    start = time.monotonic()
    while True:
        try:
            await server.call("GET", "/model_info", QUICK_SECONDS)
            break
        except ServerError:
            if time.monotonic() - start > patience_seconds:
                raise
        await asyncio.sleep(_POLL_SECONDS)
    await resume_all(server)


async def missing_memory(server: Server) -> Missing:
    """Return the memory that the server has released and not resumed, once it has finished all such orders.

    Raises:
        UnhealthyServerError: The server does not report it, or another program has released the memory.
    """
    deadline = time.monotonic() + _MEMORY_SECONDS
    while True:
        try:
            text = (await server.send("GET", "/metrics", QUICK_SECONDS)).decode("utf-8", errors="replace")
        except RequestRefusedError:
            text = ""
        due, busy = _resumptions_due(text)
        if not busy:
            break
        if time.monotonic() > deadline:
            raise UnhealthyServerError(
                f"the server has been releasing or resuming its memory for {_MEMORY_SECONDS:.0f} s"
            )
        await asyncio.sleep(_POLL_SECONDS)
    if due == Missing.NOTHING:
        return Missing.NOTHING
    if due not in list(Missing) or await _may_sample(server):
        raise UnhealthyServerError(
            "the server's memory was released by another program, and the missing part is unknown; restart the server"
        )
    return Missing(due)


def _resumptions_due(metrics: str) -> tuple[int, bool]:
    """Return the number of resumptions due, and whether the server is releasing or resuming memory right now."""
    counts = {_RELEASE: 0, _RESUME: 0}
    seen, busy = False, False
    for name, labels, value in _METRIC.findall(metrics):
        seen = True
        label = dict(_LABEL.findall(labels))
        if (endpoint := label.get("endpoint")) not in counts:
            continue
        count = _count(value)
        if name.endswith("_responses_total") and label.get("status_code") == "200":
            counts[endpoint] += count
        busy |= name.endswith("_requests_active") and count > 0
    if not seen:
        raise UnhealthyServerError(
            "the server does not report whether its memory is released; start it with --enable-metrics"
        )
    return 2 * counts[_RELEASE] - counts[_RESUME], busy


def _count(text: str) -> int:
    """Return the value of a counter. Raises UnhealthyServerError if it is none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= _MAX_COUNT:
        raise UnhealthyServerError(f"the server's metrics count {shown(text)} orders; restart the server")
    return int(value)


async def _may_sample(server: Server) -> bool:
    """Return whether the server is not paused, in which case this program cannot have released its memory."""
    try:
        await server.send("GET", "/ready", QUICK_SECONDS)
    except (ServerError, RequestRefusedError):
        return False
    return True


async def _order(server: Server, path: str, *tags: str) -> None:
    try:
        await server.send("POST", path, _MEMORY_SECONDS, {"tags": list(tags)})
    except RequestRefusedError as refusal:
        raise UnhealthyServerError(f"the server did not release or resume {tags}: {refusal}") from None
