"""Sizes of a model, read from its config.json: parameters of every rank, and operations of a forward pass.

Parameters are counted row by row from the family's table (`hf.families`), the same table that the policy is built from.

    forward operations of a sequence of n tokens = 2 n (weights of the products)  +  layers 2 query n^2  +  2 rows H V
                                                   linear layers                     causal attention       head

A causal query attends to n / 2 keys on average; scores and their product with values take 2 operations each.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_rlvr.config import ParallelSettings
from megatron_rlvr.hf.families import (
    Row,
    expert_count,
    family_of,
    moe_layers,
    padded_vocab_size,
    parameter_count,
    tensor_shapes,
    tied,
    transformer_fields,
)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model.

    Attributes:
        config: Contents of its config.json.
        layers: Number of layers.
        hidden: Width of the hidden states.
        ffn: Width of the feed-forward network of a dense layer.
        heads: Number of attention heads.
        key_value_heads: Number of key-value heads.
        head_size: Width of one head.
        vocab: Size of the vocabulary, without padding.
        experts: Number of experts of an MoE layer; 0 in a dense model.
        top_k: Number of experts that a token is routed to; 0 in a dense model.
        expert_ffn: Width of the feed-forward network of one expert; 0 in a dense model.
        moe_layers: For each layer, True if it is an MoE layer.
        qk_norm: True if queries and keys are normalized.
        tied: True if the output layer shares the weight of the embedding.
    """

    config: Mapping[str, Any]
    layers: int
    hidden: int
    ffn: int
    heads: int
    key_value_heads: int
    head_size: int
    vocab: int
    experts: int
    top_k: int
    expert_ffn: int
    moe_layers: tuple[bool, ...]
    qk_norm: bool
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "ModelShape":
        """Read the sizes from a Hugging Face ``config.json``.

        Raises: ModelError if the model cannot be trained.
        """
        fields = transformer_fields(config)
        return cls(
            config=config,
            layers=fields["num_layers"],
            hidden=fields["hidden_size"],
            ffn=fields["ffn_hidden_size"],
            heads=fields["num_attention_heads"],
            key_value_heads=fields["num_query_groups"],
            head_size=fields["kv_channels"],
            vocab=config["vocab_size"],
            experts=expert_count(config),
            top_k=fields.get("moe_router_topk", 0),
            expert_ffn=fields.get("moe_ffn_hidden_size", 0),
            moe_layers=tuple(moe_layers(config)),
            qk_norm=fields["qk_layernorm"],
            tied=tied(config),
        )

    @property
    def query_width(self) -> int:
        """Width of all queries together."""
        return self.heads * self.head_size

    @property
    def key_width(self) -> int:
        """Width of all keys together; all values together have the same."""
        return self.key_value_heads * self.head_size

    @cached_property
    def parameters(self) -> int:
        """Number of parameters of the whole model; a tied output layer counts once."""
        return parameter_count(self.config)

    @cached_property
    def active_parameters(self) -> int:
        """Number of weights that one token is multiplied with: the top-k experts only, and the output layer."""
        return sum(self.layer_weights(layer) for layer in range(self.layers)) + self.hidden * self.vocab

    def layer_weights(self, layer: int) -> int:
        """Return the number of weights of a layer that one token is multiplied with."""
        attention = self.hidden * (2 * self.query_width + 2 * self.key_width)
        if self.moe_layers[layer]:
            return attention + self.hidden * self.experts + 3 * self.hidden * self.top_k * self.expert_ffn
        return attention + 3 * self.hidden * self.ffn

    def key_value_bytes(self, element_bytes: int) -> int:
        """Return the bytes of one token in a server's KV cache: a key and a value in every layer."""
        return 2 * self.layers * self.key_width * element_bytes

    # Operations of a forward pass ------------------------------------------------------------------------------------

    def linear_flops(self, layers: range | list[int], tokens: float) -> float:
        """Return the operations of the linear layers in ``layers``."""
        return 2.0 * tokens * sum(self.layer_weights(layer) for layer in layers)

    def attention_flops(self, layers: int, squares: float) -> float:
        """Return the operations of causal attention; ``squares`` is the sum of the squared sequence lengths."""
        return 2.0 * layers * self.query_width * squares

    def head_flops(self, rows: float) -> float:
        """Return the operations of the output layer on so many tokens."""
        return 2.0 * rows * self.hidden * self.vocab


@dataclass(frozen=True)
class RankParameters:
    """Numbers of parameters on one rank.

    Attributes:
        dense: Parameters replicated over all data-parallel ranks.
        experts: Parameters of the experts on this rank, replicated over fewer ranks under expert parallelism.
    """

    dense: int
    experts: int

    @property
    def total(self) -> int:
        return self.dense + self.experts


def stage_layers(shape: ModelShape, parallel: ParallelSettings, stage: int) -> list[int]:
    """Return the layers of a pipeline stage, those of all its virtual stages."""
    return [layer for chunk in parallel.stages(shape.layers)[stage] for layer in chunk]


def rank_parameters(shape: ModelShape, parallel: ParallelSettings, stage: int) -> RankParameters:
    """Count the parameters on each rank of a pipeline stage, including the padding of the vocabulary."""
    layers = stage_layers(shape, parallel, stage)
    dense = experts = 0
    for row, count in _rows_of_stage(shape, parallel, stage, layers):
        size = sum(math.prod(tensor) for tensor in tensor_shapes(row, shape.config))
        if row.of_expert:
            experts += count * size * (shape.experts // parallel.expert)
        elif row.layout == "vocab":
            dense += count * padded_vocab_size(shape.vocab, parallel.tensor) * shape.hidden // parallel.tensor
        else:
            dense += count * (size if row.layout == "replicated" else size // parallel.tensor)
    return RankParameters(dense, experts)


def _rows_of_stage(
    shape: ModelShape, parallel: ParallelSettings, stage: int, layers: list[int]
) -> Iterator[tuple[Row, int]]:
    """Yield each row of the family's table with its count on the stage (for experts: the number of layers)."""
    first, last = stage == 0, stage == parallel.pipeline - 1
    for row in family_of(shape.config).rows:
        if "{layer}" in row.megatron:
            yield (
                row,
                sum(row.layers == "all" or (row.layers == "moe") == shape.moe_layers[layer] for layer in layers),
            )
        elif row.megatron.startswith("embedding."):
            # If it is tied, the last stage holds a copy as its output layer.
            yield row, first + (last and not first and shape.tied)
        elif row.megatron == "output_layer.weight":
            yield row, int(last and not shape.tied)
        else:
            yield row, int(last)
