"""Tests of the embedded engine against transformers: a forward without a KV cache, and ``generate``."""

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megatron_rlvr.engines.embedded.engine import EmbeddedEngine
from megatron_rlvr.engines.embedded.sampling import sample_tokens
from megatron_rlvr.types import CompletionRequest, Prompt

VOCABULARY = 61
STOP = 7
CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    # Far wider than in practice: with the usual range every next-token distribution is nearly uniform and hides bugs.
    "initializer_range": 0.25,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(  # type: ignore[call-arg]
        **SHAPE, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1
    ),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "granite": GraniteConfig(**SHAPE, attention_multiplier=0.5, tie_word_embeddings=True),  # its own scale
    "llama_one_key_value_head_each": LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}),
}


def sampling(temperature=1.0, top_p=1.0, max_response_tokens=24):
    return SimpleNamespace(temperature=temperature, top_p=top_p, max_response_tokens=max_response_tokens)


def reference_model(config, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def checkpoint(model, folder):
    """Return the tensors of ``model`` as transformers saves them, so that the names are those of a checkpoint."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def engine_of(model, tensors=None, version=3, **limits):
    engine = EmbeddedEngine(model.config, device=CPU, stop_token_ids=[STOP], pad_token_id=0, **limits)
    engine.update_weights((tensors or model.state_dict()).items(), version)
    return engine


def make_requests(prompt_count, group_size, seed=0):
    """Return ``group_size`` requests for each of ``prompt_count`` prompts of 1 to 20 tokens."""
    random = np.random.default_rng(seed)
    lengths = [1, 2, *random.integers(3, 21, prompt_count)][:prompt_count]
    prompts = [
        Prompt(f"p{i}", random.integers(0, VOCABULARY, length).astype(np.int32), "", "test")
        for i, length in enumerate(lengths)
    ]
    return [CompletionRequest(p, i, int(random.integers(2**63))) for p in prompts for i in range(group_size)]


def by_request(completions):
    table = {(c.prompt_id, c.index): c for c in completions}
    return {key: (table[key].token_ids.tolist(), table[key].finish_reason) for key in sorted(table)}


def watch_forwards(engine):
    """Return two lists that grow with every forward of the engine's model: rows prefilled and rows decoded."""
    prefilled: list[int] = []
    decoded: list[int] = []

    def record(module, args, kwargs):
        (decoded if kwargs.get("position_ids") is not None else prefilled).append(len(kwargs["input_ids"]))

    engine._model.base_model.register_forward_pre_hook(record, with_kwargs=True)
    return prefilled, decoded


@pytest.fixture(scope="module")
def qwen3():
    return reference_model(CONFIGS["qwen3"])


@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_equal_those_of_a_forward_without_kv_cache(name, tmp_path):
    model = reference_model(CONFIGS[name])
    engine = engine_of(model, checkpoint(model, tmp_path), max_batch_rows=6)
    requests = make_requests(prompt_count=6, group_size=2)
    prompts = {request.prompt.id: request.prompt.token_ids for request in requests}
    for temperature in (1.0, 0.6):
        completions = list(engine.generate(requests, sampling(temperature)))
        assert len(completions) == len(requests)
        for completion in completions:
            prompt, response = prompts[completion.prompt_id], completion.token_ids
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt.tolist(), *response.tolist()]])).logits[0]
            expected = torch.log_softmax(logits[len(prompt) - 1 : -1].double() / temperature, dim=-1)
            expected = expected[torch.arange(len(response)), torch.from_numpy(response).long()]
            assert completion.logprobs.dtype == np.float32
            assert response.dtype == np.int32
            np.testing.assert_allclose(completion.logprobs, expected.numpy(), rtol=0, atol=1e-5)
            assert completion.weight_versions.tolist() == [3] * len(response)


