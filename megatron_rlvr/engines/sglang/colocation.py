"""Servers that share the GPUs with training: who has the memory, and that a crash leaves no server without it.

A step trains between `release` and `resume_weights`; the weights are synced; `resume_all` gives the cache of keys and
values back and lets the server sample. A server must not sample while memory is missing, and ends if it is to resume
what it has not released. It does not tell what it has released, and a mark, left before or after, would leave a moment
in which the trainer may be killed between the mark and the deed. But a server started with --enable-metrics counts the
requests that it has answered, and forgets the count with its memory. Here one release is of everything, and is followed
by two resumptions, weights first:

    resumptions due = 2 * releases - resumptions:  0 all is there, 1 the cache is missing, 2 all is missing

From the pause before a release to the last resumption the server is paused: whoever asks it, for its health or for a
sample, waits, and touches no memory. Its weights, which nobody may sample from any more, lose their name before they
are gone.
"""

import asyncio
import re
import time
from enum import IntEnum

from megatron_rlvr.engines.sglang.client import Refused, Server, ServerFault, UnusableServer

RELEASED = "released"
"""What a server calls its weights from a release to the next sync."""

_QUICK_SECONDS = 20.0
# Weights that return from the CPU, and a process that waits for its turn on a GPU that is busy.
_MEMORY_SECONDS = 120.0
_ASK_AGAIN_SECONDS = 0.2

_RELEASE, _RESUME = "/release_memory_occupation", "/resume_memory_occupation"
_WEIGHTS, _CACHE = "weights", "kv_cache"
_SAMPLE = re.compile(r"^(sglang:http_\w+)\{(.*)\} (\S+)$", re.MULTILINE)


class Missing(IntEnum):
    """What a server has not got back; the value is how many resumptions are due."""

    NOTHING = 0
    CACHE = 1
    ALL = 2


async def release(server: Server) -> None:
    """Has the server give its memory up; its requests wait from now on, with the tokens that they have.

    Raises: ServerFault if it may still have it; `resume_all` is right then, too.
    """
    missing = await missing_memory(server)
    if missing is Missing.CACHE:
        await _order(server, _RESUME, _CACHE)
    server.held = True
    if missing is Missing.ALL:
        return
    await server.pause()
    await server.call(
        "POST", "/update_weight_version", _QUICK_SECONDS, {"new_version": RELEASED, "abort_all_requests": False}
    )
    await _order(server, _RELEASE, _CACHE, _WEIGHTS)


async def resume_weights(server: Server) -> None:
    """Gives it the memory of its weights back, if that is missing; the weights themselves come with the next sync."""
    if await missing_memory(server) is Missing.ALL:
        await _order(server, _RESUME, _WEIGHTS)


async def resume_all(server: Server) -> None:
    """Gives it back whatever is missing, and lets it sample; for a server that a trainer of earlier has left, too."""
    await resume_weights(server)
    if await missing_memory(server) is Missing.CACHE:
        await _order(server, _RESUME, _CACHE)
    server.held = False
    await server.resume()


async def recover(server: Server, patience_seconds: float) -> None:
    """`resume_all` at a server that may still be starting; before anything else is asked of it, its health included.

    Raises: ServerFault if it does not answer in time, or does not say what it has released.
    """
    start = time.monotonic()
    while True:
        try:
            await server.call("GET", "/model_info", _QUICK_SECONDS)
            break
        except ServerFault:
            if time.monotonic() - start > patience_seconds:
                raise
        await asyncio.sleep(_ASK_AGAIN_SECONDS)
    await resume_all(server)


async def missing_memory(server: Server) -> Missing:
    """What the server has released and not got back, once it has done what was asked of it.

    Raises: UnusableServer if it does not say, or if others have released it.
    """
    deadline = time.monotonic() + _MEMORY_SECONDS
    while True:
        try:
            text = await server._send("GET", "/metrics", _QUICK_SECONDS)
        except Refused:
            text = ""
        due, busy = _resumptions_due(text)
        if not busy:
            break
        if time.monotonic() > deadline:
            raise UnusableServer(f"it has been releasing or resuming its memory for {_MEMORY_SECONDS:.0f} s")
        await asyncio.sleep(_ASK_AGAIN_SECONDS)
    if due == Missing.NOTHING:
        return Missing.NOTHING
    if due not in list(Missing) or await _may_sample(server):
        raise UnusableServer(
            "its memory was released by another program, and what is missing cannot be told; start it again"
        )
    return Missing(due)


def _resumptions_due(metrics: str) -> tuple[int, bool]:
    """From the server's counts, and whether it is at one of these requests right now."""
    counts = {_RELEASE: 0, _RESUME: 0}
    seen, busy = False, False
    for name, labels, value in _SAMPLE.findall(metrics):
        seen = True
        label = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if (endpoint := label.get("endpoint")) not in counts:
            continue
        if name.endswith("_responses_total") and label["status_code"] == "200":
            counts[endpoint] += int(float(value))
        busy |= name.endswith("_requests_active") and float(value) > 0
    if not seen:
        raise UnusableServer("it does not tell whether its memory is released; start it with --enable-metrics")
    return 2 * counts[_RELEASE] - counts[_RESUME], busy


async def _may_sample(server: Server) -> bool:
    """Whether it is not paused, and then its memory cannot have been released here."""
    try:
        await server._send("GET", "/ready", _QUICK_SECONDS)
    except (ServerFault, Refused):
        return False
    return True


async def _order(server: Server, path: str, *tags: str) -> None:
    try:
        await server._send("POST", path, _MEMORY_SECONDS, {"tags": list(tags)})
    except Refused as refusal:
        raise UnusableServer(f"it did not release or resume {tags}: {refusal}") from None
