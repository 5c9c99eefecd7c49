"""Megatron's fields and the tables of names, against transformers' own reading of the same configuration."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megatron_rlvr.hf.families import (
    FAMILIES,
    ModelError,
    Row,
    expert_count,
    moe_layers,
    padded_vocab_size,
    rope_scaling_factor,
    rope_theta,
    rows_of,
    tensor_shapes,
    tied,
    transformer_fields,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "rms_norm_eps": 1e-5,
}


def config(**changes):
    """config.json as transformers writes it."""
    return Qwen3Config(**(SHAPE | changes)).to_dict()


def test_the_fields_are_the_configurations():
    assert transformer_fields(config()) == {
        "num_layers": 3,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 24,
        "layernorm_epsilon": 1e-5,
        "qk_layernorm": True,
        "add_qkv_bias": False,
    }


def test_sizes_that_a_config_leaves_out_follow_from_the_others():
    older = {key: value for key, value in config().items() if key not in ("head_dim", "num_key_value_heads")}
    assert transformer_fields(older)["kv_channels"] == 8
    assert transformer_fields(older)["num_query_groups"] == 4


def test_the_rotary_base_is_found_where_transformers_4_and_5_keep_it():
    assert rope_theta({"rope_theta": 1e6}) == 1e6
    assert rope_theta({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}) == 5e5
    assert rope_theta(config(rope_parameters={"rope_type": "default", "rope_theta": 7e5})) == 7e5
    assert rope_theta({}) == 1e4


@pytest.mark.parametrize(
    ("vocab", "tensor", "padded"),
    [(1, 1, 128), (128, 1, 128), (129, 1, 256), (151_936, 1, 151_936), (151_936, 8, 152_576), (151_936, 2, 152_064)],
)
def test_the_vocabulary_is_padded_to_a_multiple_of_128_rows_on_every_rank(vocab, tensor, padded):
    assert padded_vocab_size(vocab, tensor) == padded


def test_tied_embeddings_are_the_configurations():
    assert tied(config(tie_word_embeddings=True))
    assert not tied(config(tie_word_embeddings=False))
    assert not tied({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported are"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"use_sliding_window": True}, "sliding-window attention is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window attention is not supported"),
        ({"architectures": ["Qwen3ForTokenClassification"]}, "architecture 'Qwen3ForTokenClassification' is not"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5 is not supported"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_size": None}, "hidden_size of config.json is None, not an integer above 0"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads of config.json is '2'"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps of config.json is missing or not a number"),
        ({"hidden_act": "gelu"}, "activation 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
    ],
)
def test_unsupported_features_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        transformer_fields(config() | changes)


# Qwen2 and Llama ----------------------------------------------------------------------------------------------------

LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
"""Copied from the hub."""
QWEN2_5_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def test_the_fields_of_qwen2_and_llama_are_the_configurations():
    assert transformer_fields(QWEN2_5_7B) == {
        "num_layers": 28,
        "hidden_size": 3584,
        "ffn_hidden_size": 18944,
        "num_attention_heads": 28,
        "num_query_groups": 4,
        "kv_channels": 128,
        "layernorm_epsilon": 1e-6,
        "qk_layernorm": False,
        "add_qkv_bias": True,
    }
    assert transformer_fields(LLAMA_3_1_8B) == {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "kv_channels": 128,
        "layernorm_epsilon": 1e-5,
        "qk_layernorm": False,
        "add_qkv_bias": False,
    }


def test_the_rope_factor_of_llama_3_is_found_where_transformers_4_and_5_keep_it():
    newer = {"rope_parameters": {"rope_theta": 5e5} | LLAMA_3_1_8B["rope_scaling"]}
    assert rope_scaling_factor(LLAMA_3_1_8B) == rope_scaling_factor(newer) == 8.0
    assert rope_scaling_factor(QWEN2_5_7B) is None
    assert rope_scaling_factor(config()) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architecture 'LlamaForSequenceClassification'"),
        *(
            ({"rope_scaling": LLAMA_3_1_8B["rope_scaling"] | change}, f"{next(iter(change))} .* of rope type llama3")
            for change in (
                {"low_freq_factor": 2.0},
                {"high_freq_factor": 8.0},
                {"original_max_position_embeddings": 4096},
                {"factor": 0.5},
                {"factor": None},
            )
        ),
    ],
)
def test_unsupported_features_of_llama_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        transformer_fields(LLAMA_3_1_8B | changes)


# MoE layers ---------------------------------------------------------------------------------------------------------

QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
"""Copied from the hub."""
MOE_SHAPE: dict[str, Any] = SHAPE | {
    "num_hidden_layers": 5,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
}


def moe_config(**changes):
    """config.json of a model with experts, as transformers writes it."""
    return Qwen3MoeConfig(**(MOE_SHAPE | changes)).to_dict()


def test_the_fields_of_a_model_with_experts_are_the_configurations():
    assert transformer_fields(QWEN3_30B_A3B) == {
        "num_layers": 48,
        "hidden_size": 2048,
        "ffn_hidden_size": 6144,
        "num_attention_heads": 32,
        "num_query_groups": 4,
        "kv_channels": 128,
        "layernorm_epsilon": 1e-6,
        "qk_layernorm": True,
        "add_qkv_bias": False,
        "num_moe_experts": 128,
        "moe_ffn_hidden_size": 768,
        "moe_layer_freq": [1] * 48,
        "moe_router_topk": 8,
        "moe_router_dtype": "fp32",
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_z_loss_coeff": None,
        "moe_input_jitter_eps": None,
        "moe_expert_capacity_factor": None,
        "moe_grouped_gemm": False,
    }
    assert rope_theta(QWEN3_30B_A3B) == 1e6
    assert transformer_fields(QWEN3_30B_A3B | {"norm_topk_prob": False})["moe_router_pre_softmax"]


def test_the_number_of_experts_is_found_where_transformers_4_and_5_keep_it():
    assert expert_count(QWEN3_30B_A3B) == 128
    assert expert_count(moe_config()) == 4
    assert "num_experts" not in moe_config(), "it has the other name"
    assert expert_count(config()) == 0


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({}, []),
        ({"mlp_only_layers": [0, 3]}, [0, 3]),
        ({"decoder_sparse_step": 2}, [0, 2, 4]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [0, 1, 2, 4]),
    ],
)
def test_the_same_layers_as_in_transformers_have_experts(changes, dense):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        layers = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**MOE_SHAPE, **changes)).model.layers
    assert [n for n, layer in enumerate(layers) if not hasattr(layer.mlp, "experts")] == dense
    assert [n for n, is_moe in enumerate(moe_layers(moe_config(**changes))) if not is_moe] == dense
    assert transformer_fields(moe_config(**changes))["moe_layer_freq"] == [int(n not in dense) for n in range(5)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 129}, "num_experts_per_tok 129 is more than the 128 experts"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok 1 with norm_topk_prob weighs every expert 1"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok of config.json is None, not an integer above 0"),
        ({"num_experts": "128"}, "num_experts of config.json is '128'"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size of config.json is 0"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step of config.json is 0"),
        ({"mlp_only_layers": list(range(48))}, "no layer has experts by decoder_sparse_step and mlp_only_layers"),
        ({"decoder_sparse_step": 49}, "no layer has experts"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
    ],
)
def test_unsupported_experts_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        transformer_fields(QWEN3_30B_A3B | changes)


# Rows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made",
    [
        Qwen3Config(**SHAPE, tie_word_embeddings=False),
        Qwen3Config(**SHAPE, tie_word_embeddings=True),
        Qwen3MoeConfig(**MOE_SHAPE),
        Qwen3MoeConfig(**MOE_SHAPE, mlp_only_layers=[2], decoder_sparse_step=2),
        Qwen2Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"}, tie_word_embeddings=False),
        Qwen2Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"}, tie_word_embeddings=True),
        LlamaConfig(**SHAPE, tie_word_embeddings=False),
        LlamaConfig(**SHAPE, tie_word_embeddings=True),
    ],
)
def test_every_tensor_of_a_model_folder_has_exactly_one_row(made, tmp_path):
    """Against the names and shapes with which transformers writes the weights of such a model."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        theirs = sorted((name, tuple(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    ours = [
        named
        for (row,) in rows_of(made.to_dict())
        for named in zip(row.hugging_face, tensor_shapes(row, made.to_dict()), strict=True)
    ]
    assert sorted(ours) == theirs


