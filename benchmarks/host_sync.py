"""Part of host.py: weight sync to servers, by `sync.method: distributed`, over gloo.

Four scripted servers join process groups and take buckets as SGLang's do; one or two ranks, each the only one of its
replica, send random weights to them. The share is that of 4 GB. CPU seconds and peak memory are those of a sender; wall
seconds are in the size.

The seconds at more ranks are a model of the 32B model's 65.5 GB on GPUs: buckets of 268 MB, of which each takes 12 ms
to be gathered and filled and 6 ms to be loaded (assumed, not measured), at 400 Gb/s of one card, with as many replicas
as ranks / 8 and 4, 16 and 64 servers. With n servers a leader, a bucket takes max(12 ms, 6 ms + n x 268 MB / 50 GB/s),
as the next is filled under the send of this one. One sender would take 6.7, 22 and 85 s.
"""

import asyncio
import multiprocessing
import os
import resource
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from aiohttp import web

from megatron_rlvr.config import RolloutSettings
from megatron_rlvr.distributed import megatron_on_cpu
from megatron_rlvr.distributed.ranks import initialize_replicas
from megatron_rlvr.engines.sglang.connect import connect
from megatron_rlvr.engines.sglang.weight_sync.distributed import DistributedSync

SERVERS, BYTES, BUCKET = 4, 4e9, 2**26
_CONFIG: dict[str, Any] = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 50}
_MODEL_BYTES, _MODEL_BUCKET, _FILL, _LOAD, _BYTES_A_SECOND = 65.5e9, 268e6, 0.012, 0.006, 50e9


