"""Tests of releasing and resuming the real server's memory: in order, only what is due, and after any crash.

On a CPU no memory is freed, but the server keeps the same records: it crashes if it is ordered to resume memory that it
has not released.
"""

import asyncio
import contextlib
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest
import tiny
import torch
import zygote
from fake_server import FakeColocatedServer, FakeServer
from pool_runs import CONFIG, SAMPLING, check, no_weights, removals, requests
from real_servers import RealServer
from waiting import wait_for

from megatron_rlvr.engines.sglang import colocation
from megatron_rlvr.engines.sglang.client import RequestRefusedError, Server, UnhealthyServerError, new_session
from megatron_rlvr.engines.sglang.colocation import RELEASED, Missing, missing_memory
from megatron_rlvr.engines.sglang.membership import ServerState

T = TypeVar("T")
PROMPT = [5, 77, 201, 34, 150]
SECONDS = 60.0

# A minimal trainer. It prints each request before it sends it, and waits for a line of input each time.
TRAINER = """
import asyncio, sys
import aiohttp
from megatron_rlvr.engines.sglang import colocation
from megatron_rlvr.engines.sglang.client import Server, new_session

class Stepped(Server):
    async def send(self, method, path, timeout_seconds, body=None, *limit):
        print(path, flush=True)
        sys.stdin.readline()
        return await super().send(method, path, timeout_seconds, body, *limit)

async def step(url, folder):
    async with new_session(aiohttp.TCPConnector()) as session:
        server = Stepped(url, session)
        await colocation.release(server)
        await colocation.resume_weights(server)
        body = {"model_path": folder, "weight_version": "synced", "flush_cache": True}
        await server.call("POST", "/update_weights_from_disk", 60, body)
        await colocation.resume_all(server)

asyncio.run(step(*sys.argv[1:]))
"""


def with_client(url: str, use: Callable[[Server], Awaitable[T]]) -> T:
    """Return the result of ``use`` on a new client of the server, which knows nothing about it."""

    async def run() -> T:
        async with new_session(aiohttp.TCPConnector(force_close=True)) as session:
            return await use(Server(url, session))

    return asyncio.run(run())


async def sample(server: Server, count: int) -> dict[str, Any]:
    sampling = {"max_new_tokens": count, "temperature": 0.0, "ignore_eos": True}
    return await server.generate({"input_ids": PROMPT, "sampling_params": sampling}, SECONDS)


async def busy(server: Server) -> bool:
    """Return whether the server has requests: only an idle server flushes its cache."""
    try:
        await server.send("POST", "/flush_cache", SECONDS, {})
    except RequestRefusedError:
        return True
    return False


@torch.no_grad()
def greedy(model: Any, count: int) -> list[int]:
    tokens = list(PROMPT)
    for _ in range(count):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[-count:]


async def orders(server: Server) -> tuple[int, int]:
    """Return the numbers of releases and of resumptions that the server has answered."""
    text = (await server.send("GET", "/metrics", SECONDS)).decode()
    lines = [line for line in text.splitlines() if "http_responses_total" in line and "_memory_occupation" in line]
    counts = [sum(float(line.split()[-1]) for line in lines if verb in line) for verb in ("/release_", "/resume_")]
    return int(counts[0]), int(counts[1])


class Trainer:
    """TRAINER in a process of its own, executed request by request."""

    def __init__(self, server: RealServer, folder: Path) -> None:
        program = [sys.executable, "-c", TRAINER, server.url, str(folder)]
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self._process = zygote.start(
                program, stdin=theirs, stdout=theirs, cwd=tiny.CHECKOUT, env=tiny.environment()
            )
            self._talk = ours.makefile("rw")

    def next_request(self) -> str:
        """Return the path of the request that it is about to send; empty if it has exited."""
        return self._talk.readline().strip()

    def proceed(self) -> None:
        self._talk.write("\n")
        self._talk.flush()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._talk.close()


@pytest.fixture
def start_trainer(servers: list[RealServer], other_weights: Path) -> Iterator[Callable[[], Trainer]]:
    started = []

    def start() -> Trainer:
        started.append(Trainer(servers[0], other_weights))
        return started[-1]

    yield start
    for trainer in started:
        trainer.kill()


