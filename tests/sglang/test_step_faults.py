"""Tests of whole steps on real servers that die, freeze, restart with other weights, or run out of memory.

The collector, the engine, the graders and the servers are real. Each step must end with its number of groups, all
sampled from the weights of this run and graded once, and every removal from rotation must be in the log.
"""

import contextlib
import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from fake_server import FakeServer
from real_servers import TOLERANCE, RealServer, installed, logprobs_of, requests, sampling, version_at
from scripted import Layout, PlainTokenizer, joined_process_group, on_ranks, prompts_of, ranks_of, start_graders
from waiting import wait_for

from megatron_rlvr.checkpoint.store import latest_checkpoint
from megatron_rlvr.config import RewardSettings, RolloutSettings, SettingsError
from megatron_rlvr.data.tokenizer import load_tokenizer
from megatron_rlvr.engines.sglang.membership import ServerState
from megatron_rlvr.protocols import EngineError, WeightsMissingError
from megatron_rlvr.rollout.sampler import request_seed
from megatron_rlvr.types import Completion, CompletionRequest, Prompt

PROMPTS, GROUP_SIZE, LENGTH = 6, 8, 150

PARITY_REWARD = """\
import os


def first_token(prompt, response):
    file = os.open(os.path.join(os.path.dirname(__file__), "graded"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, (response + "\\n").encode())
    os.close(file)
    return sum(map(int, response.split())) % 2 == 0
"""


@pytest.fixture
def graders(tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "user_reward.py").write_text(PARITY_REWARD, encoding="ascii")
    with start_graders(tmp_path) as pool:
        yield pool


class Steps:
    """Steps of a run of one rank, with faults in the middle of them."""

    def __init__(self, engine: Any, ranks: Any, graders: Any, reference: Any, journal: Path, length: int) -> None:
        from megatron_rlvr.data.cursor import PromptCursor
        from megatron_rlvr.data.prompts import FilePrompts, PromptSet
        from megatron_rlvr.rollout.asynchronous import AsynchronousCollector
        from megatron_rlvr.rollout.sampler import Sampler

        self.engine, self.reference, self.journal = engine, reference, journal
        self.syncs = 0
        self.step = 0
        self.submitted: list[tuple[str, int]] = []
        reward = RewardSettings(overlong_buffer=0)
        sampler = Sampler(engine, PlainTokenizer(), graders, reward, leaders_only=True)  # type: ignore[arg-type]
        submit = sampler.submit_to_graders

        def record(prompt: Prompt, completion: Completion) -> Any:
            self.submitted.append((prompt.id, completion.index))
            return submit(prompt, completion)

        sampler.submit_to_graders = record  # type: ignore[method-assign]
        settings = RolloutSettings(
            engine="sglang",
            servers=["http://localhost:1"],
            group_size=GROUP_SIZE,
            max_response_tokens=length,
            partial=True,
            oversampling=1.5,
        )
        self.collector = AsynchronousCollector(
            sampler=sampler,
            cursor=PromptCursor(PromptSet(prompts_of([0.5] * 200), (FilePrompts("set", 0, 200, 1.0, 0),)), 0, True),
            ranks=ranks,
            settings=settings,
            groups_per_batch=PROMPTS,
            seed=0,
            store=dist.PrefixStore(str(id(self)), dist.HashStore()),
            sync=self.sync,
        )
        self.sync()

    def sync(self) -> None:
        self.syncs += 1
        self.engine.update_weights(self.reference.state_dict().items(), version=0)

    def take(self, fault: Callable[[], None] = lambda: None) -> None:
        """Run one step with ``fault`` at the eighth answer, and check the batch."""
        self.step += 1
        answers, encode = 0, self.engine.codec.encode
        due, over = threading.Event(), threading.Event()

        def encode_with_fault(*arguments: Any) -> Any:
            made = encode(*arguments)
            read = made.read

            def read_with_fault(answer: Any) -> Any:
                # The fault occurs while an answer is read, so that no other is: the other requests are unfinished.
                nonlocal answers
                answers += 1
                if answers == GROUP_SIZE:
                    due.set()
                    assert over.wait(60)
                return read(answer)

            made.read = read_with_fault
            return made

        def on_finished(count: int) -> None:
            # In the main thread, because a server ends with the thread that has started it.
            if due.is_set() and not over.is_set():
                fault()
                over.set()

        self.engine.codec.encode = encode_with_fault
        try:
            rollout = self.collector.collect(self.step, on_finished)
        finally:
            self.engine.codec.encode = encode
        assert answers >= GROUP_SIZE
        assert rollout.size == PROMPTS
        assert len(rollout.groups) == PROMPTS
        for ordered in rollout.groups:
            group = ordered.group
            assert len(group.completions) == GROUP_SIZE
            assert group.informative
            for completion in group.completions[:2]:
                assert completion.finish_reason == "length" or completion.token_ids[-1] == 2
                request = CompletionRequest(group.prompt, completion.index, 0)
                expected = logprobs_of(self.reference, request, completion)
                assert np.abs(expected - completion.logprobs).max() < TOLERANCE
                assert set(completion.weight_versions.tolist()) == {0}
        graded = self.journal.read_text().splitlines()
        assert len(graded) == len(self.submitted) == len(set(self.submitted)) >= GROUP_SIZE, (
            "no completion is graded twice"
        )


