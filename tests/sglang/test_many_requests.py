"""Many requests at once: more than this process may open connections for, and more than it can read in time."""

import asyncio
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import fake_server
import pytest
from aiohttp import web
from fake_server import FakeServer
from pool_runs import removals
from waiting import wait_for

from megatron_rlvr import open_files
from megatron_rlvr.engines.sglang import dispatch
from megatron_rlvr.engines.sglang.connect import in_turn
from megatron_rlvr.engines.sglang.dispatch import Dispatcher
from megatron_rlvr.engines.sglang.membership import Membership
from megatron_rlvr.engines.sglang.pool import ServerPool
from megatron_rlvr.engines.sglang.request import AbortedRequestError, RequestStream, ServerRequest

TOKENS = 8


@pytest.fixture
def apart() -> Iterator[list[str]]:
    """Two servers that answer after a second, in processes of their own."""
    command = [sys.executable, fake_server.__file__, "1.0"]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    yield [process.stdout.readline().strip() for process in started if process.stdout]
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def few_files() -> Iterator[int]:
    """A limit of 300 open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    yield 300
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def pool_of(urls: list[str], **options: Any) -> ServerPool:
    return ServerPool(urls, **({"max_inflight": 512, "retries": 0, "patience_seconds": 60.0} | options))


def requests(count: int) -> list[ServerRequest]:
    """Return requests whose results are numbers of tokens."""

    def read(answer: Any) -> int:
        length = len(answer["output_ids"])
        if answer["meta_info"]["finish_reason"]["type"] == "abort":
            raise AbortedRequestError("aborted", length)
        return length

    body = {"input_ids": [1], "sampling_params": {"max_new_tokens": TOKENS}}
    return [ServerRequest(f"request {i}", body, read, 60.0) for i in range(count)]


@pytest.mark.parametrize("counted", [True, False], ids=["requests are held back", "connections are refused"])
def test_512_requests_under_a_limit_of_300_files_remove_no_healthy_server(
    counted: bool, apart: list[str], few_files: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    if not counted:  # others may have opened files since they were counted
        monkeypatch.setattr(open_files, "room", lambda: 10_000)
    pool = pool_of(apart, health_check_seconds=0.2)
    most = 0
    try:
        with pool.open() as stream:
            stream.submit(requests(512))
            found: list[Any] = []
            while len(found) < 512:
                found.append(stream.get(60.0))
                with suppress(OSError):  # there is none left to count them
                    most = max(most, open_files.is_open())
    finally:
        pool.close()
    assert found == [TOKENS] * 512
    assert removals(caplog) == []
    assert most <= few_files
    held_back = [r for r in caplog.records if "open files leaves" in r.getMessage()]
    assert len(held_back) == (1 if counted else 0)


class SlowToEnd(FakeServer):
    """A server that ends aborted requests one after the other, or after some not at all.

    Attributes:
        ends: Number of requests that it still ends.
    """

    def __init__(self, ends: int) -> None:
        self.ends = ends
        super().__init__()
        self._turn = asyncio.Lock()

    async def _generate(self, request: web.Request) -> web.Response:
        answer = await super()._generate(request)
        async with self._turn:
            self.ends -= 1
            await asyncio.sleep(0.05 if self.ends >= 0 else 3600.0)
        return answer


@pytest.mark.parametrize("answered", [40, 25])
def test_an_abort_takes_as_long_as_answers_arrive_and_logs_what_it_gives_up(
    answered: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(dispatch, "_SILENT_SECONDS", 1.0)
    monkeypatch.setattr(dispatch, "_REPEAT_ABORT_SECONDS", 0.1)
    server = SlowToEnd(ends=answered)
    server.delay = 3600.0
    pool = pool_of([server.url])
    try:
        with pool.open() as stream:
            stream.submit(requests(40))
            wait_for(lambda: server.running == 40)
            start = time.monotonic()
            partial = stream.abort()
            assert time.monotonic() - start > answered * 0.05 > 1.0
    finally:
        pool.close()
        server.close()
    assert partial == [TOKENS // 2] * answered
    given_up = [record.getMessage() for record in caplog.records if "given up" in record.getMessage()]
    lost = 40 - answered
    assert [text.partition(" are")[0] for text in given_up] == (
        [f"{lost} responses of at most {lost * TOKENS} new tokens"] if lost else []
    )


class SlowToReport(FakeServer):
    """A server whose health checks take half a second, so that one is nearly always under way."""

    async def _health(self, request: web.Request) -> web.Response:
        await asyncio.sleep(0.5)
        return await super()._health(request)


def test_a_health_check_counts_only_if_this_process_was_on_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("megatron_rlvr.engines.sglang.client._HEALTH_SECONDS", 1.5)
    server = SlowToReport()
    pool = pool_of([server.url], health_check_seconds=0.01)
    try:
        with pool.open():
            for _ in range(3):
                time.sleep(0.3)
                pool._loop.call_soon(lambda: time.sleep(2.0))
                time.sleep(2.0)
            assert pool._loop.late() > 4.0
            assert removals(caplog) == []
            server.healthy = None
            wait_for(lambda: removals(caplog))
    finally:
        pool.close()
        server.close()


class _Unanswered:
    """A server that answers nothing."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def generate(self, body: Any, timeout_seconds: float) -> Any:
        await asyncio.sleep(3600.0)


class _HereAndNow:
    """The parts of an event loop's thread that a dispatcher uses, in this thread."""

    on_failure = None

    def start(self, coroutine: Any) -> "asyncio.Task[None]":
        return asyncio.get_running_loop().create_task(coroutine)


@pytest.mark.parametrize(
    ("leaders", "each", "servers"), [(32, 16, 64), (16, 80, 64), (4, 48, 64), (4, 512, 16), (32, 2, 64), (3, 7, 5)]
)
def test_requests_go_evenly_to_servers_from_leaders_that_do_not_know_of_each_other(
    leaders: int, each: int, servers: int
):
    urls = [f"http://{number}" for number in range(servers)]

    async def running() -> Counter[str]:
        found: Counter[str] = Counter()
        for leader in range(leaders):
            members = Membership([_Unanswered(url) for url in in_turn(urls, leader, leaders)], 10.0)  # type: ignore[misc]
            dispatcher = Dispatcher(members, _HereAndNow(), max_inflight=each, retries=0)  # type: ignore[arg-type]
            stream = RequestStream(lambda *_: None, lambda *_: None)
            dispatcher.submit(stream, requests(each))
            found.update({member.server.url: len(member.running) for member in members.members})
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        return found

    found = asyncio.run(running())
    mean = leaders * each / servers
    assert sum(found.values()) == leaders * each
    assert mean - 1 < min(found[url] for url in urls) <= max(found.values()) < mean + 1


def test_the_soft_limit_is_raised_to_the_hard_one(few_files: int):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert open_files.raise_limit() == min(hard, 2**20) > few_files
    assert open_files.limit() == min(hard, 2**20)
