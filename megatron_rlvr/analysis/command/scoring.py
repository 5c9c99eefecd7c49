"""Entropies of given responses under a model, a block of tokens at a time, and gradients by bin; in any layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_rlvr.algo.loss import LossInputs, SelectedTokens
from megatron_rlvr.analysis.command.sources import Response, blocks_of
from megatron_rlvr.batching.batch import MicroBatch, TrainingSequence
from megatron_rlvr.batching.packing import balance, micro_batches_needed
from megatron_rlvr.config import ModelSettings, OptimizerSettings, ParallelSettings
from megatron_rlvr.distributed.collectives import gather
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.policy.gradient import Gradient
from megatron_rlvr.policy.policy import Policy

_BLOCK = 1_000_000
"""Tokens of which the scores are on a rank at once."""


def load(
    model: Path,
    parallel: ParallelSettings,
    ranks: Ranks,
    *,
    dtype: Literal["float32", "bfloat16"],
    temperature: float,
    gradients: bool = False,
) -> Policy:
    """Load a model that scores, and with ``gradients`` has gradients; a collective over the world."""
    optimizer = OptimizerSettings() if gradients else None
    settings = ModelSettings(path=str(model), dtype=dtype)
    return Policy(settings, parallel, ranks, optimizer=optimizer, temperature=temperature)


def entropies(policy: Policy, responses: Sequence[Response], budget: int) -> list[np.ndarray]:
    """Return the entropies [T] float32 of each response in nats, on every rank. A collective over the world.

    Args:
        policy: The model.
        responses: Responses, the same on every rank.
        budget: Most tokens of a micro-batch.
    """
    found: dict[int, np.ndarray] = {}
    for block in blocks_of(responses, _BLOCK):
        batches = _packed(policy, responses, block, budget)
        here: dict[int, np.ndarray] = {}
        for batch, entropy in zip(batches, policy.score(batches).entropy, strict=True):
            for number, rows in batch.responses():
                here[number] = entropy[rows].float().cpu().numpy()
        for part in gather(here, policy.ranks.data_objects):
            found |= part
    return [found[number] for number in range(len(responses))]


@dataclass(frozen=True)
class BinGradients:
    """Policy gradient and the parts of it that bins of tokens add.

    Attributes:
        norm: Norm of the gradient of all tokens.
        norms: [b] norms of the bins' gradients, whose sum is the gradient.
        shares: [b] scalar products of the bins' gradients with the gradient, over its squared norm; their sum is 1.
    """

    norm: float
    norms: np.ndarray
    shares: np.ndarray


def gradients_by_bin(
    policy: Policy, responses: Sequence[Response], bin_of: np.ndarray, bins: int, budget: int
) -> BinGradients:
    """Measure the policy gradient g = sum_t -A_t grad log p(y_t) / n over n tokens, by all parameters, bin by bin.

    That is the gradient of the training loss at the policy that has sampled the responses, where no ratio is clipped.
    One backward pass for all tokens and one for each bin. A collective over the world.

    Args:
        policy: The model, with gradients.
        responses: Responses with advantages, the same on every rank.
        bin_of: [n] bin of each token, all responses one after the other.
        bins: b.
        budget: Most tokens of a micro-batch.
    """
    batches = _packed(policy, responses, range(len(responses)), budget)
    starts = np.cumsum([0, *(len(response.token_ids) for response in responses)])
    numbers = [
        np.concatenate([np.zeros(0, bin_of.dtype), *(bin_of[starts[n] : starts[n + 1]] for n, _ in batch.responses())])
        for batch in batches
    ]
    inputs = [LossInputs(torch.zeros_like(batch.advantages), batch.advantages) for batch in batches]

    def gradient(masks: Sequence[np.ndarray]) -> Gradient:
        return policy.gradient(batches, [torch.from_numpy(m) for m in masks], inputs, _policy_gradient, len(bin_of))

    whole = gradient([np.ones(len(each), bool) for each in numbers]).copy()
    square = whole.dot(whole)
    norms, products = np.zeros(bins), np.zeros(bins)
    for number in range(bins):
        part = gradient([each == number for each in numbers])
        norms[number], products[number] = part.dot(part) ** 0.5, part.dot(whole)
    with np.errstate(invalid="ignore"):  # of a gradient of zero
        return BinGradients(square**0.5, norms, products / np.float64(square))


def _policy_gradient(logp: Tensor, tokens: SelectedTokens) -> tuple[Tensor, dict[str, Tensor]]:
    return -(tokens.advantages * logp).sum(), {}


def _packed(policy: Policy, responses: Sequence[Response], which: Sequence[int], budget: int) -> list[MicroBatch]:
    """Pack this rank's share of responses; the number of micro-batches is the same on all ranks."""
    packing, ranks = policy.packing(budget), policy.ranks
    mine = [_sequence(number, responses[number]) for number in which[ranks.data_rank :: ranks.data_size]]
    lengths = [sequence.input_length for sequence in mine]
    count = max(gather(micro_batches_needed(lengths, packing), ranks.data_objects))
    return [packing.pack([mine[i] for i in part]) for part in balance(lengths, count, packing)]


def _sequence(number: int, response: Response) -> TrainingSequence:
    length = len(response.token_ids)
    return TrainingSequence(
        number=number,
        prompt_ids=response.prompt_ids,
        response_ids=response.token_ids,
        rollout_logp=np.zeros(length, np.float32),
        advantage=response.advantage or 0.0,
        weight_versions=np.zeros(length, np.int32),
    )
