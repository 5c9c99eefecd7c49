"""HTTP client of one SGLang server: every endpoint that the trainer uses, and the errors that each can end in.

ServerError               the request failed on this server; another server may answer it
  UnhealthyServerError    the server exited, hangs or gives impossible answers: use it again after a health check
  NoConnectionError       this machine had no file or port left for the connection, for the whole time of the request
RequestRefusedError       the request is invalid; every server would refuse it
"""

import asyncio
import io
import logging
import random
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp

from megatron_rlvr.distributed import transport
from megatron_rlvr.engines.sglang.answers import AnswerError, AnswerLimit, is_int, parse_object, read_body, shown
from megatron_rlvr.errors import FaultError
from megatron_rlvr.open_files import EXHAUSTED

logger = logging.getLogger(__name__)

QUICK_SECONDS = 20.0
"""Timeout of a request that the server answers without computing anything."""

_POLL_SECONDS = 1.0
# /health itself answers 503 after 20 s without a token.
_HEALTH_SECONDS = 30.0
_MAX_RANKS, _MAX_TOKENS = 1024, 2**31
# Pause before this machine is asked for a connection again, of which it had none.
_NO_CONNECTION_SECONDS = 0.5
_ANY_ANSWER = AnswerLimit()


class ServerError(FaultError):
    """A request failed on one server, which may still be healthy; another server may answer the request."""


class UnhealthyServerError(ServerError):
    """A server exited, hangs or gives an impossible answer; it must pass a health check before it is used again."""


class NoConnectionError(ServerError):
    """This machine had no file or port left for a connection, which says nothing about the server."""


class RequestRefusedError(FaultError):
    """A server refused a request as invalid, as every other server would."""


@dataclass(frozen=True)
class ServerInfo:
    """A server's description of the model that it serves.

    Attributes:
        model_type: `model_type` of the model's config.json.
        architectures: `architectures` of the model's config.json.
        context_length: Maximum number of tokens of a prompt and its response together.
        vocab_size: Size of the vocabulary; None if the server does not report it.
        preferred_sampling_params: Sampling parameters that the server adds to every request; None if there are none.
        model_path: Folder from which the server has loaded the model; None if it does not report it.
        weights: Name of the weights that it holds; None if it does not report it.
        dtype: Its option `--dtype`, which may be "auto"; None if it does not report it.
        sglang: Version of SGLang; None if it does not report it.
        transport: Version of its NCCL; None if it does not report it (`rlvr serve` makes servers report it).
    """

    model_type: str | None
    architectures: list[str]
    context_length: int
    vocab_size: int | None
    preferred_sampling_params: Any
    model_path: str | None = None
    weights: str | None = None
    dtype: str | None = None
    sglang: str | None = None
    transport: str | None = None


