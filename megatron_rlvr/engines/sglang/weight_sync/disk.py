"""Weight sync through a folder that the servers can read: slow, simple, and correct for any layout on either side.

The main rank writes a Hugging Face folder under a name that no other weights ever have, and orders every server to load
it. That name is also the name of the weights on servers, so that weights of another run, or of an earlier step, are
never mistaken for them. The folder is kept until the next one has been loaded, for servers that are re-admitted.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError

from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.engines.sglang.client import Server
from megatron_rlvr.engines.sglang.membership import ExpectedWeights
from megatron_rlvr.engines.sglang.pool import ServerPool, failures_in
from megatron_rlvr.engines.sglang.weight_sync.base import WeightSync
from megatron_rlvr.hf.weights import write_folder
from megatron_rlvr.protocols import EngineError


class DiskSync(WeightSync):
    """Pushes weights through a folder.

    Args:
        folder: Folder in which the weights are written; servers find it under the same path.
        source: Hugging Face folder of the model, with its configuration and tokenizer.
        pool: Servers, on the main rank; other ranks pass their own pool or None.
        ranks: Ranks of the run.
        finish: Called with each written folder before servers see it; may add files.
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
        exclude: Mapping[str, str] | None = None,
    ) -> tuple[ExpectedWeights, dict[str, str]]:
        """Write the weights and have every server load them; see `WeightSync.push`.

        On the main rank the returned weights have a loader for single servers.

        Raises:
            EngineError: On every rank, if the folder cannot be written.
        """
        label = self._announce_label(version)
        tensors = iter(named_tensors)
        problem = self._write(label, tensors) if self._ranks.is_main else None
        for _ in tensors:
            pass  # takes part in the collectives that gather each tensor for the main rank
        problem = self._from_main(problem)
        if problem is not None:
            raise EngineError(problem)
        failures: dict[str, str] = {}
        load = None
        if self._main_pool is not None:
            load = partial(_load, str(self._folder / label), label, self._main_pool.patience_seconds)
            failures = failures_in(self._main_pool.everywhere(load, exclude=exclude))
            self._remove_all_but(label)
        return ExpectedWeights(label, load), self._from_main(failures)

    def close(self) -> None:
        """Remove the written folders."""
        self._remove_all_but(None)
        if self._ranks.is_main and self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _write(self, label: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
        """Write the folder. Returns why it could not be written, or None."""
        try:
            self._written.append(self._folder / label)
            write_folder(self._folder / label, self._source, tensors, self._finish, fsync=False)
        except (OSError, SafetensorError) as error:
            return (
                f"sync.dir={self._folder}: weights {label} cannot be written ({error}); free some space, or choose "
                "another folder"
            )
        return None

    def _remove_all_but(self, label: str | None) -> None:
        for folder in [folder for folder in self._written if folder.name != label]:
            shutil.rmtree(folder, ignore_errors=True)
            self._written.remove(folder)


async def _load(folder: str, label: str, timeout_seconds: float, server: Server) -> None:
    await server.load_weights(folder, label, timeout_seconds)
