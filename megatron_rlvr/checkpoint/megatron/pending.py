"""Writing a checkpoint by all ranks, in three steps: prepare, wait, publish.

    prepare   the main rank creates a temporary folder; every rank copies the tensors that it writes to the machine's
              memory, and Megatron plans the files
    wait      every rank waits for its files; the main rank gathers what all ranks have written, and its digests
    publish   the main rank adds metadata and files of its own, flushes everything to the disk and renames the folder

The folder gets its name last, so that a folder of that name is complete. Only the main rank writes outside `wait`, and
its errors are raised on every rank. Megatron would have the main rank write files in the middle of its own collectives,
where a failure leaves the other ranks waiting; here `publish` writes them. So the files are the same with every version
of megatron-core, of which newer ones would put the state common to all ranks among the tensors.
"""

import io
import os
import queue
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint import CheckpointException

from megatron_rlvr.atomic import flush, flush_tree, new_folder, temporary_path
from megatron_rlvr.checkpoint.files import COMMON, CONTENT_METADATA, HUGGING_FACE, write_format
from megatron_rlvr.checkpoint.manifest import FileDigest, InvalidCheckpointError, read_manifest
from megatron_rlvr.checkpoint.megatron.writer import BackgroundWriter
from megatron_rlvr.checkpoint.store import Finish
from megatron_rlvr.distributed import megatron_versions
from megatron_rlvr.distributed.collectives import gather_on_first, on_main_rank
from megatron_rlvr.hf.weights import copy_all_but_weights

_FILES = 2
"""Files of a rank, each written by a process of its own; the default of newer releases of Megatron is one."""


class PendingCheckpoint:
    """A checkpoint that all ranks write; every method is a collective over the world.

    Every method raises OSError on every rank if the folder cannot be created or written; nothing is left of it then.

    Args:
        folder: Folder to write; it does not exist under this name until `publish` returns.
        hf_folder: Hugging Face folder whose configuration and tokenizer are copied into the checkpoint.
        finish: Called on the main rank before the folder gets its name, to add files and the manifest to it.
    """

    def __init__(self, folder: Path, hf_folder: Path, finish: Finish = lambda folder, digests: None) -> None:
        self._folder = folder
        self._building = temporary_path(folder)
        self._hf_folder = hf_folder
        self._finish = finish
        self._common = io.BytesIO()
        self._sharded = _DeferredShardedStrategy()
        self._failures: list[Exception] = []
        self._digests: dict[str, FileDigest] = {}

    def prepare(self, shards: Iterable[ShardedTensor], common: Mapping[str, Any], *, background: bool) -> None:
        """Create the temporary folder, copy this rank's tensors to the machine's memory and plan the files.

        The caller may change the tensors afterwards.

        Args:
            shards: What this rank writes, of the results of `sharded_state`; copied one by one.
            common: State common to all ranks, of which that of the main rank is saved.
            background: If True, start writing now, while the caller continues; else write in `wait`.
        """
        on_main_rank(self._create_folder)
        # Megatron would start a manager process to pass on what its writers report, keep it for the next checkpoint,
        # and so leave it behind on every machine where a rank is killed.
        filesystem_async._results_queue = queue.Queue()
        state = {str(number): shard for number, shard in enumerate(copied_to_host(shards))}
        sharded, common = save_preprocess({"shards": state, **common, "content_metadata": dict(CONTENT_METADATA)})
        if dist.get_rank() == 0:
            torch.save(common, self._common)
        request = megatron_versions.plan_files(self._sharded, sharded, self._building)
        (self._gather_results,) = request.finalize_fns
        self._writer = BackgroundWriter(request, background)

    def wait(self) -> None:
        """Wait until all ranks have written their files; failures are raised by `publish`."""
        try:
            self._writer.wait()
            self._gather_results()
        except CheckpointException as error:  # the main rank gathered the results, so only it knows the failures
            failures = (failure for failure, _ in error.failures.values())
            self._failures = [failure for failure in failures if isinstance(failure, Exception)]
        world = dist.group.WORLD
        assert world is not None, "a process group"
        for written in gather_on_first(self._writer.digests, world):
            self._digests |= written

    def publish(self) -> None:
        """Complete the folder and give it its name."""
        on_main_rank(self._complete_folder)

    def _create_folder(self) -> None:
        shutil.rmtree(self._building, ignore_errors=True)
        self._building.mkdir(parents=True)

    def _complete_folder(self) -> None:
        try:
            if self._failures:
                cause = self._failures[0].__cause__ or self._failures[0]
                raise cause if isinstance(cause, OSError) else OSError(str(cause))
            (self._building / COMMON).write_bytes(self._common.getbuffer())
            self._sharded.write_metadata()
            write_format(self._building)
            (self._building / HUGGING_FACE).mkdir()
            copy_all_but_weights(self._hf_folder, self._building / HUGGING_FACE)
            self._finish(self._building, self._digests)
            flush_tree(self._building)
            self._building.rename(self._folder)
            flush(self._folder.parent)
        except OSError:
            shutil.rmtree(self._building, ignore_errors=True)
            raise


def copied_to_host(shards: Iterable[ShardedTensor]) -> list[ShardedTensor]:
    """Return the shards that this rank writes with copies of their tensors in the machine's memory, made one by one.

    This is all of the memory that a save takes: the bytes that this rank writes, and none on the GPU.
    """
    return [
        replace(shard, data=shard.data.to("cpu", copy=True))
        for shard in shards
        if shard.data is not None and is_main_replica(shard.replica_id)
    ]


def link_checkpoint(same: Path, folder: Path, finish: Finish) -> None:
    """Write a folder whose files are hard links to those of the checkpoint ``same``. A collective over the world.

    Args:
        same: Folder of a complete checkpoint with the same weights.
        folder: Folder to write.
        finish: Called as by `PendingCheckpoint`, with the digests of the manifest of ``same``.

    Raises:
        OSError: On every rank, if the folder cannot be written; nothing is left of it.
    """

    def link() -> None:
        with new_folder(folder) as building:
            shutil.copytree(same, building, copy_function=_link_or_copy, dirs_exist_ok=True)
            try:
                finish(building, read_manifest(same).files)
            except InvalidCheckpointError as error:
                raise OSError(str(error)) from error

    on_main_rank(link)


def _link_or_copy(source: str, target: str) -> None:
    """Link a file, or copy it if the file system does not support hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


class _DeferredShardedStrategy(TorchDistSaveShardedStrategy):
    """Megatron's strategy for sharded tensors, which defers writing ``.metadata`` until `write_metadata`."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=_FILES)
        self.write_metadata: Callable[[], None] = lambda: None
        """Writes ``.metadata``. To be called on the main rank once it has the results of all ranks."""

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, *strategy: str) -> Any:
        finish = writer.finish

        def defer(*arguments: Any) -> None:
            self.write_metadata = lambda: finish(*arguments)

        writer.finish = defer
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret, *strategy)
