"""What the training pass can do without, once the mask is known.

Much of a stream no longer matters then. Attention is causal, so nothing after a sequence's last token with a gradient
can change the loss, nor can a sequence without one: `trim` leaves both out and packs the rest anew, while counts and
thresholds are those of the whole.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from megatron_rlvr.batching.batch import MicroBatch, Sample, sample_and_position
from megatron_rlvr.batching.packing import Packing, cut, micro_batches_needed


@dataclass(frozen=True)
class Work:
    """What a training pass is given: micro-batches, and for the rows of each a mask and the log-probabilities before.

    Attributes:
        batches: of this rank.
        masks: [R] bool for each, the tokens whose gradient counts.
        old_logp: [R] float32 for each.
    """

    batches: list[MicroBatch]
    masks: list[Tensor]
    old_logp: list[Tensor]


def trim(work: Work, packing: Packing, agree: Callable[[int], int]) -> Work:
    """The same gradient from less work: without the positions that no selected token with an advantage looks back on.

    Sequences without such a token are left out, the others end with their last one, and what is left is packed anew.

    Args:
        work: whole sequences as `pack` made them, on the CPU; masks and log-probabilities on any device.
        packing: of the new streams.
        agree: the number of micro-batches for all ranks, given the number that this one needs. Called once.
    """
    # The flat vectors of all rows stay where they are; for each sample that is left, where its rows begin in them.
    masks, old_logp = torch.cat(work.masks), torch.cat(work.old_logp)
    needed = masks.cpu() & (torch.cat([batch.advantages for batch in work.batches]) != 0)
    left: list[tuple[Sample, int]] = []
    begin = 0
    for batch in work.batches:
        for first, whole in _unpacked(batch):
            wanted = needed[begin + first : begin + first + len(whole.response_ids)].nonzero()
            if len(wanted):
                left.append((_cut_short(whole, int(wanted[-1]) + 1), begin + first))
        begin += len(batch.rows)
    lengths = [sample.input_length for sample, _ in left]
    parts = [[left[i] for i in part] for part in cut(lengths, agree(micro_batches_needed(lengths, packing)), packing)]
    rows = [
        torch.cat([torch.arange(0), *(torch.arange(first, first + len(s.response_ids)) for s, first in part)]).to(
            masks.device
        )
        for part in parts
    ]
    return Work(
        batches=[packing.pack([sample for sample, _ in part]) for part in parts],
        masks=[masks[row] for row in rows],
        old_logp=[old_logp[row] for row in rows],
    )


def _unpacked(batch: MicroBatch) -> list[tuple[int, Sample]]:
    """The samples of a stream, each with the number of its first row."""
    ends = [0, *torch.bincount(batch.sequence).cumsum(0).tolist()]
    return [(first, _sample(batch, i, first, end)) for i, (first, end) in enumerate(pairwise(ends))]


def _sample(batch: MicroBatch, i: int, first: int, end: int) -> Sample:
    """Sequence ``i`` of a stream, which has the rows from ``first`` to before ``end``."""
    start, response = int(batch.cu_seqlens[i]), int(batch.rows[first])
    return Sample(
        number=sample_and_position(int(batch.token_ids[first]))[0],
        prompt_ids=batch.tokens[start : response + 1].int().numpy(),
        response_ids=batch.targets[response : response + end - first].int().numpy(),
        rollout_logp=batch.rollout_logp[first:end].numpy(),
        advantage=float(batch.advantages[first]),
        weight_versions=batch.weight_versions[first:end].numpy(),
    )


def _cut_short(sample: Sample, tokens: int) -> Sample:
    cut = {key: getattr(sample, key)[:tokens] for key in ("response_ids", "rollout_logp", "weight_versions")}
    return replace(sample, **cut)
