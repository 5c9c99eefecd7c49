"""Whether ranks notice that another is gone, and only then."""

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


class Unreachable:
    """A store that stops to answer on demand, as one on a host that is gone."""

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


class Told(list[int | None]):
    """Whom a rank takes for lost."""


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[Heartbeat, Unreachable, Told]]]:
    """Makes the pulses of three ranks, each of which reaches their store in its own way."""
    monkeypatch.setattr("megatron_rlvr.distributed.heartbeat.dist.PrefixStore", lambda prefix, store: store)

    def pulse(rank: int, common: dist.Store) -> tuple[Heartbeat, Unreachable, Told]:
        told, store = Told(), Unreachable(common)
        return Heartbeat(store, rank, 3, SECONDS, told.append), store, told  # type: ignore[arg-type]

    def pulses() -> list[tuple[Heartbeat, Unreachable, Told]]:
        common = dist.HashStore()
        return [pulse(rank, common) for rank in range(3)]

    return pulses


def test_ranks_that_have_left_are_not_missed(three: Any) -> None:
    (first, _, told), (second, *_), (third, *_) = three()
    with first:
        with second, third:
            pass
        time.sleep(1.5 * SECONDS)
    assert told == []


def test_a_silent_rank_is_told_to_all(three: Any) -> None:
    (first, _, first_told), (second, _, second_told), (third, store, third_told) = three()
    with first, second, third:
        wait_for(lambda: third._looks > 2)
        store.answers.clear()  # the third hears nobody, and is not heard
        wait_for(lambda: first_told and second_told and third_told)
        assert (first_told, second_told, third_told) == ([2], [None], [0])
        store.answers.set()


def test_ranks_whose_store_has_gone_miss_the_main_rank(three: Any) -> None:
    _, (pulse, store, told), _ = three()
    store.error = dist.DistNetworkError("Broken pipe")
    with pulse:
        wait_for(lambda: told)
    assert told == [0]


def test_alone_nobody_is_missed() -> None:
    with Heartbeat(dist.HashStore(), 0, 1, 0.1, pytest.fail) as pulse:
        assert pulse._threads == []


def frozen_rank() -> list[int | None]:
    """Rank 1 is stopped while rank 0 waits for it as in sampling; it goes on once it is missed."""
    from megatron_rlvr.distributed import process_group
    from megatron_rlvr.distributed.counters import Counters

    with joined_process_group():
        rank, store = dist.get_rank(), process_group.store()
        board, told = Counters(store, "sampling"), Told()

        def lost(whom: int | None) -> None:
            told.append(whom)
            if rank == 0:
                os.kill(store.add("process of rank 1", 0), signal.SIGCONT)

        store.add("process of rank 1", os.getpid() if rank == 1 else 0)
        dist.barrier()
        pulse = Heartbeat(process_group.store(), rank, 2, 3.0, lost)
        with pulse:
            wait_for(lambda: pulse._looks > 2)
            if rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            board.leave()
            board.wait_for_all(2)
            wait_for(lambda: told)
        return told


def test_a_rank_that_is_frozen_while_others_wait_for_it_without_a_collective_is_missed() -> None:
    ranks = Ranks(most=2)
    try:
        assert ranks.run(frozen_rank, 2) == [[1], [None]]
    finally:
        ranks.stop()
