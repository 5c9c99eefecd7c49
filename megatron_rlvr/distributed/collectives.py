"""Collectives on Python objects, and on failures, so that no rank waits in a collective for one that has failed."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_rlvr.write_errors import WriteError


def raise_on_all_ranks(failure: Exception | None) -> None:
    """Raise the failure of the first rank that has one on every rank. A collective over the world."""
    failures: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    found = [f for f in failures if f is not None]
    if found:
        raise found[0]


def on_main_rank(action: Callable[[], Any]) -> None:
    """Run an action on the main rank. A collective over the world.

    Raises: OSError or WriteError on every rank if the action raised it, so that none is left waiting.
    """
    failure: list[OSError | WriteError | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except (OSError, WriteError) as error:
            failure = [error]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]


def gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Return every rank's ``value``, in rank order. A collective over ``group``."""
    if dist.get_world_size(group) == 1:
        return [value]
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, value, group=group)
    return parts


def gather_on_first(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Return every rank's ``value`` on the first rank of ``group``, in rank order; [] on the others. A collective."""
    parts: list[Any] | None = [None] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
    dist.gather_object(value, parts, dst=dist.get_global_rank(group, 0), group=group)
    return parts or []
