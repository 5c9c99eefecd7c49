"""Model families: how a Hugging Face model is written as a megatron-core one. Adding a family is adding a table.

A family is two things one can read: the fields of Megatron's TransformerConfig computed from the Hugging Face config,
and a table of names. A row of the table says which layers have a Megatron parameter, which Hugging Face tensors make it
up, and how:

    whole      one tensor, the same on every tensor-parallel rank
    vocab      one tensor [V, H], rows padded and split over ranks
    column     one tensor [out, in], split along out
    row        one tensor [out, in], split along in
    qkv        query, key, value [.., H] (or biases), interleaved by key-value group, split by group
    gate_up    gate and up [F, H], each split along F, gate above up on every rank

Layers are dense (one feed-forward network) or sparse (a router and experts). Experts are the exception to the splits: a
rank holds some of them, and those whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Layout = Literal["whole", "vocab", "column", "row", "qkv", "gate_up"]


@dataclass(frozen=True)
class Row:
    """One Megatron parameter; ``{layer}`` and ``{expert}`` stand for numbers over the whole model, from 0."""

    megatron: str
    hugging_face: tuple[str, ...]
    layout: Layout
    layers: Literal["all", "dense", "sparse"] = "all"

    @property
    def of_expert(self) -> bool:
        """Whether it is a parameter of one expert, which no other rank of the replica holds a part of."""
        return ".local_experts." in self.megatron

    def at(self, layer: int, expert: int = 0) -> "Row":
        """The row with its numbers filled in."""
        names = tuple(name.format(layer=layer, expert=expert) for name in self.hugging_face)
        return replace(self, megatron=self.megatron.format(layer=layer, expert=expert), hugging_face=names)


@dataclass(frozen=True)
class Family:
    """One architecture: its Hugging Face ``model_type``, its table, whether queries and keys are normed, and whether
    it has sparse layers."""

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    qk_layernorm: bool
    sparse: bool = False


_LAYER = "model.layers.{layer}."
_DECODER = "decoder.layers.{layer}."
_EXPERT = _LAYER + "mlp.experts.{expert}."
_LOCAL_EXPERT = _DECODER + "mlp.experts.local_experts.{expert}."

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
        "dense",
    ),
    Row(_DECODER + "mlp.linear_fc2.weight", (_LAYER + "mlp.down_proj.weight",), "row", "dense"),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), "whole"),
    Row("output_layer.weight", ("lm_head.weight",), "vocab"),
)

_QWEN3_MOE_ROWS = (
    *_QWEN3_ROWS,
    Row(_DECODER + "mlp.router.weight", (_LAYER + "mlp.gate.weight",), "whole", "sparse"),
    Row(
        _LOCAL_EXPERT + "linear_fc1.weight",
        (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
        "gate_up",
        "sparse",
    ),
    Row(_LOCAL_EXPERT + "linear_fc2.weight", (_EXPERT + "down_proj.weight",), "row", "sparse"),
)

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("qwen3", "Qwen3ForCausalLM", _QWEN3_ROWS, qk_layernorm=True),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN3_MOE_ROWS, qk_layernorm=True, sparse=True),
    )
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
        **(_expert_fields(config) if family.sparse else {}),
    }


def _expert_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    experts, chosen = expert_count(config), _whole_number(config, "num_experts_per_tok")
    sparse, share = sparse_layers(config), bool(config.get("norm_topk_prob", False))
    if chosen > experts:
        raise ModelError(
            f"num_experts_per_tok {chosen} is more than the {experts} experts; copy the model's own config"
        )
    if chosen == 1 and share:
        raise ModelError(
            "num_experts_per_tok 1 with norm_topk_prob weighs every expert 1, and its router cannot learn; use a model "
            "that chooses several"
        )
    if not any(sparse):
        raise ModelError("no layer has experts by decoder_sparse_step and mlp_only_layers; convert it to a dense model")
    return {
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": _whole_number(config, "moe_intermediate_size"),
        "moe_layer_freq": [int(layer) for layer in sparse],
        "moe_router_topk": chosen,
        "moe_router_dtype": "fp32",
        # The chosen experts' share of the softmax over all (norm_topk_prob) is the softmax over the chosen.
        "moe_router_pre_softmax": not share,
        # The policy is trained as it is: a term that balances experts, or a limit that drops tokens, would make it
        # another one than the rollout engine samples from, and a gradient would depend on the tokens beside it.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_z_loss_coeff": None,
        "moe_input_jitter_eps": None,
        "moe_expert_capacity_factor": None,
        "moe_grouped_gemm": False,
    }


def expert_count(config: Mapping[str, Any]) -> int:
    """Experts of a sparse layer, 0 in a dense model (transformers 4 and 5 write it under different names)."""
    if not family_of(config).sparse:
        return 0
    return _whole_number(config, "num_experts" if "num_experts" in config else "num_local_experts")


def sparse_layers(config: Mapping[str, Any]) -> list[bool]:
    """For each layer whether it has experts."""
    step = _whole_number(config, "decoder_sparse_step") if config.get("decoder_sparse_step") is not None else 1
    dense = config.get("mlp_only_layers") or ()
    return [
        family_of(config).sparse and layer not in dense and (layer + 1) % step == 0
        for layer in range(config["num_hidden_layers"])
    ]


def rows_of(config: Mapping[str, Any], expert_ranks: int = 1) -> Iterator[Sequence[Row]]:
    """All parameters of a model in a fixed order, numbers filled in; a tied output layer has none.

    Each comes alone, but for those of experts: with them come their like on the other expert ranks, in rank order. Of E
    experts rank r of n holds those from r E / n to before (r + 1) E / n.
    """
    sparse, here = sparse_layers(config), expert_count(config) // expert_ranks
    for row in family_of(config).rows:
        if row.megatron == "output_layer.weight" and tied(config):
            continue
        if "{layer}" not in row.megatron:
            yield (row,)
            continue
        for layer, is_sparse in enumerate(sparse):
            if row.layers != "all" and (row.layers == "sparse") != is_sparse:
                continue
            if not row.of_expert:
                yield (row.at(layer),)
                continue
            for expert in range(here):
                yield tuple(row.at(layer, rank * here + expert) for rank in range(expert_ranks))


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


def _whole_number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ModelError(f"{key} of config.json is {value!r}, not a whole number above 0; copy the model's own")
    return value
