"""The run under check and its ranks, as every check sees them."""

import logging
import secrets
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from megatron_rlvr.distributed.collectives import gather
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.errors import FaultError, RlvrError
from megatron_rlvr.signals import Signals
from megatron_rlvr.startup.resolve import Resolved

logger = logging.getLogger(__name__)

T = TypeVar("T")

LESS_MEMORY = (
    "lower batch.tokens_per_micro_batch, raise parallel.tensor, pipeline or context, or set "
    "megatron.recompute_granularity, recompute_method and recompute_num_layers"
)


class PreflightError(FaultError):
    """A check that cannot continue; the message is one sentence."""


@dataclass(frozen=True)
class RankFailure:
    """Exception on a rank, as one sentence."""

    rank: int
    sentence: str


@dataclass
class PreflightContext:
    """The run under check, and this rank of it.

    Attributes:
        resolved: The resolved run.
        ranks: Position and groups of this rank.
        signals: Signals of this process.
        full_length: True to rehearse with responses as long as the run's.
        largest_micro_batches: True to try the largest micro-batches on a CPU too.
        resources: Resources that are closed at the end.
        folders: Folders that this rank has created.
    """

    resolved: Resolved
    ranks: Ranks
    signals: Signals
    full_length: bool = False
    largest_micro_batches: bool = False
    resources: ExitStack = field(default_factory=ExitStack)
    folders: list[Path] = field(default_factory=list)

    def gather(self, value: T) -> list[T]:
        """Return every rank's ``value``, in rank order. A collective over the world."""
        return gather(value, cast(dist.ProcessGroup, dist.group.WORLD))

    def try_on_all_ranks(self, action: Callable[[], T]) -> list[T | RankFailure]:
        """Return the result of ``action`` on every rank, or its failure there. A collective over the world."""
        here: T | RankFailure
        try:
            here = action()
        except Exception as error:  # reported by the rank that gathers the results
            here = self.failure(error)
        return self.gather(here)

    def new_folder(self, near: Path) -> Path:
        """Create a temporary folder in the file system of ``near``, shared by all ranks. A collective over the world.

        Servers of another user can read it. It is removed at the end.

        Raises: PreflightError on every rank.
        """

        def create() -> Path:
            folder = nearest_existing(near).absolute() / f".preflight-{secrets.token_hex(4)}"
            if self.ranks.is_main:
                folder.mkdir()
                self.folders.append(folder)
            return folder

        created = self.try_on_all_ranks(create)[0]
        if isinstance(created, RankFailure):
            raise PreflightError(created.sentence)
        self.resources.callback(self.remove_folders)
        return created

    def remove_folders(self) -> None:
        """Remove all folders that this rank has created."""
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)

    def failure(self, error: Exception) -> RankFailure:
        """Describe an error on this rank. An unexpected one is logged with its traceback."""
        text = " ".join(str(error).split())
        if isinstance(error, torch.OutOfMemoryError):
            return RankFailure(self.ranks.rank, f"out of memory ({text}); {LESS_MEMORY}")
        if isinstance(error, RlvrError):
            return RankFailure(self.ranks.rank, text)
        if isinstance(error, OSError):
            return RankFailure(self.ranks.rank, f"{text}; check the path or address that it names, and try again")
        logger.error("rank %d failed", self.ranks.rank, exc_info=error)
        return RankFailure(
            self.ranks.rank, f"{type(error).__name__}: {text}; see the traceback of rank {self.ranks.rank}"
        )


def nearest_existing(folder: Path) -> Path:
    """Return the folder, or its nearest ancestor that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def rank_failures(results: list[Any]) -> list[RankFailure]:
    """Return the failures among the results of `PreflightContext.try_on_all_ranks`."""
    return [result for result in results if isinstance(result, RankFailure)]
