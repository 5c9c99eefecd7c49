"""Conversion of one parameter between its Hugging Face tensors and its tensor-parallel shards.

    Hugging Face tensors  -- merge -->  Megatron's full parameter  -- shard -->  shard of one rank
                         <- unmerge --                            <- unshard --  shards of all ranks

All four functions only move elements, so a round trip is exact in any dtype.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_rlvr.hf.families import Layout, attention_sizes


@dataclass(frozen=True)
class Geometry:
    """Sizes that determine how tensors are interleaved and padded.

    Attributes:
        groups: Number of key-value groups.
        heads_per_group: Number of query heads in a group.
        head_size: Size of a head.
        vocab: Size of the vocabulary.
        padded_vocab: Size of the vocabulary with Megatron's padding.
    """

    groups: int
    heads_per_group: int
    head_size: int
    vocab: int
    padded_vocab: int

    @classmethod
    def of(cls, config: Mapping[str, Any], padded_vocab: int | None = None) -> "Geometry":
        """Return the sizes in a Hugging Face ``config.json``; without ``padded_vocab`` the vocabulary is not padded."""
        heads, groups, size = attention_sizes(config)
        vocab = config["vocab_size"]
        return cls(groups, heads // groups, size, vocab, vocab if padded_vocab is None else padded_vocab)

    def of_shard(self, rank: int, size: int) -> "Geometry":
        """Return the sizes of what tensor-parallel rank ``rank`` of ``size`` holds."""
        padded = self.padded_vocab // size
        vocab = min(max(self.vocab - rank * padded, 0), padded)
        return replace(self, groups=self.groups // size, vocab=vocab, padded_vocab=padded)


def merge(layout: Layout, tensors: Sequence[Tensor], geometry: Geometry) -> Tensor:
    """Return Megatron's full parameter, made of the Hugging Face tensors of its row."""
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
    """Return the Hugging Face tensors of a row, made of Megatron's full parameter."""
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
    """Return the shard of a full parameter that tensor-parallel rank ``rank`` of ``size`` holds."""
    if size == 1 or layout == "replicated":
        return full
    if layout == "row":
        return full.chunk(size, dim=1)[rank]
    if layout == "gate_up":
        return torch.cat([part.chunk(size)[rank] for part in full.chunk(2)])
    return full.chunk(size)[rank]


def rows_of_shard(layout: Layout, rows: int, geometry: Geometry, rank: int, size: int) -> range:
    """Return the rows of a Hugging Face tensor that belong to the shard of tensor-parallel rank ``rank`` of ``size``.

    They are contiguous, and merged with ``geometry.of_shard(rank, size)`` they are the shard. Layout "row" is sharded
    along columns instead: these are the rows that the rank reads for all ranks, about the same number on each.

    Args:
        layout: Layout of the parameter.
        rows: Number of rows of the tensor.
        geometry: Sizes of the model.
        rank: Tensor-parallel rank.
        size: Tensor-parallel size.
    """
    if layout == "replicated":
        return range(rows)
    if layout == "vocab":
        padded = geometry.padded_vocab // size
        return range(min(rank * padded, rows), min((rank + 1) * padded, rows))
    return range(rank * rows // size, (rank + 1) * rows // size)


def unshard(layout: Layout, parts: Tensor) -> Tensor:
    """Return the full parameter from the shards of all tensor-parallel ranks, without a copy if possible.

    Args:
        layout: Layout of the parameter.
        parts: [ranks, *shard] shards in rank order.
    """
    if len(parts) == 1 or layout == "replicated":
        return parts[0]
    if layout == "row":
        return torch.cat(parts.unbind(), dim=1)
    if layout == "gate_up":
        return parts.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2)
    return parts.flatten(0, 1)
