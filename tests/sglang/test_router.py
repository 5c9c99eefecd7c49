"""Tests of real routers in front of real servers: the trainer finds the workers of each router, every one once."""

import asyncio
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from fake_server import free_port
from real_servers import RealServer, installed

from megatron_rlvr.engines.sglang import router as router_module
from megatron_rlvr.engines.sglang.client import ServerError
from megatron_rlvr.engines.sglang.connect import expand
from megatron_rlvr.engines.sglang.pool import ServerPool
from megatron_rlvr.engines.sglang.router import workers_of

_START_SECONDS = 120


@pytest.fixture
def router(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """A function that starts a router and returns its URL."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*workers: str, flags: tuple[str, ...] = ()) -> str:
        port = free_port()
        command = [str(installed()), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--prometheus-port", str(free_port()), "--shutdown-grace-period-secs", "0", *flags]
        command += ["--worker-urls", *workers] if workers else []
        with (tmp_path / f"router_{port}.log").open("wb") as log:
            started.append(subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log))
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                return f"http://127.0.0.1:{port}"
            except OSError:
                assert started[-1].poll() is None, log
                assert time.monotonic() < deadline
                time.sleep(0.2)

    yield start
    for process in started:
        process.kill()
        process.wait()


def ask(urls: list[str], patience: float = 30.0) -> dict[str, list[str] | ServerError | None]:
    pool = ServerPool(urls, max_inflight=1, retries=0, patience_seconds=patience)
    try:
        return pool.everywhere(partial(workers_of, patience_seconds=patience))
    finally:
        pool.close()


def test_a_router_is_replaced_by_its_workers_each_of_which_counts_once(servers: list[RealServer], router) -> None:
    first, second = (server.url for server in servers)
    both, one = router(first, second), router(second)
    answers = ask([second, both, one])
    assert answers[second] is None, "a server is not a router"
    assert sorted(answers[both]) == sorted([first, second])  # type: ignore[arg-type,type-var]
    assert expand(answers) == ([second, first], [])
    assert expand(ask([one, second])) == ([second], [])


def test_workers_that_are_added_late_are_waited_for(servers: list[RealServer], router) -> None:
    url = router()
    answers = ask([url], patience=1.0)
    (problem,) = expand(answers)[1]
    assert (
        f"rollout.servers={url}: the server cannot be used (the server is a router without workers; add some to it)"
        in problem
    )
    body = f'{{"url": "{servers[0].url}"}}'.encode()
    headers = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{url}/workers", body, headers), timeout=10).close()
    assert ask([url])[url] == [servers[0].url]


def test_a_server_that_does_not_answer_is_named_and_the_others_are_kept(servers: list[RealServer]) -> None:
    unused = f"http://127.0.0.1:{free_port()}"
    urls, problems = expand(ask([unused, servers[0].url], patience=0.5))
    assert urls == [servers[0].url]
    assert len(problems) == 1
    assert problems[0].startswith(f"rollout.servers={unused}: the server cannot be used (/workers: ")
    assert problems[0].endswith("start it, or remove it from the list")


def test_a_router_that_is_starting_is_asked_until_its_workers_no_longer_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "_POLL_SECONDS", 0.01)
    counts = iter([0, 1, 1, 1, 2, 2, 2, 2, 3])  # workers in each answer

    class Router:
        async def call(self, method: str, path: str, timeout_seconds: float) -> object:
            return {"workers": [{"url": f"http://{n}:1", "worker_type": "regular"} for n in range(next(counts))]}

    assert asyncio.run(workers_of(cast(Any, Router()), 60)) == ["http://0:1", "http://1:1"]
    assert next(counts) == 3, "the router was not asked again"


@pytest.mark.parametrize(
    "worker",
    [
        {"url": "http://a:1", "worker_type": "prefill"},
        {"url": "grpc://a:1", "worker_type": "regular"},
        {"url": "http://a:1@0", "worker_type": "regular"},
    ],
)
def test_workers_that_cannot_be_used_alone_are_refused(worker: dict[str, str]) -> None:
    class Router:
        async def call(self, method: str, path: str, timeout_seconds: float) -> object:
            return {"workers": [{"url": "http://b:1", "worker_type": "regular"}, worker]}

    with pytest.raises(ServerError, match="cannot be used alone; route to whole servers"):
        asyncio.run(workers_of(cast(Any, Router()), 0))
