"""Weights and optimizer state as shards of global tensors, which any layout can save and any other layout can load.

Each rank describes what it writes or reads (`shares`) by its place in global tensors; the data of a shard are views of
the policy's own tensors, which a load fills in place. Megatron's ``dist_checkpointing`` writes the shards, and reads
for each rank the parts of the global tensors that it needs. Names are those of the tables in `hf.families`.

The state of the distributed optimizer has the names of Megatron's format ``fully_reshardable``, which is the only one
that any layout can load. Megatron itself gathers the whole state on every rank to write it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.utils import extract_nonpersistent, extract_sharded_base
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_rlvr.checkpoint.files import CONTENT_METADATA, CheckpointReader
from megatron_rlvr.checkpoint.megatron.loading import load_sharded
from megatron_rlvr.checkpoint.megatron.shares import Replicated, shards_of_range

_SHARDING_TYPE = "fully_reshardable"
_OPTIMIZER_KEY = re.compile(r"optimizer\.state\.\w+\.(?P<weight>.+)")


class ShardedWeights:
    """This rank's weights, described for Megatron.

    Scaling factors of Transformer Engine's FP8 are left out: they are determined again in training.

    Args:
        chunks: This rank's model chunks.

    Attributes:
        leaves: Megatron's descriptions of the weights, by chunk and name.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        metadata = CONTENT_METADATA | {"dp_cp_group": _data_group(expert=False)}
        states = [_module(chunk).sharded_state_dict(metadata=metadata) for chunk in chunks]
        self.leaves: dict[str, dict[str, Any]] = {
            f"model{number}": {key: leaf for key, leaf in state.items() if not isinstance(leaf, ShardedObject)}
            for number, state in enumerate(states)
        }
        # Megatron's data-parallel wrapper distinguishes them by this mark as well.
        self._experts = {leaf.key for leaf in nested_values(self.leaves) if not getattr(leaf.data, "allreduce", True)}

    def written(self) -> Iterator[ShardedTensor]:
        """Yield what this rank writes."""
        return _shares(self.groups(_written(nested_values(self.leaves))), loading=False)

    def replicated(self) -> list[Replicated]:
        """Return all weights by the ranks that hold them."""
        return self.groups(nested_values(self.leaves))

    def groups(self, leaves: Iterable[Any]) -> list[Replicated]:
        """Return weights, or tensors of an optimizer's state for them, by the ranks that hold the same weights."""
        by_expert: dict[bool, list[Any]] = {False: [], True: []}
        for leaf in leaves:
            state = _OPTIMIZER_KEY.fullmatch(leaf.key)
            by_expert[(state["weight"] if state else leaf.key) in self._experts].append(leaf)
        return [Replicated(each, _data_group(expert=expert)) for expert, each in by_expert.items() if each]


def load_weights(chunks: Sequence[torch.nn.Module], folder: Path, hf_config: Mapping[str, Any]) -> None:
    """Fill this rank's parameters from a checkpoint. A collective over the world.

    Raises:
        ModelError: On every rank, with the names of weights that are missing or do not fit ``hf_config``.
        InvalidCheckpointError: On every rank, if a file cannot be loaded.
    """
    CheckpointReader(folder).check(hf_config)
    load_replicated(ShardedWeights(chunks).replicated(), [], folder)


def load_replicated(replicated: Sequence[Replicated], shards: Iterable[ShardedTensor], folder: Path) -> dict[str, Any]:
    """Fill tensors from a checkpoint: this rank's share of the replicated ones, and other shards, which it alone holds.

    A collective over the world.

    Returns:
        The state common to all ranks.

    Raises:
        InvalidCheckpointError: On every rank, if a file cannot be loaded.
    """
    common = load_sharded([*_shares(replicated, loading=True), *shards], folder)
    for each in replicated:
        each.exchange()
    return common


