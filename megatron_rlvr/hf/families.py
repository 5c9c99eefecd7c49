"""Model families: how a Hugging Face model is written as a megatron-core one. Adding a family is adding a table.

A family is two things one can read: the fields of Megatron's TransformerConfig computed from the Hugging Face config,
and a table of names. A row of the table says which Hugging Face tensors make up a Megatron parameter, and how:

    whole      one tensor, the same on every tensor-parallel rank
    vocab      one tensor [V, H], rows padded and split over ranks
    column     one tensor [out, in], split along out
    row        one tensor [out, in], split along in
    qkv        query, key, value [.., H] (or biases), interleaved by key-value group, split by group
    gate_up    gate and up [F, H], each split along F, gate above up on every rank
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Layout = Literal["whole", "vocab", "column", "row", "qkv", "gate_up"]


@dataclass(frozen=True)
class Row:
    """One Megatron parameter; ``{layer}`` stands for the global layer number, from 0."""

    megatron: str
    hugging_face: tuple[str, ...]
    layout: Layout


@dataclass(frozen=True)
class Family:
    """One architecture: its Hugging Face ``model_type``, its table, and whether queries and keys are normed."""

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    qk_layernorm: bool


_LAYER = "model.layers.{layer}."
_DECODER = "decoder.layers.{layer}."

_QWEN3_ROWS = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab"),
    Row(_DECODER + "input_layernorm.weight", (_LAYER + "input_layernorm.weight",), "whole"),
    Row(
        _DECODER + "self_attention.linear_qkv.weight",
        tuple(_LAYER + f"self_attn.{part}_proj.weight" for part in "qkv"),
        "qkv",
    ),
    Row(_DECODER + "self_attention.q_layernorm.weight", (_LAYER + "self_attn.q_norm.weight",), "whole"),
    Row(_DECODER + "self_attention.k_layernorm.weight", (_LAYER + "self_attn.k_norm.weight",), "whole"),
    Row(_DECODER + "self_attention.linear_proj.weight", (_LAYER + "self_attn.o_proj.weight",), "row"),
    Row(_DECODER + "pre_mlp_layernorm.weight", (_LAYER + "post_attention_layernorm.weight",), "whole"),
    Row(
        _DECODER + "mlp.linear_fc1.weight",
        (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
        "gate_up",
    ),
    Row(_DECODER + "mlp.linear_fc2.weight", (_LAYER + "mlp.down_proj.weight",), "row"),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), "whole"),
    Row("output_layer.weight", ("lm_head.weight",), "vocab"),
)

FAMILIES: Mapping[str, Family] = {
    family.model_type: family for family in (Family("qwen3", "Qwen3ForCausalLM", _QWEN3_ROWS, qk_layernorm=True),)
}


class ModelError(ValueError):
    """A model folder that cannot be used; the message is one sentence for the user."""


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face ``config.json``, or ModelError naming those that are known."""
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise ModelError(f"model_type {model_type!r} has no table; known families are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def transformer_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig that follow from a Hugging Face ``config.json``."""
    family = family_of(config)
    heads = config["num_attention_heads"]
    _refuse_unsupported(config)
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "layernorm_epsilon": config["rms_norm_eps"],
        "qk_layernorm": family.qk_layernorm,
    }


def rope_theta(config: Mapping[str, Any]) -> float:
    """Base period of the rotary embedding (transformers 4 and 5 keep it in different places)."""
    return float((config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta") or 10000.0)


def tied(config: Mapping[str, Any]) -> bool:
    """Whether the output layer shares the input embedding's weight."""
    return bool(config.get("tie_word_embeddings", False))


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type != "default":
        raise ModelError(f"rope type {rope_type!r} is not supported; use a model with default rotary embeddings")
    if config.get("use_sliding_window"):
        raise ModelError("sliding-window attention is not supported; set use_sliding_window to false in config.json")
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"activation {config['hidden_act']!r} is not supported; known is silu")
    if config.get("attention_bias"):
        raise ModelError("attention_bias is not supported for this family; use a model without it")