def requests_of(trainer: Trainer) -> list[str]:
    paths = []
    while path := trainer.next_request():
        paths.append(path)
        trainer.proceed()
    return paths


def test_a_step_releases_syncs_and_resumes_in_an_order_that_never_uses_missing_memory(
    servers: list[RealServer], start_trainer: Callable[[], Trainer]
) -> None:
    paths = requests_of(start_trainer())
    assert [path for path in paths if path not in ("/metrics", "/ready")] == [
        "/pause_generation",
        "/update_weight_version",
        "/release_memory_occupation",
        "/resume_memory_occupation",
        "/update_weights_from_disk",
        "/resume_memory_occupation",
        "/continue_generation",
    ]
    assert with_client(servers[0].url, Server.weight_version) == "synced"


def test_after_a_kill_between_or_within_any_two_requests_the_next_trainer_can_use_the_server(
    servers: list[RealServer], start_trainer: Callable[[], Trainer], reference: Any, model: Path
) -> None:
    expected = greedy(reference, 6)
    total = len(requests_of(start_trainer()))
    found = []

    async def next_trainer(server: Server) -> None:
        missing = await missing_memory(server)
        version = await server.weight_version()
        assert missing is Missing.NOTHING or version in (RELEASED, "synced"), "released weights have no name"
        found.append(missing)
        await colocation.recover(server, patience_seconds=5)
        assert await missing_memory(server) is Missing.NOTHING
        await server.load_weights(str(model), "next", SECONDS)
        answer = await sample(server, 6)
        assert (answer["output_ids"], answer["meta_info"]["weight_version"]) == (expected, "next")

    for within in (False, True):
        for done in range(total):
            trainer = start_trainer()
            for _ in range(done):
                trainer.next_request()
                trainer.proceed()
            trainer.next_request()
            if within:
                trainer.proceed()  # the request may be sent before the kill, or not
            trainer.kill()
            with_client(servers[0].url, next_trainer)
    assert set(found) == set(Missing), "the trainer was killed in every state of the memory"


def test_requests_in_flight_wait_for_the_memory_and_continue_with_the_new_weights(
    servers: list[RealServer], other_weights: Path, model: Path
) -> None:
    async def conversation(server: Server) -> None:
        await server.load_weights(str(model), "first", SECONDS)
        running = asyncio.create_task(sample(server, 480))
        while not await busy(server):
            assert not running.done(), "the request ended before the server was seen to be busy"
            await asyncio.sleep(0.01)
        await colocation.release(server)
        assert await server.weight_version() == RELEASED
        late = asyncio.create_task(sample(server, 3))
        await asyncio.sleep(0.5)
        assert not running.done()
        assert not late.done()
        await colocation.resume_weights(server)
        assert await missing_memory(server) is Missing.CACHE
        body = {"model_path": str(other_weights), "weight_version": "second", "flush_cache": True}
        await server.call("POST", "/update_weights_from_disk", SECONDS, body)
        await colocation.resume_all(server)
        spans = (await running)["meta_info"]["weight_versions"]
        assert [span["version"] for span in spans] == ["first", "second"]
        assert spans[-1]["end"] == 480
        assert (await late)["meta_info"]["weight_version"] == "second"

    with_client(servers[0].url, conversation)


def test_only_what_is_due_is_ordered(servers: list[RealServer]) -> None:
    async def conversation(server: Server) -> None:
        before = await orders(server)
        await colocation.resume_weights(server)
        await colocation.resume_all(server)
        assert await orders(server) == before
        await colocation.release(server)
        await colocation.release(server)
        assert await orders(server) == (before[0] + 1, before[1])
        await colocation.resume_weights(server)
        await colocation.resume_weights(server)
        assert await orders(server) == (before[0] + 1, before[1] + 1)
        await colocation.release(server)  # with the cache missing
        assert await missing_memory(server) is Missing.ALL
        await colocation.resume_all(server)
        assert await orders(server) == (before[0] + 2, before[1] + 4)
        assert len((await sample(server, 4))["output_ids"]) == 4

    with_client(servers[0].url, conversation)