@pytest.fixture
def steps_on(engine_on: Any, one_rank: Any, graders: Any, reference: Any, tmp_path: Path) -> Iterator[Any]:
    made = []

    def make(servers: list[RealServer], length: int = LENGTH, **settings: Any) -> Steps:
        engine = engine_on([server.url for server in servers], stop=(2,), max_inflight=24, **settings)
        engine.pool.membership.health_check_seconds = 1.0
        made.append(Steps(engine, one_rank, graders, reference, tmp_path / "graded", length))
        return made[-1]

    yield make
    for steps in made:
        steps.collector.close()


def removals(caplog: pytest.LogCaptureFixture, server: RealServer) -> list[str]:
    lines = [record.getMessage() for record in caplog.records]
    return [line for line in lines if line.startswith(f"server {server.url} is removed from rotation")]


def usable_within(steps: Steps, count: int, seconds: float) -> None:
    pool = steps.engine.pool
    deadline = time.monotonic() + seconds
    with pool.open():
        while len(pool.in_rotation) < count:
            assert time.monotonic() < deadline, pool.in_rotation
            time.sleep(0.1)


def test_one_of_two_is_killed_and_restarts_with_other_weights_which_are_replaced(
    servers: list[RealServer], steps_on: Any, other_weights: Path, caplog: pytest.LogCaptureFixture
):
    steps = steps_on(servers)
    steps.take(servers[1].kill)
    assert len(removals(caplog, servers[1])) == 1
    assert steps.engine.pool.in_rotation == [servers[0].url]
    servers[1].restart(other_weights)
    steps.take()
    usable_within(steps, 2, 90)
    steps.take()
    assert len(removals(caplog, servers[1])) == 1


@pytest.mark.soak
def test_one_of_two_is_frozen_for_30_seconds(servers: list[RealServer], steps_on: Any):
    steps = steps_on(servers)
    timer = threading.Timer(30, servers[0].thaw)

    def freeze() -> None:
        servers[0].freeze()
        timer.start()

    steps.take(freeze)
    timer.join()
    usable_within(steps, 2, 90)
    steps.take()


@pytest.mark.parametrize("method", [pytest.param("disk", marks=pytest.mark.soak), "distributed"])
def test_all_are_killed_and_restart_with_other_weights(
    method: str, servers: list[RealServer], steps_on: Any, caplog: pytest.LogCaptureFixture
):
    steps = steps_on(servers, method=method, server_timeout_seconds=900.0)

    def restart_both() -> None:
        for server in servers:
            server.kill()
        for server in servers:
            server.start()

    steps.take(restart_both)
    pool = steps.engine.pool
    assert version_at(pool.in_rotation[0]) == pool.membership.expected.label, (
        "restarted servers have other weights, of another name"
    )
    assert steps.syncs == (1 if method == "disk" else 2), (
        "restarted servers can load a folder again, but not a broadcast"
    )
    assert all(len(removals(caplog, server)) >= 1 for server in servers)


