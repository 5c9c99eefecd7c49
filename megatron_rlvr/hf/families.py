"""Model families: the correspondence of Hugging Face models to megatron-core ones. A new family is a new table.

A family consists of two things: fields of Megatron's TransformerConfig computed from the Hugging Face config, and a
table of names. A row of the table says which layers have a Megatron parameter, which Hugging Face tensors form it, of
which shapes, and how they are arranged:

    replicated  one tensor, the same on every tensor-parallel rank
    vocab       one tensor [V, H], rows padded and sharded over ranks
    column      one tensor [out, in], sharded along out
    row         one tensor [out, in], sharded along in
    qkv         query, key, value [.., H] (or biases), interleaved by key-value group, sharded by group
    gate_up     gate and up [F, H], each sharded along F, gate above up on every rank

Layers are dense (one feed-forward network) or MoE layers (a router and experts). Experts are not sharded over
tensor-parallel ranks: an expert-parallel rank holds some of the experts, and each of those unsharded.

Names are those of the project's layers. Transformer Engine's differ in two norms, which it holds in the linear layer
that follows them; checkpoints have Transformer Engine's names whichever layers wrote them, and hold all experts of a
layer as one tensor.

Shapes: V vocabulary, H hidden, D head, Q queries of all heads, K keys of all key-value groups, F feed-forward,
E experts, M feed-forward of an expert.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_rlvr.hf.config_values import LARGEST, check_layer_lists, positive_float, positive_int
from megatron_rlvr.hf.config_values import ModelError as ModelError

Layout = Literal["replicated", "vocab", "column", "row", "qkv", "gate_up"]


@dataclass(frozen=True)
class Row:
    """One Megatron parameter.

    Attributes:
        megatron: Name in Megatron. ``{layer}`` and ``{expert}`` are placeholders for numbers over the whole model.
        hugging_face: Names of the Hugging Face tensors that form the parameter.
        layout: Arrangement of these tensors (see the module).
        shapes: Shapes of the Hugging Face tensors, one letter per dimension: ``QH`` is [Q, H].
        layers: Layers that have the parameter.
        in_checkpoint: Name in checkpoints, or "" if it is ``megatron``. All experts of a layer share one name.
        expert: Index of the expert in the tensor of that name; None for a parameter that is not an expert's.
    """

    megatron: str
    hugging_face: tuple[str, ...]
    layout: Layout
    shapes: tuple[str, ...]
    layers: Literal["all", "dense", "moe"] = "all"
    in_checkpoint: str = ""
    expert: int | None = None

    @property
    def of_expert(self) -> bool:
        """True for a parameter of one expert, which is not sharded within a data-parallel replica."""
        return ".local_experts." in self.megatron

    @property
    def key(self) -> str:
        """Name in checkpoints."""
        return self.in_checkpoint or self.megatron

    def at(self, layer: int, expert: int | None = None) -> "Row":
        """Return the row with its placeholders filled in."""
        megatron, key, *names = (
            name.format(layer=layer, expert=expert) for name in (self.megatron, self.in_checkpoint, *self.hugging_face)
        )
        return replace(self, megatron=megatron, in_checkpoint=key, hugging_face=tuple(names), expert=expert)


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: ``model_type`` in ``config.json``.
        architecture: Name of the Hugging Face class.
        rows: Table of the parameters.
        qk_layernorm: True if queries and keys are normalized.
        qkv_bias: True if queries, keys and values have biases.
        moe: True if layers may have experts.
    """

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    qk_layernorm: bool = False
    qkv_bias: bool = False
    moe: bool = False


_LAYER = "model.layers.{layer}."
_DECODER = "decoder.layers.{layer}."
_EXPERT = _LAYER + "mlp.experts.{expert}."
_LOCAL_EXPERT = _DECODER + "mlp.experts.local_experts.{expert}."
_ALL_EXPERTS = _DECODER + "mlp.experts.experts."
_QKV = _DECODER + "self_attention.linear_qkv."

