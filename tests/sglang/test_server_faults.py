"""Tests of the engine on servers that misbehave: stand-ins that lie, hang, refuse requests and die on demand."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_server import VOCABULARY, FakeColocatedServer, FakeServer, aborted, cut_in_half, good_answer
from pool_runs import CONFIG, LENGTH, SAMPLING, check, no_weights, removals, requests
from scripted import Layout, joined_process_group, on_ranks, ranks_of
from waiting import wait_for

from megatron_rlvr.config import SettingsError
from megatron_rlvr.engines.sglang.membership import ServerState
from megatron_rlvr.protocols import EngineError, WeightsMissingError


@pytest.fixture
def fakes() -> Iterator[list[FakeServer]]:
    servers = [FakeServer(), FakeServer()]
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def engine(fakes: list[FakeServer], engine_on: Callable[..., Any]) -> Any:
    """An engine on both servers, with weights of version 1. The pool's patience is shorter than a request's timeout."""
    made = with_frequent_health_checks(
        engine_on([fake.url for fake in fakes], stop=(), config=CONFIG, server_timeout_seconds=60.0)
    )
    made.update_weights(no_weights(), version=1)
    return made


def with_frequent_health_checks(engine: Any) -> Any:
    engine.pool.membership.health_check_seconds = 0.1
    return engine


def spoiled(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function that replaces entries of an answer: output_ids, or entries of meta_info."""

    def spoil(answer: dict[str, Any]) -> dict[str, Any]:
        whole = {key: changes[key] for key in changes if key == "output_ids"}
        return (
            answer | whole | {"meta_info": answer["meta_info"] | {k: v for k, v in changes.items() if k not in whole}}
        )

    return spoil


