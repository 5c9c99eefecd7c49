"""The conversation with one SGLang server: every endpoint that the trainer uses, and what can go wrong with it.

Three things can go wrong, and each has its error: the server cannot be relied on (gone, silent, wrong), the request
failed on a server that may be well, or the request itself is refused, as it would be anywhere.
"""

import asyncio
import io
import json
import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp

logger = logging.getLogger(__name__)

_ASK_AGAIN_SECONDS = 1.0
_QUICK_SECONDS = 20.0
# /health answers 503 by itself after 20 s without a token.
_HEALTH_SECONDS = 30.0


class ServerFault(Exception):
    """A request failed here; the server may be well, and another may do better."""


class UnusableServer(ServerFault):
    """The server is gone, does not answer, or answers what cannot be true: it must prove itself before it is used."""


class Refused(Exception):
    """The server says that the request is wrong; so would any other."""


@dataclass(frozen=True)
class ServerInfo:
    """What a server says about itself.

    Attributes:
        model_type, architectures: of its model's config.json.
        context_length: tokens that a prompt and its response may have together.
        vocab_size: its token ids are below it; None where it does not say.
        preferred_sampling_params: sampling that it would add to every request; None for none.
    """

    model_type: str | None
    architectures: list[str]
    context_length: int
    vocab_size: int | None
    preferred_sampling_params: Any


