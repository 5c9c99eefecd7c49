"""Two temperatures by entropy: against NumPy in float64, in the embedded engine, and as servers get it."""

import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import entropy as entropy_of
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_rlvr.engines.embedded.engine import EmbeddedEngine
from megatron_rlvr.engines.sglang.completions import CompletionCodec
from megatron_rlvr.engines.two_temperatures import TwoTemperatures
from megatron_rlvr.types import CompletionRequest, Prompt

LOGITS = np.random.default_rng(0).normal(size=(40, 30)) * np.linspace(0.1, 8, 40)[:, None]
VOCABULARY = 61


def expected(logits: np.ndarray, threshold: float, high: float, low: float) -> np.ndarray:
    """Log-probabilities that tokens are to be sampled with."""
    rows = []
    for row in logits:
        temperature = high if entropy_of(np.exp(log_softmax(row))) > threshold else low
        if temperature:
            rows.append(log_softmax(row / temperature))
        else:
            rows.append(np.where(np.arange(len(row)) == row.argmax(), 0.0, -np.inf))
    return np.stack(rows)


@pytest.mark.parametrize(("high", "low"), [(1.4, 0.6), (0.0, 1.0), (1.0, 0.0)])
def test_the_temperature_of_a_row_is_decided_by_its_entropy(high: float, low: float):
    wanted = expected(LOGITS, 1.5, high, low)
    found = TwoTemperatures(1.5, high, low)(torch.from_numpy(LOGITS)).log_softmax(-1)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-12)
    entropies = [entropy_of(np.exp(log_softmax(row))) for row in LOGITS]
    assert 5 < sum(value > 1.5 for value in entropies) < 35


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.25,
        )
    ).eval()


@torch.no_grad()
def logits_of(model: Qwen2ForCausalLM, tokens: list[int]) -> np.ndarray:
    """[T, V] logits of a response to the prompt of `sampled`."""
    return model(input_ids=torch.tensor([[1, 2, 3, 4, 5, *tokens]])).logits[0, 4:-1].double().numpy()


def sampled(model: Qwen2ForCausalLM, temperature: float, two: TwoTemperatures | None) -> dict[int, tuple]:
    engine = EmbeddedEngine(
        model.config, device=torch.device("cpu"), stop_token_ids=[7], pad_token_id=0, process_logits=two
    )
    engine.update_weights(model.state_dict().items(), 0)
    prompt = Prompt("p", np.arange(1, 6, dtype=np.int32), "", "set")
    requests = [CompletionRequest(prompt, i, 100 + i) for i in range(12)]
    sampling = SimpleNamespace(temperature=temperature, top_p=1.0, max_response_tokens=24)
    return {c.index: (c.token_ids.tolist(), c.logprobs) for c in engine.generate(requests, sampling)}


def test_the_embedded_engine_samples_with_both_temperatures(model: Qwen2ForCausalLM):
    for temperature in (1.0, 0.7):
        plain, same = sampled(model, temperature, None), sampled(model, 1.0, TwoTemperatures(1.0, *[temperature] * 2))
        assert {i: tokens for i, (tokens, _) in plain.items()} == {i: tokens for i, (tokens, _) in same.items()}
    rows = np.concatenate([logits_of(model, tokens) for tokens, _ in sampled(model, 1.0, None).values()])
    threshold = float(np.median(entropy_of(np.exp(log_softmax(rows, axis=-1)), axis=-1)))
    used = set()
    for tokens, logprobs in sampled(model, 1.0, TwoTemperatures(threshold, 1.3, 0.5)).values():
        logits = logits_of(model, tokens)
        log_p = expected(logits, threshold, 1.3, 0.5)
        np.testing.assert_allclose(logprobs, log_p[np.arange(len(tokens)), tokens], atol=1e-4)
        used |= {bool(entropy_of(np.exp(log_softmax(row))) > threshold) for row in logits}
    assert used == {True, False}


def test_requests_to_servers_have_a_processor_that_needs_nothing_of_the_project():
    codec = CompletionCodec(
        stop_token_ids=[7], vocab_size=30, max_sequence_tokens=50, two_temperatures=TwoTemperatures(1.5, 1.4, 0.6)
    )
    request = CompletionRequest(Prompt("p", np.arange(3, dtype=np.int32), "", "set"), 0, 1)
    sampling = SimpleNamespace(temperature=1.0, top_p=1.0, max_response_tokens=8)
    body = codec.encode(request, None, sampling, 0).body
    assert body["sampling_params"]["custom_params"] == {"threshold": 1.5, "high": 1.4, "low": 0.6}
    content = bytes.fromhex(json.loads(body["custom_logit_processor"])["callable"])
    assert b"megatron_rlvr." not in content
    rows = [{"threshold": 1.5, "high": 1.4, "low": 0.6}] * 20 + [{"threshold": 0.5, "high": 0.0, "low": 1.0}] * 20
    found = pickle.loads(content)()(torch.from_numpy(LOGITS), rows).log_softmax(-1).numpy()
    wanted = np.concatenate([expected(LOGITS[:20], 1.5, 1.4, 0.6), expected(LOGITS[20:], 0.5, 0.0, 1.0)])
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    # In a Python that has torch and no package of the project.
    code = "import pickle, sys; pickle.loads(bytes.fromhex(sys.argv[1]))(); assert 'megatron_rlvr' not in sys.modules"
    subprocess.run([sys.executable, "-I", "-c", code, content.hex()], check=True, timeout=120)


def test_requests_without_two_temperatures_are_as_before():
    codec = CompletionCodec(stop_token_ids=[7], vocab_size=30, max_sequence_tokens=50)
    request = CompletionRequest(Prompt("p", np.arange(3, dtype=np.int32), "", "set"), 0, 1)
    body = codec.encode(request, None, SimpleNamespace(temperature=0.6, top_p=0.9, max_response_tokens=8), 0).body
    assert set(body) == {"input_ids", "return_logprob", "sampling_params"}
