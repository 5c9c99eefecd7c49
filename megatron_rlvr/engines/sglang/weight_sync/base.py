"""Weight sync: pushing the policy's weights to the servers; the part that all methods share.

Every rank calls `push` and exhausts the tensors, since gathering each is a collective; only the main rank talks to the
servers, or with buckets the leader of every data-parallel replica. The name of weights on servers has a part that is
random for every run, so that weights of another run, or of an earlier step, are never mistaken for them.
"""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_rlvr.distributed.collectives import raise_on_all_ranks
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.engines.sglang.membership import ExpectedWeights
from megatron_rlvr.engines.sglang.pool import ServerPool

T = TypeVar("T")


class WeightSync(ABC):
    """A method of pushing weights to servers.

    Args:
        pool: Servers, on the leader of a data-parallel replica; None on other ranks.
        ranks: Ranks of the run.

    Attributes:
        announce: Called on every rank with the name on servers of new weights and their version, before any server
            can sample from them: a fast server continues with new weights while a slow one is still loading them.
    """

    def __init__(self, pool: ServerPool | None, ranks: Ranks) -> None:
        self.announce: Callable[[str, int], None] = lambda label, version: None
        self._ranks = ranks
        self._main_pool = pool if ranks.is_main else None
        self._run_id = secrets.token_hex(4)

    @abstractmethod
    def push(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        version: int,
        exclude: Mapping[str, str] | None = None,
    ) -> tuple[ExpectedWeights, dict[str, str]]:
        """Push weights to all servers; a collective over the world in which every rank exhausts the iterator.

        Running requests wait, and continue with the new weights.

        Args:
            named_tensors: The whole model, under Hugging Face names.
            version: Version of the weights.
            exclude: On the main rank, {URL: reason} of servers that cannot take weights; they count as failures.

        Returns:
            The weights that servers hold from now on, and {URL: reason} of the servers that do not hold them.
        """

    @abstractmethod
    def close(self) -> None:
        """Remove everything that pushes have left, on servers too; the pool must still be open."""

    def _announce_label(self, version: int) -> str:
        """Return the name on servers of the weights of a version. When any rank has it, every rank has announced it."""
        label = self._from_main(f"{self._run_id}-{version}")
        self.announce(label, version)
        # A replica whose rank is late has requests on servers, which may get the weights before that rank has returned.
        raise_on_all_ranks(None)
        return label

    def _from_main(self, value: T) -> T:
        """Return the main rank's ``value`` on every rank."""
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]
