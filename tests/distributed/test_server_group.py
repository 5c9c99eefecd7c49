"""Tests of groups with a server: they are created without NCCL's watchdog, and closing one never blocks.

A broadcast on GPUs is tested with stand-ins for torch's streams and NCCL's operations; tests/gpu has a real one.
"""

import contextlib
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


class Operation:
    """A broadcast of NCCL that is complete after being asked ``polls`` times; its wait raises ``error``."""

    def __init__(self, happened: list[Any], polls: float, error: str = "") -> None:
        self.happened, self.polls, self.error = happened, polls, error

    def is_completed(self) -> bool:
        self.polls -= 1
        return self.polls < 0

    def wait(self, timeout: Any) -> None:
        self.happened.append("wait")
        if self.error:
            raise RuntimeError(self.error)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, str], tuple[server_group.ServerGroup, list[Any]]]:
    """Factory of a group whose broadcasts are `Operation`; also returns a list of what happens, by stream."""

    def make(polls: float, error: str = "") -> tuple[server_group.ServerGroup, list[Any]]:
        happened: list[Any] = []
        current = ["the trainer's"]

        class Stream:
            def __init__(self, device: Any) -> None:
                pass

            def wait_event(self, event: Any) -> None:
                happened.append((current[0], "waits for", event))

        @contextlib.contextmanager
        def within(stream: Any) -> Iterator[None]:
            current[0] = "its own"
            yield
            current[0] = "the trainer's"

        class Group:
            def broadcast(self, tensors: Any, options: Any) -> Operation:
                happened.append((current[0], "broadcasts"))
                return Operation(happened, polls, error)

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", within)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(None))
        group = server_group.ServerGroup("server", 1)
        monkeypatch.setattr(group, "backend", "nccl")
        monkeypatch.setattr(group, "_group", Group())
        return group, happened

    return make


def test_a_broadcast_on_a_gpu_is_queued_on_a_stream_of_its_own_behind_the_filling_of_the_bucket(on_gpu):
    group, happened = on_gpu(3)
    group.broadcast(torch.ones(1), 60.0, "filled")
    assert happened == [("its own", "waits for", "filled"), ("its own", "broadcasts"), "wait"]


def test_no_stream_waits_for_a_broadcast_that_never_ends(on_gpu):
    group, happened = on_gpu(float("inf"))
    with pytest.raises(RuntimeError, match="did not finish within 0 s"):
        group.broadcast(torch.ones(1), 0.05)
    assert happened == [("its own", "broadcasts")]


def test_a_failure_of_a_broadcast_is_raised_and_other_versions_of_nccl_are_explained(on_gpu):
    with pytest.raises(RuntimeError, match=r"^unhandled system error$"):
        on_gpu(0, "unhandled system error")[0].broadcast(torch.ones(1), 60.0)
    failure = (
        "ncclInvalidUsage. Last error: Mismatched NCCL version detected : rank 0 version 22907 rank 1 version 23007"
    )
    with pytest.raises(RuntimeError, match=r"install the same version for both .*rank 0 version 22907"):
        on_gpu(0, failure)[0].broadcast(torch.ones(1), 60.0)
