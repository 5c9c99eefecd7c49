"""What the ranks agree on around a collective, so that none is left waiting in it for one that has failed."""

from typing import Any

import torch.distributed as dist


def raise_on_all_ranks(failure: Exception | None) -> None:
    """Raises on every rank of the world what failed on any: the failure of the first that has one."""
    failures: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    found = [f for f in failures if f is not None]
    if found:
        raise found[0]


def gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's ``value``, in rank order."""
    if dist.get_world_size(group) == 1:
        return [value]
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, value, group=group)
    return parts


def gather_on_first(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's ``value``, in rank order, on the first rank of the group; nothing on the others."""
    parts: list[Any] | None = [None] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
    dist.gather_object(value, parts, dst=dist.get_global_rank(group, 0), group=group)
    return parts or []
