"""From a step's groups to the mini-batches of every rank: advantages, distribution over ranks, exchange, packing.

A group is held by the rank that sampled it. Every rank learns the lengths of all sequences, makes the same plan of who
trains on which, and sends its sequences to their new ranks, once.
"""

import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlvr.algo.advantage import batch_scale, group_advantages
from megatron_rlvr.batching.batch import MicroBatch, TrainingSequence, sequence_and_position
from megatron_rlvr.batching.packing import Packing, distribute, plan_micro_batches
from megatron_rlvr.types import Group


@dataclass(frozen=True)
class MiniBatch:
    """Data of one optimizer step.

    Attributes:
        micro_batches: Micro-batches of this rank.
        packing: Constraints by which they were packed.
        lengths: Response tokens of every sequence of all ranks, by its number.
        group_size: Number of sequences of a prompt, which have consecutive numbers.
    """

    micro_batches: list[MicroBatch]
    packing: Packing
    lengths: Mapping[int, int]
    group_size: int

    @property
    def response_tokens(self) -> int:
        """Number of response tokens over all ranks."""
        return sum(self.lengths.values())

    @property
    def sequences(self) -> int:
        """Number of sequences over all ranks."""
        return len(self.lengths)

    @property
    def prompts(self) -> int:
        """Number of prompts over all ranks."""
        return len({number // self.group_size for number in self.lengths})

    def tokens_around(self, batch: MicroBatch, sequences: int) -> Tensor:
        """Return for each row of a micro-batch the response tokens of all sequences that it is averaged with.

        Args:
            batch: A micro-batch of this mini-batch.
            sequences: 1 for the row's own sequence; the group size for all sequences of its prompt.

        Returns: [R] float32.
        """
        totals: Counter[int] = Counter()
        for number, length in self.lengths.items():
            totals[number // sequences] += length
        starts = torch.bincount(batch.sequence).cumsum(0).roll(1)
        starts[:1] = 0
        numbers = [sequence_and_position(first)[0] for first in batch.token_ids[starts].tolist()]
        return torch.tensor([float(totals[number // sequences]) for number in numbers])[batch.sequence]


def build_mini_batches(
    groups: Sequence[tuple[int, Group]],
    *,
    estimator: str,
    groups_per_mini_batch: int,
    packing: Packing,
    data_group: dist.ProcessGroup,
) -> list[MiniBatch]:
    """Build the mini-batches of a training step, in the order of the groups. A collective over ``data_group``.

    Args:
        groups: (index in the batch of all ranks, from 0; group) for each group of this rank. Groups may
            differ in size.
        estimator: Name of the advantage estimator, see `algo.advantage`.
        groups_per_mini_batch: Number of groups of a mini-batch; the last one may have fewer.
        packing: Constraints of the packed streams.
        data_group: Data-parallel ranks, by a back end that carries Python objects.
    """
    largest = max((len(group.completions) for _, group in groups), default=0)
    group_size = max(_gather(largest, data_group))
    here = [seq for index, group in groups for seq in _training_sequences(index, group, estimator, group_size)]
    sizes = _sizes_on_all_ranks(here, data_group)
    scale = batch_scale(np.array([sizes[n].advantage for n in sorted(sizes)]), estimator)
    here = [replace(sequence, advantage=sequence.advantage * scale) for sequence in here]
    numbers: dict[int, list[int]] = {}
    for number in sorted(sizes):
        numbers.setdefault(number // (group_size * groups_per_mini_batch), []).append(number)
    plans = [_plan(own, sizes, dist.get_world_size(data_group), packing) for own in numbers.values()]
    mine = _move_sequences(here, plans, data_group)
    return [
        MiniBatch(
            micro_batches=[packing.pack([mine[n] for n in micro]) for micro in plan[dist.get_rank(data_group)]],
            packing=packing,
            lengths={n: sizes[n].response_tokens for by_rank in plan for micro in by_rank for n in micro},
            group_size=group_size,
        )
        for plan in plans
    ]


class _Size(NamedTuple):
    input_length: int
    response_tokens: int
    advantage: float


_Plan = list[list[list[int]]]
"""Numbers of the sequences of each micro-batch of each rank, for one mini-batch."""


def _training_sequences(index: int, group: Group, estimator: str, stride: int) -> list[TrainingSequence]:
    advantages = group_advantages(np.array([grade.reward for grade in group.grades]), estimator)
    return [
        TrainingSequence(
            number=index * stride + i,
            prompt_ids=group.prompt.token_ids,
            response_ids=completion.token_ids,
            rollout_logp=completion.logprobs,
            advantage=float(advantages[i]),
            weight_versions=completion.weight_versions,
        )
        for i, completion in enumerate(group.completions)
    ]


def _sizes_on_all_ranks(here: Sequence[TrainingSequence], data_group: dist.ProcessGroup) -> dict[int, _Size]:
    """Return the size of every sequence by its number."""
    by_rank = _gather({s.number: _Size(s.input_length, len(s.response_ids), s.advantage) for s in here}, data_group)
    return {n: size for held in by_rank for n, size in held.items()}


def _gather(item: Any, data_group: dist.ProcessGroup) -> list[Any]:
    """Return the objects of all ranks."""
    by_rank: list[Any] = [None] * dist.get_world_size(data_group)
    dist.all_gather_object(by_rank, item, group=data_group)
    return by_rank


def _plan(numbers: Sequence[int], sizes: dict[int, _Size], ranks: int, packing: Packing) -> _Plan:
    lengths = [sizes[n].input_length for n in numbers]
    owned = distribute(lengths, ranks, packing)
    by_rank = plan_micro_batches([[lengths[i] for i in part] for part in owned], packing)
    return [[[numbers[part[i]] for i in micro] for micro in plan] for part, plan in zip(owned, by_rank, strict=True)]


def _move_sequences(
    here: Sequence[TrainingSequence], plans: Sequence[_Plan], data_group: dist.ProcessGroup
) -> dict[int, TrainingSequence]:
    """Send every sequence to the rank that trains on it; return this rank's sequences by number."""
    owner = {n: rank for plan in plans for rank, by_rank in enumerate(plan) for micro in by_rank for n in micro}
    outgoing: list[list[TrainingSequence]] = [[] for _ in range(dist.get_world_size(data_group))]
    for sequence in here:
        outgoing[owner[sequence.number]].append(sequence)
    return {s.number: s for received in exchange(outgoing, data_group) for s in received}


def exchange(outgoing: Sequence[Any], group: dist.ProcessGroup) -> list[Any]:
    """Send ``outgoing[r]`` to rank r of ``group``, and return the objects sent to this rank. A collective.

    Args:
        outgoing: One object for each rank; anything that can be pickled.
        group: Ranks that exchange, by a back end for CPU tensors.

    Returns: The objects sent to this rank, in rank order.
    """
    if len(outgoing) == 1:
        return list(outgoing)
    payloads = [pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL) for item in outgoing]
    send_sizes = torch.tensor([len(payload) for payload in payloads])
    receive_sizes = torch.empty_like(send_sizes)
    dist.all_to_all_single(receive_sizes, send_sizes, group=group)
    received = torch.empty(int(receive_sizes.sum()), dtype=torch.uint8)
    sent = torch.frombuffer(bytearray(b"".join(payloads)), dtype=torch.uint8)
    dist.all_to_all_single(received, sent, receive_sizes.tolist(), send_sizes.tolist(), group=group)
    return [pickle.loads(part.numpy().tobytes()) for part in received.split(receive_sizes.tolist())]
