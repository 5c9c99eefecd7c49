"""The launcher itself: it must report the failure of a rank, and outlive a rank that hangs."""

import importlib.util
import os
import signal
import time

import pytest
from launcher import RankError, Ranks, joined_process_group


def rank_and_sum(offset):
    import torch
    import torch.distributed as dist

    with joined_process_group() as group:
        total = torch.tensor(dist.get_rank(group) + offset)
        dist.all_reduce(total, group=group)
        return dist.get_rank(group), int(total), os.getpid()


def one_rank_leaves(how):
    if os.environ["RANK"] == "1":
        if how == "raises":
            raise ValueError("rank 1 has had enough")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)  # as in a collective that rank 1 never joins


def answer(value):
    return value


def place_of_megatron():
    import megatron.core

    return megatron.core.__file__


def all_hang():
    time.sleep(600)


def test_ranks_are_used_again_and_the_failure_of_one_is_reported():
    ranks = Ranks(most=3)
    first, again = ranks.run(rank_and_sum, 3, 10), ranks.run(rank_and_sum, 2, 0)
    assert [answer[:2] for answer in first] == [(0, 33), (1, 33), (2, 33)]
    assert [answer[:2] for answer in again] == [(0, 1), (1, 1)]
    assert [answer[2] for answer in again] == [answer[2] for answer in first[:2]], "the same processes"

    start = time.monotonic()
    other = Ranks(most=2)
    for how, message in (("raises", "rank 1 has had enough"), ("dies", "rank 1: the process died")):
        with pytest.raises(RankError, match=message):
            other.run(one_rank_leaves, 2, how, timeout=550)
    with pytest.raises(RankError, match="no answer from rank 0, 1"):
        other.run(all_hang, 2, timeout=0.5)
    assert other.run(answer, 2, "new ones take over") == ["new ones take over"] * 2
    other.stop()
    assert time.monotonic() - start < 300


def test_ranks_import_the_megatron_core_that_this_process_would():
    """`make core-0.19` puts another release in front of the installed one."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None
    ranks = Ranks(most=1)
    assert ranks.run(place_of_megatron, 1) == [spec.origin]
    ranks.stop()
