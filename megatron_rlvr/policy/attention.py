"""Causal attention within each sequence of a packed stream, for whole sequences or context-parallel shards.

Used instead of Transformer Engine where that is not installed. It calls ``scaled_dot_product_attention``, whose kernels
never hold the matrix of scores, so memory grows linearly with the length of a sequence.

On a CPU the backward computes in fp32 for bf16 models as well: of bf16 it hands each small product to oneDNN, whose
preparation takes four times as long as the product of the short sequences that one trains on a CPU.

Under context parallelism a rank holds the queries of two chunks of each sequence (`context.zigzag`) and gathers all
keys and values. A chunk attends to all earlier positions, and causally to itself. PyTorch's CPU kernel supports a
causal mask only from the first key on, so the two parts are computed separately and combined by their log-sum-exp l:

    l = log(e^l1 + e^l2)        out = out1 e^(l1 - l) + out2 e^(l2 - l)

The kernel's backward, given the combined out and l, returns the exact gradients of each part.

Shapes: S packed tokens of this rank, n heads on this rank, g key-value heads on this rank, d head size; q queries and k
keys of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rlvr.batching.batch import MicroBatch
from megatron_rlvr.policy.context import zigzag


@dataclass
class PackedStream(PackedSeqParams):
    """Megatron's description of a packed stream, plus the sequence lengths as Python ints."""

    lengths: tuple[int, ...] = ()


def packed_stream(batch: MicroBatch) -> PackedStream:
    """Describe a micro-batch for Megatron; the lengths are those of whole sequences, also under context parallelism."""
    return PackedStream(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_length,
        max_seqlen_kv=batch.max_length,
        lengths=batch.lengths,
    )


class PackedAttention(MegatronModule):
    """Core attention of a Megatron transformer layer."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal or (attention_dropout or config.attention_dropout):
            raise ValueError("PackedAttention is causal and without dropout; set megatron.attention_dropout to 0")
        self.softmax_scale = softmax_scale or config.kv_channels**-0.5
        self.group: dist.ProcessGroup | None = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend within each sequence: query [S, n, d], key and value [S, g, d] -> [S, n * d]."""
        assert isinstance(packed_seq_params, PackedStream), "the policy always packs sequences"
        lengths = packed_seq_params.lengths
        rank, size = (dist.get_rank(self.group), dist.get_world_size(self.group)) if self.group is not None else (0, 1)
        if self.group is not None:
            key, value = _gather_sequence(key, value, lengths, self.group)
        outputs = []
        sequences = (
            x.split([length // part for length in lengths]) for x, part in ((query, size), (key, 1), (value, 1))
        )
        for q, k, v in zip(*sequences, strict=True):
            if size == 1:
                outputs.append(_attend(q, k, v, self.softmax_scale))
                continue
            chunk = len(k) // (2 * size)
            for part, number in zip(q.split(chunk), (rank, 2 * size - 1 - rank), strict=True):
                end = (number + 1) * chunk
                outputs.append(_attend(part, k[:end], v[:end], self.softmax_scale))
        return torch.cat(outputs).reshape(query.shape[0], -1)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend causally from the last q of k positions: query [q, n, d], key and value [k, g, d] -> [q, n, d]."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    grouped = q.shape[1] != k.shape[1]
    if q.device.type == "cpu":
        out = _AttentionOnCpu.apply(q, k, v, scale)
    elif q.shape[2] == k.shape[2]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        from torch.nn.attention.bias import causal_lower_right  # imports torch's compiler, which takes seconds

        mask: Any = causal_lower_right(q.shape[2], k.shape[2])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1)


class _AttentionOnCpu(torch.autograd.Function):
    """Causal attention of the last q of k positions on a CPU: query [1, n, q, d], key and value [1, g, k, d]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        parts = [
            attend(query, k, v, 0.0, causal, scale=scale) for k, v, causal in _prefix_and_diagonal(query, key, value)
        ]
        out, log = parts[0]
        if len(parts) > 1:
            log = torch.logaddexp(*(part_log for _, part_log in parts))
            out = sum(part * (part_log - log).exp().unsqueeze(-1) for part, part_log in parts).to(query.dtype)
        ctx.save_for_backward(query, key, value, out, log)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        *saved, log = ctx.saved_tensors
        query, key, value, out, grad = (x.to(log.dtype) for x in (*saved, grads[0]))
        heads = (key.shape[1], query.shape[1] // key.shape[1])
        # The kernel's forward shares a key-value head between queries' heads, its backward does not.
        key, value = (x.repeat_interleave(heads[1], dim=1) for x in (key, value))
        attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        parts = [
            attend_backward(grad.contiguous(), query, k, v, out, log, 0.0, causal, scale=ctx.scale)
            for k, v, causal in _prefix_and_diagonal(query, key, value)
        ]
        grad_query, grad_key, grad_value = zip(*parts, strict=True)
        grad_key, grad_value = (torch.cat(x, dim=2).unflatten(1, heads).sum(2) for x in (grad_key, grad_value))
        dtype = saved[0].dtype
        return sum(grad_query).to(dtype), grad_key.to(dtype), grad_value.to(dtype), None


def _prefix_and_diagonal(query: Tensor, key: Tensor, value: Tensor) -> list[tuple[Tensor, Tensor, bool]]:
    """Split keys and values into those before the queries' positions (not causal), if any, and those at them."""
    before = key.shape[2] - query.shape[2]
    diagonal = (key[:, :, before:], value[:, :, before:], True)
    return [(key[:, :, :before], value[:, :, :before], False), diagonal] if before else [diagonal]


def _gather_sequence(
    key: Tensor, value: Tensor, lengths: Sequence[int], group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Gather keys and values of all ranks, [S x size, g, d], in the order of the whole stream."""
    size = dist.get_world_size(group)
    gathered = _AllGather.apply(torch.cat([key, value], dim=1), group)
    order = torch.cat([zigzag(lengths, rank, size) for rank in range(size)])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return gathered.index_select(0, place.to(key.device)).chunk(2, dim=1)


class _AllGather(torch.autograd.Function):
    """All-gather [S, ..] of each rank to [S x size, ..]; the backward is a reduce-scatter (sum)."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = part.new_empty(len(part) * dist.get_world_size(group), *part.shape[1:])
        dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        part = grads[0].new_empty(len(grads[0]) // dist.get_world_size(ctx.group), *grads[0].shape[1:])
        dist.reduce_scatter_tensor(part, grads[0].contiguous(), group=ctx.group)
        return part, None