@pytest.mark.parametrize("name", CONFIGS)
def test_temperature_zero_equals_greedy_generate_of_transformers(name, tmp_path):
    model = reference_model(CONFIGS[name], seed=1)
    engine = engine_of(model, checkpoint(model, tmp_path))
    requests = make_requests(prompt_count=6, group_size=1)
    greedy = by_request(engine.generate(requests, sampling(temperature=0.0)))
    for request in requests:
        prompt = torch.from_numpy(request.prompt.token_ids).long()[None]
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=STOP,
            pad_token_id=0,
        )
        assert greedy[request.prompt.id, 0][0] == output[0, prompt.shape[1] :].tolist()


def test_completions_do_not_depend_on_the_batch_the_order_or_the_limits(qwen3):
    requests = make_requests(prompt_count=20, group_size=12)
    together = by_request(engine_of(qwen3).generate(requests, sampling()))
    assert len(together) == 240
    assert len({tuple(tokens) for tokens, _ in together.values()}) > 200  # the random streams do differ
    shuffled = [requests[i] for i in np.random.default_rng(5).permutation(len(requests))]
    for limits in ({"max_batch_rows": 7}, {"max_batch_tokens": 500}, {"max_batch_rows": 64}):
        assert by_request(engine_of(qwen3, **limits).generate(shuffled, sampling())) == together
    engine = engine_of(qwen3)
    for request in requests[::10]:
        alone = by_request(engine.generate([request], sampling()))
        assert alone.items() <= together.items()


def test_uniform_j_of_a_request_picks_token_j_while_rows_enter_and_leave_the_batch():
    config = Qwen3Config(**{**SHAPE, "max_position_embeddings": 512}, head_dim=16, tie_word_embeddings=True)
    model = reference_model(config)
    requests = make_requests(prompt_count=6, group_size=4)
    completions = {
        (c.prompt_id, c.index): c for c in engine_of(model).generate(requests, sampling(max_response_tokens=200))
    }
    assert sum(len(c.token_ids) > 150 for c in completions.values()) >= 3
    assert sum(len(c.token_ids) < 100 for c in completions.values()) >= 3
    for request in requests:
        response = completions[request.prompt.id, request.index].token_ids.tolist()
        prompt = request.prompt.token_ids.tolist()
        uniforms = np.random.Generator(np.random.Philox(key=request.seed)).random(len(response))
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        cumulative = logits.double().softmax(-1).cumsum(-1).numpy()
        picked = [int(np.searchsorted(row, u, side="right")) for row, u in zip(cumulative, uniforms, strict=True)]
        assert picked == response


def test_first_tokens_follow_the_softmax(qwen3):
    prompt = make_requests(prompt_count=5, group_size=1)[-1].prompt
    requests = [CompletionRequest(prompt, index, seed=index) for index in range(6000)]
    for temperature in (1.0, 1.7):
        completions = engine_of(qwen3).generate(requests, sampling(temperature, max_response_tokens=1))
        counts = np.bincount([c.token_ids[0] for c in completions], minlength=VOCABULARY)
        with torch.no_grad():
            logits = qwen3(torch.from_numpy(prompt.token_ids).long()[None]).logits[0, -1]
        expected = 6000 * (logits.double() / temperature).softmax(-1).numpy()
        assert expected.max() > 3 * expected.mean()  # far from uniform
        bins = np.where(expected >= 5, np.arange(VOCABULARY), VOCABULARY)  # the rare tokens share one bin
        counts, expected = np.bincount(bins, counts), np.bincount(bins, expected)
        counts, expected = counts[expected > 0], expected[expected > 0]
        degrees = len(expected) - 1
        assert degrees > 8
        assert ((counts - expected) ** 2 / expected).sum() < degrees + 4 * np.sqrt(2 * degrees)


