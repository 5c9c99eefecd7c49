"""One parameter between its Hugging Face tensors and its tensor-parallel shards, both ways.

``merge`` turns the Hugging Face tensors of a table row into Megatron's full parameter, ``shard`` cuts one rank's part,
``unshard`` and ``unmerge`` go back. All four only move elements, so a round trip is exact in any dtype.

Shapes: H hidden, g key-value groups, q query heads in a group, d head size, F feed-forward size, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rlvr.hf.families import Layout, attention_sizes


@dataclass(frozen=True)
class Geometry:
    """Sizes that decide how tensors are interleaved and padded."""

    groups: int
    heads_per_group: int
    head_size: int
    vocab: int
    padded_vocab: int

    @classmethod
    def of(cls, config: Mapping[str, Any], padded_vocab: int | None = None) -> "Geometry":
        """From a Hugging Face ``config.json``; the vocabulary is not padded where no size is given."""
        heads, groups, size = attention_sizes(config)
        vocab = config["vocab_size"]
        return cls(groups, heads // groups, size, vocab, vocab if padded_vocab is None else padded_vocab)


def merge(layout: Layout, tensors: Sequence[Tensor], geometry: Geometry) -> Tensor:
    """Megatron's full parameter from the Hugging Face tensors of its row."""
    if layout == "qkv":
        groups, rest = geometry.groups, tensors[0].shape[1:]
        return torch.cat([t.reshape(groups, -1, *rest) for t in tensors], dim=1).reshape(-1, *rest)
    if layout == "gate_up":
        return torch.cat(list(tensors))
    (tensor,) = tensors
    if layout == "vocab" and geometry.padded_vocab > geometry.vocab:
        padded = tensor.new_zeros(geometry.padded_vocab, *tensor.shape[1:])
        padded[: geometry.vocab] = tensor
        return padded
    return tensor


def unmerge(layout: Layout, full: Tensor, geometry: Geometry) -> list[Tensor]:
    """The Hugging Face tensors of a row from Megatron's full parameter."""
    if layout == "qkv":
        rest, d, q = full.shape[1:], geometry.head_size, geometry.heads_per_group
        parts = full.reshape(geometry.groups, (q + 2) * d, *rest).split([q * d, d, d], dim=1)
        return [part.reshape(-1, *rest).contiguous() for part in parts]
    if layout == "gate_up":
        return [part.contiguous() for part in full.chunk(2)]
    if layout == "vocab":
        return [full[: geometry.vocab].contiguous()]
    return [full]


def shard(layout: Layout, full: Tensor, rank: int, size: int) -> Tensor:
    """Tensor-parallel rank ``rank``'s part of a full parameter."""
    if size == 1 or layout == "whole":
        return full
    if layout == "row":
        return full.chunk(size, dim=1)[rank]
    if layout == "gate_up":
        return torch.cat([part.chunk(size)[rank] for part in full.chunk(2)])
    return full.chunk(size)[rank]


def unshard(layout: Layout, parts: Tensor) -> Tensor:
    """The full parameter from the parts of all tensor-parallel ranks [ranks, *part]; without a copy where it can be."""
    if len(parts) == 1 or layout == "whole":
        return parts[0]
    if layout == "row":
        return torch.cat(parts.unbind(), dim=1)
    if layout == "gate_up":
        return parts.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2)
    return parts.flatten(0, 1)
