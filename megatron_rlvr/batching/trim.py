"""Trim: drop the part of a mini-batch that carries no gradient, once the mask is known.

Attention is causal, so no position after a sequence's last token with a gradient can change the loss, nor can a
sequence without such a token. `trim` drops both and packs the rest again. Counts and thresholds are of the whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_rlvr.algo.loss import LossInputs
from megatron_rlvr.batching.batch import MicroBatch, TrainingSequence
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
    masks, inputs = torch.cat(whole.masks), LossInputs.concatenated(whole.inputs)
    needed = masks.cpu()
    if not regularized:
        needed = needed & (torch.cat([batch.advantages for batch in whole.batches]) != 0)
    batches, rows = repack(whole.batches, needed, packing, maximum_over_ranks)
    rows = [row.to(masks.device) for row in rows]
    return MaskedBatches(batches, [masks[row] for row in rows], [inputs[row] for row in rows])


def repack(
    batches: Sequence[MicroBatch], needed: Tensor, packing: Packing, maximum_over_ranks: Callable[[int], int]
) -> tuple[list[MicroBatch], list[Tensor]]:
    """Pack again the sequences that have a needed row, each truncated after the last one.

    Args:
        batches: Micro-batches as `pack` made them, on the CPU.
        needed: Bool, on the CPU, for the rows of all micro-batches.
        packing: Constraints of the new streams.
        maximum_over_ranks: As for `trim`.

    Returns: (new micro-batches; for each the indices of its rows among those of all micro-batches, [R] int64).
    """
    # The flat vectors of all rows are only indexed: with each remaining sequence goes the index of its first row.
    remaining: list[tuple[TrainingSequence, int]] = []
    offset = 0
    for batch in batches:
        for i, (number, rows) in enumerate(batch.responses()):
            first = offset + rows.start
            positions = needed[first : offset + rows.stop].nonzero()
            if len(positions):
                remaining.append((_truncated(_sequence(batch, i, number, rows), int(positions[-1]) + 1), first))
        offset += len(batch.rows)
    lengths = [sequence.input_length for sequence, _ in remaining]
    count = maximum_over_ranks(micro_batches_needed(lengths, packing))
    parts = [[remaining[i] for i in part] for part in balance(lengths, count, packing)]
    return [packing.pack([sequence for sequence, _ in part]) for part in parts], [_rows(part) for part in parts]


def _rows(part: list[tuple[TrainingSequence, int]]) -> Tensor:
    """[R] int64, indices of a new micro-batch's rows in the flat vectors of all rows."""
    return torch.cat([torch.arange(0), *(torch.arange(first, first + len(s.response_ids)) for s, first in part)])


def _sequence(batch: MicroBatch, i: int, number: int, rows: slice) -> TrainingSequence:
    """Sequence ``i`` of a stream, from its number in the training step and its rows."""
    start, response = int(batch.cu_seqlens[i]), int(batch.rows[rows.start])
    return TrainingSequence(
        number=number,
        prompt_ids=batch.tokens[start : response + 1].int().numpy(),
        response_ids=batch.targets[response : response + rows.stop - rows.start].int().numpy(),
        rollout_logp=batch.rollout_logp[rows].numpy(),
        advantage=float(batch.advantages[rows.start]),
        weight_versions=batch.weight_versions[rows].numpy(),
    )


def _truncated(sequence: TrainingSequence, tokens: int) -> TrainingSequence:
    per_token = ("response_ids", "rollout_logp", "weight_versions")
    return replace(sequence, **{name: getattr(sequence, name)[:tokens] for name in per_token})
