"""Answers that no SGLang server gives: each is an error of that server in one line, in bounded time and memory."""

import gzip
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from raw_server import Answer, RawServer, endless, head, plain, raw_server

from megatron_rlvr.config import RolloutSettings
from megatron_rlvr.engines.sglang import answers, colocation
from megatron_rlvr.engines.sglang.answers import AnswerLimit, parse_object
from megatron_rlvr.engines.sglang.client import RequestRefusedError, Server, ServerError, UnhealthyServerError
from megatron_rlvr.engines.sglang.completions import CompletionCodec
from megatron_rlvr.engines.sglang.pool import ServerPool
from megatron_rlvr.engines.sglang.router import workers_of
from megatron_rlvr.types import CompletionRequest, Prompt

MEMORY = 64 * 2**20
TOKENS = 20480
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
BOMB = gzip.compress(bytes(2**30), 1)


def chunked(chunk: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(chunk), chunk)


ANSWERS: dict[str, Answer] = {
    "an endless body": lambda: endless(head(Content_Type="application/json"), b" " * 2**16),
    "endless chunks": lambda: endless(head(Transfer_Encoding="chunked"), chunked(b"[" * 2**16)),
    "a body of 10 GB": lambda: endless(head(Content_Length=str(10**10)), b"1" * 2**16),
    "an endless refusal": lambda: endless(head("400 Bad Request"), b"no" * 2**15),
    "an endless failure": lambda: endless(head("500 Oops"), b"no" * 2**15),
    "a bomb": lambda: [plain(BOMB, Content_Encoding="gzip")],
    "a hidden bomb": lambda: [plain(BOMB)],
    "an unknown encoding": lambda: [plain(b"{}", Content_Encoding="zstd, br, x")],
    "an unknown charset": lambda: [head(Content_Type="text/x; charset=rot13", Content_Length="1") + b"\xff"],
    "endless headers": lambda: endless(b"HTTP/1.1 200 OK\r\n", b"x-%d: y\r\n" * 1000),
    "a header of 1 MB": lambda: [b"HTTP/1.1 200 OK\r\nx: " + b"y" * 2**20 + b"\r\n\r\n"],
    "an endless header": lambda: endless(b"HTTP/1.1 200 OK\r\nx: ", b"y" * 2**16),
    "an endless status line": lambda: endless(b"HTTP/1.1 200 ", b"OK" * 2**15),
    "cookies": lambda: [plain(b"[]", Set_Cookie="=;" * 3000)],
    "no HTTP": lambda: [b"SSH-2.0-OpenSSH_9.6\r\n" * 10],
    "nothing": lambda: [],
    "a wrong length": lambda: [head(Content_Length="100") + b"{}"],
    "a negative length": lambda: [head(Content_Length="-1") + b"{}"],
    "a length of text": lambda: [head(Content_Length="many") + b"{}"],
    "a wrong chunk": lambda: [head(Transfer_Encoding="chunked") + b"zz\r\n{}\r\n"],
    "an endless chunk size": lambda: endless(head(Transfer_Encoding="chunked"), b"f" * 2**16),
    "deep objects": lambda: [plain(DEEP)],
    "deep arrays": lambda: [plain(b"[" * 200_000)],
    "many arrays": lambda: [plain(b'{"a":[' + b"[]," * 10**6 + b"[]]}")],
    "many objects": lambda: [plain(b'{"a":[' + b'{"":{}},' * 5 * 10**5 + b"{}]}")],
    "many numbers": lambda: [plain(b'{"a":[' + b"1e9," * 10**6 + b"1]}")],
    "many texts": lambda: [plain(b'{"a":[' + b'"\xf0\x9f\x98\x80",' * 5 * 10**5 + b"1]}")],
    "a text of 10 MB": lambda: [plain(b'{"a":"' + b"\xf0\x9f\x98\x80" * 2500000 + b'"}')],
    "quotes": lambda: [plain(b'"' + b'\\"' * 10**6)],
    "an integer of 5,000 digits": lambda: [plain(b'{"success":' + b"9" * 5000 + b"}")],
    "no UTF-8": lambda: [plain(b'{"a": "\xff\xfe"}')],
    "a list": lambda: [plain(b"[1]")],
    "a number": lambda: [plain(b"5")],
    "null": lambda: [plain(b"null")],
    "no JSON": lambda: [plain(b"<html>\x1b[2J\r\n</html>")],
    "not modified": lambda: [head("304 Not Modified")],
    "a wrong chunk after the headers": lambda: [head(Transfer_Encoding="chunked"), b"", b"zz\r\n"],
    "a body that stops": lambda: endless(head(Content_Length="100") + b"{", b""),
    "no content": lambda: [head("204 No Content")],
    "switching": lambda: [head("101 Switching Protocols", Upgrade="websocket", Connection="Upgrade")],
    "status 999": lambda: [head("999 Strange", Content_Length="0")],
    "status 100000": lambda: [head("100000 Strange", Content_Length="0")],
}

