"""Which part of a packed stream a context-parallel rank computes.

Each sequence is cut into 2 x size chunks of equal length, and rank r takes chunks r and 2 x size - 1 - r: causal
attention makes late positions dear and early ones cheap, so every rank gets the same work. Megatron's rotary embedding
and Transformer Engine's attention assume this cut too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlvr.batching.batch import MicroBatch


def zigzag(lengths: Sequence[int], rank: int, size: int) -> Tensor:
    """[S / size] int64, positions in the whole stream of this rank's part, in the order of its own stream.

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
    """What a rank computes of a micro-batch.

    Attributes:
        batch: the micro-batch, with R rows.
        part: the same with this rank's tokens, targets and rows only; ``rows`` and the vectors beside them are [r].
            ``lengths`` and ``cu_seqlens`` stay those of whole sequences. Without context parallelism it is ``batch``.
        held: [r] int64, which of the R rows these are.
        group: ranks that hold the other parts; None where there are none.
    """

    batch: MicroBatch
    part: MicroBatch
    held: Tensor
    group: dist.ProcessGroup | None

    def whole(self, values: Tensor) -> Tensor:
        """[..., R] on every rank of the group, from each one's [..., r]. A collective over the group."""
        if self.group is None:
            return values
        everything = values.new_zeros(*values.shape[:-1], len(self.batch.rows))
        everything[..., self.held] = values
        dist.all_reduce(everything, group=self.group)
        return everything


def context_shard(batch: MicroBatch, rank: int, size: int, group: dist.ProcessGroup) -> ContextShard:
    """This rank's part of a micro-batch."""
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
