"""What a model's config.json says about its size: parameters of every rank, and operations of a forward pass.

Parameters are counted row by row of the family's table (`hf.families`), so that a family is planned as it is built.

    forward operations of a sequence of n tokens = 2 n (weights of the products)  +  layers 2 query n^2  +  2 rows H V
                                                   linear layers                     causal attention       head

A causal query of n tokens meets n / 2 keys on average; scores and their product with values are 2 operations each.
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
    rows_of,
    sparse_layers,
    tensor_shapes,
    tied,
    transformer_fields,
)

# `policy.build.padded_vocab`: every tensor-parallel rank gets a multiple of so many columns of the vocabulary.
_VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
        config: its config.json.
        query, key: width of all queries together, and of all keys (values have the same).
        experts, chosen, expert_feed_forward: of a sparse layer; 0 in a dense model.
        sparse: for each layer whether it has experts.
    """

    config: Mapping[str, Any]
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    groups: int
    head: int
    vocab: int
    experts: int
    chosen: int
    expert_feed_forward: int
    sparse: tuple[bool, ...]
    qk_norm: bool
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """From a Hugging Face ``config.json``; ModelError says why it is not one that can be trained."""
        fields = transformer_fields(config)
        return cls(
            config=config,
            layers=fields["num_layers"],
            hidden=fields["hidden_size"],
            feed_forward=fields["ffn_hidden_size"],
            heads=fields["num_attention_heads"],
            groups=fields["num_query_groups"],
            head=fields["kv_channels"],
            vocab=config["vocab_size"],
            experts=expert_count(config),
            chosen=fields.get("moe_router_topk", 0),
            expert_feed_forward=fields.get("moe_ffn_hidden_size", 0),
            sparse=tuple(sparse_layers(config)),
            qk_norm=fields["qk_layernorm"],
            tied=tied(config),
        )

    @property
    def query(self) -> int:
        return self.heads * self.head

    @property
    def key(self) -> int:
        return self.groups * self.head

    @cached_property
    def parameters(self) -> int:
        """Of the whole model, a tied output layer counted once."""
        return sum(_numel(row, self.config) for rows in rows_of(self.config) for row in rows)

    @cached_property
    def active_parameters(self) -> int:
        """Weights that one token is multiplied with: of the experts the chosen ones, and the output layer."""
        return sum(self.layer_weights(layer) for layer in range(self.layers)) + self.hidden * self.vocab

    def layer_weights(self, layer: int) -> int:
        """Weights of a layer's products that one token meets."""
        attention = self.hidden * (2 * self.query + 2 * self.key)
        if self.sparse[layer]:
            return attention + self.hidden * self.experts + 3 * self.hidden * self.chosen * self.expert_feed_forward
        return attention + 3 * self.hidden * self.feed_forward

    def key_value_bytes(self, element: int) -> int:
        """Bytes that a server caches for one token: a key and a value in every layer."""
        return 2 * self.layers * self.key * element

    # Operations of a forward pass ------------------------------------------------------------------------------------

    def linear_flops(self, layers: range | list[int], tokens: float) -> float:
        return 2.0 * tokens * sum(self.layer_weights(layer) for layer in layers)

    def attention_flops(self, layers: int, squares: float) -> float:
        """``squares``: the sum over the sequences of the square of their length."""
        return 2.0 * layers * self.query * squares

    def head_flops(self, rows: float) -> float:
        return 2.0 * rows * self.hidden * self.vocab


@dataclass(frozen=True)
class Held:
    """Parameters that a rank holds: those it shares with all data-parallel ranks, and those of its experts."""

    shared: int
    experts: int

    @property
    def all(self) -> int:
        return self.shared + self.experts


def padded_vocab(vocab: int, tensor: int) -> int:
    """Rows of the embedding with Megatron's padding, over all tensor-parallel ranks."""
    multiple = _VOCAB_MULTIPLE * tensor
    return -(-vocab // multiple) * multiple


def layers_of(shape: Shape, parallel: ParallelSettings, stage: int) -> list[int]:
    """Numbers of the layers on a pipeline stage; interleaved, it has a piece of every round."""
    size = shape.layers // (parallel.pipeline * parallel.virtual_pipeline)
    starts = (piece * parallel.pipeline * size + stage * size for piece in range(parallel.virtual_pipeline))
    return [layer for start in starts for layer in range(start, start + size)]


def held(shape: Shape, parallel: ParallelSettings, stage: int) -> Held:
    """Parameters of each rank of a pipeline stage, with the padding of the vocabulary."""
    layers = layers_of(shape, parallel, stage)
    shared = experts = 0
    for row, count in _rows_of_stage(shape, parallel, stage, layers):
        size = _numel(row, shape.config)
        if row.of_expert:
            experts += count * size * (shape.experts // parallel.expert)
        elif row.layout == "vocab":
            shared += count * padded_vocab(shape.vocab, parallel.tensor) * shape.hidden // parallel.tensor
        else:
            shared += count * (size if row.layout == "whole" else size // parallel.tensor)
    return Held(shared, experts)


def _rows_of_stage(
    shape: Shape, parallel: ParallelSettings, stage: int, layers: list[int]
) -> Iterator[tuple[Row, int]]:
    """Rows of the family's table, each with how many of its like the stage has (of experts: how many layers)."""
    first, last = stage == 0, stage == parallel.pipeline - 1
    for row in family_of(shape.config).rows:
        if "{layer}" in row.megatron:
            yield row, sum(row.layers == "all" or (row.layers == "sparse") == shape.sparse[layer] for layer in layers)
        elif row.megatron.startswith("embedding."):
            # Where it is tied, the last stage has a copy as its output layer.
            yield row, first + (last and not first and shape.tied)
        elif row.megatron == "output_layer.weight":
            yield row, int(last and not shape.tied)
        else:
            yield row, int(last)


def _numel(row: Row, config: Mapping[str, Any]) -> int:
    return sum(math.prod(size) for size in tensor_shapes(row, config))