def test_rows_of_experts_are_yielded_together_with_those_of_the_other_expert_ranks():
    one = [row for (row,) in rows_of(moe_config())]
    two = list(rows_of(moe_config(), 2))
    assert sorted(row.megatron for rows in two for row in rows) == sorted(row.megatron for row in one)
    assert [rows for rows in two if len(rows) == 1] == [(row,) for row in one if not row.of_expert]
    together = [
        [int(re.findall(r"local_experts\.(\d)", row.megatron)[0]) for row in rows] for rows in two if len(rows) > 1
    ]
    assert together == [[0, 2], [1, 3]] * (5 * 2), "in every layer, for both matrices"
    for rows in two:
        for row in rows:
            numbers = set(re.findall(r"layers\.\d+|experts\.\d+", row.megatron))
            assert all(set(re.findall(r"layers\.\d+|experts\.\d+", name)) == numbers for name in row.hugging_face)


def test_the_page_about_checkpoints_shows_the_tables():
    def short(name: str) -> str:
        return re.sub(r"(decoder|model)\.layers\.\{layer\}\.", "", name).replace("{expert}", "E")

    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    shown = [line for line in page.splitlines() if line.endswith((*(f" {name} |" for name in FAMILIES), "| all |"))]
    rows: dict[Row, list[str]] = {}
    for family in FAMILIES.values():
        for row in family.rows:
            rows.setdefault(row, []).append(family.model_type)
    for line, (row, families) in zip(shown, rows.items(), strict=True):
        tensors = zip(row.hugging_face, row.shapes, strict=True)
        cells = [
            f"`{short(row.megatron)}`",
            f"`{short(row.in_checkpoint)}`" if row.in_checkpoint else "the same",
            ", ".join(f"`{short(name)}` [{', '.join(shape)}]" for name, shape in tensors),
            row.layout,
            row.layers,
            "all" if len(families) == len(FAMILIES) else ", ".join(families),
        ]
        assert line == f"| {' | '.join(cells)} |"