_COMMON_ROWS = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab", ("VH",)),
    Row(
        _DECODER + "input_layernorm.weight",
        (_LAYER + "input_layernorm.weight",),
        "replicated",
        ("H",),
        in_checkpoint=_QKV + "layer_norm_weight",
    ),
    Row(_QKV + "weight", tuple(_LAYER + f"self_attn.{p}_proj.weight" for p in "qkv"), "qkv", ("QH", "KH", "KH")),
    Row(_DECODER + "self_attention.linear_proj.weight", (_LAYER + "self_attn.o_proj.weight",), "row", ("HQ",)),
    Row(
        _DECODER + "pre_mlp_layernorm.weight",
        (_LAYER + "post_attention_layernorm.weight",),
        "replicated",
        ("H",),
        "dense",
        in_checkpoint=_DECODER + "mlp.linear_fc1.layer_norm_weight",
    ),
    Row(
        _DECODER + "mlp.linear_fc1.weight",
        (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
        "gate_up",
        ("FH", "FH"),
        "dense",
    ),
    Row(_DECODER + "mlp.linear_fc2.weight", (_LAYER + "mlp.down_proj.weight",), "row", ("HF",), "dense"),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated", ("H",)),
    Row("output_layer.weight", ("lm_head.weight",), "vocab", ("VH",)),
)

_QKV_BIAS_ROWS = (
    Row(_QKV + "bias", tuple(_LAYER + f"self_attn.{p}_proj.bias" for p in "qkv"), "qkv", ("Q", "K", "K")),
)

_QK_NORM_ROWS = (
    Row(_DECODER + "self_attention.q_layernorm.weight", (_LAYER + "self_attn.q_norm.weight",), "replicated", ("D",)),
    Row(_DECODER + "self_attention.k_layernorm.weight", (_LAYER + "self_attn.k_norm.weight",), "replicated", ("D",)),
)

_EXPERT_ROWS = (
    Row(
        _DECODER + "pre_mlp_layernorm.weight",
        (_LAYER + "post_attention_layernorm.weight",),
        "replicated",
        ("H",),
        "moe",
    ),
    Row(_DECODER + "mlp.router.weight", (_LAYER + "mlp.gate.weight",), "replicated", ("EH",), "moe"),
    Row(
        _LOCAL_EXPERT + "linear_fc1.weight",
        (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
        "gate_up",
        ("MH", "MH"),
        "moe",
        in_checkpoint=_ALL_EXPERTS + "linear_fc1.weight",
    ),
    Row(
        _LOCAL_EXPERT + "linear_fc2.weight",
        (_EXPERT + "down_proj.weight",),
        "row",
        ("HM",),
        "moe",
        in_checkpoint=_ALL_EXPERTS + "linear_fc2.weight",
    ),
)

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", _COMMON_ROWS),
        Family("qwen2", "Qwen2ForCausalLM", (*_COMMON_ROWS, *_QKV_BIAS_ROWS), qkv_bias=True),
        Family("qwen3", "Qwen3ForCausalLM", (*_COMMON_ROWS, *_QK_NORM_ROWS), qk_layernorm=True),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            (*_COMMON_ROWS, *_QK_NORM_ROWS, *_EXPERT_ROWS),
            qk_layernorm=True,
            moe=True,
        ),
    )
}

# {name of a norm in a layer of Transformer Engine: name in a layer of the project}, for norms held in linear layers.
NORMS_IN_LINEARS = {
    row.in_checkpoint.removeprefix(_DECODER): row.megatron.removeprefix(_DECODER)
    for row in _COMMON_ROWS
    if row.in_checkpoint
}

_VOCAB_MULTIPLE = 128

