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


def test_an_nccl_connection_that_does_not_end_blocks_no_other_thread(group_of_one, monkeypatch):
    stuck, ended = threading.Event(), []

    def abort(group: Any) -> None:
        assert stuck.wait(60)
        ended.append(threading.current_thread())

    monkeypatch.setattr(torch.distributed.ProcessGroup, "abort", abort)
    monkeypatch.setattr(
        torch.distributed, "destroy_process_group", lambda group: pytest.fail("destroying the group would wait")
    )
    monkeypatch.setattr(server_group, "_CLOSE_SECONDS", 60.0)
    registered = registry_sizes()
    for _ in range(2):  # the group with the same server is created again while the old one is still being aborted
        group = group_of_one("server")
        group.join(60.0)
        assert group_names() == ["server"]
        group.backend = "nccl"
        group.close()
        assert group_names() == []
    assert ended == []
    assert registry_sizes() == registered, "torch would destroy it a second time with the world"
    stuck.set()
    process_group.shut_down()
    assert len(ended) == 2
    assert threading.current_thread() not in ended


def registry_sizes() -> dict[str, int]:
    """Number of groups in each of torch's registries."""
    world = torch.distributed.distributed_c10d._world
    names = ("pg_map", "pg_names", "pg_group_ranks", "pg_backend_config", "pg_to_tag")
    in_tags = sum(map(len, world.tags_to_pg.values()))
    return {name: len(getattr(world, name)) for name in names} | {"tags_to_pg": in_tags}