def test_top_p_keeps_the_fewest_most_likely_tokens_and_the_full_logprobs():
    probabilities = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
    logits = torch.from_numpy(np.log(probabilities)).float()
    uniforms = torch.linspace(0, 0.9999, 400, dtype=torch.float64)
    # Computed by hand: 0.4 + 0.25 < 0.7 <= 0.4 + 0.25 + 0.2, which leaves tokens 1, 3 and 4.
    for top_p, nucleus in ((0.7, [1, 3, 4]), (0.3, [1]), (0.94, [1, 2, 3, 4]), (1.0, [0, 1, 2, 3, 4])):
        tokens, logprobs = sample_tokens(logits.expand(400, -1), uniforms, 1.0, top_p)
        assert sorted(set(tokens.tolist())) == nucleus
        np.testing.assert_allclose(logprobs.numpy(), np.log(probabilities)[tokens.numpy()], atol=1e-6)
        share = np.bincount(tokens.numpy(), minlength=5) / 400
        kept = np.where(np.isin(np.arange(5), nucleus), probabilities, 0)
        np.testing.assert_allclose(share, kept / kept.sum(), atol=0.006)


def test_top_p_samples_only_tokens_of_the_nucleus(qwen3):
    requests = make_requests(prompt_count=8, group_size=4)
    prompts = {request.prompt.id: request.prompt.token_ids.tolist() for request in requests}
    outside = 0
    for top_p in (0.5, 1.0):
        for completion in engine_of(qwen3).generate(requests, sampling(top_p=top_p)):
            prompt, response = prompts[completion.prompt_id], completion.token_ids
            with torch.no_grad():
                rows = qwen3(torch.tensor([prompt + response.tolist()])).logits[0, len(prompt) - 1 : -1].softmax(-1)
            for row, token in zip(rows, response, strict=True):
                outside += float(row[row > row[int(token)]].sum()) >= 0.5 + 1e-6
        assert (outside == 0) == (top_p == 0.5)


def test_a_finished_completion_is_yielded_at_once_and_its_row_is_not_computed_again(qwen3):
    engine = engine_of(qwen3)
    prefilled, decoded = watch_forwards(engine)
    requests = make_requests(prompt_count=10, group_size=3)
    completions, steps_at_yield = [], []
    for completion in engine.generate(requests, sampling(max_response_tokens=40)):
        completions.append(completion)
        steps_at_yield.append(len(decoded))
        assert not torch.is_inference_mode_enabled()  # the trainer computes between two completions
    assert prefilled == [9]  # once per prompt, not per completion; a prompt of one token needs no prefill
    lengths = [len(c.token_ids) for c in completions]
    assert steps_at_yield == lengths == sorted(lengths)
    assert len(set(lengths)) > 5
    assert sum(decoded) == sum(lengths)
    for completion in completions:
        stopped = completion.token_ids[-1] == STOP
        assert STOP not in completion.token_ids[:-1]
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(completion.token_ids) == 40
    assert {c.finish_reason for c in completions} == {"stop", "length"}


def test_waiting_requests_start_as_soon_as_rows_are_free(qwen3):
    engine = engine_of(qwen3, max_batch_rows=4)
    _, decoded = watch_forwards(engine)
    requests = make_requests(prompt_count=10, group_size=3)
    completions = list(engine.generate(requests, sampling(max_response_tokens=40)))
    assert sorted(by_request(completions)) == sorted((r.prompt.id, r.index) for r in requests)
    assert sum(decoded) == sum(len(c.token_ids) for c in completions)
    # A step may have free rows only once no request waits, which is at most the length of one response.
    assert len(decoded) > 160
    assert all(rows == 4 for rows in decoded[:-40])
    assert decoded[-1] < 4


def test_a_dropped_or_failed_generate_does_not_affect_later_ones(qwen3):
    engine = engine_of(qwen3, max_batch_rows=5)
    requests = make_requests(prompt_count=6, group_size=3)
    expected = by_request(engine.generate(requests, sampling()))
    dropped = engine.generate(requests, sampling(temperature=0.3))
    next(dropped)
    dropped.close()
    assert by_request(engine.generate(requests, sampling())) == expected

    poisoned = {name: torch.full_like(tensor, torch.nan) for name, tensor in qwen3.state_dict().items()}
    poisoned.pop("lm_head.weight")
    engine.update_weights(poisoned.items(), 4)
    with pytest.raises(RuntimeError, match="weights of version 4 produce logits that are not finite"):
        list(engine.generate(requests, sampling()))
    engine.update_weights(qwen3.state_dict().items(), 5)
    completions = list(engine.generate(requests, sampling()))
    assert by_request(completions) == expected
    assert {v for c in completions for v in c.weight_versions.tolist()} == {5}


