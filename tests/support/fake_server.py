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


def aborted(answer: dict[str, Any], length: int) -> dict[str, Any]:
    """The answer to a request that is aborted after ``length`` tokens."""
    meta = answer["meta_info"] | {"finish_reason": {"type": "abort", "message": "Abort"}}
    meta["output_token_logprobs"] = meta["output_token_logprobs"][:length]
    return answer | {"output_ids": answer["output_ids"][:length], "meta_info": meta}


def cut_in_half(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request that is aborted half-way."""
    return aborted(answer, len(answer["output_ids"]) // 2)


class FakeServer:
    """Serves on a loopback port from a thread of its own.

    Attributes:
        spoil: turns a good answer of /generate into what is answered: JSON, or a status; None hangs.
        healthy: what /health answers; None hangs.
        version: of its weights, as it tells; changed by a load, after ``load_delay``, unless ``loads`` is false.
        load_waits: whether a load is still to wait, asked again and again.
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
        self.load_waits: Callable[[], bool] = lambda: False
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
        app.add_routes(self._routes())
        runner = web.AppRunner(app, shutdown_timeout=0.01)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True).start()
        return runner

    def _routes(self) -> list[web.RouteDef]:
        return [
            web.get("/health", self._health),
            web.get("/model_info", self._model_info),
            web.get("/v1/models", self._models),
            web.post("/generate", self._generate),
            web.post("/pause_generation", self._nothing),
            web.post("/continue_generation", self._nothing),
            web.post("/abort_request", self._abort),
            web.post("/update_weights_from_disk", self._load),
        ]

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
        if rid in self._running:  # a part of an id means nothing, but a whole one may begin others
            for other in self._running:
                if other.startswith(rid):
                    self._running[other].set()
        return web.json_response({"status": "ok"})

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.loaded.append(body["model_path"])
        self.loading += 1
        await asyncio.sleep(self.load_delay)
        while self.load_waits():
            await asyncio.sleep(0.01)
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
        told_to_end = self._running[body["rid"]] = asyncio.Event()
        try:
            try:
                await asyncio.wait_for(told_to_end.wait(), self.delay)
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


class FakeSharing(FakeServer):
    """One that can give up its memory, counts it as --enable-metrics does, and takes weights in buckets, too.

    Attributes:
        missing: tags of the memory that it has given up.
        paused: whether requests wait; it looks unhealthy then, at once.
        refusals: resumptions that it will refuse.
        broken: what would have ended a real one.
    """

    def __init__(self) -> None:
        self.refusals = 0
        self.broken: list[str] = []
        self._forget()
        super().__init__()

    def start(self) -> None:
        """As a new process: with its memory, and weights and counts of none before it."""
        self._forget()
        super().start()

    def _forget(self) -> None:
        self.version, self.missing, self.paused = "default", set[str](), False
        self._answered = {"/release_memory_occupation": 0, "/resume_memory_occupation": 0}

    def _routes(self) -> list[web.RouteDef]:
        own = [
            web.get("/metrics", self._metrics),
            web.get("/ready", self._health),
            web.get("/server_info", self._server_info),
            web.post("/pause_generation", self._pause),
            web.post("/continue_generation", self._continue),
            web.post("/release_memory_occupation", self._release),
            web.post("/resume_memory_occupation", self._resume),
            web.post("/update_weight_version", self._name),
            web.post("/begin_weight_update", self._succeed),
            web.post("/update_weights_from_tensor", self._succeed),
            web.post("/end_weight_update", self._succeed),
            web.post("/flush_cache", self._succeed),
        ]
        return own + [route for route in super()._routes() if route.path not in {mine.path for mine in own}]

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=503) if self.paused else await super()._health(request)

    async def _metrics(self, request: web.Request) -> web.Response:
        lines = [
            f'sglang:http_responses_total{{endpoint="{endpoint}",status_code="200"}} {count}'
            for endpoint, count in self._answered.items()
        ]
        return web.Response(text="\n".join(lines))

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response({"tp_size": 1, "pp_size": 1, "dp_size": 1})

    async def _pause(self, request: web.Request) -> web.Response:
        self.paused = True
        return web.json_response({"status": "ok"})

    async def _continue(self, request: web.Request) -> web.Response:
        if self.missing:
            self.broken.append("it samples without memory")
        self.paused = False
        return web.json_response({"status": "ok"})

    async def _release(self, request: web.Request) -> web.Response:
        self.missing |= set((await request.json())["tags"])
        self._answered[request.path] += 1
        return web.Response()

    async def _resume(self, request: web.Request) -> web.Response:
        tags = set((await request.json())["tags"])
        if self.refusals:
            self.refusals -= 1
            return web.Response(status=400, text="no memory")
        if not tags <= self.missing:
            self.broken.append(f"it resumes {tags}, and lacks {self.missing}")
        self.missing -= tags
        self._answered[request.path] += 1
        return web.Response()

    async def _name(self, request: web.Request) -> web.Response:
        self.version = (await request.json())["new_version"]
        return web.json_response({"success": True})

    async def _succeed(self, request: web.Request) -> web.Response:
        if "weights" in self.missing:
            self.broken.append(f"{request.path} without memory")
        return web.json_response({"success": True})

    async def _load(self, request: web.Request) -> web.Response:
        if "weights" in self.missing:
            self.broken.append("weights are loaded into memory that is not there")
        return await super()._load(request)

    async def _generate(self, request: web.Request) -> web.Response:
        while self.paused:
            await asyncio.sleep(0.01)
        return await super()._generate(request)
