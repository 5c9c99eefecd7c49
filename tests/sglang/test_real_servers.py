"""Tests of sampling on real SGLang servers, against transformers, the embedded engine and in whole runs."""

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from real_servers import TOLERANCE, in_order, logprobs_of, requests, sampling
from waiting import wait_for

from megatron_rlvr.engines.embedded.engine import EmbeddedEngine
from megatron_rlvr.protocols import EngineError
from megatron_rlvr.rollout.sampler import requests_for
from megatron_rlvr.types import Completion, CompletionRequest, Prompt


def weights_of(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    return iter(model.state_dict().items())


@torch.no_grad()
def greedy(model: Any, request: CompletionRequest, count: int) -> list[int]:
    tokens = request.prompt.token_ids.tolist()
    for _ in range(count):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[-count:]


def test_greedy_tokens_and_log_probabilities_are_those_of_transformers(servers, engine_on, reference):
    engine = engine_on([server.url for server in servers], stop=())
    engine.update_weights(weights_of(reference), version=7)
    asked = requests(24)
    # 2 is the model's own stop token, at which a server ends every response.
    completions = in_order(asked, engine.generate(asked, sampling(20)))
    for request, completion in zip(asked, completions, strict=True):
        expected = greedy(reference, request, 20)
        expected = expected[: expected.index(2) + 1] if 2 in expected else expected
        assert completion.token_ids.tolist() == expected
        assert np.abs(completion.logprobs - logprobs_of(reference, request, completion)).max() < TOLERANCE
        assert set(completion.weight_versions.tolist()) == {7}
    assert sum(len(c.token_ids) for c in completions) > 300


def test_log_probabilities_are_those_at_the_temperature_before_top_p(servers, engine_on, reference):
    engine = engine_on([server.url for server in servers])
    engine.update_weights(weights_of(reference), version=0)
    asked = requests(4, group_size=4)
    completions = in_order(asked, engine.generate(asked, sampling(16, temperature=0.7, top_p=0.8)))
    for request, completion in zip(asked, completions, strict=True):
        assert np.abs(completion.logprobs - logprobs_of(reference, request, completion, 0.7)).max() < TOLERANCE
    assert len({tuple(c.token_ids.tolist()) for c in completions}) > 8, "the completions of a prompt differ"


def test_responses_end_as_with_the_embedded_engine(servers, engine_on, reference, model: Path):
    asked = requests(12)
    # Tokens that occur in greedy responses, one of them at the very end.
    responses = [greedy(reference, request, 8) for request in asked]
    early = {2, responses[0][3]}
    last = next(tokens[7] for tokens in responses if tokens[7] not in tokens[:7] and not early & set(tokens))
    stop = tuple(sorted(early | {last}))
    embedded = EmbeddedEngine(str(model), device=torch.device("cpu"), stop_token_ids=stop, pad_token_id=0)
    embedded.update_weights(weights_of(reference), version=1)
    engine = engine_on([server.url for server in servers], stop=stop)
    engine.update_weights(weights_of(reference), version=1)
    expected = in_order(asked, embedded.generate(asked, sampling(8)))
    found = in_order(asked, engine.generate(asked, sampling(8)))
    assert [(c.token_ids.tolist(), c.finish_reason) for c in found] == [
        (c.token_ids.tolist(), c.finish_reason) for c in expected
    ]
    ends = {(c.finish_reason, len(c.token_ids) == 8) for c in found}
    assert ends == {("stop", False), ("stop", True), ("length", True)}


def test_after_a_disk_sync_servers_sample_from_the_new_weights_and_old_folders_are_removed(
    servers, engine_on, reference, tmp_path: Path
):
    engine = engine_on([server.url for server in servers])
    asked = requests(8)
    with pytest.raises(RuntimeError, match="no weights of this run"):
        list(engine.generate(asked, sampling(8)))
    for version, factor in ((0, 1.0), (1, 0.8), (2, 1.1)):
        weights = {name: factor * tensor for name, tensor in reference.state_dict().items()}
        engine.update_weights(iter(weights.items()), version)
        assert [folder.name.rpartition("-")[2] for folder in (tmp_path / "sync").iterdir()] == [str(version)]
        completions = in_order(asked, engine.generate(asked, sampling(8, temperature=1.0)))
        scaled = type(reference)(reference.config).eval()
        scaled.load_state_dict(weights)
        for request, completion in zip(asked, completions, strict=True):
            assert np.abs(completion.logprobs - logprobs_of(scaled, request, completion)).max() < TOLERANCE
            assert set(completion.weight_versions.tolist()) == {version}
    engine.close()
    assert not (tmp_path / "sync").exists()


def test_a_request_that_would_crash_a_server_is_refused_before_it_is_sent(servers, engine_on, reference):
    engine = engine_on([servers[0].url])
    engine.update_weights(weights_of(reference), version=0)
    for token_ids in ([5, 320], [-1], []):
        prompt = Prompt("set/bad", np.array(token_ids, dtype=np.int32), "", "set")
        with pytest.raises(EngineError, match="set/bad is empty or has a token id outside the vocabulary of 320"):
            list(engine.generate(requests(2) + requests_for(prompt, 1, 0, "test"), sampling(4)))
    with pytest.raises(EngineError, match=r"has 4 \+ 509 tokens, more than the maximum of 512"):
        list(engine.generate(requests(1), sampling(509)))
    assert len(list(engine.generate(requests(2), sampling(4)))) == 2


def test_another_vocabulary_is_detected_before_weights_are_pushed(servers, engine_on):
    from megatron_rlvr.config import SettingsError

    with pytest.raises(SettingsError, match=r"serves another model \(vocabulary 320, not 352\)"):
        engine_on([servers[0].url], config={"vocab_size": 352})
    with pytest.raises(SettingsError, match="context length of 512 tokens is below"):
        engine_on([servers[0].url], max_sequence_tokens=513)


def test_another_version_of_nccl_is_detected_before_a_group_is_formed(servers, one_rank, model, monkeypatch):
    from megatron_rlvr.config import RolloutSettings, SettingsError
    from megatron_rlvr.engines.sglang import connect as module
    from megatron_rlvr.hf.files import read_config

    rollout = RolloutSettings(engine="sglang", servers=[servers[0].url])
    monkeypatch.setattr(module.accelerator, "has_gpu", lambda: True)
    for version, refusal in (("2.29.7", r"the server has NCCL 2\.30\.7 and the trainer 2\.29\.7"), ("2.30.7", None)):
        monkeypatch.setattr(module.transport, "version", lambda version=version: version)
        with pytest.raises(SettingsError, match=refusal) if refusal else contextlib.nullcontext():
            module.connect(rollout, one_rank, read_config(model), max_sequence_tokens=64, same_transport=True).close()


def test_an_aborted_response_is_returned_at_once_and_resumes_at_the_exact_token(servers, engine_on, reference):
    # The engine knows the model's own stop token 2, as in a run: an aborted response may just have ended with it.
    engine = engine_on([server.url for server in servers], stop=(2,))
    engine.update_weights(weights_of(reference), version=0)
    asked, length = requests(12), 470
    whole = [greedy(reference, request, length) for request in asked[:2]]
    partial: dict[str, Completion] = {}
    aborts = 0
    for patience in itertools.count(3):
        left = [r for r in asked if r.prompt.id not in partial or partial[r.prompt.id].finish_reason == "abort"]
        if not left:
            break
        with engine.open(sampling(length)) as stream:
            asked_at = time.monotonic()
            stream.submit(left, [partial.get(request.prompt.id) for request in left])
            time.sleep(0.1 * patience)  # longer each time, so that the test also ends on a busy machine
            answers = stream.abort()
        if not aborts and time.monotonic() - asked_at < 1:
            assert all(len(c.token_ids) < length for _, c in answers), "abort does not wait for responses to end"
        aborts += sum(c.finish_reason == "abort" and len(c.token_ids) > 0 for _, c in answers)
        for request, completion in answers:
            before = partial.get(request.prompt.id)
            assert before is None or len(completion.token_ids) >= len(before.token_ids)
            partial[request.prompt.id] = completion
    assert aborts > 6
    for request in asked:
        completion = partial[request.prompt.id]
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] == 2 else "length")
        assert np.abs(completion.logprobs - logprobs_of(reference, request, completion)).max() < TOLERANCE
    for request, expected in zip(asked, whole, strict=False):
        expected = expected[: expected.index(2) + 1] if 2 in expected else expected
        assert partial[request.prompt.id].token_ids.tolist() == expected


