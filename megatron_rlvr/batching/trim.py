"""Trim: drop the part of a mini-batch that carries no gradient, once the mask is known.

Attention is causal, so no position after a sequence's last token with a gradient can change the loss, nor can a
sequence without such a token. `trim` drops both and packs the rest again. Counts and thresholds are of the whole.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from megatron_rlvr.algo.loss import LossInputs
from megatron_rlvr.batching.batch import MicroBatch, TrainingSequence, sequence_and_position
from megatron_rlvr.batching.packing import Packing, balance, micro_batches_needed


@dataclass(frozen=True)
class MaskedBatches:
    """Input of a training pass: this rank's micro-batches, with a mask and the inputs of the loss for their rows.

    Attributes:
        batches: Micro-batches of this rank.
        masks: [R] bool for each, True for tokens whose gradient counts.
        inputs: Inputs of the loss for the [R] rows of each.
    """

    batches: list[MicroBatch]
    masks: list[Tensor]
    inputs: list[LossInputs]


def trim(
    whole: MaskedBatches, packing: Packing, maximum_over_ranks: Callable[[int], int], *, regularized: bool = False
) -> MaskedBatches:
    """Drop all positions that cannot change the gradient.

    Sequences without a selected token that has a gradient are left out, the others are truncated after their last such
    token, and the rest is packed again.

    Args:
        whole: Sequences as `pack` made them, on the CPU; masks and inputs on any device.
        packing: Constraints of the new streams.
        maximum_over_ranks: Returns the largest of the numbers that the data-parallel ranks give, so that all of them
            run the same number of micro-batches. Called once.
        regularized: Whether selected tokens without advantage have a gradient as well, from a regularizer.
    """
    # The flat vectors of all rows are only indexed: with each remaining sequence goes the index of its first row.
    masks, inputs = torch.cat(whole.masks), LossInputs.concatenated(whole.inputs)
    needed = masks.cpu()
    if not regularized:
        needed = needed & (torch.cat([batch.advantages for batch in whole.batches]) != 0)
    remaining: list[tuple[TrainingSequence, int]] = []
    offset = 0
    for batch in whole.batches:
        for row, sequence in _unpacked(batch):
            first = offset + row
            positions = needed[first : first + len(sequence.response_ids)].nonzero()
            if len(positions):
                remaining.append((_truncated(sequence, int(positions[-1]) + 1), first))
        offset += len(batch.rows)
    lengths = [sequence.input_length for sequence, _ in remaining]
    count = maximum_over_ranks(micro_batches_needed(lengths, packing))
    parts = [[remaining[i] for i in part] for part in balance(lengths, count, packing)]
    rows = [_rows(part).to(masks.device) for part in parts]
    return MaskedBatches(
        batches=[packing.pack([sequence for sequence, _ in part]) for part in parts],
        masks=[masks[row] for row in rows],
        inputs=[inputs[row] for row in rows],
    )


def _rows(part: list[tuple[TrainingSequence, int]]) -> Tensor:
    """[R] int64, indices of a new micro-batch's rows in the flat vectors of all rows."""
    return torch.cat([torch.arange(0), *(torch.arange(first, first + len(s.response_ids)) for s, first in part)])


def _unpacked(batch: MicroBatch) -> list[tuple[int, TrainingSequence]]:
    """Sequences of a stream, each with the index of its first row."""
    ends = [0, *torch.bincount(batch.sequence).cumsum(0).tolist()]
    return [(first, _sequence(batch, i, first, end)) for i, (first, end) in enumerate(pairwise(ends))]


def _sequence(batch: MicroBatch, i: int, first: int, end: int) -> TrainingSequence:
    """Sequence ``i`` of a stream, which has rows ``first`` .. ``end`` - 1."""
    start, response = int(batch.cu_seqlens[i]), int(batch.rows[first])
    return TrainingSequence(
        number=sequence_and_position(int(batch.token_ids[first]))[0],
        prompt_ids=batch.tokens[start : response + 1].int().numpy(),
        response_ids=batch.targets[response : response + end - first].int().numpy(),
        rollout_logp=batch.rollout_logp[first:end].numpy(),
        advantage=float(batch.advantages[first]),
        weight_versions=batch.weight_versions[first:end].numpy(),
    )


def _truncated(sequence: TrainingSequence, tokens: int) -> TrainingSequence:
    per_token = ("response_ids", "rollout_logp", "weight_versions")
    return replace(sequence, **{name: getattr(sequence, name)[:tokens] for name in per_token})