def test_memory_that_another_program_released_is_not_touched(servers: list[RealServer]) -> None:
    async def order(server: Server, verb: str, tags: str) -> None:
        await server.send("POST", f"/{verb}_memory_occupation", SECONDS, {"tags": list(tags)})

    async def conversation(server: Server) -> None:
        # Tags that name no memory, so that only the counts change.
        await order(server, "release", "a")
        await order(server, "resume", "a")
        before = await orders(server)
        for verb in (colocation.release, colocation.resume_weights, colocation.resume_all):
            with pytest.raises(UnhealthyServerError, match="released by another program"):
                await verb(server)
        assert await orders(server) == before
        await order(server, "release", "abc")
        for tag in "abc":
            await order(server, "resume", tag)
        assert await missing_memory(server) is Missing.NOTHING

    with_client(servers[0].url, conversation)


def test_a_restarted_server_has_all_of_its_memory(servers: list[RealServer], other_weights: Path) -> None:
    with_client(servers[0].url, colocation.release)
    servers[0].restart()
    assert with_client(servers[0].url, missing_memory) is Missing.NOTHING
    with_client(servers[0].url, lambda server: colocation.recover(server, patience_seconds=5))
    assert len(with_client(servers[0].url, lambda server: sample(server, 4))["output_ids"]) == 4


def test_a_server_without_metrics_is_refused() -> None:
    fake = FakeServer()
    try:
        with pytest.raises(UnhealthyServerError, match="start it with --enable-metrics"):
            with_client(fake.url, colocation.release)
        assert fake.calls == ["/metrics"]
    finally:
        fake.close()


# The engine on stand-ins that fail between a release and a sync ------------------------------------------------------


@pytest.fixture
def colocated_servers() -> Iterator[list[FakeColocatedServer]]:
    servers = [FakeColocatedServer(), FakeColocatedServer()]
    yield servers
    for server in servers:
        server.close()
    assert [server.crashes for server in servers] == [[], []]


@pytest.fixture(params=["disk", "tensor"])
def engine(request: Any, colocated_servers: list[FakeColocatedServer], engine_on: Callable[..., Any]) -> Any:
    """A colocated engine on both servers, which have weights and memory."""
    made = colocated_engine(engine_on, colocated_servers, method=request.param)
    made.pool.membership.health_check_seconds = 0.1
    made.update_weights(no_weights(), 0)
    return made


def colocated_engine(engine_on: Callable[..., Any], servers: list[FakeColocatedServer], **settings: Any) -> Any:
    urls = [server.url for server in servers]
    made = engine_on(urls, stop=(), config=CONFIG, colocated=True, server_timeout_seconds=60.0, **settings)
    return made


def check_all_sample(engine: Any, servers: list[FakeColocatedServer]) -> None:
    """Check that all servers sample from the weights of version 1."""
    assert sorted(engine.pool.in_rotation) == sorted(server.url for server in servers)
    assert all(not server.missing and not server.paused for server in servers)
    for server in servers:
        server.seen.clear()
    asked = requests(10)
    check(asked, list(engine.generate(asked, SAMPLING)))
    assert all(server.seen for server in servers)


def test_a_server_that_is_unhealthy_when_memory_is_released_is_re_admitted_with_the_next_sync(
    engine: Any, colocated_servers: list[FakeColocatedServer]
) -> None:
    colocated_servers[0].healthy = False
    with engine.open(SAMPLING):
        wait_for(lambda: engine.pool.in_rotation == [colocated_servers[1].url])
    colocated_servers[0].healthy = True
    engine.release_memory()
    assert all(server.missing and server.paused for server in colocated_servers)
    engine.update_weights(no_weights(), 1)
    check_all_sample(engine, colocated_servers)


