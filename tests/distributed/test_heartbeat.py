"""Tests that ranks detect the loss of another rank, and report none that is alive or has left."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from launcher import Ranks, joined_process_group
from waiting import wait_for

from megatron_rlvr.distributed.heartbeat import Heartbeat

SECONDS = 4.0
CLOSED = -1


class Unreachable:
    """A store that stops answering on demand, as one on a host that is down."""

    def __init__(self, store: dist.Store) -> None:
        self.store = store
        self.answers = threading.Event()
        self.answers.set()
        self.error: Exception | None = None

    def add(self, key: str, number: int) -> int:
        self.answers.wait()
        if self.error:
            raise self.error
        return self.store.add(key, number)


class Lost(list[int | None]):
    """The ranks that a heartbeat has reported as lost."""


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[Heartbeat, Unreachable, Lost]]]:
    """Creates the heartbeats of three ranks on one store, each with a connection of its own."""
    monkeypatch.setattr("megatron_rlvr.distributed.heartbeat.dist.PrefixStore", lambda prefix, store: store)

    def heartbeat(rank: int, common: dist.Store) -> tuple[Heartbeat, Unreachable, Lost]:
        lost, store = Lost(), Unreachable(common)
        watch = Heartbeat(store, rank, 3, SECONDS, lost.append, lambda: lost.append(CLOSED))  # type: ignore[arg-type]
        return watch, store, lost

    def heartbeats() -> list[tuple[Heartbeat, Unreachable, Lost]]:
        common = dist.HashStore()
        return [heartbeat(rank, common) for rank in range(3)]

    return heartbeats


def test_ranks_that_have_left_are_not_lost(three: Any) -> None:
    (first, _, lost), (second, *_), (third, *_) = three()
    with first:
        with second, third:
            pass
        time.sleep(1.5 * SECONDS)
    assert lost == []


def test_a_silent_rank_is_reported_to_all(three: Any) -> None:
    (first, _, first_lost), (second, _, second_lost), (third, store, third_lost) = three()
    with first, second, third:
        wait_for(lambda: third._beats > 2)
        store.answers.clear()  # the third rank neither reads nor writes the store any more
        wait_for(lambda: first_lost and second_lost and third_lost)
        assert (first_lost, second_lost, third_lost) == ([2], [None], [0])
        store.answers.set()


def test_ranks_whose_store_fails_report_the_main_rank(three: Any) -> None:
    _, (heartbeat, store, lost), _ = three()
    store.error = dist.DistStoreError("no answer")
    with heartbeat:
        wait_for(lambda: lost)
    assert lost == [0]


def test_ranks_report_a_store_that_has_closed_long_before_the_timeout(
    three: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "SECONDS", 600.0)
    _, (heartbeat, store, lost), _ = three()
    store.error = dist.DistNetworkError("Broken pipe")
    began = time.monotonic()
    with heartbeat:
        wait_for(lambda: lost)
    assert lost == [CLOSED]
    assert time.monotonic() - began < 10


def test_a_connection_to_a_store_whose_process_has_ended_is_a_network_error() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    connection = dist.TCPStore("127.0.0.1", server.port, is_master=False)
    connection.add("a", 1)
    del server
    for _ in range(3):
        with pytest.raises(dist.DistNetworkError):
            connection.add("a", 1)


def test_a_world_of_one_rank_starts_no_thread() -> None:
    with Heartbeat(dist.HashStore(), 0, 1, 0.1, lambda rank: pytest.fail(f"rank {rank} is lost"), int) as heartbeat:
        assert heartbeat._threads == []


def frozen_rank() -> list[int | None]:
    """Rank 1 is stopped while rank 0 waits for it as in sampling; it continues once it is reported as lost."""
    from megatron_rlvr.distributed import process_group
    from megatron_rlvr.distributed.counters import Counters

    with joined_process_group():
        rank, store = dist.get_rank(), process_group.store()
        counters, lost = Counters(store, "sampling"), Lost()

        def on_lost(lost_rank: int | None) -> None:
            lost.append(lost_rank)
            if rank == 0:
                os.kill(store.add("process of rank 1", 0), signal.SIGCONT)

        store.add("process of rank 1", os.getpid() if rank == 1 else 0)
        dist.barrier()
        heartbeat = Heartbeat(process_group.store(), rank, 2, 3.0, on_lost, int)
        with heartbeat:
            wait_for(lambda: heartbeat._beats > 2)
            if rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            counters.leave()
            counters.wait_for_all(2)
            wait_for(lambda: lost)
        return lost


def test_a_rank_that_is_frozen_while_others_wait_for_it_without_a_collective_is_reported() -> None:
    ranks = Ranks(most=2)
    try:
        assert ranks.run(frozen_rank, 2) == [[1], [None]]
    finally:
        ranks.stop()