class ShardedOptimizer:
    """The optimizer's state, described for Megatron.

    A distributed optimizer's state is on one rank each; that of others is on all ranks with the same weights.

    Args:
        optimizer: Megatron's optimizer.
        weights: The weights that it trains.
        loading: True if a checkpoint will be loaded into the state.

    Attributes:
        common: State common to all ranks: settings of parameter groups, step counts.
    """

    def __init__(self, optimizer: Any, weights: ShardedWeights, *, loading: bool) -> None:
        _allocate_moments(optimizer)
        self._optimizer = optimizer
        self._weights = weights
        parts = _parts(optimizer)
        if len(parts) > 1:
            optimizer._synchronize_steps()
        states = [
            part.state_dict() | {"param_state_sharding_type": _SHARDING_TYPE}
            if isinstance(part, DistributedOptimizer)
            else part.sharded_state_dict(weights.leaves, loading, metadata=CONTENT_METADATA)
            for part in parts
        ]
        self._leaves, state = extract_sharded_base(states[0] if len(parts) == 1 else dict(enumerate(states)))
        self._local, self.common = extract_nonpersistent(state)

    def written(self) -> Iterator[ShardedTensor]:
        """Yield what this rank writes."""
        yield from self.own(loading=False)
        yield from _shares(self._weights.groups(_written(nested_values(self._leaves))), loading=False)

    def replicated(self) -> list[Replicated]:
        """Return the tensors of the state that all ranks with the same weights hold, by these ranks."""
        return self._weights.groups(nested_values(self._leaves))

    def own(self, *, loading: bool) -> Iterator[ShardedTensor]:
        """Yield the shards of the state of distributed optimizers."""
        leaves = {leaf.data: leaf for leaf in nested_values(self._weights.leaves)}
        for part in _parts(self._optimizer):
            if not isinstance(part, DistributedOptimizer):
                continue
            for parameter in part.model_param_gbuf_map:
                start = part._get_model_param_range_map(parameter)["param"].start
                for name, values in part._get_main_param_and_optimizer_states(parameter).items():
                    if name == "step":
                        continue
                    for shard in shards_of_range(leaves[parameter], values.detach().view(-1), start, loading=loading):
                        replica = (*shard.replica_id[:2], part.distributed_optimizer_instance_id)  # type: ignore[index]
                        yield replace(shard, key=f"optimizer.state.{name}.{shard.key}", replica_id=replica)

    def restore(self, common: dict[str, Any]) -> None:
        """Complete a load: give the optimizer the common state beside its tensors, which are loaded.

        Args:
            common: The value of `common` when the checkpoint was saved.
        """
        dict_list_map_inplace(lambda leaf: leaf.data, self._leaves)
        dict_list_map_inplace(lambda value: value.unwrap(), self._local)
        set_common_state(self._optimizer, merge(merge(common, self._leaves), self._local))


def _shares(replicated: Iterable[Replicated], *, loading: bool) -> Iterator[ShardedTensor]:
    return (shard for each in replicated for shard in each.shards(loading=loading))


def set_common_state(optimizer: Any, loaded: Any) -> None:
    """Give the optimizer its state but for the tensors of distributed optimizers, which keep theirs.

    Args:
        optimizer: Megatron's optimizer.
        loaded: Its state; completed where Megatron leaves something out.
    """
    parts = _parts(optimizer)
    states = [loaded] if len(parts) == 1 else [loaded[number] for number in range(len(parts))]
    for part, state in zip(parts, states, strict=True):
        state.pop("param_state", None)  # empty; Megatron would take it for the loaded tensors
        inner = state.get("optimizer", state)
        # Megatron omits the step count if it is 0. Only torch's Adam needs it: fused optimizers count steps for a whole
        # parameter group, and some reject a step count of a single parameter.
        if "state" in inner and isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
            inner["state"].setdefault("common_step", torch.zeros(()))
    optimizer.load_state_dict(loaded)
    for part in parts:
        # With torch's Adam, the distributed optimizer makes all parameters share one step count, which each of them
        # would increment.
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()


def _allocate_moments(optimizer: Any) -> None:
    """Give Adam its initial moments if it has none yet; it would create them in its first step.

    Megatron takes an optimizer without moments, such as one that has skipped all of its steps, for one without state.
    """
    for part in _parts(optimizer):
        adam = part.optimizer
        part.init_state_fn(adam, part.config)
        if isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
            for state in adam.state.values():
                state.setdefault("step", torch.zeros(()))


def _written(leaves: Iterable[Any]) -> list[Any]:
    """Return the tensors that ranks of this tensor and pipeline rank write, being the first that hold them."""
    return [leaf for leaf in leaves if not any(leaf.replica_id[:2])]


def _data_group(*, expert: bool) -> dist.ProcessGroup:
    """Return the ranks that hold the same weights as this one: those of experts, or all other ones."""
    if expert:
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _parts(optimizer: Any) -> list[Any]:
    """Return the optimizers that Megatron has chained: experts have their own."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _module(chunk: Any) -> Any:
    """Return the model inside a chunk's data-parallel wrapper, if it has one."""
    return getattr(chunk, "module", chunk)