def test_two_generate_calls_may_alternate(qwen3):
    engine = engine_of(qwen3)
    first, second = make_requests(4, 2, seed=1), make_requests(4, 2, seed=2)
    expected = [by_request(engine.generate(requests, sampling())) for requests in (first, second)]
    turns = list(zip(engine.generate(first, sampling()), engine.generate(second, sampling()), strict=True))
    assert [by_request(completions) for completions in zip(*turns, strict=True)] == expected


def test_new_weights_are_sampled_from_and_end_generate_calls_in_progress(qwen3):
    engine = engine_of(qwen3, version=3)
    requests = make_requests(prompt_count=6, group_size=2)
    other = reference_model(CONFIGS["qwen3"], seed=9)
    running = engine.generate(requests, sampling())
    next(running)
    engine.update_weights(other.state_dict().items(), 4)
    with pytest.raises(RuntimeError, match="weights changed from version 3 to 4 while sampling"):
        list(running)
    assert by_request(engine.generate(requests, sampling())) == by_request(
        engine_of(other).generate(requests, sampling())
    )


def test_weights_must_fit_exactly(qwen3):
    def attempt(change, config=CONFIGS["qwen3"], model=qwen3):
        engine = EmbeddedEngine(config, device=CPU, stop_token_ids=[STOP], pad_token_id=0)
        engine.update_weights(model.state_dict().items(), 1)
        with pytest.raises(RuntimeError) as caught:
            engine.update_weights(change(dict(model.state_dict())), 2)
        with pytest.raises(RuntimeError, match="no complete weights"):
            engine.generate(make_requests(1, 1), sampling())
        engine.update_weights(model.state_dict().items(), 3)  # a later update succeeds
        assert engine.weight_version == 3
        return str(caught.value)

    norm, bogus = "model.norm.weight", "model.layers.9.mlp.up_proj.weight"
    assert f"missing: {norm}" in attempt(lambda t: [(n, v) for n, v in t.items() if n != norm])
    assert f"unknown: {bogus}" in attempt(lambda t: [*t.items(), (bogus, torch.zeros(1))])
    assert f"of the wrong shape: {norm} [31], not [32]" in attempt(lambda t: [*(t | {norm: torch.zeros(31)}).items()])
    assert f"repeated: {norm}" in attempt(lambda t: [*t.items(), (norm, t[norm])])
    assert "and 21 more" in attempt(lambda t: [])  # of 2 x 11 in the layers, the embedding, the norm and the tied head
    assert "lm_head.weight differs from model.embed_tokens.weight" in attempt(
        lambda t: [*(t | {"lm_head.weight": t["lm_head.weight"] + 1}).items()]
    )
    llama = reference_model(CONFIGS["llama"])
    untied = attempt(lambda t: [(n, v) for n, v in t.items() if n != "lm_head.weight"], CONFIGS["llama"], llama)
    assert untied.endswith("missing: lm_head.weight")


def test_a_tied_head_may_be_omitted(qwen3):
    tensors = {name: tensor for name, tensor in qwen3.state_dict().items() if name != "lm_head.weight"}
    requests = make_requests(prompt_count=4, group_size=2)
    assert by_request(engine_of(qwen3, tensors).generate(requests, sampling())) == by_request(
        engine_of(qwen3).generate(requests, sampling())
    )