def shortened(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the answer without its last token."""
    meta = answer["meta_info"]
    return answer | {
        "output_ids": answer["output_ids"][:-1],
        "meta_info": meta | {"output_token_logprobs": meta["output_token_logprobs"][:-1]},
    }


def with_token(answer: dict[str, Any], token: Any, logprob: Any = -0.5) -> dict[str, Any]:
    """Return the answer with another second token."""
    meta = answer["meta_info"]
    logprobs = [entry if i != 1 else [logprob, token, None] for i, entry in enumerate(meta["output_token_logprobs"])]
    tokens = [known if i != 1 else token for i, known in enumerate(answer["output_ids"])]
    return answer | {"output_ids": tokens, "meta_info": meta | {"output_token_logprobs": logprobs}}


def spanned(*spans: tuple[str | None, int]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function that gives an answer spans of (name of the weights, or None for the server's own; end)."""

    def spoil(answer: dict[str, Any]) -> dict[str, Any]:
        label = answer["meta_info"]["weight_version"]
        starts = [0, *(end for _, end in spans)]
        weight_versions = [
            {"version": v or label, "start": s, "end": e} for s, (v, e) in zip(starts, spans, strict=False)
        ]
        return spoiled(weight_versions=weight_versions)(answer)

    return spoil


NONSENSE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no tokens": (lambda answer: {"meta_info": answer["meta_info"]}, "lacks tokens"),
    "a list": (lambda answer: [answer], "no JSON object"),
    "no logprobs": (spoiled(output_token_logprobs=None), "log-probabilities of other tokens"),
    "few logprobs": (spoiled(output_token_logprobs=[[-0.5, 1, None]]), "log-probabilities of other tokens"),
    "empty": (spoiled(output_ids=[]), "0 tokens"),
    "too long": (spoiled(output_ids=[1] * 6), "6 tokens, not 1 to 5"),
    "too short": (shortened, "4 tokens has finish reason 'length'"),
    "outside the vocabulary": (lambda answer: with_token(answer, VOCABULARY), "token id 50, outside"),
    "negative": (lambda answer: with_token(answer, -1), "token id -1, outside"),
    "text": (lambda answer: with_token(answer, "x"), "token id 'x', outside"),
    "NaN": (lambda answer: with_token(answer, 3, float("nan")), "log-probability nan"),
    "impossible": (lambda answer: with_token(answer, 3, 0.5), "log-probability 0.5"),
    "null": (lambda answer: with_token(answer, 3, None), "log-probability None"),
    "half a span": (spanned((None, 3)), "does not give the weights"),
    "a span of others": (spanned((None, 3), ("x", 5)), "sampled from weights x, which are not of this run"),
    "aborted": (cut_in_half, "aborted the request: Abort"),
    "other weights": (spoiled(weight_version="1"), "sampled from weights 1, which are not of this run"),
    "stopped by text": (
        spoiled(finish_reason={"type": "stop", "matched": "NaN happened"}),
        "stopped by 'NaN happened' and ends with [",
    ),
    "no finish reason": (spoiled(finish_reason=None), "lacks tokens, log-probabilities or a finish reason"),
    "a string as finish reason": (
        spoiled(finish_reason="length"),
        "lacks tokens, log-probabilities or a finish reason",
    ),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_nonsense_answer_removes_the_server_with_one_line_and_its_requests_go_to_the_other(
    name: str, fakes: list[FakeServer], engine: Any, caplog: pytest.LogCaptureFixture
):
    fakes[0].spoil, reason = NONSENSE[name]
    engine.pool.membership.health_check_seconds = 600.0  # its health check, which succeeds, does not re-admit it
    asked = requests(20)
    check(asked, list(engine.generate(asked, SAMPLING)))
    (line,) = removals(caplog)
    assert line.startswith(f"server {fakes[0].url} is removed from rotation")
    assert reason in line
    assert engine.pool.in_rotation == [fakes[1].url]
    removed, other = engine.pool.status()
    assert (removed.url, removed.state, removed.removals) == (fakes[0].url, ServerState.UNHEALTHY, 1)
    assert reason in removed.reason
    assert (other.url, other.state, other.removals, other.reason) == (fakes[1].url, ServerState.HEALTHY, 0, "")


def test_a_hanging_server_fails_its_health_check_long_before_its_requests_time_out(
    fakes: list[FakeServer], engine: Any, caplog: pytest.LogCaptureFixture
):
    def hang(answer: dict[str, Any]) -> None:
        fakes[0].healthy = len(fakes[0].seen) < 5  # unhealthy once all of its requests have arrived

    fakes[0].spoil = hang
    asked = requests(10)
    start = time.monotonic()
    check(asked, list(engine.generate(asked, SAMPLING)))
    assert time.monotonic() - start < 60, "no request can have timed out"
    assert "/health answered 503" in removals(caplog)[0]
    assert len(fakes[0].seen) == 5, "a request goes to the server with the fewest running requests"


def test_a_request_that_times_out_is_sent_to_another_server(
    fakes: list[FakeServer], engine: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("megatron_rlvr.engines.sglang.completions._SECONDS_PER_REQUEST", 3.0)
    monkeypatch.setattr("megatron_rlvr.engines.sglang.completions._SECONDS_PER_TOKEN", 0.01)
    fakes[0].spoil = lambda answer: None
    asked = requests(10)
    check(asked, list(engine.generate(asked, SAMPLING)))


def test_a_server_that_restarts_with_other_weights_loads_the_current_ones(
    fakes: list[FakeServer], engine: Any, caplog: pytest.LogCaptureFixture
):
    fakes[0].delay, fakes[1].delay = 60.0, 0.05
    asked = requests(200)
    answers = engine.generate(asked, SAMPLING)
    completions = [next(answers) for _ in range(20)]
    wait_for(lambda: fakes[0].running == 64)
    fakes[0].stop()
    # More than the other server had: some of the requests lost by the first are among them.
    completions += [next(answers) for _ in range(150)]
    label = fakes[0].version
    fakes[0].version, fakes[0].loaded, fakes[0].delay = "default", [], 0.05
    fakes[0].start()
    wait_for(lambda: len(engine.pool.in_rotation) == 2)
    sent = len(fakes[0].seen)
    completions += answers
    check(asked, completions)
    assert len(removals(caplog)) == 1
    assert fakes[0].version == label
    assert len(fakes[0].loaded) == 1
    more = requests(10)
    check(more, list(engine.generate(more, SAMPLING)))
    assert len(fakes[0].seen) >= sent + 5


@pytest.mark.parametrize(
    "fault", [500, 503, {"meta_info": {"finish_reason": {"type": "abort"}, "weight_version": ""}, "output_ids": []}]
)
def test_one_failure_is_retried_and_consecutive_failures_remove_the_server(
    fault: Any, fakes: list[FakeServer], engine: Any, caplog: pytest.LogCaptureFixture
):
    left = [2]

    def fail_twice(answer: dict[str, Any]) -> Any:
        left[0] -= 1
        return fault if left[0] >= 0 else answer

    fakes[0].spoil = fail_twice
    asked = requests(20)
    check(asked, list(engine.generate(asked, SAMPLING)))
    assert removals(caplog) == []
    fakes[0].spoil = lambda answer: fault
    fakes[0].healthy = False
    check(asked, list(engine.generate(asked, SAMPLING)))
    assert len(removals(caplog)) == 1


def test_no_healthy_server_for_too_long_is_one_error_that_names_them_all(fakes: list[FakeServer], engine: Any):
    engine.pool.patience_seconds = 2.0
    for fake in fakes:
        fake.stop()
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"rollout.server_timeout_seconds=2: no server was healthy for 2 s") as error:
        list(engine.generate(requests(20), SAMPLING))
    assert 2 <= time.monotonic() - start < 30
    assert all(fake.url in str(error.value) for fake in fakes)
    for fake in fakes:
        fake.start()


def test_sampling_continues_when_a_server_is_re_admitted_in_time(fakes: list[FakeServer], engine: Any):
    for fake in fakes:
        fake.stop()

    def restart_once_removed() -> None:
        wait_for(lambda: not engine.pool.in_rotation)
        fakes[1].start()

    restarting = threading.Thread(target=restart_once_removed)
    restarting.start()
    asked = requests(20)
    check(asked, list(engine.generate(asked, SAMPLING)))
    restarting.join()
    fakes[0].start()


def test_a_request_that_fails_on_every_server_ends_sampling_with_its_reason(fakes: list[FakeServer], engine: Any):
    for fake in fakes:
        fake.spoil = lambda answer: 500 if answer["output_ids"][0] == 3 else answer
    with pytest.raises(EngineError, match=r"completion 0 of prompt set/2 failed 4 times, .* /generate answered 500"):
        list(engine.generate(requests(8), SAMPLING))
    assert all(server.requests_running == 0 for server in engine.pool.status()), "no request may still run"
    for fake in fakes:
        fake.spoil = lambda answer: 400
    with pytest.raises(
        EngineError, match=r"completion . of prompt set/\d was refused 4 times, last on .*: /generate answered 400"
    ):
        list(engine.generate(requests(8), SAMPLING))


def test_a_defect_in_reading_an_answer_is_raised_where_the_answers_are_awaited(
    fakes: list[FakeServer], engine: Any, monkeypatch: pytest.MonkeyPatch
):
    encode = engine.codec.encode

    def encode_with_defect(*arguments: Any) -> Any:
        request = encode(*arguments)
        request.read = lambda answer: 1 / 0
        return request

    monkeypatch.setattr(engine.codec, "encode", encode_with_defect)
    with pytest.raises(ZeroDivisionError):
        list(engine.generate(requests(1), SAMPLING))
    assert all(server.requests_running == 0 for server in engine.pool.status())


def test_requests_in_flight_are_bounded_and_distributed_by_load(fakes: list[FakeServer], engine_on: Callable[..., Any]):
    engine = engine_on([fake.url for fake in fakes], stop=(), config=CONFIG, max_inflight=4)
    engine.update_weights(no_weights(), version=1)
    for fake in fakes:
        fake.delay = 0.2
    asked = requests(60)
    check(asked, list(engine.generate(asked, SAMPLING)))
    assert [fake.max_running for fake in fakes] == [4, 4]
    assert all(len(fake.seen) > 20 for fake in fakes)
    fakes[0].delay = 60.0
    fakes[0].seen, fakes[1].seen = [], []
    answers = engine.generate(asked, SAMPLING)
    for _ in range(56):
        next(answers)
    wait_for(lambda: fakes[0].running == 4)
    assert [len(fake.seen) for fake in fakes] == [4, 56], "a slow server gets less"
    answers.close()


def test_the_body_of_a_request(fakes: list[FakeServer], engine: Any):
    (request,) = requests(1)
    check([request], list(engine.generate([request], SAMPLING)))
    (body,) = fakes[0].seen + fakes[1].seen
    assert body.pop("rid")
    assert body == {
        "input_ids": [1, 0],
        "return_logprob": True,
        "sampling_params": {
            "max_new_tokens": 5,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "stop_token_ids": [],
            "sampling_seed": request.seed,
        },
    }


def test_weights_are_loaded_while_paused_and_a_server_that_fails_to_load_is_removed(
    fakes: list[FakeServer], engine: Any, caplog: pytest.LogCaptureFixture
):
    load = ["/pause_generation", "/update_weights_from_disk", "/continue_generation", "/model_info"]
    assert all(fake.calls[-4:] == load for fake in fakes)
    fakes[0].loads = False
    for _ in range(2):
        engine.update_weights(no_weights(), version=1)
    (line,) = removals(caplog)
    assert "did not load weights" in line
    assert "disk on fire" in line
    assert fakes[0].calls[-2:] == ["/update_weights_from_disk", "/continue_generation"]
    engine.pool.membership.health_check_seconds = 600.0  # its health check does not re-admit it
    asked = requests(6)
    check(asked, list(engine.generate(asked, SAMPLING)))
    assert len(fakes[1].seen) == 6
    fakes[1].loads = False
    with pytest.raises(EngineError, match=r"no server took the weights of version 2; .*disk on fire"):
        engine.update_weights(no_weights(), version=2)
    fakes[0].loads = fakes[1].loads = True
    engine.update_weights(no_weights(), version=1)
    assert len(engine.pool.in_rotation) == 2


def test_a_server_that_already_has_new_weights_stays_in_rotation_while_another_is_loading_them(
    fakes: list[FakeServer], engine: Any, caplog: pytest.LogCaptureFixture
):
    answered = threading.Event()
    fakes[1].load_waits = lambda: not answered.is_set()
    changing = threading.Thread(target=engine.update_weights, args=(no_weights(), 2))
    asked = requests(10)
    with engine.open(SAMPLING) as stream:
        changing.start()
        try:
            wait_for(lambda: fakes[0].version.endswith("-2") and fakes[1].loading)
            stream.submit(asked)
            found = [stream.get()[1] for _ in asked]
        finally:
            answered.set()
            changing.join()
    assert {version for completion in found for version in completion.weight_versions.tolist()} == {1, 2}
    assert removals(caplog) == []
    assert len(fakes[0].seen) + len(fakes[1].seen) == len(asked)


def test_a_folder_that_cannot_be_written_is_an_error_raised_after_all_weights_were_gathered(engine: Any):
    gathered = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(5):
            gathered.append(i)
            yield f"weight.{i}", torch.zeros(1)

    engine.weight_sync._source = engine.weight_sync._source / "missing"
    with pytest.raises(EngineError, match=r"sync\.dir=.*: weights .* cannot be written"):
        engine.update_weights(weights(), version=2)
    assert gathered == [0, 1, 2, 3, 4], "other ranks wait in the collectives that gather them"


def test_each_server_that_cannot_be_used_is_reported_in_one_line_before_the_run(
    fakes: list[FakeServer], engine_on: Callable[..., Any], caplog: pytest.LogCaptureFixture
):
    fakes[0].model_type = "llama"
    fakes[1].stop()
    with pytest.raises(SettingsError) as error:
        engine_on([fake.url for fake in fakes], config=CONFIG, server_timeout_seconds=0.5)
    lines = [str(error.value), *(r.getMessage() for r in caplog.records if r.levelno == logging.ERROR)]
    assert len(lines) == 2
    assert f"rollout.servers={fakes[1].url}: the server cannot be used" in lines[0]
    assert f"rollout.servers={fakes[0].url}: the server serves another model (model_type llama, not qwen3" in lines[1]
    fakes[1].start()


def test_a_dropped_iterator_leaves_no_requests_and_close_ends_the_thread(fakes: list[FakeServer], engine: Any):
    for fake in fakes:
        fake.delay = 0.2
    answers = engine.generate(requests(40), SAMPLING)
    next(answers)
    answers.close()
    assert all(server.requests_running == 0 for server in engine.pool.status())
    asked = requests(4)
    check(asked, list(engine.generate(asked, SAMPLING)))
    engine.close()
    assert "servers" not in [thread.name for thread in threading.enumerate()]
    engine.close()


def test_an_abort_returns_partial_responses_which_can_be_resumed(fakes: list[FakeServer], engine: Any):
    for fake in fakes:
        fake.delay = 60.0
    asked = requests(40)
    with engine.open(SAMPLING) as stream:
        stream.submit(asked)
        wait_for(lambda: sum(fake.running for fake in fakes) == 40)
        assert sum(server.requests_running for server in engine.pool.status()) == 40
        assert stream.get(0.01) is None
        partial = {request.prompt.id: completion for request, completion in stream.abort()}
    assert len(partial) == 40
    assert all(c.finish_reason == "abort" and len(c.token_ids) == 2 for c in partial.values())
    assert all(server.requests_running == 0 for server in engine.pool.status())
    for fake in fakes:
        fake.delay = 0.0
        fake.seen.clear()
    engine.update_weights(no_weights(), version=2)
    with engine.open(SAMPLING) as stream:
        stream.submit(asked, [partial[request.prompt.id] for request in asked])
        found = [stream.get()[1] for _ in asked]
    for completion in found:
        first = int(completion.prompt_id.split("/")[1])
        assert completion.token_ids.tolist() == [first + i + 1 for i in range(LENGTH)]
        assert completion.logprobs.tolist() == [-0.25, -0.5, -0.25, -0.5, -0.75]
        assert completion.weight_versions.tolist() == [1, 1, 2, 2, 2]
        assert completion.finish_reason == "length"
    sent = fakes[0].seen[0]
    assert len(sent["input_ids"]) == 4
    assert sent["sampling_params"]["max_new_tokens"] == 3


@pytest.mark.parametrize(("stop", "length", "reason"), [((5,), 2, "stop"), ((), LENGTH, "length")])
def test_a_response_aborted_at_its_last_token_is_complete(
    stop: tuple[int, ...], length: int, reason: str, fakes: list[FakeServer], engine_on: Callable[..., Any]
):
    """A server reports "abort" even if its last token ends the response, which must not be continued then."""
    engine = with_frequent_health_checks(engine_on([fake.url for fake in fakes], stop=stop, config=CONFIG))
    engine.update_weights(no_weights(), version=1)
    asked = requests(4)[3:]
    for fake in fakes:
        fake.spoil = lambda answer: aborted(answer, length)
    (completion,) = engine.generate(asked, SAMPLING)
    assert (completion.token_ids.tolist(), completion.finish_reason) == ([4, 5, 6, 7, 8][:length], reason)
    assert sum(len(fake.seen) for fake in fakes) == 1


def test_an_abort_waits_until_servers_are_resumed(fakes: list[FakeServer], engine: Any):
    for fake in fakes:
        fake.delay = 60.0
    with engine.open(SAMPLING) as stream:
        with engine.pool.pushing_weights():
            stream.submit(requests(10))
            wait_for(lambda: sum(fake.running for fake in fakes) == 10)
            answers: list[Any] = []
            aborting = threading.Thread(target=lambda: answers.extend(stream.abort()))
            aborting.start()
            aborting.join(1.5)  # longer than the time after which orders are repeated
            assert [fake.aborts for fake in fakes] == [[], []]
        aborting.join(30)
    assert len(answers) == 10
    assert sum(len(fake.aborts) for fake in fakes) == 10


def test_no_request_id_is_a_prefix_of_another(fakes: list[FakeServer], engine: Any):
    """A server that aborts an id also aborts all requests whose ids begin with it."""
    asked = requests(120)
    with engine.open(SAMPLING) as stream:
        stream.submit(asked)
        check(asked, [stream.get()[1] for _ in asked])
    ids = [body["rid"] for fake in fakes for body in fake.seen]
    assert len(set(ids)) == len(asked)
    assert not [(one, other) for one in ids for other in ids if one != other and other.startswith(one)]


def test_closing_a_stream_aborts_its_requests_on_the_servers(fakes: list[FakeServer], engine: Any):
    for fake in fakes:
        fake.delay = 30.0
    with engine.open(SAMPLING) as stream:
        stream.submit(requests(10))
        wait_for(lambda: sum(fake.running for fake in fakes) == 10)
    assert sum(len(fake.aborts) for fake in fakes) == 10
    wait_for(lambda: not any(fake.running for fake in fakes), seconds=20)


def test_two_streams_get_their_own_answers(fakes: list[FakeServer], engine: Any):
    asked = requests(20)
    with engine.open(SAMPLING) as first, engine.open(SAMPLING) as second:
        first.submit(asked[:10])
        second.submit(asked[10:])
        answers = [second.get()[1] for _ in range(10)]
        check(asked[:10], [first.get()[1] for _ in range(10)])
        check(asked[10:], answers)


def test_servers_without_weights_need_a_sync_if_nothing_else_can_provide_them(fakes: list[FakeServer], engine: Any):
    engine.pool.weights_pushed(replace(engine.pool.membership.expected, load=None, by_sync_only=True), {})
    engine.pool.patience_seconds = 60.0
    for fake in fakes:
        fake.version = "default"
    with pytest.raises(WeightsMissingError, match="no server holds the current weights"):
        list(engine.generate(requests(4), SAMPLING))


def test_a_server_that_loads_weights_while_newer_ones_are_pushed_ends_up_with_the_newer_ones(
    fakes: list[FakeServer], engine: Any
):
    with engine.open(SAMPLING):
        fakes[0].healthy = False
        wait_for(lambda: fakes[0].url not in engine.pool.in_rotation)
        fakes[0].version, fakes[0].loaded, fakes[0].load_delay = "default", [], 1.0
        fakes[0].healthy = True
        wait_for(lambda: fakes[0].loaded)
        assert engine.pool.status()[0].state is ServerState.LOADING_WEIGHTS
        fakes[0].load_delay = 0.0
        engine.update_weights(no_weights(), version=2)
        assert len(fakes[0].loaded) == 2
        wait_for(lambda: not fakes[0].loading)
        assert [fake.version for fake in fakes] == [engine.pool.membership.expected.label] * 2
        assert len(engine.pool.in_rotation) == 2


def test_an_unhealthy_server_that_needed_weights_is_no_reason_for_a_sync(fakes: list[FakeServer], engine: Any):
    engine.pool.weights_pushed(replace(engine.pool.membership.expected, load=None, by_sync_only=True), {})

    def state() -> ServerState:
        return engine.pool.status()[0].state

    with engine.open(SAMPLING) as stream:
        fakes[0].healthy, fakes[0].version = False, "default"
        wait_for(lambda: state() is ServerState.UNHEALTHY)
        fakes[0].healthy = True
        wait_for(lambda: state() is ServerState.NEEDS_WEIGHTS)
        fakes[0].healthy = False
        wait_for(lambda: state() is ServerState.UNHEALTHY)
        fakes[1].healthy = False
        wait_for(lambda: not engine.pool.in_rotation)
        asked = requests(4)
        stream.submit(asked)
        assert stream.get(2.0) is None, "the stream waits for the other server, which has the weights"
        fakes[1].healthy = True
        check(asked, [stream.get()[1] for _ in asked])


# Over ranks ---------------------------------------------------------------------------------------------------------


def generate_on_ranks(layout: Layout, urls: list[str], folder: Any, patience: float) -> tuple[int, int, str | None]:
    """Sample every prompt of this rank's replica. Returns (number of requests, number of completions, error)."""
    from megatron_rlvr.config import RewardSettings, RolloutSettings
    from megatron_rlvr.engines.sglang.connect import connect
    from megatron_rlvr.engines.sglang.engine import SglangEngine
    from megatron_rlvr.engines.sglang.weight_sync.disk import DiskSync
    from megatron_rlvr.rollout.sampler import Sampler

    with joined_process_group():
        ranks = ranks_of(layout)
        settings = RolloutSettings(engine="sglang", servers=urls, server_timeout_seconds=patience, max_inflight=6)
        config = CONFIG | {"model_type": "qwen3"}
        pool = connect(settings, ranks, config, max_sequence_tokens=64)
        sync = DiskSync(folder / "sync", folder / "model", pool, ranks)
        engine = SglangEngine(pool, sync, stop_token_ids=(), vocab_size=VOCABULARY, max_sequence_tokens=64)
        engine.update_weights(no_weights(), version=1)
        sampler = Sampler(engine, None, None, RewardSettings(), leaders_only=True)  # type: ignore[arg-type]
        mine = sampler.share_of(requests(40)[ranks.data_rank :: ranks.data_size], ranks)
        completions, failure = [], None
        try:
            completions = list(engine.generate(mine, SAMPLING))
            check(mine, completions)
        except EngineError as error:
            failure = str(error)
        engine.close()
        return len(mine), len(completions), failure


def test_leaders_sample_for_their_replica_and_a_failure_is_raised_on_every_rank(fakes: list[FakeServer], tmp_path: Any):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    urls = [fake.url for fake in fakes]
    for fake in fakes:
        fake.delay = 0.05
    shares = {((0, 1),): [40, 0], ((0,), (1,)): [20, 20]}
    for replicas, expected in shares.items():
        found = on_ranks(generate_on_ranks, 2, Layout(replicas), urls, tmp_path, 60.0)
        assert found == [(count, count, None) for count in expected]
    assert max(fake.max_running for fake in fakes) <= 6, "the maximum is over all ranks"
    # First one request of one of the two replicas fails for good, then one of the only replica.
    for fake in fakes:
        fake.spoil = lambda answer: 500 if answer["output_ids"][0] == 4 else answer
    for replicas in shares:
        found = on_ranks(generate_on_ranks, 2, Layout(replicas), urls, tmp_path, 60.0)
        assert "prompt set/3 failed 4 times" in found[0][2]
        assert found[1][2] == found[0][2]


def announced_on_ranks(layout: Layout, folder: Any) -> bool:
    """Return whether the other rank, which is slow, had announced the name when this rank continued."""
    from megatron_rlvr.engines.sglang.weight_sync.disk import DiskSync

    with joined_process_group():
        ranks = ranks_of(layout)
        sync = DiskSync(folder, folder, None, ranks)

        def announce_late(label: str, version: int) -> None:
            time.sleep(0.5)
            (folder / label).touch()

        if not ranks.is_main:
            sync.announce = announce_late
        return (folder / sync._announce_label(3)).exists()


def test_no_rank_continues_before_all_have_announced_the_name_of_new_weights(tmp_path: Any):
    assert on_ranks(announced_on_ranks, 2, Layout(((0,), (1,))), tmp_path) == [True, True]


def test_an_answer_of_the_stand_in_has_tokens_and_their_log_probabilities():
    answer = good_answer({"input_ids": [7], "sampling_params": {"max_new_tokens": 2}}, "x")
    assert answer["output_ids"] == [8, 9]
    assert [entry[1] for entry in answer["meta_info"]["output_token_logprobs"]] == [8, 9]


def push_on_ranks(layout: Layout, urls: list[str], missing: str) -> tuple[list[str], dict[str, str], list[str]]:
    """Push weights in buckets. Returns the servers to which this rank sent any, the failures, and those in rotation."""
    from megatron_rlvr.config import RolloutSettings
    from megatron_rlvr.engines.sglang.connect import connect
    from megatron_rlvr.engines.sglang.weight_sync.tensor import TensorSync

    sent: list[str] = []

    class Recorded(TensorSync):
        async def _send(self, server: Any, packed: Any, timeout_seconds: float) -> None:
            sent.append(server.url)
            await super()._send(server, packed, timeout_seconds)

    with joined_process_group():
        ranks = ranks_of(layout)
        settings = RolloutSettings(engine="sglang", servers=urls)
        pool = connect(settings, ranks, CONFIG | {"model_type": "qwen3"}, max_sequence_tokens=64)
        sync = Recorded(pool, ranks, 2**20)
        tensors = [(str(number), torch.full((4, 4), float(number))) for number in range(3)]
        if pool is None:
            return sent, sync.push(iter(tensors), 1)[1], []
        with pool.pushing_weights():
            weights, failures = sync.push(iter(tensors), 1, {missing: "no memory"} if ranks.is_main else None)
            pool.weights_pushed(weights, failures)
        healthy = sorted(pool.in_rotation)
        pool.close()
        return sorted(sent), failures, healthy


@pytest.mark.parametrize("replicas", [((0,), (1,)), ((0, 1),)])
def test_each_leader_pushes_weights_to_its_share_of_the_servers(replicas: Any):
    servers = [FakeColocatedServer() for _ in range(5)]
    urls = sorted(server.url for server in servers)
    try:
        found = on_ranks(push_on_ranks, 2, Layout(replicas), urls, urls[1])
    finally:
        for server in servers:
            server.close()
    shares = [[urls[0], urls[2], urls[4]], [urls[3]]] if len(replicas) == 2 else [[urls[0], *urls[2:]], []]
    assert [sent for sent, _, _ in found] == shares
    leaders = found[: len(replicas)]
    assert [failures for _, failures, _ in leaders] == [{urls[1]: "no memory"}] * len(replicas)
    assert [healthy for _, _, healthy in leaders] == [[urls[0], *urls[2:]]] * len(replicas)
    labels = {server.version for server in servers if server.url != urls[1]}
    assert len(labels) == 1
    assert labels.pop().endswith("-1")
