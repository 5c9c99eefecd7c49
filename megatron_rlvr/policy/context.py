"""Shards a packed stream over context-parallel ranks.

Each sequence is split into 2 x size chunks of equal length, and rank r takes chunks r and 2 x size - 1 - r. Under
causal attention late positions cost more than early ones, so this gives every rank the same work. Megatron's rotary
embedding and Transformer Engine's attention assume the same split.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlvr.batching.batch import MicroBatch


def zigzag(lengths: Sequence[int], rank: int, size: int) -> Tensor:
    """Positions in the whole stream of one rank's shard, [S / size] int64, in the order of the shard.

    Args:
        lengths: tokens of each sequence, padding included; multiples of 2 x size.
    """
    if size == 1:
        return torch.arange(sum(lengths))
    parts, begin = [], 0
    for length in lengths:
        chunk = length // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            parts.append(torch.arange(begin + number * chunk, begin + (number + 1) * chunk))
        begin += length
    return torch.cat(parts)


@dataclass(frozen=True)
class ContextShard:
    """The shard of a micro-batch that one context-parallel rank computes.

    Attributes:
        batch: the whole micro-batch, with R rows.
        part: the micro-batch with this rank's tokens, targets and r rows only. ``lengths`` and ``cu_seqlens`` stay
            those of whole sequences. The same object as ``batch`` without context parallelism.
        held: [r] int64, indices of this rank's rows among the R rows.
        group: the context-parallel ranks; None without context parallelism.
    """

    batch: MicroBatch
    part: MicroBatch
    held: Tensor
    group: dist.ProcessGroup | None

    def whole(self, values: Tensor) -> Tensor:
        """Combine each rank's [..., r] to [..., R] on every rank of the group. A collective over the group."""
        if self.group is None:
            return values
        everything = values.new_zeros(*values.shape[:-1], len(self.batch.rows))
        everything[..., self.held] = values
        dist.all_reduce(everything, group=self.group)
        return everything


def context_shard(batch: MicroBatch, rank: int, size: int, group: dist.ProcessGroup) -> ContextShard:
    """Shard a micro-batch for one context-parallel rank."""
    everything = torch.arange(len(batch.rows), device=batch.rows.device)
    if size == 1:
        return ContextShard(batch, batch, everything, None)
    positions = zigzag(batch.lengths, rank, size).to(batch.tokens.device)
    place = torch.full_like(batch.tokens, -1)
    place[positions] = torch.arange(len(positions), device=positions.device)
    rows = place[batch.rows]
    held = everything[rows >= 0]
    part = replace(
        batch,
        tokens=batch.tokens[positions],
        targets=batch.targets[positions],
        rows=rows[held],
        token_ids=batch.token_ids[held],
        sequence=batch.sequence[held],
        rollout_logp=batch.rollout_logp[held],
        advantages=batch.advantages[held],
        weight_versions=batch.weight_versions[held],
    )
    return ContextShard(batch, part, held, group)
