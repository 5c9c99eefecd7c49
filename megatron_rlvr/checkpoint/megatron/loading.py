"""Loading by Megatron, with the readers of `unpickling` in place of its own: they run no code of a checkpoint."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from torch.distributed.checkpoint import CheckpointException

from megatron_rlvr.checkpoint.manifest import InvalidCheckpointError
from megatron_rlvr.checkpoint.unpickling import RestrictedReader, read_common
from megatron_rlvr.distributed import megatron_versions
from megatron_rlvr.distributed.collectives import raise_on_all_ranks

_SHARDS = "shards"


class _RestrictedShardedStrategy(torch_dist.TorchDistLoadShardedStrategy):
    def load(self, sharded_state_dict: Any, checkpoint_dir: Path, *strategy: str) -> Any:
        # Megatron's strategy takes its reader from this function, and has no other way to be given one.
        own, torch_dist._get_filesystem_reader = torch_dist._get_filesystem_reader, _restricted_reader
        try:
            return super().load(sharded_state_dict, checkpoint_dir, *strategy)
        finally:
            torch_dist._get_filesystem_reader = own


def _restricted_reader(folder: str | Path, **unused: Any) -> RestrictedReader:
    return RestrictedReader(folder)


def load_sharded(shards: Sequence[ShardedTensor], folder: Path) -> dict[str, Any]:
    """Fill the tensors of shards from a checkpoint, in place. A collective over the world.

    Returns:
        The state common to all ranks.

    Raises:
        InvalidCheckpointError: On every rank, if the files do not hold what the shards need, or anything but tensors
            and numbers.
    """
    reason: BaseException | None = None
    common: dict[str, Any] = {}
    try:
        state = {_SHARDS: {str(number): shard for number, shard in enumerate(shards)}}
        common = megatron_versions.load(state, folder, _RestrictedShardedStrategy(), read_common)
        common.pop(_SHARDS, None)
    except CheckpointException as error:  # of any rank, in older releases of Megatron; in newer ones of this rank
        reason = next((failure for failure, _ in error.failures.values() if isinstance(failure, Exception)), error)
    except (CheckpointingException, pickle.UnpicklingError, OSError) as error:
        reason = error
    message = f"{folder}: cannot be loaded ({reason}); copy the checkpoint again"
    raise_on_all_ranks(None if reason is None else InvalidCheckpointError(message))
    return common
