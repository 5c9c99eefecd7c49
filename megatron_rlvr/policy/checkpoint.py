"""Megatron-core checkpoints, saved and loaded by all ranks in any layout.

A layout cuts what another has written differently: Megatron's dist_checkpointing reads for each rank what it needs.
Names and files are those of `checkpoint_files`.
"""

import queue
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_rlvr.hf.weights import beside, copy_all_but_weights
from megatron_rlvr.policy.checkpoint_files import CONTENT, HUGGING_FACE, CheckpointReader


def sharded_weights(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """What Megatron calls the sharded state dict of this rank's model chunks; ``model0`` is the first one's.

    The scaling factors of Transformer Engine's FP8 are left out: they are found anew.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    states = [_module(chunk).sharded_state_dict(metadata=CONTENT | {"dp_cp_group": group}) for chunk in chunks]
    return {
        f"model{number}": {key: part for key, part in state.items() if not isinstance(part, ShardedObject)}
        for number, state in enumerate(states)
    }


def save_checkpoint(state: dict[str, Any], folder: Path, hf_folder: Path) -> None:
    """Writes a new folder; a collective over the world. The folder gets its name when all ranks have written.

    Args:
        state: `sharded_weights`, and whatever else is to be kept, in Megatron's sharded form.
        hf_folder: whose configuration and tokenizer come along.

    Raises: OSError on every rank where the folder cannot be made.
    """
    building = beside(folder)

    def prepare() -> None:
        shutil.rmtree(building, ignore_errors=True)
        (building / HUGGING_FACE).mkdir(parents=True)
        copy_all_but_weights(hf_folder, building / HUGGING_FACE)

    _on_main_rank(prepare)
    # Writers are waited for here. Megatron would start a process that passes on what they report later, keep it for the
    # next time, and so leave it behind on every machine where a rank is killed.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(state, str(building), content_metadata=dict(CONTENT))
    dist.barrier()
    _on_main_rank(partial(building.rename, folder))


def _on_main_rank(act: Callable[[], Any]) -> None:
    """Runs it on the main rank; an OSError there is raised on every rank, so that none is left waiting."""
    told: list[OSError | None] = [None]
    if dist.get_rank() == 0:
        try:
            act()
        except OSError as error:
            told = [error]
    dist.broadcast_object_list(told, src=0)
    if told[0] is not None:
        raise told[0]


def load_weights(chunks: Sequence[torch.nn.Module], folder: Path, hf_config: Mapping[str, Any]) -> None:
    """Fills this rank's parameters from a checkpoint; a collective over the world.

    Raises: ModelError that names weights that are missing or do not fit ``hf_config``, on every rank.
    """
    CheckpointReader(folder).check(hf_config)
    loaded = dist_checkpointing.load(sharded_weights(chunks), str(folder))
    for number, chunk in enumerate(chunks):
        with torch.no_grad():
            for name, parameter in _module(chunk).named_parameters():
                parameter.copy_(loaded[f"model{number}"][name])


def _module(chunk: Any) -> Any:
    return getattr(chunk, "module", chunk)