# Megatron has these constants of Llama 3's rotary embedding built in; every Llama 3.1, 3.2 and 3.3 uses them.
_LLAMA3_ROPE = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a Hugging Face ``config.json``.

    Raises:
        ModelError: If the model type is not supported, with the names of those that are.
    """
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise ModelError(f"model_type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def transformer_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of Megatron's TransformerConfig that follow from a Hugging Face ``config.json``.

    Raises:
        ModelError: If the model has a feature that is not supported.
    """
    family = family_of(config)
    _refuse_unsupported(config)
    heads, groups, size = attention_sizes(config)
    return {
        "num_layers": positive_int(config, "num_hidden_layers"),
        "hidden_size": positive_int(config, "hidden_size"),
        "ffn_hidden_size": positive_int(config, "intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": size,
        "layernorm_epsilon": config["rms_norm_eps"],
        "qk_layernorm": family.qk_layernorm,
        "add_qkv_bias": family.qkv_bias,
        **(_expert_fields(config) if family.moe else {}),
    }


def attention_sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the numbers of query heads and key-value groups, and the head size; older configs omit the last two."""
    heads = positive_int(config, "num_attention_heads")
    groups = heads if config.get("num_key_value_heads") is None else positive_int(config, "num_key_value_heads")
    if heads % groups:
        raise ModelError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}; copy its config")
    if config.get("head_dim") is not None:
        return heads, groups, positive_int(config, "head_dim")
    return heads, groups, positive_int(config, "hidden_size") // heads


def _expert_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    experts, top_k = expert_count(config), positive_int(config, "num_experts_per_tok")
    moe, normalized = moe_layers(config), bool(config.get("norm_topk_prob", False))
    if top_k > experts:
        raise ModelError(f"num_experts_per_tok {top_k} is more than the {experts} experts; copy the model's own config")
    if top_k == 1 and normalized:
        raise ModelError(
            "num_experts_per_tok 1 with norm_topk_prob weighs every expert 1, and its router cannot learn; use a model "
            "with several experts per token"
        )
    if not any(moe):
        raise ModelError("no layer has experts by decoder_sparse_step and mlp_only_layers; convert it to a dense model")
    return {
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": positive_int(config, "moe_intermediate_size"),
        "moe_layer_freq": [int(layer) for layer in moe],
        "moe_router_topk": top_k,
        "moe_router_dtype": "fp32",
        # The softmax over all experts, normalized over the top k (norm_topk_prob), is the softmax over the top k.
        "moe_router_pre_softmax": not normalized,
        # No load-balancing loss and no capacity limit: the policy would differ from the model that the rollout engine
        # samples from, and the gradient of a token would depend on the other tokens of its micro-batch.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_z_loss_coeff": None,
        "moe_input_jitter_eps": None,
        "moe_expert_capacity_factor": None,
        "moe_grouped_gemm": False,
    }


def expert_count(config: Mapping[str, Any]) -> int:
    """Return the number of experts of an MoE layer, or 0 for a dense model.

    transformers 4 and 5 write it under different names.
    """
    if not family_of(config).moe:
        return 0
    return positive_int(config, "num_experts" if "num_experts" in config else "num_local_experts")


def moe_layers(config: Mapping[str, Any]) -> list[bool]:
    """Return for each layer whether it has experts."""
    step = positive_int(config, "decoder_sparse_step") if config.get("decoder_sparse_step") is not None else 1
    dense = config.get("mlp_only_layers") or ()
    return [
        family_of(config).moe and layer not in dense and (layer + 1) % step == 0
        for layer in range(config["num_hidden_layers"])
    ]


def rows_of(config: Mapping[str, Any], expert_ranks: int = 1) -> Iterator[Sequence[Row]]:
    """Yield a tuple of rows for each parameter of a rank, in a fixed order, with placeholders filled in.

    The tuple has one row, except for parameters of experts: then it has one row per expert-parallel rank, in rank
    order. Of E experts, rank r of n holds those from r E / n to before (r + 1) E / n. A tied output layer has no row.

    Args:
        config: The model's ``config.json``.
        expert_ranks: Expert-parallel size; with 1, every parameter of the model has a tuple of its own.
    """
    moe, local_experts = moe_layers(config), expert_count(config) // expert_ranks
    for row in family_of(config).rows:
        if row.megatron == "output_layer.weight" and tied(config):
            continue
        if "{layer}" not in row.megatron:
            yield (row,)
            continue
        for layer, is_moe in enumerate(moe):
            if row.layers != "all" and (row.layers == "moe") != is_moe:
                continue
            if not row.of_expert:
                yield (row.at(layer),)
                continue
            for expert in range(local_experts):
                yield tuple(row.at(layer, rank * local_experts + expert) for rank in range(expert_ranks))


def tensor_shapes(row: Row, config: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Return the shapes of a row's Hugging Face tensors."""
    heads, groups, size = attention_sizes(config)
    sizes = {"D": size, "Q": heads * size, "K": groups * size}
    keys = {"V": "vocab_size", "H": "hidden_size", "F": "intermediate_size", "M": "moe_intermediate_size"}
    sizes |= {letter: config[key] for letter, key in keys.items() if key in config} | {"E": expert_count(config)}
    return [tuple(sizes[letter] for letter in shape) for shape in row.shapes]


def parameter_count(config: Mapping[str, Any]) -> int:
    """Return the number of parameters of a model with this ``config.json``; a tied output layer counts once."""
    return sum(math.prod(shape) for (row,) in rows_of(config) for shape in tensor_shapes(row, config))


def padded_vocab_size(vocab: int, tensor: int) -> int:
    """Return the number of rows of the embedding over all ``tensor`` tensor-parallel ranks, with Megatron's padding.

    Megatron pads the vocabulary so that every tensor-parallel rank holds the same number of rows, a multiple of 128,
    which suits the matrix products of GPUs.
    """
    multiple = _VOCAB_MULTIPLE * tensor
    return -(-vocab // multiple) * multiple


def rope_theta(config: Mapping[str, Any]) -> float:
    """Return the base of the rotary embedding's periods; transformers 4 and 5 keep it in different places."""
    for values in (_rope(config), config):
        if values.get("rope_theta") is not None:
            return positive_float(values, "rope_theta")
    return 10000.0


def rope_scaling_factor(config: Mapping[str, Any]) -> float | None:
    """Return the factor by which Llama 3 scales the long periods of its rotary embedding; None if it does not."""
    rope = _rope(config)
    return float(rope["factor"]) if _rope_type(rope) == "llama3" else None


def tied(config: Mapping[str, Any]) -> bool:
    """Return whether the output layer shares the input embedding's weight."""
    return bool(config.get("tie_word_embeddings", False))


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the entries about the rotary embedding, which transformers 4 and 5 write under different keys."""
    old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    for rope in (old, new):
        if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
            raise ModelError(f"rope parameters {rope!r} are not supported; use a model with one set for all layers")
    if any(new.get(key, value) != value for key, value in old.items()):
        raise ModelError("rope_scaling and rope_parameters of config.json differ; remove the one that is out of date")
    return {**old, **new}


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    rope, own = _rope(config), family_of(config).architecture
    architectures = config.get("architectures") or [own]
    if architectures != [own]:
        shown = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else architectures
        raise ModelError(
            f"architecture {shown!r} is not supported; of model_type {config['model_type']!r}, {own} is supported"
        )
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        raise ModelError(f"quantised weights ({method}) are not supported; give the model's folder in bfloat16")
    if not isinstance(config.get("tie_word_embeddings") or False, bool):
        raise ModelError(f"tie_word_embeddings of config.json is {config['tie_word_embeddings']!r}; set true or false")
    if _rope_type(rope) not in ("default", "llama3"):
        raise ModelError(f"rope type {_rope_type(rope)!r} is not supported; use a model with default or llama3")
    if _rope_type(rope) == "llama3":
        _refuse_other_llama3(rope)
    for key, only, remedy in (
        ("partial_rotary_factor", 1, "use a model that rotates whole heads"),
        ("attention_bias", False, "use a model without it"),
        ("mlp_bias", False, "use a model without it"),
    ):
        value = rope.get(key, config.get(key))
        if value is not None and value != only:
            raise ModelError(f"{key} {value!r} is not supported; {remedy}")
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"activation {config['hidden_act']!r} is not supported; use a model with silu")
    rope_theta(config)
    check_layer_lists(config)
    if config.get("use_sliding_window") or set(config.get("layer_types") or ()) - {"full_attention"}:
        raise ModelError("sliding-window attention is not supported; use a model whose layers attend to all tokens")
    positive_int(config, "vocab_size")
    positive_float(config, "rms_norm_eps")


def _refuse_other_llama3(rope: Mapping[str, Any]) -> None:
    for key, only in _LLAMA3_ROPE.items():
        if rope.get(key) != only:
            raise ModelError(f"{key} {rope.get(key)!r} of rope type llama3 is not supported; it is {only} in Llama 3")
    if not isinstance(rope.get("factor"), float | int) or not 1 <= rope["factor"] <= LARGEST:
        raise ModelError(
            f"factor {rope.get('factor')!r} of rope type llama3 is not a number of at least 1; copy the model's own"
        )
