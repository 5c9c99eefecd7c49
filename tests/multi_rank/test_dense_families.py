"""Every dense family in every kind of layout against transformers: scores, weights, and a few steps of training.

Biases, norms and the stretch of Llama 3's rotary embedding are such that leaving one out would be seen, and a test
looks whether it would.
"""

from typing import Any

import pytest
import torch
from launcher import Ranks
from policy_runs import GROUPS, VOCAB, Layout, Run, assert_same_training, scored_and_exported, trained
from reference_training import Recipe, load, token_scores, train
from safetensors.torch import load_file

SEQUENCES = [(prompt, response) for prompt, responses, _ in GROUPS for response in responses]
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-3,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 500.0}
# With 12 numbers a head, wavelengths are 6, 43, 290, 2000, 13700 and 94000: short ones, one in between, long ones.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {"rope_parameters": PLAIN_ROPE, "tie_word_embeddings": False}),
    "qwen2 tied": ("Qwen2", {"rope_parameters": PLAIN_ROPE, "tie_word_embeddings": True}),
    "llama": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": False}),
    "llama tied": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 16}),
    "llama 3.0": ("Llama", {"rope_parameters": PLAIN_ROPE, "tie_word_embeddings": False}),
}
LAYOUTS = (
    Layout(),
    Layout(budget=90),
    Layout(tensor=2, sequence=True, budget=150),
    Layout(pipeline=2, budget=90),
    Layout(tensor=2, sequence=True, pipeline=2, budget=200),
    Layout(pipeline=2, virtual_pipeline=2, budget=90),
    Layout(context=2, budget=150),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Random models, biases and norms included."""
    import transformers

    made = {}
    for name, (kind, changes) in MODELS.items():
        torch.manual_seed(len(name))
        config = getattr(transformers, f"{kind}Config")(**SHAPE | changes)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.5 * torch.randn_like(parameter))
        made[name] = str(tmp_path_factory.mktemp("models") / name)
        model.save_pretrained(made[name])
    return made


def scores_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(token_scores(model, SEQUENCES, 0.8))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "qwen2" else pytest.mark.soak) for name in MODELS],
)
def test_scores_are_those_of_transformers_and_the_export_is_the_input_bit_by_bit(ranks: Ranks, folders, name):
    expected = scores_of(load(folders[name]))
    weights = load_file(f"{folders[name]}/model.safetensors")
    for layout in LAYOUTS:
        found = ranks.run(scored_and_exported, layout.size, folders[name], GROUPS, layout, 0.8)
        scores = {token: pair for by_token, _ in found for token, pair in by_token.items()}
        difference = (torch.tensor([scores[token] for token in sorted(scores)]) - expected).abs()
        assert difference.max() < 1e-4, layout
        for _, exported in found:
            assert exported.keys() == weights.keys()
            assert all(torch.equal(exported[n], weights[n]) for n in weights), layout


@pytest.mark.parametrize("name", ["qwen2 tied", "llama"])
def test_a_bfloat16_export_is_the_input_rounded(ranks: Ranks, folders, name):
    weights = load_file(f"{folders[name]}/model.safetensors")
    layout = Layout(tensor=2, sequence=True, pipeline=2, budget=200)
    for _, exported in ranks.run(scored_and_exported, 4, folders[name], GROUPS, layout, 1.0, "bfloat16"):
        assert exported.keys() == weights.keys()
        assert all(torch.equal(exported[n], weights[n].bfloat16()) for n in weights)


def test_leaving_out_a_bias_or_the_stretch_would_be_seen(folders):
    for name, parts in (("qwen2", ["q_proj.bias", "k_proj.bias", "v_proj.bias"]), ("llama", ["layernorm.weight"])):
        expected = scores_of(load(folders[name]))
        for part in parts:
            model = load(folders[name])
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith(part):
                    parameter.data.fill_(float(part.endswith("weight")))
            assert (scores_of(model) - expected).abs().max() > 1e-2, part
    model = load(folders["llama"])
    model.model.rotary_emb.inv_freq = 1 / 100_000 ** (torch.arange(0, 12, 2) / 12)
    assert (scores_of(model) - scores_of(load(folders["llama"]))).abs().max() > 1e-3


@pytest.mark.parametrize("name", [pytest.param("qwen2", marks=pytest.mark.soak), "llama tied"])
def test_training_steps_are_those_of_plain_autograd_in_every_layout(ranks: Ranks, folders, name):
    recipe = Recipe(steps=3)
    wanted = train(folders[name], GROUPS, recipe)
    before = load_file(f"{folders[name]}/model.safetensors")
    part = "q_proj.bias" if name == "qwen2" else "q_proj.weight"
    assert max(float((w - before[n]).abs().max()) for n, w in wanted.weights.items() if part in n) > 1e-3, "trained"
    for layout in LAYOUTS[1:6]:
        traces = ranks.run(trained, layout.size, Run(folders[name], GROUPS, recipe, layout))
        assert_same_training(traces, wanted, layout)
