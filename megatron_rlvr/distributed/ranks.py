"""The position of this process in Megatron's grid of ranks, and its process groups.

A *data-parallel replica* is the set of ranks that together hold one copy of the model (tensor x context x pipeline);
there are ``data_size`` of them. All ranks of a replica work on the same sequences. Experts are the exception: they are
sharded over the ranks of ``expert_size`` replicas. The first rank of a replica is its *leader*.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_rlvr.config import ParallelSettings
from megatron_rlvr.distributed import megatron_on_cpu, process_group


@dataclass(frozen=True)
class Ranks:
    """Position and groups of this rank. Groups named ``*_objects`` are for Python objects and CPU tensors."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    context_rank: int
    context_size: int
    expert_rank: int
    expert_size: int
    data_rank: int
    data_size: int
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    context_group: dist.ProcessGroup
    expert_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    data_context_group: dist.ProcessGroup
    """Ranks that hold the same weights, except for experts, and process different tokens."""
    expert_data_group: dist.ProcessGroup
    """Ranks that hold the same experts."""
    data_objects: dist.ProcessGroup
    """Ranks at the same position in every data-parallel replica, ordered by data rank."""
    replica_objects: dist.ProcessGroup
    """All ranks of this data-parallel replica, the leader first."""

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes the files and prints."""
        return self.rank == 0

    @property
    def last_stage(self) -> bool:
        """True on ranks of the last pipeline stage, which compute logits and losses."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def replica_rank(self) -> int:
        """Rank within the data-parallel replica; 0 is the leader."""
        return dist.get_rank(self.replica_objects)

    @property
    def replica_size(self) -> int:
        """Number of ranks of a data-parallel replica."""
        return dist.get_world_size(self.replica_objects)

    def from_last_stage(self, value: Any) -> Any:
        """Return the last pipeline stage's ``value`` on every stage of the data-parallel replica."""
        if self.pipeline_size == 1:
            return value
        gathered: list[Any] = [None] * self.replica_size
        dist.all_gather_object(gathered, value if self.last_stage else None, group=self.replica_objects)
        return next(v for v in gathered if v is not None)


def initialize_replicas(timeout_minutes: float) -> Ranks:
    """Join the process group with every rank a data-parallel replica of its own, without Megatron.

    Every rank must call it.

    Args:
        timeout_minutes: Time after which a collective fails.
    """
    process_group.initialize(timeout_minutes)
    rank, size = dist.get_rank(), dist.get_world_size()
    # Creating a group is collective over the world: every rank creates every group, and keeps its own.
    alone = [process_group.object_group([each]) for each in range(size)][rank]
    everyone = process_group.object_group(list(range(size)))
    return Ranks(
        rank=rank,
        world_size=size,
        tensor_rank=0,
        tensor_size=1,
        pipeline_rank=0,
        pipeline_size=1,
        context_rank=0,
        context_size=1,
        expert_rank=0,
        expert_size=1,
        data_rank=rank,
        data_size=size,
        tensor_group=alone,
        pipeline_group=alone,
        context_group=alone,
        expert_group=alone,
        data_group=everyone,
        data_context_group=everyone,
        expert_data_group=everyone,
        data_objects=everyone,
        replica_objects=alone,
    )


def initialize_ranks(parallel: ParallelSettings, timeout_minutes: float) -> Ranks:
    """Join the process group and arrange its ranks in Megatron's grid. Every rank must call it.

    Args:
        parallel: Sizes of the grid.
        timeout_minutes: Time after which a collective on any of the groups fails; Megatron's groups need an int of at
            least 1.
    """
    megatron_on_cpu.import_megatron()
    from megatron.core import parallel_state

    process_group.initialize(timeout_minutes)
    with process_group.connecting_later():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=max(1, round(timeout_minutes)),
            create_gloo_process_groups=False,  # the two that are needed are made here
        )
    data_rank = parallel_state.get_data_parallel_rank()
    data_size = parallel_state.get_data_parallel_world_size()
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, data_rank)
    replicas = [[rank for rank, place in enumerate(places) if place == d] for d in range(data_size)]
    # Creating a group is collective over the world: every rank creates every group, and keeps its own.
    groups = [process_group.object_group(ranks) for ranks in replicas]
    own = replicas[data_rank].index(dist.get_rank())
    across = [process_group.object_group(list(ranks)) for ranks in zip(*replicas, strict=True)]
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel.tensor,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel.pipeline,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel.context,
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_size=parallel.expert,
        data_rank=data_rank,
        data_size=data_size,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        context_group=parallel_state.get_context_parallel_group(),
        expert_group=parallel_state.get_expert_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        data_context_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        expert_data_group=parallel_state.get_expert_data_parallel_group(),
        data_objects=across[own],
        replica_objects=groups[data_rank],
    )