LARGE = ("endless", "stops", "after", "many", "deep", "bomb", "MB", "GB", "quotes")
"""Words of the answers that are read once, as a request for many tokens, which has the widest bounds."""

ACTIONS: dict[str, Callable[[Server], Any]] = {
    "generate": lambda server: server.generate({"sampling_params": {"max_new_tokens": TOKENS}}, 20.0),
    "info": lambda server: server.info(),
    "load": lambda server: server.load_weights("/folder", "label", 20.0),
    "ranks": lambda server: server.tensor_parallel_size(),
    "memory": colocation.missing_memory,
    "workers": lambda server: workers_of(server, 0.0),
}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "STALL_SECONDS", 2.0)


@pytest.fixture
def server() -> Iterator[RawServer]:
    with raw_server() as made:
        yield made


@pytest.fixture
def pool(server: RawServer) -> Iterator[ServerPool]:
    made = ServerPool([server.url], max_inflight=4, retries=0, patience_seconds=1.0)
    yield made
    made.close()


def error_of(pool: ServerPool, action: Callable[[Server], Any]) -> str:
    """The line of the error that an action has ended in."""
    (result,) = pool.everywhere(action).values()
    assert isinstance(result, ServerError), result
    line = str(result)
    assert len(line) < 500
    assert line.isprintable()
    return line


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_cannot_be_used_is_an_error_of_the_server_in_bounded_memory(
    name: str, server: RawServer, pool: ServerPool
) -> None:
    server.answer = ANSWERS[name]
    actions = ["generate"] if any(word in name for word in LARGE) else list(ACTIONS)
    for action in actions:
        tracemalloc.start()
        start = time.process_time()  # of all threads
        try:
            error_of(pool, ACTIONS[action])
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < MEMORY, (action, peak)
        assert time.process_time() - start < 15, action


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_a_redirect_is_an_error_and_nothing_is_sent_to_the_other_address(
    status: str, server: RawServer, pool: ServerPool
) -> None:
    with raw_server() as other:
        server.answer = lambda: [plain(b"", status, Location=f"{other.url}/elsewhere")]
        for action in (*ACTIONS.values(), lambda server: server.check_health(), lambda server: server.abort("x")):
            assert "which is not followed" in error_of(pool, action)
        assert other.requests == []


def test_a_slow_body_ends_by_the_time_of_a_body_and_not_by_that_of_the_request(
    server: RawServer, pool: ServerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "BODY_SECONDS", 0.5)
    server.answer = lambda: (part for part in [head(Content_Length="1000"), *([b" ", b""] * 1000)])
    start = time.monotonic()
    assert "sent only" in error_of(
        pool, lambda server: server.generate({"sampling_params": {"max_new_tokens": 5}}, 60.0)
    )
    assert time.monotonic() - start < 50


def test_the_largest_honest_answer_is_read() -> None:
    """Every token is the longest of Qwen's vocabulary (128 spaces), with a log-probability of all digits."""
    for tokens in (1, 100, 20480):
        pairs = [[-12.345678901234567, 151000 + i % 900, None] for i in range(tokens)]
        answer = {
            "text": " " * 128 * tokens,
            "output_ids": [token for _, token, _ in pairs],
            "meta_info": {"output_token_logprobs": pairs, "finish_reason": {"type": "length", "length": tokens}},
        }
        body = json.dumps(answer).encode()
        limit = AnswerLimit(tokens)
        assert len(body) <= limit.body
        assert parse_object(body, limit) == answer | {"text": "" if 128 * tokens > 1000 else answer["text"]}


def test_the_key_is_sent_as_a_bearer_token_and_only_then(server: RawServer) -> None:
    for key in (None, "secret-key"):
        made = ServerPool([server.url], max_inflight=4, retries=0, patience_seconds=1.0, api_key=key)
        server.requests.clear()
        try:
            made.everywhere(lambda server: server.pause())
        finally:
            made.close()
        sent = [line for line in server.requests[0].decode().split("\r\n") if line.startswith("Authorization:")]
        assert sent == ([] if key is None else ["Authorization: Bearer secret-key"])
        assert b"Accept-Encoding: identity" in server.requests[0]


# Decoding -----------------------------------------------------------------------------------------------------------

LENGTH, VOCABULARY = 5, 50


def decode(answer: Any) -> Any:
    codec = CompletionCodec(stop_token_ids=[7], vocab_size=VOCABULARY, max_sequence_tokens=100)
    codec.versions["run-1"] = 1
    request = CompletionRequest(Prompt("set/0", np.array([1, 2], np.int32), "3", "set"), index=0, seed=1)
    return codec.encode(request, None, RolloutSettings(max_response_tokens=LENGTH), oldest_version=1).read(answer)


