"""Values of the tokens of chosen responses, taken from this rank's micro-batches while it learns."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_rlvr.batching.batch import MicroBatch, PolicyScores
from megatron_rlvr.batching.packing import Packing
from megatron_rlvr.batching.trim import repack

Score = Callable[[Sequence[MicroBatch]], PolicyScores]


@dataclass(frozen=True)
class TokenValues:
    """Values of the T tokens of a response, of which s are selected, in nats where they are floats.

    Attributes:
        advantage: Advantage of every token.
        entropy: [T] float32, under the policy before the update.
        old_logp: [T] float32, log-probabilities under the policy before the update.
        new_logp: [T] float32, log-probabilities after the step; empty until they are known.
        selected: [T] bool, the tokens that the policy gradient touches.
        alternative_ids: [s, k] int32, likeliest tokens at the selected positions, before the update.
        alternative_logp: [s, k] float32, their log-probabilities, highest first.
    """

    advantage: float
    entropy: np.ndarray
    old_logp: np.ndarray
    new_logp: np.ndarray
    selected: np.ndarray
    alternative_ids: np.ndarray
    alternative_logp: np.ndarray


class TokenRecorder:
    """Takes the values of chosen responses; each rank takes those of its own micro-batches.

    Attributes:
        numbers: Numbers of the chosen training sequences.
        values: Values by the number of the training sequence, of those that this rank trains on.
    """

    def __init__(self, numbers: Collection[int]) -> None:
        """Create a recorder.

        Args:
            numbers: Numbers of the chosen training sequences, at least one, the same on every rank.
        """
        self.values: dict[int, TokenValues] = {}
        self.numbers = frozenset(numbers)

    def rows(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """For each micro-batch [R] bool: the rows of chosen responses."""
        return [self._rows(batch) for batch in batches]

    def before_update(self, batches: Sequence[MicroBatch], scores: PolicyScores, masks: Sequence[Tensor]) -> None:
        """Take what is known before the update.

        Args:
            batches: Micro-batches of this rank.
            scores: Their scores, with the likeliest tokens of `rows`.
            masks: For each [R] bool, the selected tokens.
        """
        for batch, logp, entropy, mask, (ids, top) in zip(
            batches, scores.logp, scores.entropy, masks, scores.likeliest, strict=True
        ):
            top_ids, top_logp = ids.int().cpu().numpy(), top.float().cpu().numpy()
            end = 0  # of the rows so far for which the likeliest tokens were asked
            for number, rows in batch.responses():
                if number not in self.numbers:
                    continue
                selected = mask[rows].cpu().numpy()
                end += len(selected)
                here = slice(end - len(selected), end)
                self.values[number] = TokenValues(
                    advantage=float(batch.advantages[rows.start]),
                    entropy=entropy[rows].float().cpu().numpy(),
                    old_logp=logp[rows].float().cpu().numpy(),
                    new_logp=np.empty(0, np.float32),
                    selected=selected,
                    alternative_ids=top_ids[here][selected],
                    alternative_logp=top_logp[here][selected],
                )

    def after_update(
        self, batches: Sequence[MicroBatch], score: Score, packing: Packing, maximum_over_ranks: Callable[[int], int]
    ) -> None:
        """Score the chosen responses under the updated weights. A collective over the world.

        Args:
            batches: Micro-batches of this rank.
            score: Scores micro-batches, on all ranks.
            packing, maximum_over_ranks: As for `trim`.
        """
        again, _ = repack(batches, torch.cat(self.rows(batches)), packing, maximum_over_ranks)
        for batch, logp in zip(again, score(again).logp, strict=True):
            for number, rows in batch.responses():
                self.values[number] = replace(self.values[number], new_logp=logp[rows].float().cpu().numpy())

    def _rows(self, batch: MicroBatch) -> Tensor:
        chosen = torch.zeros(len(batch.rows), dtype=torch.bool)
        for number, rows in batch.responses():
            chosen[rows] = number in self.numbers
        return chosen
