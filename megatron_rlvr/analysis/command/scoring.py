"""Entropies of given responses under a model, in any layout, a block of tokens at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_rlvr.batching.batch import TrainingSequence
from megatron_rlvr.batching.packing import balance, micro_batches_needed
from megatron_rlvr.config import ModelSettings, ParallelSettings
from megatron_rlvr.distributed.collectives import gather
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.recording.files import RecordedResponse

_BLOCK = 1_000_000
"""Tokens of which the scores are on a rank at once."""


def load(
    model: Path, parallel: ParallelSettings, ranks: Ranks, *, dtype: Literal["float32", "bfloat16"], temperature: float
) -> Policy:
    """Load a model that only scores; a collective over the world."""
    return Policy(ModelSettings(path=str(model), dtype=dtype), parallel, ranks, temperature=temperature)


def entropies(policy: Policy, responses: Sequence[RecordedResponse], budget: int) -> list[np.ndarray]:
    """Return the entropies [T] float32 of each response in nats, on every rank. A collective over the world.

    Args:
        policy: The model.
        responses: Responses, the same on every rank.
        budget: Most tokens of a micro-batch.
    """
    packing, ranks = policy.packing(budget), policy.ranks
    found: dict[int, np.ndarray] = {}
    for block in _blocks(responses):
        places = range(ranks.data_rank, len(block), ranks.data_size)
        mine = [_sequence(place, responses[block[place]]) for place in places]
        lengths = [sequence.input_length for sequence in mine]
        count = max(gather(micro_batches_needed(lengths, packing), ranks.data_objects))
        batches = [packing.pack([mine[i] for i in part]) for part in balance(lengths, count, packing)]
        here: dict[int, np.ndarray] = {}
        for batch, entropy in zip(batches, policy.score(batches).entropy, strict=True):
            for number, rows in batch.responses():
                here[block[number]] = entropy[rows].float().cpu().numpy()
        for part in gather(here, ranks.data_objects):
            found |= part
    return [found[number] for number in range(len(responses))]


def _blocks(responses: Sequence[RecordedResponse]) -> Iterator[list[int]]:
    """Yield indices of responses that together have about `_BLOCK` tokens."""
    block: list[int] = []
    tokens = 0
    for number, response in enumerate(responses):
        block.append(number)
        tokens += len(response.prompt_ids) + len(response.token_ids)
        if tokens >= _BLOCK:
            yield block
            block, tokens = [], 0
    if block:
        yield block


def _sequence(number: int, response: RecordedResponse) -> TrainingSequence:
    return TrainingSequence(
        number=number,
        prompt_ids=response.prompt_ids,
        response_ids=response.token_ids,
        rollout_logp=response.rollout_logp,
        advantage=0.0,
        weight_versions=response.weight_versions,
    )
