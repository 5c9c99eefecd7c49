"""Tests of groups with a server: they are created without NCCL's watchdog, and closing one never blocks."""

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megatron_rlvr.distributed import process_group, server_group

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tests expect gloo groups")


@pytest.fixture
def group_of_one() -> Iterator[Callable[[str], server_group.ServerGroup]]:
    """Factory of groups without a server, which join at once."""
    made = []

    def make(name: str) -> server_group.ServerGroup:
        made.append(server_group.ServerGroup(name, 0))
        return made[-1]

    yield make
    for group in made:
        group.close()
    process_group.shut_down()


def group_names() -> list[str]:
    return list(torch.distributed.distributed_c10d._world.pg_names.values())


@pytest.mark.parametrize("before", [None, "0"])
def test_only_groups_with_servers_are_created_without_a_watchdog(before, group_of_one, monkeypatch):
    variable = "TORCH_NCCL_BLOCKING_WAIT"
    monkeypatch.delenv(variable, raising=False)
    if before is not None:
        monkeypatch.setenv(variable, before)
    c10d = torch.distributed.distributed_c10d
    make, found, within, second_has_joined = c10d._new_process_group_helper, {}, threading.Event(), threading.Event()

    def slowly(*arguments: Any, **options: Any) -> Any:
        group_name = options["group_name"]
        if group_name == "first":
            within.set()
            assert second_has_joined.wait(60)
        found[group_name] = os.environ.get(variable)
        return make(*arguments, **options)

    monkeypatch.setattr(c10d, "_new_process_group_helper", slowly)
    first = threading.Thread(target=group_of_one("first").join, args=(60.0,))
    first.start()
    assert within.wait(60)
    group_of_one("second").join(60.0)
    second_has_joined.set()
    first.join()
    assert found == {"first": "1", "second": "1"}
    assert os.environ.get(variable) == before
    with pytest.raises(RuntimeError):
        server_group.ServerGroup("alone", 1).join(0.2)
    assert os.environ.get(variable) == before


def test_closing_a_group_on_the_cpu_destroys_it(group_of_one, monkeypatch):
    destroy, ended = torch.distributed.destroy_process_group, []
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda group: ended.append(destroy(group)))
    group = group_of_one("server")
    group.join(60.0)
    group.broadcast(torch.ones(3), 60.0)
    assert group_names() == ["server"]
    group.close()
    group.close()
    assert (ended, group_names()) == ([None], [])
