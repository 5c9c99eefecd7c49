"""Differences between the supported releases of megatron-core: 0.16 on Python 3.11, 0.19 on newer versions.

All other modules use only what is alike in both; two methods of checkpoint strategies that they override pass on
whatever further arguments a release has. A difference is found by looking at what Megatron has, not at its
version, so that later releases work as long as they change nothing else.
"""

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any


def plan_files(strategy: Any, sharded: Any, folder: Path) -> Any:
    """Plan the files of a checkpoint and return Megatron's ``AsyncRequest``. A collective over the world.

    Args:
        strategy: A ``TorchDistSaveShardedStrategy``.
        sharded: State whose leaves are Megatron's sharded tensors.
        folder: Existing folder of the files.
    """
    # Newer releases would otherwise expect NVIDIA's nvidia-resiliency-ext to write.
    has_choice = "async_strategy" in inspect.signature(strategy.async_save).parameters
    return strategy.async_save(sharded, folder, *(("mcore",) if has_choice else ()))


def load(state: Any, folder: Path, strategy: Any, read_common: Callable[[Path], Any]) -> Any:
    """Load a checkpoint into a state in Megatron's sharded form. A collective over the world.

    Args:
        state: State whose leaves are Megatron's sharded tensors.
        folder: Folder of the checkpoint.
        strategy: A ``TorchDistLoadShardedStrategy``, which reads the tensors.
        read_common: Reads the state common to all ranks from the folder.
    """
    serialization = importlib.import_module("megatron.core.dist_checkpointing.serialization")
    if "common_strategy" in inspect.signature(serialization.load).parameters:
        common = importlib.import_module("megatron.core.dist_checkpointing.strategies.common")

        class CommonStrategy(common.TorchCommonLoadStrategy):  # type: ignore[name-defined,misc]
            def load_common(self, checkpoint_dir: str | Path) -> Any:
                return read_common(Path(checkpoint_dir))

        return serialization.load(state, str(folder), strategy, CommonStrategy())
    # Newer releases read the file by a function of theirs, and have no way to be given another.
    own, serialization.load_common = serialization.load_common, lambda path: read_common(Path(path))  # type: ignore[attr-defined]
    try:
        return serialization.load(state, str(folder), strategy)
    finally:
        serialization.load_common = own  # type: ignore[attr-defined]


def gradients(optimizer: Any) -> list[Any]:
    """Return this rank's gradients of a ``MegatronOptimizer``, of which every parameter is on one rank of its group."""
    if hasattr(optimizer, "get_grads_for_grad_norm"):
        return list(optimizer.get_grads_for_grad_norm())
    return list(optimizer.get_main_grads_for_grad_norm())
