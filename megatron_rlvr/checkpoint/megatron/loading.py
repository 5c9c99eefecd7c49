"""Loading by Megatron, with the readers of `unpickling` in place of its own: they run no code of a checkpoint."""

import pickle
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from torch.distributed.checkpoint import CheckpointException

from megatron_rlvr.checkpoint.manifest import InvalidCheckpointError
from megatron_rlvr.checkpoint.unpickling import RestrictedReader, read_common
from megatron_rlvr.distributed import megatron_versions


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


def load_sharded(state: dict[str, Any], folder: Path) -> Any:
    """Return a state in Megatron's sharded form with the tensors of a checkpoint. A collective over the world.

    Raises:
        InvalidCheckpointError: If the files do not hold what the state needs, or anything but tensors and numbers.
    """
    try:
        return megatron_versions.load(state, folder, _RestrictedShardedStrategy(), read_common)
    except CheckpointException as error:  # of any rank
        reason: Any = next((failure for failure, _ in error.failures.values()), error)
    except (CheckpointingException, pickle.UnpicklingError, OSError) as error:
        reason = error
    raise InvalidCheckpointError(f"{folder}: cannot be loaded ({reason}); copy the checkpoint again") from reason
