"""Tests of the preflight with real servers: the mismatch, the restored weights, and a server of another model."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from preflight_runs import Preflight, run_all

NATS = 1e-4  # in float32


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, model: Path, problems: Path, started: list[Any]) -> dict[str, Any]:
    """Run preflights on the two servers of the session, which hold other weights of the tiny model."""
    for server in started:
        if not server.alive:
            server.restart()
    place = tmp_path_factory.mktemp("preflight")
    rollout = {"engine": "sglang", "servers": [server.url for server in started]}
    larger = tiny.write_model(place / "larger vocabulary", vocab_size=352)

    def config(name: str, start: Path = model, **sections: Any) -> list[str | Path]:
        values = tiny.settings_for(start, problems, place / "runs" / name, rollout=rollout, **sections)
        values["rollout"] |= rollout | {"server_timeout_seconds": 20, "colocated": name == "disk"}
        return [tiny.write_settings(place / f"{name}.yaml", values)]

    shared = {"method": "disk", "dir": str(place / "shared")}
    (place / "shared").mkdir()
    done = run_all(
        place,
        {
            "distributed": config("distributed"),
            "disk": [*config("disk", sync=shared), "--largest-micro-batches"],
            "another": config("another", larger),
        },
    )
    return {"place": place, **done}


@pytest.mark.parametrize("name", ["distributed", "disk"])
def test_matching_servers_pass_with_their_version_and_a_small_mismatch(name: str, found: dict[str, Any]) -> None:
    passing: Preflight = found[name]
    assert passing.status == 0, passing.stdout + passing.stderr
    assert set(passing.results.values()) == {"passed"}
    assert (
        "2 with the run's model and at least 144 tokens of context, SGLang 0.5." in passing.checks["servers"]["message"]
    )
    assert float(passing.checks["mismatch"]["message"].split()[0]) < NATS
    assert "2 server(s) held the weights pushed" in passing.checks["rehearsal"]["message"]
    assert not (found["place"] / "runs").exists()
    assert list(found["place"].rglob(".preflight-*")) == []
    assert list((found["place"] / "shared").iterdir()) == []


def test_servers_hold_the_weights_of_the_model_afterwards(found: dict[str, Any], servers: Any, reference: Any) -> None:
    prompt = [5, 7, 11, 13]
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
    for server in servers:
        body = {"input_ids": prompt, "return_logprob": True, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        request = urllib.request.Request(
            server.url + "/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            meta = json.load(answer)["meta_info"]
        logprob, token, _ = meta["output_token_logprobs"][0]
        assert token == int(expected.argmax())
        assert abs(logprob - float(expected[token])) < NATS
        assert meta["weight_version"] in found["disk"].checks["restored"]["message"], (
            "the name given by the last preflight"
        )


def test_a_server_of_another_model_fails_and_gets_no_weights(found: dict[str, Any]) -> None:
    another: Preflight = found["another"]
    assert another.status == 1
    assert another.results["servers"] == "failed"
    assert "serves another model (vocabulary 320, not 352)" in another.checks["servers"]["message"]
    assert another.checks["servers"]["remedy"] == "start it on model.path"
    assert another.checks["rehearsal"]["message"] == "needs servers, which failed"
    assert another.results["disk"] == "passed"
