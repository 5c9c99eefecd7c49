"""Tests of weight sync to real servers: they get the policy's weights from any layout, and failures stay local."""

import asyncio
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from launcher import Ranks
from policy_runs import Layout
from real_servers import TOLERANCE, in_order, logprobs_of, requests, sampling, version_at
from sync_runs import PROMPTS, Synced, trained_and_synced

from megatron_rlvr.distributed.network import own_address_toward
from megatron_rlvr.engines.sglang.client import Server
from megatron_rlvr.engines.sglang.event_loop import EventLoopThread
from megatron_rlvr.engines.sglang.weight_sync.bucket_sync import BucketSync
from megatron_rlvr.engines.sglang.weight_sync.buckets import buckets

METHODS = ["disk", "distributed", "tensor"]
IN_BUCKETS = ["distributed", "tensor"]
LAYOUTS = [Layout(), Layout(tensor=2), Layout(pipeline=2)]
# Smaller than the embedding, which is a bucket of its own; the rest needs several buckets.
BUCKET_BYTES = 20_000


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(most=2)
    yield ranks
    ranks.stop()


def scaled(model: Any, factor: float) -> Any:
    """Return a copy of the model with all weights multiplied."""
    copy = type(model)(model.config).eval()
    copy.load_state_dict({name: factor * tensor for name, tensor in model.state_dict().items()})
    return copy


