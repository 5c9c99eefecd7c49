"""What Megatron is told about a model, against transformers' own reading of the same configuration."""

from typing import Any

import pytest
from transformers import Qwen3Config

from megatron_rlvr.hf.families import ModelError, family_of, rope_theta, tied, transformer_fields

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


def test_tied_embeddings_are_the_configurations():
    assert tied(config(tie_word_embeddings=True))
    assert not tied(config(tie_word_embeddings=False))
    assert not tied({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' has no table; known families are"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"use_sliding_window": True}, "sliding-window attention is not supported"),
        ({"hidden_act": "gelu"}, "activation 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias is not supported"),
    ],
)
def test_a_model_that_would_be_computed_wrongly_is_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        transformer_fields(config() | changes)


def test_every_tensor_of_a_family_has_exactly_one_row():
    """Against the names that transformers gives the weights of such a model."""
    import torch
    from transformers import AutoModelForCausalLM

    for model_type, made in {"qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=False)}.items():
        with torch.device("meta"):
            theirs = set(AutoModelForCausalLM.from_config(made).state_dict())
        rows = family_of({"model_type": model_type}).rows
        ours = [
            name.format(layer=layer)
            for row in rows
            for layer in (range(SHAPE["num_hidden_layers"]) if "{layer}" in row.megatron else (0,))
            for name in row.hugging_face
        ]
        assert sorted(ours) == sorted(theirs)
