"""Weights and optimizer state in Megatron's sharded form, which any layout can save and any other layout can load.

Each rank describes its tensors as shards of global tensors; Megatron's ``dist_checkpointing`` writes the shards, and
reads for each rank the parts of the global tensors that it needs. Names are those of the tables in `hf.families`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_rlvr.checkpoint.files import CONTENT_METADATA, CheckpointReader
from megatron_rlvr.checkpoint.megatron.loading import load_sharded

# Saved moments have the shape of their parameter, whichever ranks shared them, so that any layout can read them.
_OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def sharded_weights(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Return Megatron's sharded state dict of each of this rank's model chunks, under ``model0``, ``model1``, ...

    Scaling factors of Transformer Engine's FP8 are left out: they are determined again in training.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = CONTENT_METADATA | {"dp_cp_group": group}
    states = [_module(chunk).sharded_state_dict(metadata=metadata) for chunk in chunks]
    return {
        f"model{number}": {key: shard for key, shard in state.items() if not isinstance(shard, ShardedObject)}
        for number, state in enumerate(states)
    }


def load_weights(chunks: Sequence[torch.nn.Module], folder: Path, hf_config: Mapping[str, Any]) -> None:
    """Fill this rank's parameters from a checkpoint. A collective over the world.

    Raises:
        ModelError: On every rank, with the names of weights that are missing or do not fit ``hf_config``.
        InvalidCheckpointError: If a file cannot be loaded.
    """
    CheckpointReader(folder).check(hf_config)
    fill_weights(chunks, load_sharded(sharded_weights(chunks), folder))


def fill_weights(chunks: Sequence[torch.nn.Module], loaded: Mapping[str, Any]) -> None:
    """Copy loaded `sharded_weights` into this rank's parameters."""
    for number, chunk in enumerate(chunks):
        with torch.no_grad():
            for name, parameter in _module(chunk).named_parameters():
                parameter.copy_(loaded[f"model{number}"][name])


def sharded_optimizer(optimizer: Any, weights: dict[str, Any], *, loading: bool) -> Any:
    """Return the optimizer's state in Megatron's sharded form.

    Args:
        optimizer: Megatron's optimizer.
        weights: Result of `sharded_weights`.
        loading: True if a checkpoint will be loaded into the result.
    """
    _allocate_moments(optimizer)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = CONTENT_METADATA | _OPTIMIZER_METADATA | {"dp_cp_group": group}
    return optimizer.sharded_state_dict(weights, loading, metadata=metadata)


def load_optimizer(optimizer: Any, loaded: Any) -> None:
    """Fill the optimizer from a loaded `sharded_optimizer`."""
    parts = _parts(optimizer)
    states = [loaded] if len(parts) == 1 else [loaded[number] for number in range(len(parts))]
    moments = [state.pop("param_state", None) for state in states]
    for part, state in zip(parts, states, strict=True):
        inner = state.get("optimizer", state)
        # Megatron omits the step count if it is 0. Only torch's Adam needs it: fused optimizers count steps for a whole
        # parameter group, and some reject a step count of a single parameter.
        if "state" in inner and isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
            inner["state"].setdefault("common_step", torch.zeros(()))
    optimizer.load_state_dict(loaded)
    for part, moment in zip(parts, moments, strict=True):
        # With torch's Adam, the distributed optimizer mistakes the step counts, which are not sharded, for another
        # moment of the parameter, and makes all parameters share one tensor, which each of them would increment.
        steps = {parameter: state.pop("step", None) for parameter, state in part.optimizer.state.items()}
        if moment is not None:
            part.load_parameter_state_from_fully_reshardable(moment)
        for parameter, step in steps.items():
            if step is not None:
                part.optimizer.state[parameter]["step"] = step.clone()


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


def _parts(optimizer: Any) -> list[Any]:
    """Return the optimizers that Megatron has chained: experts have their own."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _module(chunk: Any) -> Any:
    """Return the model inside a chunk's data-parallel wrapper, if it has one."""
    return getattr(chunk, "module", chunk)
