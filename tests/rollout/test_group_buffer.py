"""States of a group, and the buffer over ranks: restored in another layout, and split into batches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scripted import CORRECT, INCORRECT, LAYOUTS, Layout, joined_process_group, on_ranks, prompts_of, ranks_of

from megatron_rlvr.config import RolloutSettings
from megatron_rlvr.rollout.informative_rate import InformativeRate
from megatron_rlvr.types import Completion, Grade, Group

PROMPTS = prompts_of([0.5] * 40)


def completion(index: int, *versions: int, finish_reason: Any = "stop") -> Completion:
    tokens = np.full(len(versions), 7, dtype=np.int32)
    weight_versions = np.array(versions, dtype=np.int32)
    return Completion("set/0", index, tokens, tokens.astype(np.float32), finish_reason, weight_versions)


def test_a_group_passes_through_its_states_and_keeps_its_completions_when_interrupted():
    from megatron_rlvr.rollout.group_buffer import GroupInProgress, GroupState

    group = GroupInProgress(5, PROMPTS[0], 3)
    assert (group.state, group.oldest_version) == (GroupState.WAITING, None)
    assert group.request() == [0, 1, 2]
    assert group.state is GroupState.SAMPLING
    group.arrive(completion(1, 4, 5))
    assert group.state is GroupState.SAMPLING, "two of three are outstanding"
    group.add_grade(completion(1, 4, 5), Grade(1.0, True))
    group.partial[2] = completion(2, 3, finish_reason="abort")
    group.interrupt()
    assert (group.state, group.oldest_version) == (GroupState.WAITING, 3)
    assert group.request() == [0, 2]
    for index in (2, 0):
        group.arrive(completion(index, 6))
    assert group.state is GroupState.GRADING
    assert group.partial == {}
    for index in (2, 0):
        assert group.state is GroupState.GRADING
        group.add_grade(completion(index, 6), Grade(0.0, False))
    assert group.state is GroupState.FINISHED
    finished = group.finish()
    assert (finished.order, finished.oldest_version) == (5, 4)
    assert [c.index for c in finished.group.completions] == [0, 1, 2]
    assert [grade.correct for grade in finished.group.grades] == [False, True, False]


def test_a_group_that_is_being_sampled_is_neither_restarted_nor_finished():
    from megatron_rlvr.rollout.group_buffer import GroupInProgress, GroupState

    group = GroupInProgress(0, PROMPTS[0], 2)
    group.request()
    for forbidden in (group.request, group.restart, group.finish):
        with pytest.raises(AssertionError):
            forbidden()
    group.interrupt()
    group.partial[0] = completion(0, 1, finish_reason="abort")
    group.restart()
    assert (group.state, group.partial, group.request()) == (GroupState.WAITING, {}, [0, 1])


def test_the_rate_forgets_half_of_the_past_with_each_step_and_is_bounded():
    rate = InformativeRate()
    assert rate.groups_for(6) == 6
    rate = rate.after_step(1, 3)  # (1 + 1) / 2 of (1 + 3) / 2
    assert (rate.informative, rate.finished) == (1, 2)
    assert rate.plus(1, 6).groups_for(3) == 12
    assert rate.plus(0, 1000).groups_for(3) == 12, "at most four for each missing one"


def finished_group(order: int, verdicts: Sequence[int], version: int = 0) -> Any:
    from megatron_rlvr.rollout.group_buffer import FinishedGroup

    completions = [completion(index, version) for index in range(len(verdicts))]
    grades = [Grade(float(verdict), verdict == CORRECT) for verdict in verdicts]
    return FinishedGroup(order, Group(PROMPTS[order], completions, grades))


def save_and_restore(first: Layout, second: Layout) -> tuple[list[Any], list[Any]]:
    """Content of this rank's buffer in the first layout, and in the second one after it was restored there.

    Of 20 orders, every third group is in progress, every fifth of the others is not informative.
    """
    import torch.distributed as dist

    from megatron_rlvr.rollout.group_buffer import GroupBuffer, GroupInProgress

    def content(buffer: Any) -> list[Any]:
        return [
            sorted(group.order for group in buffer.in_progress),
            sorted(group.order for group in buffer.ready),
            sorted(finished.order for finished in buffer._unreported),
            buffer.total_ready,
            buffer.missing,
            buffer.rate,
        ]

    with joined_process_group():
        settings = RolloutSettings(group_size=2)
        ranks = ranks_of(first)
        buffer = GroupBuffer(ranks, settings, 30, leaders_only=True)
        buffer.rate = InformativeRate(3, 4)
        own = [order for order in range(20) if order % ranks.data_size == ranks.data_rank]
        added = buffer.add(
            [finished_group(o, (CORRECT, INCORRECT if o % 5 else CORRECT)) for o in own if o % 3],
        )
        assert added == (13, 11)
        if ranks.replica_rank == 0:
            buffer.in_progress = [GroupInProgress(o, PROMPTS[o], 2) for o in own if o % 3 == 0]
        state = [buffer.state()]
        dist.broadcast_object_list(state, src=0)
        restored = GroupBuffer(ranks_of(second), settings, 30, leaders_only=True)
        restored.restore(state[0])
        return content(buffer), content(restored)


def test_a_buffer_is_restored_in_another_layout():
    first, second = LAYOUTS[3], LAYOUTS[5]
    in_progress = [order for order in range(20) if order % 3 == 0]
    finished = [order for order in range(20) if order % 3]
    ready = [order for order in finished if order % 5]
    for number, contents in enumerate(zip(*on_ranks(save_and_restore, 4, first, second), strict=True)):
        layout = (first, second)[number]
        for data_rank, replica in enumerate(layout.replicas):
            for rank in replica:

                def own(orders: list[int], place: int = data_rank, size: int = len(layout.replicas)) -> list[int]:
                    return [order for order in orders if order % size == place]

                held = own(in_progress) if rank == replica[0] else []
                counts = [len(ready), 30 - len(ready), InformativeRate(3, 4)]
                assert contents[rank] == [held, own(ready), own(finished), *counts]


def restart_and_split(layout: Layout) -> Any:
    """This rank's groups in progress at step 6 with a staleness of 2, and places and orders of its batch."""
    from megatron_rlvr.rollout.group_buffer import GroupBuffer, GroupInProgress

    with joined_process_group():
        ranks = ranks_of(layout)
        buffer = GroupBuffer(ranks, RolloutSettings(group_size=2, max_staleness=2), 5)
        own = [order for order in range(12) if order % ranks.data_size == ranks.data_rank]
        # Orders 0 to 3 have tokens of version 2, one older than step 6 allows.
        buffer.add([finished_group(order, (CORRECT, INCORRECT), 2 if order < 4 else 3) for order in reversed(own)])
        for order, version in ((20, 2), (21, 3)):
            group = GroupInProgress(order, PROMPTS[order], 2)
            group.partial[1] = completion(1, version, 4, finish_reason="abort")
            buffer.in_progress.append(group)
        buffer.restart_stale(6)
        batch = [
            (finished.order, int(finished.group.prompt.id.partition("/")[2])) for finished in buffer.split_off_batch()
        ]
        in_progress = [(group.order, sorted(group.partial)) for group in buffer.in_progress]
        return in_progress, batch, buffer.total_ready, [finished.order for finished in buffer.ready]


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3]], ids=["1", "4 replicas"])
def test_stale_groups_are_restarted_and_the_batch_has_the_first_drawn_of_the_others(layout: Layout):
    size = layout.world_size
    for rank, (in_progress, batch, total_ready, ready) in enumerate(on_ranks(restart_and_split, size, layout)):
        restarted: list[tuple[int, list[int]]] = [(order, []) for order in range(4) if order % size == rank]
        assert in_progress == [*restarted, (20, []), (21, [1])]
        assert batch == [(order - 4, order) for order in range(4, 9) if order % size == rank]
        assert total_ready == 3
        assert ready == [order for order in range(9, 12) if order % size == rank]