def good() -> dict[str, Any]:
    tokens = [3, 4, 5, 6, 8]
    return {
        "text": "",
        "output_ids": tokens,
        "meta_info": {
            "finish_reason": {"type": "length", "length": LENGTH},
            "weight_version": "run-1",
            "output_token_logprobs": [[-0.5, token, None] for token in tokens],
        },
    }


NESTED: Any = []
for _ in range(900):
    NESTED = [NESTED]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 5, 10**400, -(10**400), 2**63, 0.5, 1e308, -1e308, float("inf"), float("-inf")),
    *(float("nan"), "", "x", "run-1", [], {}, [[]], [{}], {"type": []}, {"type": "stop"}, NESTED, [NESTED] * 5),
    *([True] * 5, ["3"] * 5, [3] * 10, [{"version": "run-1", "start": -100, "end": 10**18}], [1, 2, 3]),
    *([{"version": ["run-1"], "start": 0, "end": 5}], [{"version": "run-1", "start": 0.0, "end": 5}]),
    *([{"version": "run-1", "start": 0, "end": 5}] * 10**5, [[0.5, 3, None]] * 5, [[-0.5]] * 5, [[False, 3]] * 5),
]


def in_meta(key: str) -> Callable[[dict[str, Any], Any], Any]:
    return lambda answer, value: answer | {"meta_info": answer["meta_info"] | {key: value}}


PLACES: dict[str, Callable[[dict[str, Any], Any], Any]] = {
    "whole": lambda answer, value: value,
    "output_ids": lambda answer, value: answer | {"output_ids": value},
    "meta_info": lambda answer, value: answer | {"meta_info": value},
    **{key: in_meta(key) for key in ("finish_reason", "weight_version", "weight_versions", "output_token_logprobs")},
    "reason": lambda a, v: a | {"meta_info": a["meta_info"] | {"finish_reason": {"type": v, "matched": v}}},
    "logprob": lambda a, v: (
        a | {"meta_info": a["meta_info"] | {"output_token_logprobs": [[v, token, None] for token in a["output_ids"]]}}
    ),
    "token": lambda a, v: a | {"output_ids": [v, *a["output_ids"][1:]]},
}


def test_the_answer_without_changes_is_decoded() -> None:
    _, completion = decode(good())
    assert completion.token_ids.tolist() == good()["output_ids"]


@pytest.mark.parametrize("place", PLACES)
def test_a_value_of_any_kind_in_any_place_is_an_error_or_a_completion_within_its_bounds(place: str) -> None:
    for value in VALUES:
        start = time.monotonic()
        try:
            _, completion = decode(PLACES[place](good(), value))
        except ServerError as error:
            line = str(error)
            assert len(line) < 500
        else:
            assert len(completion.token_ids) == len(completion.logprobs) == LENGTH
            assert np.isfinite(completion.logprobs.astype(np.float32) ** 2).all()
            assert (completion.logprobs <= 1e-3).all()
            assert (completion.token_ids < VOCABULARY).all()
            assert set(completion.weight_versions.tolist()) == {1}
        assert time.monotonic() - start < 5


def test_false_is_no_log_probability() -> None:
    with pytest.raises(UnhealthyServerError, match="log-probability False"):
        decode(PLACES["logprob"](good(), False))


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ("inf", "count inf orders"),
        ("x", "count x orders"),
        ("-1", "count -1 orders"),
        ("1e400", "count 1e400 orders"),
        ("nan", "count nan orders"),
    ],
)
def test_a_counter_that_is_none_is_an_error_of_the_server(
    metrics: str, expected: str, server: RawServer, pool: ServerPool
) -> None:
    line = f'sglang:http_responses_total{{endpoint="/release_memory_occupation",status_code="200"}} {metrics}\n'
    server.answer = lambda: [plain(line.encode())]
    assert expected in error_of(pool, colocation.missing_memory)


def test_labels_without_end_take_no_time(server: RawServer, pool: ServerPool) -> None:
    server.answer = lambda: [plain(b"sglang:http_x{" + b"a" * 2**20 + b"} 1\n")]
    start = time.monotonic()
    pool.everywhere(colocation.missing_memory)
    assert time.monotonic() - start < 5


def test_a_refusal_is_an_error_of_its_request(server: RawServer, pool: ServerPool) -> None:
    server.answer = lambda: [plain(b'{"error": {"message": "no"}}', "400 Bad Request")]

    async def ask(server: Server) -> str:
        with pytest.raises(RequestRefusedError) as refusal:
            await server.generate({"sampling_params": {"max_new_tokens": 1}}, 5.0)
        return str(refusal.value)

    assert pool.everywhere(ask)[server.url] == '/generate answered 400 {"error": {"message": "no"}}'