def test_a_server_that_dies_while_its_memory_is_released_is_re_admitted_only_with_the_next_sync(
    engine: Any, colocated_servers: list[FakeColocatedServer], caplog: pytest.LogCaptureFixture
) -> None:
    engine.release_memory()
    colocated_servers[0].stop()
    engine.update_weights(no_weights(), 1)
    assert engine.pool.in_rotation == [colocated_servers[1].url]
    colocated_servers[0].start()
    asked = requests(10)
    with engine.open(SAMPLING) as stream:
        wait_for(lambda: engine.pool.status()[0].state is ServerState.NEEDS_WEIGHTS)
        stream.submit(asked)
        check(asked, [stream.get()[1] for _ in asked])
    assert colocated_servers[0].seen == []
    assert "is re-admitted" not in caplog.text
    engine.release_memory()
    engine.update_weights(no_weights(), 1)
    check_all_sample(engine, colocated_servers)


@pytest.mark.parametrize("refusals", [1, 2])
def test_a_server_that_cannot_resume_its_memory_gets_no_weights(
    refusals: int, engine: Any, colocated_servers: list[FakeColocatedServer], caplog: pytest.LogCaptureFixture
) -> None:
    engine.release_memory()
    # The second refusal is of the order at the end of an update.
    colocated_servers[0].refusals, colocated_servers[0].calls = refusals, []
    engine.update_weights(no_weights(), 1)
    assert not [path for path in colocated_servers[0].calls if "weights_from" in path or path == "/begin_weight_update"]
    assert engine.pool.in_rotation == [colocated_servers[1].url]
    (line,) = removals(caplog)
    assert f"server {colocated_servers[0].url} is removed from rotation" in line
    assert "did not release or resume ('weights',)" in line
    engine.release_memory()
    engine.update_weights(no_weights(), 1)
    check_all_sample(engine, colocated_servers)


def test_a_trainer_that_exits_in_the_middle_of_a_step_leaves_the_memory_to_the_next(
    engine: Any, colocated_servers: list[FakeColocatedServer], engine_on: Callable[..., Any]
) -> None:
    engine.release_memory()
    for server in colocated_servers:
        server.calls.clear()
    engine.close()
    assert [server.calls for server in colocated_servers] == [[], []], "training may still hold the memory"
    engine = colocated_engine(engine_on, colocated_servers)
    assert all(not server.missing and not server.paused for server in colocated_servers)
    engine.update_weights(no_weights(), 1)
    check_all_sample(engine, colocated_servers)


@pytest.mark.parametrize("leader", [True, False])
def test_cached_memory_is_given_back_before_servers_resume_their_weights_and_again_before_their_caches(
    leader: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every rank: the servers share the GPUs of all of them."""
    from megatron_rlvr.engines.sglang import engine

    happened: list[str] = []

    class Pool:
        in_rotation = ("http://server",)

        def everywhere(self, order: Any, check_health: bool) -> dict[str, None]:
            happened.append(order.__name__)
            return {}

        def pushing_weights(self) -> Any:
            return contextlib.nullcontext()

        def weights_pushed(self, weights: Any, failures: Any) -> None:
            happened.append("sample")

    class Sync:
        announce = None

        def push(self, *arguments: Any) -> tuple[None, dict[str, str]]:
            happened.append("push")
            return None, {}

    for name, value in {"barrier": lambda: happened.append("barrier"), "get_rank": lambda: 0}.items():
        monkeypatch.setattr(engine.dist, name, value)
    monkeypatch.setattr(engine.process_group, "store", lambda: None)
    monkeypatch.setattr(engine.accelerator, "release_cached_memory", lambda: happened.append("give back"))
    monkeypatch.setattr(engine, "raise_on_all_ranks", lambda failure: happened.append(str(failure)))
    pool: Any = Pool() if leader else None
    sizes = {"vocab_size": 8, "max_sequence_tokens": 8}
    servers = engine.SglangEngine(pool, Sync(), stop_token_ids=[0], colocated=True, **sizes)  # type: ignore[arg-type]
    servers.update_weights([], 1)
    pushed = ["give back", "barrier", *["resume_weights"] * leader, "push", "give back", "barrier"]
    assert happened == [*pushed, *["resume_all", "sample"] * leader, "None"]