def model_seconds(servers: int, leaders: int) -> float:
    """Return the seconds of a sync on GPUs, by the model of the module's docstring."""
    each = -(-servers // leaders)
    return _MODEL_BYTES / _MODEL_BUCKET * max(_FILL, _LOAD + each * _MODEL_BUCKET / _BYTES_A_SECOND)


class Server:
    """The endpoints of a server that a weight sync uses."""

    def __init__(self) -> None:
        self.version = "default"
        self.bytes = 0
        self._group: Any = None

    def routes(self) -> list[web.RouteDef]:
        done = ("pause_generation", "continue_generation", "begin_weight_update", "end_weight_update", "flush_cache")
        return [
            web.get("/health", self._succeed),
            web.get("/model_info", self._model),
            web.get("/v1/models", self._models),
            web.get("/server_info", self._sizes),
            web.post("/generate", self._vocabulary),
            *(web.post(f"/{name}", self._succeed) for name in (*done, "destroy_weights_update_group")),
            web.post("/update_weight_version", self._name),
            web.post("/init_weights_update_group", self._join),
            web.post("/update_weights_from_distributed", self._take),
        ]

    async def _succeed(self, request: web.Request) -> web.Response:
        return web.json_response({"success": True})

    async def _model(self, request: web.Request) -> web.Response:
        return web.json_response(_CONFIG | {"weight_version": self.version})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"max_model_len": 4096}]})

    async def _sizes(self, request: web.Request) -> web.Response:
        return web.json_response({"tp_size": 1, "pp_size": 1, "dp_size": 1})

    async def _vocabulary(self, request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": f"keys in [0, {_CONFIG['vocab_size'] - 1}]"}}, status=400)

    async def _name(self, request: web.Request) -> web.Response:
        self.version = (await request.json())["new_version"]
        return web.json_response({"success": True})

    async def _join(self, request: web.Request) -> web.Response:
        body = await request.json()

        def join() -> None:
            store = dist.TCPStore(body["master_address"], body["master_port"], is_master=False)
            c10d = dist.distributed_c10d
            self._group, _ = c10d._new_process_group_helper(
                body["world_size"], 1, [], c10d.Backend(body["backend"]),
                c10d.PrefixStore(body["group_name"], store), group_name=body["group_name"],
                timeout=timedelta(seconds=60),
            )  # fmt: skip

        await asyncio.get_running_loop().run_in_executor(None, join)
        return web.json_response({"success": True})

    async def _take(self, request: web.Request) -> web.Response:
        body = await request.json()
        dtypes = [getattr(torch, dtype) for dtype in body["dtypes"]]
        sizes = (
            dtype.itemsize * torch.Size(shape).numel() for dtype, shape in zip(dtypes, body["shapes"], strict=True)
        )
        data = torch.empty(sum(sizes), dtype=torch.uint8)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        take: Callable[[], Any] = self._group.broadcast([data], options).wait
        await asyncio.get_running_loop().run_in_executor(None, take)
        self.bytes += len(data)
        return web.json_response({"success": True})


def _serve(report: Connection) -> None:
    async def run() -> None:
        app = web.Application()
        app.add_routes(Server().routes())
        runner = web.AppRunner(app)
        await runner.setup()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        await web.TCPSite(runner, "127.0.0.1", port).start()
        report.send(f"http://127.0.0.1:{port}")
        await asyncio.Event().wait()

    asyncio.run(run())


def _send(rank: int, ranks: int, port: int, urls: list[str], size: int, report: Connection) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    megatron_on_cpu.define_absent_kernels = megatron_on_cpu.patch_cuda_calls = lambda: None  # no model is built
    place = initialize_replicas(10.0)
    pool = connect(RolloutSettings(engine="sglang", servers=urls), place, _CONFIG, max_sequence_tokens=64)
    assert pool is not None
    sync = DistributedSync(pool, place, BUCKET)
    tensor = torch.rand(2**22)  # the same every time, to measure the memory of the sync alone
    tensors = [(str(number), tensor) for number in range(max(1, size // 2**24))]
    for version in range(2):  # the first one makes the groups
        dist.barrier()
        before, start = time.process_time(), time.perf_counter()
        with pool.pushing_weights():
            weights, failures = sync.push(iter(tensors), version)
            pool.weights_pushed(weights, failures)
        seconds, spent = time.perf_counter() - start, time.process_time() - before
        if failures:
            raise RuntimeError(str(failures))
    dist.barrier()
    report.send((spent, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000))
    sync.close()
    pool.close()


def measure(senders: int, size: int) -> tuple[float, float, float]:
    """Return CPU seconds, wall seconds and peak MB of the slowest sender to four servers."""
    spawn = multiprocessing.get_context("fork")
    ends = [spawn.Pipe() for _ in range(SERVERS + senders)]
    servers = [spawn.Process(target=_serve, args=(end,), daemon=True) for _, end in ends[:SERVERS]]
    for server in servers:
        server.start()
    urls = [end.recv() for end, _ in ends[:SERVERS]]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        spawn.Process(target=_send, args=(rank, senders, port, urls, size, end))
        for rank, (_, end) in enumerate(ends[SERVERS:])
    ]
    try:
        for rank in ranks:
            rank.start()
        for _, end in ends[SERVERS:]:
            end.close()
        found = [end.recv() for end, _ in ends[SERVERS:]]
    finally:
        for process in (*ranks, *servers):
            process.kill() if process in servers else process.join(30.0)
    cpu, wall, peak = (max(values) for values in zip(*found, strict=True))
    return cpu, wall, peak


def rows(share: float) -> list[dict[str, Any]]:
    """See host.py."""
    size = int(share * BYTES)
    at = {32: model_seconds(4, 4), 256: model_seconds(16, 32), 1024: model_seconds(64, 128)}
    found = []
    for senders in (1, 2):
        cpu, wall, peak = measure(senders, size)
        found.append(
            {
                "name": f"weight sync to 4 servers, {senders} sender(s)",
                "size": f"{size / 1e6:.0f} MB in {wall:.2f} s",
                "cpu_seconds": cpu,
                "peak_mb": peak,
                "seconds_at": at if senders > 1 else None,
            }
        )
    return found