def test_the_config_of_the_caller_is_not_changed_and_may_be_a_folder(qwen3, tmp_path):
    config = Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True)
    before = (config.to_dict(), config._attn_implementation)
    engine = engine_of(SimpleNamespace(config=config, state_dict=qwen3.state_dict))
    assert (config.to_dict(), config._attn_implementation) == before
    config.save_pretrained(tmp_path)
    from_folder = engine_of(SimpleNamespace(config=tmp_path, state_dict=qwen3.state_dict))
    requests = make_requests(prompt_count=4, group_size=2)
    assert by_request(from_folder.generate(requests, sampling())) == by_request(engine.generate(requests, sampling()))


def test_requests_that_cannot_be_served_are_refused_before_sampling(qwen3):
    engine = engine_of(qwen3, max_batch_tokens=60)
    requests = make_requests(prompt_count=4, group_size=1)
    long = CompletionRequest(Prompt("long", np.zeros(73, np.int32), "", "test"), 0, 0)
    with pytest.raises(
        ValueError, match=r"prompt long \(73 tokens\) plus max_response_tokens=24 exceeds the model's 96"
    ):
        engine.generate([*requests, long], sampling())
    with pytest.raises(ValueError, match="exceeds max_batch_tokens=60; raise max_batch_tokens"):
        engine.generate(requests, sampling(max_response_tokens=59))
    with pytest.raises(ValueError, match="prompt none has no tokens"):
        engine.generate([CompletionRequest(Prompt("none", np.zeros(0, np.int32), "", "test"), 0, 0)], sampling())
    with pytest.raises(ValueError, match="temperature=-1: must be at least 0"):
        engine.generate(requests, sampling(temperature=-1))
    assert list(engine.generate([], sampling())) == []
    assert len(list(engine.generate(requests, sampling()))) == 4


def test_unsupported_attention_and_tokens_outside_the_vocabulary_are_refused():
    sliding = Qwen3Config(**SHAPE, head_dim=16, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(ValueError, match="supports full attention only, but the model has sliding_attention"):
        EmbeddedEngine(sliding, device=CPU, stop_token_ids=[STOP], pad_token_id=0)
    with pytest.raises(ValueError, match=f"token id {VOCABULARY} is outside"):
        EmbeddedEngine(CONFIGS["qwen3"], device=CPU, stop_token_ids=[VOCABULARY], pad_token_id=0)


def test_prefill_computes_no_logits(qwen3):
    engine = engine_of(qwen3)
    prefilled, decoded = watch_forwards(engine)
    rows: list[int] = []
    engine._model.get_output_embeddings().register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    list(engine.generate(make_requests(prompt_count=10, group_size=3), sampling()))
    assert prefilled == [9]
    assert rows == decoded


def test_a_kv_cache_is_freed_with_its_rollout_and_not_by_the_garbage_collector(qwen3):
    engine = engine_of(qwen3)
    requests = make_requests(prompt_count=10, group_size=3)
    gc.collect()
    gc.disable()
    try:
        for ended in (True, False):
            stream = engine.generate(requests, sampling())
            next(stream)
            caches = [weakref.ref(each) for each in gc.get_objects() if type(each).__name__ == "_KVCacheLayer"]
            assert len(caches) == SHAPE["num_hidden_layers"]
            if ended:
                list(stream)
            del stream
            assert [cache() for cache in caches] == [None] * len(caches)
    finally:
        gc.enable()


def test_a_stop_ends_sampling_at_the_next_step_and_the_rest_can_be_requested_again(qwen3):
    engine = engine_of(qwen3)
    requests = make_requests(prompt_count=10, group_size=3)
    whole = by_request(engine.generate(requests, sampling()))
    asked = iter(range(100))
    stopped = by_request(engine.completions(requests, sampling(), stop_wanted=lambda: next(asked) == 8))
    assert stopped == {key: (tokens, reason) for key, (tokens, reason) in whole.items() if len(tokens) <= 8}
    assert 0 < len(stopped) < len(whole)
    rest = [request for request in requests if (request.prompt.id, request.index) not in stopped]
    assert stopped | by_request(engine.generate(rest, sampling())) == whole