def new_session(connector: aiohttp.BaseConnector, api_key: str | None = None) -> aiohttp.ClientSession:
    """Return a session for any number of servers. Asks for plain bodies, inflates none, and keeps no cookies."""
    headers = {"Accept-Encoding": "identity"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    return aiohttp.ClientSession(
        connector=connector, headers=headers, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
    )


class Server:
    """Client of one server. All methods are coroutines of the event loop that owns the session.

    Args:
        url: URL of the server.
        session: HTTP session for all requests.
        late: Returns by how many seconds, in all, the event loop has been behind (`EventLoopThread.late`).

    Attributes:
        url: URL of the server, without a slash at the end.
        keep_paused: True while the server must stay paused, so that `resume` does nothing: its memory is released
            (see colocation.py).
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, late: Callable[[], float] = lambda: 0.0) -> None:
        self.url = url
        self.late = late
        self.keep_paused = False
        self._session = session

    async def generate(self, body: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
        """Return the answer to one generation request, unchecked; it is no larger than its tokens need."""
        limit = AnswerLimit(body["sampling_params"]["max_new_tokens"])
        return await self.call("POST", "/generate", timeout_seconds, body, limit)

    async def abort(self, rid: str) -> None:
        """End the request with the id ``rid``, if it is running; it is answered with the tokens sampled so far."""
        await self.send("POST", "/abort_request", QUICK_SECONDS, {"rid": rid})

    async def check_health(self) -> None:
        """Return once the server has shown that it can sample.

        Raises:
            UnhealthyServerError: The server answered with an error, or not in time.
            NoConnectionError: The server could not be asked.
        """
        try:
            await self.send("GET", "/health", _HEALTH_SECONDS)
        except NoConnectionError:
            raise
        except (ServerError, RequestRefusedError) as error:
            raise UnhealthyServerError(str(error)) from None

    async def wait_until_healthy(self, patience_seconds: float) -> None:
        """Wait at the start of a run until the server can sample.

        Raises:
            UnhealthyServerError: The server is not healthy within ``patience_seconds``.
        """
        with suppress(ServerError, RequestRefusedError):
            await self.resume()  # a trainer that was killed during a weight sync leaves its servers paused
        start = time.monotonic()
        logged = False
        while True:
            try:
                return await self.check_health()
            except (UnhealthyServerError, NoConnectionError) as error:
                if time.monotonic() - start > patience_seconds:
                    raise
                if not logged:
                    logger.info("waiting up to %.0f s for server %s (%s)", patience_seconds, self.url, error)
                logged = True
            await asyncio.sleep(_POLL_SECONDS)

    async def weight_version(self) -> str | None:
        """Return the name of the weights that the server holds; None if it reports none."""
        name = (await self.call("GET", "/model_info", QUICK_SECONDS)).get("weight_version")
        return name if isinstance(name, str) else None

    async def info(self) -> ServerInfo:
        """Return the description of the model that the server serves."""
        model = await self.call("GET", "/model_info", QUICK_SECONDS)
        models = await self.call("GET", "/v1/models", QUICK_SECONDS)
        model_type, architectures = model.get("model_type"), model.get("architectures") or []
        context_length = _context_length(models)
        options = await self._options()
        labels = options.get("extra_metric_labels")
        if not (isinstance(model_type, str) and isinstance(architectures, list)) or context_length is None:
            raise UnhealthyServerError("/model_info and /v1/models do not describe a model; is this SGLang?")
        return ServerInfo(
            model_type=model_type,
            architectures=architectures,
            context_length=context_length,
            vocab_size=await self._vocab_size(),
            preferred_sampling_params=model.get("preferred_sampling_params"),
            model_path=_text(model.get("model_path")),
            weights=_text(model.get("weight_version")),
            dtype=_text(options.get("dtype")),
            sglang=_text(options.get("version")),
            transport=_text(labels.get(transport.LABEL)) if isinstance(labels, dict) else None,
        )

    async def _options(self) -> dict[str, Any]:
        """Return the server's options; {} if it does not report them."""
        with suppress(RequestRefusedError):
            return await self.call("GET", "/server_info", QUICK_SECONDS)
        return {}

    async def _vocab_size(self) -> int | None:
        """Return the vocabulary size that a refusal names.

        No endpoint reports the size, and a token id beyond it in a prompt, or a weight of another shape, would kill
        the server.
        """
        bias = {"logit_bias": {str(10**9): 0.0}, "max_new_tokens": 1}
        try:
            await self.call("POST", "/generate", QUICK_SECONDS, {"input_ids": [0], "sampling_params": bias})
        except RequestRefusedError as refusal:
            found = re.search(r"\[0, (\d{1,9})\]", str(refusal))
            return int(found[1]) + 1 if found else None
        return None

    async def load_weights(self, folder: str, version: str, timeout_seconds: float) -> None:
        """Have the server load the weights of a Hugging Face folder; running requests wait meanwhile.

        Raises:
            UnhealthyServerError: The server does not report afterwards that it holds ``version``.
        """
        body = {"model_path": folder, "weight_version": version, "flush_cache": True}
        try:
            async with self.paused():
                await self._succeed("/update_weights_from_disk", timeout_seconds, body)
            await self._check_version(version)
        except RequestRefusedError as refusal:
            raise UnhealthyServerError(f"the server did not load weights {version}: {refusal}") from None

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Pause the server: its requests keep their tokens and wait, and its weights may change."""
        await self.pause()
        try:
            yield
        finally:
            await self.resume()

    async def pause(self) -> None:
        """Retract running requests, which keep their tokens, and let new ones wait. Pausing twice is harmless."""
        await self.call("POST", "/pause_generation", QUICK_SECONDS, {"mode": "retract"})

    async def resume(self) -> None:
        """Continue the requests of a paused server, unless `keep_paused`."""
        if not self.keep_paused:
            await self.call("POST", "/continue_generation", QUICK_SECONDS, {})

    # Weights in buckets: pause, begin_update, take_bucket for each bucket, end_update, resume -------------------------

    async def tensor_parallel_size(self) -> int:
        """Return the number of tensor-parallel ranks of the server, each of which takes every bucket.

        Raises:
            UnhealthyServerError: The server has pipeline- or data-parallel ranks, too, which would get no buckets.
        """
        info = await self.call("GET", "/server_info", QUICK_SECONDS)
        sizes: dict[str, Any] = {name: info.get(name) for name in ("tp_size", "pp_size", "dp_size")}
        if not is_int(sizes["tp_size"], 1, _MAX_RANKS) or (sizes["pp_size"], sizes["dp_size"]) != (1, 1):
            raise UnhealthyServerError(
                f"the server runs with {shown(sizes)}, and only tensor-parallel servers take weights in buckets; start "
                "it with --pp-size 1 --dp-size 1, or set sync.method to disk"
            )
        return int(sizes["tp_size"])

    async def join_group(
        self, name: str, address: str, port: int, size: int, backend: str, timeout_seconds: float
    ) -> None:
        """Have the server's ranks join a process group as ranks 1 to ``size`` - 1; return when all have joined."""
        body = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": size}
        body |= {"group_name": name, "backend": backend}
        await self._succeed("/init_weights_update_group", timeout_seconds, body)

    async def leave_group(self, name: str) -> None:
        """Have the server's ranks leave a process group, if they are in it."""
        with suppress(RequestRefusedError):  # they are not in it
            await self.call("POST", "/destroy_weights_update_group", QUICK_SECONDS, {"group_name": name})

    async def begin_update(self, version: str) -> None:
        """Prepare the server for buckets. Until `end_update` its weights have a name that is never expected."""
        await self._name_weights(f"{version}-incomplete")
        try:
            await self._succeed("/begin_weight_update", QUICK_SECONDS, {"selector": "all"})
        except RequestRefusedError:  # an earlier update was never ended
            await self._succeed("/end_weight_update", QUICK_SECONDS, {})
            await self._succeed("/begin_weight_update", QUICK_SECONDS, {"selector": "all"})

    async def take_bucket(self, path: str, body: Any, timeout_seconds: float) -> None:
        """Have the server load some of the weights, through the endpoint ``path``."""
        await self._succeed(path, timeout_seconds, body)

    async def end_update(self, version: str, timeout_seconds: float) -> None:
        """Finish the update: flush the cache of the old weights and, last, give the new weights their name."""
        await self._succeed("/end_weight_update", timeout_seconds, {})
        await self.send("POST", "/flush_cache", QUICK_SECONDS, {})
        await self._name_weights(version)
        await self._check_version(version)

    async def _name_weights(self, version: str) -> None:
        body = {"new_version": version, "abort_all_requests": False}
        await self._succeed("/update_weight_version", QUICK_SECONDS, body)

    async def _check_version(self, version: str) -> None:
        found = await self.weight_version()
        if found != version:
            raise UnhealthyServerError(f"weights {version} were pushed to the server, and it holds {shown(found)}")

    # Any request ------------------------------------------------------------------------------------------------------

    async def _succeed(self, path: str, timeout_seconds: float, body: Any) -> None:
        """Return if the server reports success.

        Raises:
            RequestRefusedError: The server reports a failure, which SGLang does as if the request were invalid.
        """
        answer = await self.call("POST", path, timeout_seconds, body)
        if answer.get("success") is not True:
            raise RequestRefusedError(f"{path} failed: {shown(answer.get('message'))}")

    async def call(
        self, method: str, path: str, timeout_seconds: float, body: Any = None, limit: AnswerLimit = _ANY_ANSWER
    ) -> dict[str, Any]:
        """Return the JSON object that an endpoint answers; see `send`."""
        answer = await self.send(method, path, timeout_seconds, body, limit)
        try:
            return parse_object(answer, limit)
        except AnswerError as error:
            raise UnhealthyServerError(f"{path} {error}") from None

    async def send(
        self, method: str, path: str, timeout_seconds: float, body: Any = None, limit: AnswerLimit = _ANY_ANSWER
    ) -> bytes:
        """Return the body that an endpoint answers.

        While this machine has no file or port left for a connection, the request waits for one.

        Args:
            body: An object to send as JSON, or bytes that already are JSON.
            limit: Largest answer to the request.

        Raises:
            NoConnectionError: The request was still waiting for a connection after ``timeout_seconds``.
            UnhealthyServerError: The server does not answer in time, the connection fails, or the answer is too large,
                compressed, or a redirect, which is not followed.
            ServerError: The answer has an HTTP status of 500 or above.
            RequestRefusedError: The answer has an HTTP status of 400 to 499.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                return await self._send_once(method, path, timeout_seconds, body, limit)
            except NoConnectionError:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_NO_CONNECTION_SECONDS * random.uniform(0.5, 1.5))

    async def _send_once(self, method: str, path: str, timeout_seconds: float, body: Any, limit: AnswerLimit) -> bytes:
        content: dict[str, Any] = {"json": body}
        if isinstance(body, bytes):
            content = {"data": io.BytesIO(body), "headers": {"Content-Type": "application/json"}}
        timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        try:
            async with self._session.request(
                method, self.url + path, timeout=timeout, allow_redirects=False, **content
            ) as response:
                status, answer = response.status, await self._read(response, path, limit)
        except TimeoutError:
            raise UnhealthyServerError(f"no answer to {path} in {timeout_seconds:.0f} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: headers that aiohttp cannot parse
            if isinstance(error, OSError) and error.errno in EXHAUSTED:
                raise NoConnectionError(f"{path}: this machine has no connection left ({error.strerror})") from None
            raise UnhealthyServerError(f"{path}: {type(error).__name__} {shown(str(error))}") from None
        if status >= 500:
            raise ServerError(f"{path} answered {status} {shown(answer)}")
        if status >= 400:
            raise RequestRefusedError(f"{path} answered {status} {shown(answer)}")
        if not 200 <= status < 300:
            raise UnhealthyServerError(f"{path} answered {status}, which is not followed; give the server's own URL")
        return answer

    async def _read(self, response: aiohttp.ClientResponse, path: str, limit: AnswerLimit) -> bytes:
        """Return the body of a response, plain as it was requested, or raise UnhealthyServerError."""
        try:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise AnswerError(f"answered with encoding {shown(response.headers['Content-Encoding'])}")
            return await read_body(response.content, limit, self.late)
        except AnswerError as error:
            response.close()
            raise UnhealthyServerError(f"{path} {error}") from None


def _text(value: Any) -> str | None:
    """Return a text of an answer, or None for anything else."""
    return value if isinstance(value, str) else None


def _context_length(models: dict[str, Any]) -> int | None:
    """Return the context length in an answer of /v1/models, or None if it has none."""
    try:
        length = models["data"][0]["max_model_len"]
    except (LookupError, TypeError):
        return None
    return length if is_int(length, 1, _MAX_TOKENS) else None
