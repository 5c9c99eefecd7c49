"""Weights by way of a folder that servers can read: slow and simple, and right for any layout on either side.

The main rank writes a Hugging Face folder under a name that no other weights ever have, and tells every server to load
it. What servers call their weights is that name, so that weights of another run, or of an earlier step, are told apart.
The folder stays until the next one has been loaded, for servers that come back.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError

from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.engines.sglang.client import Server
from megatron_rlvr.engines.sglang.pool import ServerPool, Weights, faults
from megatron_rlvr.engines.sglang.weight_sync.base import Sync
from megatron_rlvr.hf.weights import write_folder
from megatron_rlvr.protocols import EngineError


class DiskSync(Sync):
    """Hands weights over through a folder; see rollout.sglang.WeightSync.

    Args:
        folder: in which the weights are written; servers find it under the same path.
        source: Hugging Face folder of the model: its configuration and tokenizer.
        finish: may add files to a folder before servers see it.
        pool: of the main rank; others pass their own or None.
    """

    def __init__(
        self,
        folder: Path,
        source: Path,
        pool: ServerPool | None,
        ranks: Ranks,
        finish: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        super().__init__(pool, ranks)
        self._folder = folder.absolute()
        self._source = source
        self._finish = finish
        self._written: list[Path] = []

    def push(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        version: int,
        without: Mapping[str, str] | None = None,
    ) -> tuple[Weights, dict[str, str]]:
        """Writes, and has every server load; a collective over the world in which every rank exhausts the iterator.

        Args:
            without: see rollout.sglang.WeightSync.

        Returns: what servers have to sample from, with a loader on the main rank, and {URL: why it does not}.
        Raises: EngineError on every rank if the folder cannot be written.
        """
        label = self._label(version)
        tensors = iter(named_tensors)
        problem = self._write(label, tensors) if self._ranks.is_main else None
        for _ in tensors:
            pass  # the other ranks wait in its collectives
        problem = self._from_main(problem)
        if problem is not None:
            raise EngineError(problem)
        failures: dict[str, str] = {}
        load = None
        if self._main_pool is not None:
            load = partial(_load, str(self._folder / label), label, self._main_pool.patience_seconds)
            failures = faults(self._main_pool.everywhere(load, without=without))
            self._drop_all_but(label)
        return Weights(label, load), self._from_main(failures)

    def close(self) -> None:
        """Removes what was written."""
        self._drop_all_but(None)
        if self._ranks.is_main and self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _write(self, label: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
        """Why the folder could not be written, or None."""
        try:
            self._written.append(self._folder / label)
            write_folder(self._folder / label, self._source, tensors, self._finish, fsync=False)
        except (OSError, SafetensorError) as error:
            return (
                f"weights {label} cannot be written to sync.dir {self._folder} ({error}); make room, or choose another"
            )
        return None

    def _drop_all_but(self, label: str | None) -> None:
        for folder in [folder for folder in self._written if folder.name != label]:
            shutil.rmtree(folder, ignore_errors=True)
            self._written.remove(folder)


async def _load(folder: str, label: str, timeout_seconds: float, server: Server) -> None:
    await server.load_weights(folder, label, timeout_seconds)