class Server:
    """One server. All methods are coroutines of the event loop that owns the session."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self._session = session
        self.held = False
        """Whether it is to stay paused, whatever `resume` is for: its memory is away (rollout.colocation)."""

    async def generate(self, body: dict[str, Any], timeout_seconds: float) -> Any:
        """The answer to one request, unchecked."""
        return await self.call("POST", "/generate", timeout_seconds, body)

    async def abort(self, rid: str) -> None:
        """Ends the request of that `rid`, if it is there; it answers with the tokens that it has."""
        await self._send("POST", "/abort_request", _QUICK_SECONDS, {"rid": rid})

    async def check_health(self) -> None:
        """Returns once the server has shown that it can sample."""
        try:
            await self._send("GET", "/health", _HEALTH_SECONDS)
        except (ServerFault, Refused) as error:
            raise UnusableServer(str(error)) from None

    async def wait_until_healthy(self, patience_seconds: float) -> None:
        """Returns once the server can sample; the last fault if it cannot in time. For the start of a run."""
        with suppress(ServerFault, Refused):
            await self.resume()  # a trainer that was killed while it changed weights has left it paused
        start = time.monotonic()
        told = False
        while True:
            try:
                return await self.check_health()
            except UnusableServer as fault:
                if time.monotonic() - start > patience_seconds:
                    raise
                if not told:
                    logger.info("waiting up to %.0f s for server %s (%s)", patience_seconds, self.url, fault)
                told = True
            await asyncio.sleep(_ASK_AGAIN_SECONDS)

    async def weight_version(self) -> str | None:
        """Name of the weights that it holds."""
        return (await self.call("GET", "/model_info", _QUICK_SECONDS)).get("weight_version")

    async def info(self) -> ServerInfo:
        """What it serves."""
        model = await self.call("GET", "/model_info", _QUICK_SECONDS)
        models = await self.call("GET", "/v1/models", _QUICK_SECONDS)
        try:
            return ServerInfo(
                model_type=model["model_type"],
                architectures=model["architectures"] or [],
                context_length=int(models["data"][0]["max_model_len"]),
                vocab_size=await self._vocab_size(),
                preferred_sampling_params=model.get("preferred_sampling_params"),
            )
        except (LookupError, TypeError, ValueError):
            raise UnusableServer("/model_info and /v1/models do not describe a model; is this SGLang?") from None

    async def _vocab_size(self) -> int | None:
        """From a refusal: no endpoint tells it, and an id beyond it in a prompt or a weight would kill the server."""
        bias = {"logit_bias": {str(10**9): 0.0}, "max_new_tokens": 1}
        try:
            await self.call("POST", "/generate", _QUICK_SECONDS, {"input_ids": [0], "sampling_params": bias})
        except Refused as refusal:
            found = re.search(r"\[0, (\d+)\]", str(refusal))
            return int(found[1]) + 1 if found else None
        return None

    async def load_weights(self, folder: str, version: str, timeout_seconds: float) -> None:
        """Replaces its weights by those of a Hugging Face folder; requests that are running wait meanwhile.

        Raises: UnusableServer unless the server says that it now holds ``version``.
        """
        body = {"model_path": folder, "weight_version": version, "flush_cache": True}
        try:
            async with self.paused():
                await self._succeed("/update_weights_from_disk", timeout_seconds, body)
            await self._check_version(version)
        except Refused as refusal:
            raise UnusableServer(f"it did not load weights {version}: {refusal}") from None

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Its requests keep their tokens and wait; the weights may change meanwhile."""
        await self.pause()
        try:
            yield
        finally:
            await self.resume()

    async def pause(self) -> None:
        """Takes requests from their places, with the tokens that they have; new ones wait. Once more is no harm."""
        await self.call("POST", "/pause_generation", _QUICK_SECONDS, {"mode": "retract"})

    async def resume(self) -> None:
        """Requests go on, unless it is held."""
        if not self.held:
            await self.call("POST", "/continue_generation", _QUICK_SECONDS, {})

    # Weights in buckets: pause, begin_update, take_bucket for each, end_update, resume ------------------------------

    async def tensor_parallel_size(self) -> int:
        """Its ranks, each of which takes every bucket.

        Raises: UnusableServer if it has other ranks beside them, which get no buckets.
        """
        info = await self.call("GET", "/server_info", _QUICK_SECONDS)
        sizes = {name: info.get(name) for name in ("tp_size", "pp_size", "dp_size")}
        if not isinstance(sizes["tp_size"], int) or (sizes["pp_size"], sizes["dp_size"]) != (1, 1):
            raise UnusableServer(
                f"it runs with {sizes}, and only tensor-parallel servers take weights so; start it with --pp-size 1 "
                "--dp-size 1, or set sync.method to disk"
            )
        return sizes["tp_size"]

    async def join_group(
        self, name: str, address: str, port: int, size: int, backend: str, timeout_seconds: float
    ) -> None:
        """Has its ranks join a process group as ranks 1 to ``size`` - 1; returns when all are in it."""
        body = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": size}
        body |= {"group_name": name, "backend": backend}
        await self._succeed("/init_weights_update_group", timeout_seconds, body)

    async def leave_group(self, name: str) -> None:
        """Has its ranks leave a process group, if they are in it."""
        with suppress(Refused):  # it is not
            await self.call("POST", "/destroy_weights_update_group", _QUICK_SECONDS, {"group_name": name})

    async def begin_update(self, version: str) -> None:
        """Readies it for buckets. Until `end_update` its weights have a name that no weights ever have."""
        await self._name_weights(f"{version}-incomplete")
        try:
            await self._succeed("/begin_weight_update", _QUICK_SECONDS, {"selector": "all"})
        except Refused:  # an update was begun before and never ended
            await self._succeed("/end_weight_update", _QUICK_SECONDS, {})
            await self._succeed("/begin_weight_update", _QUICK_SECONDS, {"selector": "all"})

    async def take_bucket(self, path: str, body: Any, timeout_seconds: float) -> None:
        """Has it load some of the weights, by one of the endpoints for that."""
        await self._succeed(path, timeout_seconds, body)

    async def end_update(self, version: str, timeout_seconds: float) -> None:
        """Finishes the weights, forgets what the old ones cached, and gives them their name at last."""
        await self._succeed("/end_weight_update", timeout_seconds, {})
        await self._send("POST", "/flush_cache", _QUICK_SECONDS, {})
        await self._name_weights(version)
        await self._check_version(version)

    async def _name_weights(self, version: str) -> None:
        body = {"new_version": version, "abort_all_requests": False}
        await self._succeed("/update_weight_version", _QUICK_SECONDS, body)

    async def _check_version(self, version: str) -> None:
        found = await self.weight_version()
        if found != version:
            raise UnusableServer(f"it was given weights {version} and holds {found}")

    # Any request ----------------------------------------------------------------------------------------------------

    async def _succeed(self, path: str, timeout_seconds: float, body: Any) -> None:
        """Returns if it says that it did what it was told. A failure it reports as a wrong request, as does this."""
        answer = await self.call("POST", path, timeout_seconds, body)
        if answer.get("success") is not True:
            raise Refused(f"{path} failed: {answer.get('message')}")

    async def call(self, method: str, path: str, timeout_seconds: float, body: Any = None) -> Any:
        """The JSON object that an endpoint answers; ``body`` is JSON already if it is bytes."""
        text = await self._send(method, path, timeout_seconds, body)
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise UnusableServer(f"{path} answered no JSON object: {_short(text)}")
        return answer

    async def _send(self, method: str, path: str, timeout_seconds: float, body: Any = None) -> str:
        timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        content: dict[str, Any] = {"json": body}
        if isinstance(body, bytes):
            content = {"data": io.BytesIO(body), "headers": {"Content-Type": "application/json"}}
        try:
            async with self._session.request(method, self.url + path, timeout=timeout, **content) as response:
                status, text = response.status, await response.text(errors="replace")
        except TimeoutError:
            raise UnusableServer(f"no answer to {path} in {timeout_seconds:.0f} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise UnusableServer(f"{path}: {type(error).__name__} {_short(str(error))}") from None
        if status >= 500:
            raise ServerFault(f"{path} answered {status} {_short(text)}")
        if status >= 400:
            raise Refused(f"{path} answered {status} {_short(text)}")
        return text


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:197] + "..."
