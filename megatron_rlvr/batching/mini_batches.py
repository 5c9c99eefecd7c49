"""From a step's groups to the mini-batches of every rank: advantages, spreading, exchange, packing.

Groups are held where they were sampled. Every rank learns the lengths of all sequences, decides alike who trains on
which, and sends its own sequences there once.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_rlvr.algo.advantage import group_advantages
from megatron_rlvr.batching.batch import MicroBatch, Sample
from megatron_rlvr.batching.packing import Packing, micro_batch_plan, spread
from megatron_rlvr.types import Group


@dataclass(frozen=True)
class MiniBatch:
    """What one optimizer step trains on: this rank's micro-batches, how they were packed, and sizes over all ranks."""

    micro_batches: list[MicroBatch]
    packing: Packing
    response_tokens: int
    sequences: int


def build_mini_batches(
    groups: Sequence[tuple[int, Group]],
    *,
    estimator: str,
    groups_per_mini_batch: int,
    packing: Packing,
    data_group: dist.ProcessGroup,
) -> list[MiniBatch]:
    """The mini-batches of a training step, in the order of the groups; a collective over the data-parallel ranks.

    Args:
        groups: (place in the batch from 0 over all ranks, group) of this rank; all groups have the same size.
        estimator: of the advantage.
        groups_per_mini_batch: the last mini-batch may have fewer.
        packing: how streams are cut.
        data_group: carries Python objects.
    """
    here = [sample for order, group in groups for sample in _samples(order, group, estimator)]
    per_group = len(groups[0][1].completions) if groups else 0
    parts: list[Any] = [None] * dist.get_world_size(data_group)
    dist.all_gather_object(
        parts, (per_group, [(s.number, s.input_length, len(s.response_ids)) for s in here]), group=data_group
    )
    per_mini_batch = groups_per_mini_batch * max(size for size, _ in parts)
    sizes = {number: (length, tokens) for _, held in parts for number, length, tokens in held}
    plans = [_plan(numbers, sizes, len(parts), packing) for numbers in _mini_batches(sorted(sizes), per_mini_batch)]
    owner = {number: rank for plan in plans for rank, cut in enumerate(plan) for part in cut for number in part}
    outgoing: list[list[Sample]] = [[] for _ in parts]
    for sample in here:
        outgoing[owner[sample.number]].append(sample)
    mine = {s.number: s for received in exchange(outgoing, data_group) for s in received}
    rank = dist.get_rank(data_group)
    return [
        MiniBatch(
            micro_batches=[packing.pack([mine[number] for number in part]) for part in plan[rank]],
            packing=packing,
            response_tokens=sum(sizes[number][1] for cut in plan for part in cut for number in part),
            sequences=sum(len(part) for cut in plan for part in cut),
        )
        for plan in plans
    ]


def _samples(order: int, group: Group, estimator: str) -> list[Sample]:
    advantages = group_advantages(np.array([grade.reward for grade in group.grades]), estimator)
    return [
        Sample(
            number=order * len(group.completions) + i,
            prompt_ids=group.prompt.token_ids,
            response_ids=completion.token_ids,
            rollout_logp=completion.logprobs,
            advantage=float(advantages[i]),
            weight_versions=completion.weight_versions,
        )
        for i, completion in enumerate(group.completions)
    ]


def _mini_batches(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), max(1, size))]


def _plan(numbers: list[int], sizes: dict[int, tuple[int, int]], ranks: int, packing: Packing) -> list[list[list[int]]]:
    """Sequence numbers of each micro-batch of each rank."""
    owned = spread([sizes[n][0] for n in numbers], ranks, packing.quadratic)
    cuts = micro_batch_plan([[sizes[numbers[i]][0] for i in part] for part in owned], packing)
    return [[[numbers[part[i]] for i in micro] for micro in cut] for part, cut in zip(owned, cuts, strict=True)]


def exchange(outgoing: Sequence[Any], group: dist.ProcessGroup) -> list[Any]:
    """Sends ``outgoing[r]`` to rank r of ``group`` and returns what each rank sent here, in rank order."""
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
