"""A stand-in for an SGLang server that misbehaves on demand, for faults that the real server cannot be made to show."""

import asyncio
import contextlib
import random
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aiohttp import web

VOCABULARY = 50


def _unassigned_ports() -> Iterator[int]:
    """Yield ports outside the range from which the kernel assigns free ones; each once, in random order."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    # SGLang itself takes some above 22000. If the kernel gives away nearly all ports, none is better than another.
    end = min(lowest, 22000) if lowest > 4000 else 22000
    ports = range(max(1024, end - 12000), end)
    yield from random.SystemRandom().sample(ports, len(ports))


_ports = _unassigned_ports()


def free_port() -> int:
    """Return a free port that no process takes by chance, even if it is used late or by a server that restarts."""
    for port in _ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def good_answer(body: dict[str, Any], version: str) -> dict[str, Any]:
    """Return an answer with all requested tokens, which count up from the last token of the prompt."""
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
    """Return the answer to a request that is aborted after ``length`` tokens."""
    meta = answer["meta_info"] | {"finish_reason": {"type": "abort", "message": "Abort"}}
    meta["output_token_logprobs"] = meta["output_token_logprobs"][:length]
    return answer | {"output_ids": answer["output_ids"][:length], "meta_info": meta}


def cut_in_half(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request that is aborted half-way."""
    return aborted(answer, len(answer["output_ids"]) // 2)


class FakeServer:
    """A server on a loopback port, in a thread of its own.

    Attributes:
        spoil: Turns a good answer of /generate into the answer that is sent: JSON or an HTTP status; None hangs.
        healthy: True if /health succeeds; None hangs.
        version: Name of the weights. A load changes it after ``load_delay`` seconds, unless ``loads`` is false.
        load_waits: Polled during a load, which waits as long as it returns True.
        loading: Number of loads in progress.
        delay: Seconds after which /generate answers.
        seen: Bodies of /generate.
        aborts: Ids of aborted requests; an aborted request is answered with the first half of its tokens.
        calls: Requested paths in order, without /health.
        max_running: Largest number of requests that ran at once.
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
        self.max_running = 0
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.start()

    @property
    def running(self) -> int:
        """Number of requests that run now."""
        return len(self._running)

    def start(self) -> None:
        self._runner = asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result()

    def stop(self) -> None:
        """Refuse connections from now on, and drop open ones."""
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _serve(self) -> web.AppRunner:
        app = web.Application(middlewares=[self._record])
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
    async def _record(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path != "/health":
            self.calls.append(request.path)
        return await handler(request)

    async def _health(self, request: web.Request) -> web.Response:
        if self.healthy is None:
            await asyncio.sleep(3600)
        return web.Response(status=200 if self.healthy else 503)

    async def _model_info(self, request: web.Request) -> web.Response:
        architectures = {"qwen3": ["Qwen3ForCausalLM"]}.get(self.model_type, ["OtherForCausalLM"])
        info = {"model_type": self.model_type, "architectures": architectures, "weight_version": self.version}
        return web.json_response(info)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"max_model_len": 512}]})

    async def _nothing(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _abort(self, request: web.Request) -> web.Response:
        rid = (await request.json())["rid"]
        self.aborts.append(rid)
        # As in SGLang: a mere prefix of ids is ignored, but a complete id ends all requests whose ids begin with it.
        if rid in self._running:
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
        abort_ordered = self._running[body["rid"]] = asyncio.Event()
        self.max_running = max(self.max_running, self.running)
        try:
            try:
                await asyncio.wait_for(abort_ordered.wait(), self.delay)
                answer: Any = cut_in_half(good_answer(body, self.version))
            except TimeoutError:
                answer = self.spoil(good_answer(body, self.version))
            if answer is None:
                await asyncio.sleep(3600)
        finally:
            del self._running[body["rid"]]
        if isinstance(answer, int):
            return web.Response(status=answer, text="as requested")
        return web.json_response(answer)


class FakeColocatedServer(FakeServer):
    """A server that also releases its memory, counts that as with --enable-metrics, and takes weights in buckets.

    Attributes:
        missing: Tags of the memory that was released and not resumed.
        paused: True while requests wait; the health check then fails at once.
        refusals: Number of resumptions to refuse.
        crashes: Events that would have crashed a real server.
    """

    def __init__(self) -> None:
        self.refusals = 0
        self.crashes: list[str] = []
        self._reset()
        super().__init__()

    def start(self) -> None:
        """Start as a new process would: with all memory, initial weights, and no counts."""
        self._reset()
        super().start()

    def _reset(self) -> None:
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
            self.crashes.append("sampling without memory")
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
            self.crashes.append(f"resuming {tags} while {self.missing} is missing")
        self.missing -= tags
        self._answered[request.path] += 1
        return web.Response()

    async def _name(self, request: web.Request) -> web.Response:
        self.version = (await request.json())["new_version"]
        return web.json_response({"success": True})

    async def _succeed(self, request: web.Request) -> web.Response:
        if "weights" in self.missing:
            self.crashes.append(f"{request.path} without memory")
        return web.json_response({"success": True})

    async def _load(self, request: web.Request) -> web.Response:
        if "weights" in self.missing:
            self.crashes.append("weights loaded into memory that was released")
        return await super()._load(request)

    async def _generate(self, request: web.Request) -> web.Response:
        while self.paused:
            await asyncio.sleep(0.01)
        return await super()._generate(request)


if __name__ == "__main__":  # a server in a process of its own, whose connections are not files of the test
    own = FakeServer()
    own.delay = float(sys.argv[1])
    print(own.url, flush=True)
    threading.Event().wait()
