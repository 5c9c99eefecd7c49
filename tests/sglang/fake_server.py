"""A server that speaks the protocol and misbehaves on demand, for faults that the real one cannot be made to show."""

import asyncio
import contextlib
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aiohttp import web

VOCABULARY = 50


def _unasked_ports() -> Iterator[int]:
    """Ports that nobody is given who asks for any one; each once, in an order of this process alone."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    # SGLang takes some for itself above 22000; where the kernel gives away nearly all, none is better than another.
    end = min(lowest, 22000) if lowest > 4000 else 22000
    ports = range(max(1024, end - 12000), end)
    yield from random.SystemRandom().sample(ports, len(ports))


_ports = _unasked_ports()


def free_port() -> int:
    """Nobody takes it by chance before it is used, however late that is, nor while a server on it starts again."""
    for port in _ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def good_answer(body: dict[str, Any], version: str) -> dict[str, Any]:
    """All of the tokens that were asked for, counted up from the last one of the prompt."""
    last, count = body["input_ids"][-1], body["sampling_params"]["max_new_tokens"]
    tokens = [(last + i + 1) % VOCABULARY for i in range(count)]
    return {
        "text": "",
        "output_ids": tokens,
        "meta_info": {
            "finish_reason": {"type": "length", "length": count},
            "weight_version": version,
            "output_token_logprobs": [[-0.25 * (i + 1), token, None] for i, token in enumerate(tokens)],
        },
    }


def cut_in_half(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request that is aborted half-way."""
    half = len(answer["output_ids"]) // 2
    meta = answer["meta_info"] | {"finish_reason": {"type": "abort", "message": "Abort"}}
    meta["output_token_logprobs"] = meta["output_token_logprobs"][:half]
    return answer | {"output_ids": answer["output_ids"][:half], "meta_info": meta}


class FakeServer:
    """Serves on a loopback port from a thread of its own.

    Attributes:
        spoil: turns a good answer of /generate into what is answered: JSON, or a status; None hangs.
        healthy: what /health answers; None hangs.
        version: of its weights, as it tells; changed by a load, after ``load_delay``, unless ``loads`` is false.
        loading: loads that it is busy with.
        seen: bodies of /generate.
        aborts: what was aborted; a request that is aborted answers with the first half of its tokens.
        calls: paths in the order in which they were asked for, /health aside.
        most: requests that it had at once.
    """

    def __init__(self) -> None:
        self.spoil: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self.healthy: bool | None = True
        self.loads = True
        self.load_delay = 0.0
        self.loading = 0
        self.version = "default"
        self.delay = 0.0
        self.model_type = "qwen3"
        self.seen: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.loaded: list[str] = []
        self.aborts: list[str] = []
        self._running: dict[str, asyncio.Event] = {}
        self.most = self._now = 0
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.start()

    def start(self) -> None:
        self._runner = asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result()

    def stop(self) -> None:
        """Refuses connections from now on, and drops those that are open."""
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _serve(self) -> web.AppRunner:
        app = web.Application(middlewares=[self._note])
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/model_info", self._model_info),
                web.get("/v1/models", self._models),
                web.post("/generate", self._generate),
                web.post("/pause_generation", self._nothing),
                web.post("/continue_generation", self._nothing),
                web.post("/abort_request", self._abort),
                web.post("/update_weights_from_disk", self._load),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=0.01)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True).start()
        return runner

    @web.middleware
    async def _note(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path != "/health":
            self.calls.append(request.path)
        return await handler(request)

    async def _health(self, request: web.Request) -> web.Response:
        if self.healthy is None:
            await asyncio.sleep(3600)
        return web.Response(status=200 if self.healthy else 503)

    async def _model_info(self, request: web.Request) -> web.Response:
        architectures = {"qwen3": ["Qwen3ForCausalLM"]}.get(self.model_type, ["OtherForCausalLM"])
        told = {"model_type": self.model_type, "architectures": architectures, "weight_version": self.version}
        return web.json_response(told)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"max_model_len": 512}]})

    async def _nothing(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _abort(self, request: web.Request) -> web.Response:
        rid = (await request.json())["rid"]
        self.aborts.append(rid)
        if rid in self._running:  # a part of an id means nothing
            self._running[rid].set()
        return web.json_response({"status": "ok"})

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.loaded.append(body["model_path"])
        self.loading += 1
        await asyncio.sleep(self.load_delay)
        self.loading -= 1
        if self.loads:
            self.version = body["weight_version"]
        return web.json_response({"success": self.loads, "message": "" if self.loads else "disk on fire"})

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "logit_bias" in body["sampling_params"]:
            return web.json_response({"error": {"message": f"keys in [0, {VOCABULARY - 1}]"}}, status=400)
        self.seen.append(body)
        self._now += 1
        self.most = max(self.most, self._now)
        aborted = self._running[body["rid"]] = asyncio.Event()
        try:
            try:
                await asyncio.wait_for(aborted.wait(), self.delay)
                answer: Any = cut_in_half(good_answer(body, self.version))
            except TimeoutError:
                answer = self.spoil(good_answer(body, self.version))
            if answer is None:
                await asyncio.sleep(3600)
        finally:
            self._now -= 1
            del self._running[body["rid"]]
        if isinstance(answer, int):
            return web.Response(status=answer, text="as told")
        return web.json_response(answer)