def test_all_are_killed_for_good_and_what_was_sampled_is_kept(
    servers: list[RealServer], steps_on: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    steps = steps_on(servers, length=450)
    pool = steps.engine.pool
    patience = pool.patience_seconds
    buffer = steps.collector._buffer
    finished: list[Any] = []
    add = buffer.add

    def note(groups: Any) -> None:
        finished.extend(groups)
        add(groups)

    # A group whose completions all have one grade is not kept.
    monkeypatch.setattr(buffer, "add", note)

    def kill_both() -> None:
        pool.patience_seconds = 3.0  # only here, because it is also the time in which servers must load weights
        for server in servers:
            server.kill()

    with pytest.raises(EngineError, match=r"no server was healthy for 3 s") as caught:
        steps.take(kill_both)
    assert all(server.url in str(caught.value) for server in servers)
    assert "\n" not in str(caught.value)
    graded = len((tmp_path / "graded").read_text().splitlines())
    assert graded >= GROUP_SIZE
    assert sum(len(group.graded) for group in buffer.in_progress) + GROUP_SIZE * len(finished) == graded
    assert buffer.ready == [group for group in finished if group.group.informative]
    for server in servers:
        server.start()
    for server in servers:
        server.wait()
    pool.patience_seconds = patience
    steps.sync()
    steps.take()


@contextmanager
def garbage(port: int) -> Iterator[None]:
    """Answer every connection to ``port`` with bytes that are not HTTP."""
    with socket.create_server(("127.0.0.1", port), reuse_port=False) as listener:
        listener.settimeout(0.1)
        stop = threading.Event()

        def serve() -> None:
            while not stop.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                with connection, contextlib.suppress(OSError):  # the client may have disconnected
                    connection.sendall(bytes(range(256)))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def test_a_port_that_answers_garbage(
    servers: list[RealServer], steps_on: Any, engine_on: Any, caplog: pytest.LogCaptureFixture
):
    steps = steps_on(servers)
    with ExitStack() as stack:

        def replace() -> None:
            servers[1].kill()
            stack.enter_context(garbage(servers[1].port))

        steps.take(replace)
        steps.take()
        assert len(removals(caplog, servers[1])) == 1
        with pytest.raises(SettingsError, match=f"rollout.servers={servers[1].url}: the server cannot be used"):
            engine_on([server.url for server in servers], server_timeout_seconds=2.0)


def test_a_server_without_memory_for_all_its_requests_retracts_some(steps_on: Any, other_weights: Path, tmp_path: Path):
    small = RealServer(
        installed(),
        other_weights,
        tmp_path / "small.log",
        "--max-total-tokens",
        "700",
        "--schedule-conservativeness",
        "0.01",
    )
    small.start()
    try:
        small.wait()
        steps = steps_on([small])
        retractions: list[int] = []
        encode = steps.engine.codec.encode

        def encode_with_record(*arguments: Any) -> Any:
            made = encode(*arguments)
            read = made.read

            def read_with_record(answer: Any) -> Any:
                retractions.append(answer["meta_info"].get("num_retractions", 0))
                return read(answer)

            made.read = read_with_record
            return made

        steps.engine.codec.encode = encode_with_record
        steps.take()
        assert sum(retractions) > 0, "otherwise the server had enough memory"
    finally:
        small.kill()


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGKILL"])
def test_servers_are_idle_after_the_trainer_has_exited_and_a_saved_step_resumes(
    signal_name: str, servers: list[RealServer], model: Path, problems: Path, tmp_path: Path
):
    (tmp_path / "rewards.py").write_text(tiny.REWARDS, encoding="utf-8")
    folder = tmp_path / "run"
    settings = tiny.settings_for(
        model,
        problems,
        folder,
        rollout={
            "engine": "sglang",
            "servers": [server.url for server in servers],
            "group_size": 8,
            "max_response_tokens": 380,
            "max_rounds": 2,
            "partial": True,
        },
        reward={"function": "rewards:even"},
        sync={"method": "disk"},
        run={"dir": str(folder), "steps": 100, "save_every": 1},
        log={"rollouts": 1000},
    )
    config = tiny.write_settings(tmp_path / "config.yaml", settings)
    with (tmp_path / "out").open("wb") as out:
        trainer = tiny.start_train(config, cwd=tmp_path, ranks=0, stdout=out)
        try:
            deadline = time.monotonic() + 480
            while not (folder / "checkpoints" / "latest").exists() or all(idle(server) for server in servers):
                assert trainer.poll() is None, (tmp_path / "out").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            if signal_name == "SIGKILL":
                for server in servers:
                    # The server looks for disconnected clients every 4 s; the requests might end by themselves sooner.
                    server.freeze("sglang::scheduler")
            else:
                time.sleep(0.5)  # the busy server samples the first tokens of requests that take 4 to 8 s
            before = sum(map(aborted, servers))
            trainer.send_signal(getattr(signal, signal_name))
            start = time.monotonic()
            trainer.wait(timeout=60)
            seconds = time.monotonic() - start
            deadline = time.monotonic() + 60
            while sum(map(aborted, servers)) == before:
                assert time.monotonic() < deadline, "the requests are not aborted"
                time.sleep(0.2)
        finally:
            trainer.kill()
            trainer.wait()
            for server in servers:
                server.thaw()
    deadline = time.monotonic() + 60
    while not all(idle(server) for server in servers):
        assert time.monotonic() < deadline, "a request still runs, and no client reads its answer"
        time.sleep(0.2)
    if signal_name == "SIGTERM":
        assert (trainer.returncode, seconds < 40) == (0, True)
        assert "stopped by SIGTERM after step" in (tmp_path / "out").read_text()
        check_that_it_resumes(folder, config, model)


def check_that_it_resumes(folder: Path, config: Path, model: Path) -> None:
    """Check what a run that was stopped while it sampled has saved, and that the next run resumes with it."""
    last = latest_checkpoint(folder / "checkpoints")
    assert last is not None
    assert last.number == 1, "the signal arrived while the run sampled"
    state = last.state()["collector"]
    partial = [part for group in state["in_progress"] for part in group["partial"]]
    assert partial
    assert all(len(part["token_ids"]) for part in partial)
    for path in last.folder.glob("*.distcp"):
        assert path.samefile(last.folder.with_name(f"step_{last.step:06d}") / path.name), "written once"
    again = tiny.run_train(config, f"--run.steps={last.step + 1}", cwd=config.parent)
    assert again.returncode == 0, again.stderr
    sampled = read_lines(folder / "rollouts" / f"step_{last.step + 1:06d}.jsonl")
    tokenizer = load_tokenizer(str(model))
    texts = [tokenizer.decode(part["token_ids"].tolist()[:20]) for part in partial]
    assert [text for text in texts if any(line["response"].startswith(text) for line in sampled)], (
        "the responses were not resumed"
    )
    steps = [line["step"] for line in read_lines(folder / "metrics.jsonl")]
    assert steps == list(range(1, last.step + 2))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def idle(server: RealServer) -> bool:
    """Return whether the server has no requests: only an idle server flushes its cache."""
    request = urllib.request.Request(server.url + "/flush_cache", data=b"{}", method="POST")
    try:
        with urllib.request.urlopen(request, timeout=30):
            return True
    except urllib.error.HTTPError as error:
        if error.code != 400:
            raise
        return False


def aborted(server: RealServer) -> float:
    """Return the number of requests that were aborted, or whose client had disconnected."""
    with urllib.request.urlopen(server.url + "/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("sglang:num_aborted_requests_total"))


def test_each_token_has_the_version_of_its_weights_when_they_change_during_a_request(
    servers: list[RealServer], engine_on: Any, reference: Any
):
    engine = engine_on([server.url for server in servers], max_inflight=4)
    engine.update_weights(reference.state_dict().items(), version=0)
    asked = requests(96)
    changed = {name: 1.1 * tensor for name, tensor in reference.state_dict().items()}
    with engine.open(sampling(450, temperature=1.0)) as stream:
        stream.submit(asked)
        # They end at random times, so that most of the eight requests that run during the push have tokens of both.
        found = [stream.get() for _ in range(8)]
        engine.update_weights(changed.items(), version=1)
        found += [stream.get() for _ in asked[8:]]
    other = type(reference)(reference.config).eval()
    other.load_state_dict(changed)
    mixed = 0
    for request, completion in found:
        versions = completion.weight_versions
        assert versions.tolist() == sorted(versions.tolist())
        mixed += len(set(versions.tolist())) == 2
        by_version = [logprobs_of(weights, request, completion) for weights in (reference, other)]
        expected = np.where(versions == 0, *by_version)
        assert np.abs(completion.logprobs - expected).max() < TOLERANCE
    assert mixed > 2


# On a stand-in for a server -------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A stand-in that reports the vocabulary of the tiny model."""
    monkeypatch.setattr("fake_server.VOCABULARY", tiny.model_config()["vocab_size"])
    server = FakeServer()
    yield server
    server.close()


def test_a_run_without_servers_ends_with_one_line_and_resumes_with_what_was_sampled(
    fake: FakeServer, model: Path, problems: Path, tmp_path: Path
):
    (tmp_path / "rewards.py").write_text(tiny.REWARDS, encoding="utf-8")
    folder, prompts, group_size = tmp_path / "run", 2, 3
    good = prompts * group_size + group_size + 1  # the second step's first group, and one completion of the other

    def die(answer: dict[str, Any]) -> Any:
        # Requests are sent one by one, so that the trainer has the answers to all earlier ones.
        if len(fake.seen) <= good:
            return answer
        fake.healthy = False
        return []

    fake.spoil = die
    settings = tiny.settings_for(
        model,
        problems,
        folder,
        rollout={
            "engine": "sglang",
            "servers": [fake.url],
            "group_size": group_size,
            "max_response_tokens": 16,
            "dynamic_sampling": False,
            "max_inflight": 1,
            "max_logprob_gap": 1e6,  # its answers do not come from the policy's weights
            "server_timeout_seconds": 15.0,
        },
        batch={"prompts": prompts, "mini_batch_prompts": prompts, "tokens_per_micro_batch": 512},
        reward={"function": "rewards:even"},
        sync={"method": "disk"},
        run={"dir": str(folder), "steps": 3, "save_every": 0, "async_save": True},
    )
    del settings["rollout"]["max_rounds"]
    config = tiny.write_settings(tmp_path / "config.yaml", settings)
    ended = tiny.run_train(config, cwd=tmp_path)
    output = ended.stdout + ended.stderr
    assert ended.returncode == 1, output
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("megatron_rlvr: ")]
    assert "rollout.server_timeout_seconds=15: no server was healthy for 15 s (" in line
    assert fake.url in line

    last = latest_checkpoint(folder / "checkpoints")
    assert last is not None
    assert last.step == 1
    state = last.state()["collector"]
    ready = [state["finished"][number] for number in state["ready"]]
    held = [(group, completion) for group in ready for completion in group["completions"]]
    held += [(group, completion) for group in state["in_progress"] for completion, _ in group["graded"]]
    assert len(held) == group_size + 1
    fake.spoil, fake.healthy = lambda answer: answer, True
    fake.seen.clear()
    again = tiny.run_train(config, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    asked = [body["sampling_params"]["sampling_seed"] for body in fake.seen]
    assert len(asked) == len(set(asked)) == 2 * prompts * group_size - len(held)
    assert not set(asked) & {request_seed(0, f"train/{g['order']}", g["prompt"], c["index"]) for g, c in held}
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["rollout/groups_sampled"] for line in lines] == [prompts] * 3


def test_servers_that_no_rank_gives_their_weights_need_a_sync_when_patience_is_over(fake: FakeServer, engine_on: Any):
    engine = engine_on([fake.url])
    engine.update_weights(iter({"weight": torch.zeros(1)}.items()), version=0)
    pool = engine.pool
    pool.membership.health_check_seconds = 0.1
    pool.weights_pushed(replace(pool.membership.expected, load=None), {})  # as on a rank that leaves loading to another

    def state() -> ServerState:
        (server,) = pool.status()
        return server.state

    with engine.open(sampling(16)) as stream:
        fake.healthy, fake.version = False, "default"
        wait_for(lambda: state() is ServerState.UNHEALTHY, 60)
        fake.healthy = True
        wait_for(lambda: state() is ServerState.NEEDS_WEIGHTS, 60)
        stream.submit(requests(1))
        assert stream.get(1.0) is None, "another rank may still have it load the weights"
        fake.version = pool.membership.expected.label
        assert stream.get(60.0) is not None
        assert state() is ServerState.HEALTHY
        fake.healthy, fake.version = False, "default"
        wait_for(lambda: state() is ServerState.UNHEALTHY, 60)
        fake.healthy = True
        wait_for(lambda: state() is ServerState.NEEDS_WEIGHTS, 60)
        pool.patience_seconds = 0.5
        with pytest.raises(WeightsMissingError, match="no server holds the current weights"):
            stream.get(60.0)


def generate_and_count(layout: Layout, url: str, model: Path, folder: Path) -> list[int]:
    """Return, for two calls of `generate`, how many ranks still sampled when this rank entered the final collective."""
    from unittest import mock

    from megatron_rlvr.config import RolloutSettings
    from megatron_rlvr.distributed import process_group
    from megatron_rlvr.engines.sglang import engine as sglang
    from megatron_rlvr.engines.sglang.connect import connect
    from megatron_rlvr.engines.sglang.weight_sync.disk import DiskSync
    from megatron_rlvr.hf.files import read_config

    with joined_process_group():
        ranks, config = ranks_of(layout), read_config(model)
        pool = connect(RolloutSettings(engine="sglang", servers=[url]), ranks, config, max_sequence_tokens=512)
        sync = DiskSync(folder / "sync", model, pool, ranks)
        vocabulary = config["vocab_size"]
        engine = sglang.SglangEngine(pool, sync, stop_token_ids=(2,), vocab_size=vocabulary, max_sequence_tokens=512)
        engine.update_weights(iter({"weight": torch.zeros(1)}.items()), version=0)
        store, on_all, missing = process_group.store(), sglang.raise_on_all_ranks, []
        for call in range(2):

            def count_missing(failure: Exception | None, key: str = f"over/{call}") -> None:
                missing.append(ranks.world_size - store.add(key, 0))
                on_all(failure)

            # The first rank has the most requests.
            mine = requests(12 if ranks.is_main else 2) if ranks.replica_rank == 0 else []
            with mock.patch.object(sglang, "raise_on_all_ranks", count_missing):
                answers = engine.generate(mine, sampling(16))
                found = [next(answers) for _ in mine]
                store.add(f"over/{call}", 1)
                assert list(answers) == []
            assert len(found) == len(mine)
        engine.close()
        return missing


@pytest.mark.parametrize("replicas", [((0, 1),), ((0,), (1,))], ids=["one leader", "two leaders"])
def test_ranks_without_requests_wait_for_the_others_outside_of_collectives(
    replicas: Any, fake: FakeServer, model: Path, tmp_path: Path
):
    fake.delay = 1.0
    assert on_ranks(generate_and_count, 2, Layout(replicas), fake.url, model, tmp_path) == [[0, 0]] * 2