def weights_of(model: Any, during: Callable[[], Any] = lambda: None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all weights, and call ``during`` half-way."""
    tensors = list(model.state_dict().items())
    yield from tensors[: len(tensors) // 2]
    during()
    yield from tensors[len(tensors) // 2 :]


def check(engine: Any, model: Any, urls: list[str], version: int) -> None:
    """Check that exactly these servers are in rotation and sample from the model."""
    assert sorted(engine.pool.in_rotation) == sorted(urls)
    asked = requests(8)
    for request, completion in zip(asked, in_order(asked, engine.generate(asked, sampling(12, 1.0))), strict=True):
        assert np.abs(completion.logprobs - logprobs_of(model, request, completion)).max() < TOLERANCE
    for url in urls:
        assert version_at(url).endswith(f"-{version}")


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["one_rank", "tensor", "pipeline"])
def test_servers_have_the_log_probabilities_of_the_policy_that_pushed_its_weights(
    layout: Layout, servers, ranks: Ranks, model: Path, reference, tmp_path: Path
):
    urls = [server.url for server in servers]
    found: list[Synced] = ranks.run(
        trained_and_synced, layout.size, str(model), layout, urls, str(tmp_path), METHODS, BUCKET_BYTES, timeout=200
    )
    main = found[0]
    trained = type(reference)(reference.config).eval()
    trained.load_state_dict(main.weights)
    for method in METHODS:
        on_servers = main.on_servers[method]
        assert len(main.sequences[method]) == 4 * PROMPTS
        by_transformers = {
            (number << 20) + position: logprob
            for number, (prompt, response) in enumerate(main.sequences[method])
            for position, logprob in enumerate(logprobs_after(trained, prompt, response))
        }
        in_policy = {token: logp for rank in found for token, logp in rank.in_policy[method].items()}
        assert mean_difference(on_servers, in_policy) < TOLERANCE, method
        assert mean_difference(on_servers, by_transformers) < TOLERANCE, method


@torch.no_grad()
def logprobs_after(model: Any, prompt: list[int], response: list[int]) -> list[float]:
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0].tolist()


def mean_difference(a: dict[int, float], b: dict[int, float]) -> float:
    assert a.keys() == b.keys()
    return sum(abs(a[token] - b[token]) for token in a) / len(a)


@pytest.mark.parametrize("method", IN_BUCKETS)
def test_each_push_replaces_all_weights_and_has_metrics(method: str, servers, engine_on, reference):
    urls = [server.url for server in servers]
    engine = engine_on(urls, method=method, bucket_bytes=BUCKET_BYTES)
    groups = []
    for version, factor in enumerate((1.0, 0.8, 1.1)):
        model = scaled(reference, factor)
        engine.update_weights(weights_of(model), version)
        check(engine, model, urls, version)
        push = engine.weight_sync.last_push
        assert push.bytes == sum(tensor.nbytes for tensor in model.state_dict().values())
        assert push.largest_bucket == model.get_input_embeddings().weight.nbytes > BUCKET_BYTES
        assert (push.servers, push.buckets > 4, push.seconds > 0) == (2, True, True)
        groups.append(dict(getattr(engine.weight_sync, "groups", {})))
    assert groups[0] == groups[1] == groups[2], "groups are created once"


@pytest.mark.parametrize("method", METHODS)
def test_a_running_request_continues_with_the_new_weights(method: str, servers, engine_on, reference):
    url, version = servers[0].url, 4
    engine = engine_on([url], method=method)
    engine.update_weights(weights_of(reference), version - 1)
    old = version_at(url)
    new_model = scaled(reference, 0.9)
    over = threading.Event()
    answers: list[tuple[int, dict[str, Any]]] = []

    def send_repeatedly(count: int) -> None:
        parameters = {"max_new_tokens": count, "ignore_eos": True, "temperature": 1.0}
        body = {"input_ids": [5, 6, 7], "return_logprob": True, "sampling_params": parameters}
        while not over.is_set():
            answers.append((count, post(url + "/generate", body)["meta_info"]))

    # Two lengths, repeated as often as necessary: whenever the weights change, one of the requests is in its middle.
    senders = [threading.Thread(target=send_repeatedly, args=(count,)) for count in (450, 310)]
    for sender in senders:
        sender.start()
    try:
        deadline = time.monotonic() + 120
        while not answers:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        engine.update_weights(weights_of(new_model), version)
    finally:
        over.set()
        for sender in senders:
            sender.join()
    mixed = [(count, meta) for count, meta in answers if len(meta["weight_versions"]) == 2]
    assert mixed
    for count, meta in mixed:
        assert meta["finish_reason"]["type"] == "length"
        assert meta["completion_tokens"] == count
        first, second = meta["weight_versions"]
        assert (first["version"], second["version"]) == (old, version_at(url))
        assert first["start"] == 0 < first["end"] == second["start"] < second["end"] == count
        tokens = [token for _, token, _ in meta["output_token_logprobs"]]
        logprobs = np.array([logprob for logprob, _, _ in meta["output_token_logprobs"]])
        for span, model in ((first, reference), (second, new_model)):
            expected = np.array(logprobs_after(model, [5, 6, 7], tokens))
            difference = np.abs(logprobs - expected)[span["start"] : span["end"]]
            assert difference.max() < TOLERANCE, span


@pytest.mark.parametrize("method", IN_BUCKETS)
def test_a_server_that_fails_halfway_is_removed_and_re_admitted_with_the_next_sync(
    method: str, servers, engine_on, reference, caplog: pytest.LogCaptureFixture
):
    urls = [server.url for server in servers]
    engine = engine_on(urls, method=method, bucket_bytes=BUCKET_BYTES)
    engine.update_weights(weights_of(reference), 0)
    model = scaled(reference, 0.9)
    engine.update_weights(weights_of(model, lambda: post(urls[1] + "/end_weight_update", {})), 1)
    check(engine, model, urls[:1], 1)
    assert f"server {urls[1]} is removed from rotation" in caplog.text
    assert "must run between begin_weight_update() and end_weight_update()" in caplog.text
    assert version_at(urls[1]).endswith("-1-incomplete")
    engine.update_weights(weights_of(reference), 2)
    check(engine, reference, urls, 2)


@pytest.mark.parametrize("method", IN_BUCKETS)
def test_a_server_that_hangs_halfway_delays_the_others_for_a_bounded_time(method: str, servers, engine_on, reference):
    urls = [server.url for server in servers]
    engine = engine_on(urls, method=method, bucket_bytes=BUCKET_BYTES)
    engine.update_weights(weights_of(reference), 0)
    model, patience = scaled(reference, 0.9), engine.pool.patience_seconds
    engine.pool.patience_seconds = 20.0  # only here, because it bounds every order to every server
    start = time.monotonic()
    try:
        engine.update_weights(weights_of(model, servers[1].freeze), 1)
        # Without a bound it would be the timeout of a broadcast, 10 to 30 minutes.
        assert time.monotonic() - start < 20 + 20 + 60, "one bucket, the order to resume, and some reserve"
        check(engine, model, urls[:1], 1)
    finally:
        servers[1].thaw()
        engine.pool.patience_seconds = patience
    servers[1].wait()
    assert version_at(urls[1]).endswith("-1-incomplete")
    model = scaled(reference, 1.1)
    engine.update_weights(weights_of(model), 2)
    check(engine, model, urls, 2)


@pytest.mark.parametrize("method", IN_BUCKETS)
def test_an_error_of_the_trainer_halfway_leaves_no_server_paused_or_current(method: str, servers, engine_on, reference):
    urls = [server.url for server in servers]
    engine = engine_on(urls, method=method, bucket_bytes=BUCKET_BYTES)
    engine.update_weights(weights_of(reference), 0)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.update_weights(weights_of(scaled(reference, 0.9), interrupt), 1)
    for url in urls:
        assert version_at(url).endswith("-1-incomplete")
        body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 4}}
        assert post(url + "/generate", body)["meta_info"]["completion_tokens"] <= 4
    engine.update_weights(weights_of(reference), 2)
    check(engine, reference, urls, 2)


def test_servers_that_a_killed_trainer_left_in_the_middle_of_an_update_work_with_the_next(
    servers, engine_on, reference
):
    urls = [server.url for server in servers]
    for url in urls:
        post(url + "/pause_generation", {"mode": "retract"})
        post(url + "/begin_weight_update", {})
    engine = engine_on(urls, method="distributed", server_timeout_seconds=30.0)
    engine.update_weights(weights_of(reference), 0)
    check(engine, reference, urls, 0)


def test_a_restarted_server_joins_again_and_one_that_dies_halfway_is_removed_at_once(
    servers, engine_on, reference, caplog: pytest.LogCaptureFixture
):
    urls = [server.url for server in servers]
    engine = engine_on(urls, method="distributed", bucket_bytes=BUCKET_BYTES)
    engine.update_weights(weights_of(reference), 0)
    servers[1].kill()
    servers[1].start()
    servers[1].wait()
    model = scaled(reference, 0.9)
    engine.update_weights(weights_of(model), 1)
    check(engine, model, urls, 1)
    assert "removed from rotation" not in caplog.text
    start = time.monotonic()
    engine.update_weights(weights_of(reference, servers[1].kill), 2)
    assert time.monotonic() - start < 30
    check(engine, reference, urls[:1], 2)
    engine.weight_sync.close()
    deadline = time.monotonic() + 20  # a broadcast would end after 30 s
    while "weights" in [thread.name for thread in threading.enumerate()]:
        assert time.monotonic() < deadline, "a broadcast is still running"
        time.sleep(0.1)


def test_buckets_hold_every_tensor_in_order_at_an_offset_that_its_receiver_can_compute():
    rng = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.uint8, torch.int64)
    tensors = {}
    for i in range(200):
        sizes = torch.randint(1, 7, (int(torch.randint(0, 4, (), generator=rng)),), generator=rng).tolist()
        tensors[f"t{i}"] = torch.randint(0, 200, sizes, generator=rng).to(dtypes[i % 7 % 4])
    tensors["large"] = torch.arange(300.0).reshape(3, 100).T
    tensors["last"] = torch.ones(2, 2)
    max_bytes, found, storages = 1000, {}, set()
    for bucket in buckets(tensors.items(), max_bytes, torch.device("cpu")):
        assert bucket.bytes <= max_bytes or bucket.names == ["large"]
        if bucket.names != ["large"]:
            storages.add(bucket.data.untyped_storage().data_ptr())
        start = 0
        for name, dtype, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
            assert start % dtype.itemsize == 0
            end = start + shape.numel() * dtype.itemsize
            found[name] = bucket.data[start:end].clone().view(dtype).reshape(shape)
            start = end
        assert start == bucket.bytes
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert len(storages) == 1, "all buckets share one buffer"
    before = content = torch.empty(0)
    for bucket in buckets(tensors.items(), max_bytes, torch.device("cpu"), buffers=2):
        assert torch.equal(before, content), "the bucket before this one is still complete"
        before, content = bucket.data, bucket.data.clone()
    assert list(buckets([], max_bytes, torch.device("cpu"))) == []


def test_servers_on_this_machine_get_its_loopback_address():
    assert own_address_toward("127.0.0.1") == "127.0.0.1"
    assert own_address_toward("localhost") in ("127.0.0.1", "::1")


def test_the_next_bucket_is_filled_while_one_is_sent() -> None:
    """The server takes each bucket only when the next one is being filled, which never happens if it is waited for."""
    filling = [threading.Event() for _ in range(4)]
    taken: list[list[str]] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(3):
            filling[number].set()
            yield str(number), torch.full((10,), float(number))
        filling[3].set()

    class Sync(BucketSync):
        async def _open(self, server: Any) -> None: ...

        def _pack(self, bucket: Any) -> Any:
            return bucket

        async def _send(self, server: Any, packed: Any, timeout_seconds: float) -> None:
            following = filling[int(packed.names[-1]) + 1]
            deadline = time.monotonic() + 30
            while not following.is_set():
                assert time.monotonic() < deadline, "the next bucket is not being filled"
                await asyncio.sleep(0.01)
            assert packed.data.view(torch.float32).tolist() == [float(packed.names[0])] * 10
            taken.append(packed.names)

    class Idle(Server):
        def __init__(self) -> None:
            self.url = "http://server"

        async def answer(self, *arguments: Any) -> None: ...

        pause = begin_update = end_update = resume = answer  # type: ignore[assignment]

    class Pool(EventLoopThread):
        patience_seconds = 60.0

        def everywhere(self, order: Any, exclude: Any, among: Any) -> dict[str, Any]:
            assert among == ["http://server"]
            return {"http://server": self.run(order(Idle()))}

        def status(self) -> list[Any]:
            return [SimpleNamespace(url="http://server")]

    loop = Pool("servers")
    sync = Sync(None, SimpleNamespace(is_main=False, data_rank=0, data_size=1), 40, torch.device("cpu"))  # type: ignore[arg-type]
    assert sync._push(loop, tensors(), "label", None) == {}  # type: ignore[arg-type]
    loop.close()
    assert taken == [["0"], ["1"], ["2"]]