RUNS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "one rank, disk": (0, {"sync": {"method": "disk"}}),
    "tensor 2, distributed, partial": (
        2,
        {
            "parallel": {"tensor": 2},
            "sync": {"bucket_bytes": 20_000},
            # So few rounds that the groups carried over from one step matter in the next.
            "rollout": {"partial": True, "oversampling": 3.0, "max_rounds": 2},
        },
    ),
    "data 2, tensor, overlap": (
        2,
        {"sync": {"method": "tensor"}, "rollout": {"overlap": "one_step"}, "loss": {"rollout_correction": "tis"}},
    ),
    "colocated": (0, {"sync": {"method": "disk"}, "rollout": {"colocated": True}}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_servers_samples_from_its_own_weights(name: str, servers, model: Path, problems: Path, tmp_path: Path):
    ranks, sections = RUNS[name]
    (tmp_path / "rewards.py").write_text(tiny.REWARDS, encoding="utf-8")
    rollout: dict[str, Any] = {"group_size": 4, "max_response_tokens": 16, "max_rounds": 4}
    # A batch may consist of groups carried over, whose mismatch after a step is not bounded in this test.
    rollout |= {"engine": "sglang", "servers": [server.url for server in servers], "max_logprob_gap": 1e6}
    settings = tiny.settings_for(
        model,
        problems,
        tmp_path / "run",
        reward={"function": "rewards:even"},
        **(sections | {"rollout": rollout | sections.get("rollout", {}), "run": {"steps": 3}}),
    )
    done = tiny.run_train(tiny.write_settings(tmp_path / "config.yaml", settings), cwd=tmp_path, ranks=ranks)
    assert done.returncode == 0, done.stderr
    method = settings.get("sync", {}).get("method", "distributed")
    assert f"from 2 SGLang server(s), which get weights by {method}" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    overlap = settings["rollout"].get("overlap") == "one_step"
    for line in lines:
        assert line["rollout/groups"] == 4
        assert line["train/grad_norm"] > 0
        if line["rollout/staleness_min"] == 0:
            assert line["rollout/logprob_gap_mean"] < TOLERANCE
            assert line["rollout/logprob_gap_max"] < 10 * TOLERANCE
    assert lines[0]["rollout/staleness_max"] == 0
    assert overlap or any(line["rollout/staleness_min"] == 0 for line in lines[1:])
    if overlap:
        assert lines[2]["rollout/staleness_mean"] > 0
        assert 1 <= lines[2]["rollout/staleness_max"] <= 2  # groups of the first step may have been carried over
    assert not (tmp_path / "run" / "sync").exists()


def test_requests_of_a_server_that_dies_go_to_the_other_and_it_is_re_admitted_with_the_weights(
    servers, engine_on, reference, caplog: pytest.LogCaptureFixture
):
    engine = engine_on([server.url for server in servers], max_inflight=8)
    engine.update_weights(weights_of(reference), version=3)
    engine.pool.membership.health_check_seconds = 0.5
    asked = requests(96)
    answers = engine.generate(asked, sampling(100))
    completions = [next(answers)]
    servers[1].kill()
    completions += answers
    found = in_order(asked, completions)
    for request, completion in list(zip(asked, found, strict=True))[::8]:
        expected = greedy(reference, request, 100)
        expected = expected[: expected.index(2) + 1] if 2 in expected else expected
        assert completion.token_ids.tolist() == expected
    removals = [record.getMessage() for record in caplog.records if "is removed from rotation" in record.getMessage()]
    assert len(removals) == 1
    assert removals[0].startswith(f"server {servers[1].url} is removed from rotation")
    assert engine.pool.in_rotation == [servers[0].url]
    servers[1].start()
    servers[1].wait()
    with engine.pool.open():
        wait_for(lambda: len(engine.pool.in_rotation) == 2, seconds=60)
    servers[0].kill()
    again = in_order(asked[:8], engine.generate(asked[:8], sampling(100)))
    assert [c.token_ids.tolist() for c in again] == [c.token_ids.tolist() for c in found[:8]]
