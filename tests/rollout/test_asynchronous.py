"""Asynchronous collector over ranks: random delays, aborts and failures, and a direct count of every token.

The engine is scripted, so that the tokens of each response are known, however often it was aborted and resumed; the
collector, its threads, the counters in the store, the graders and the ranks are the real ones. The reward function
records the responses that it grades.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asynchronous_runs import (
    CASES,
    JOURNAL_REWARD,
    Case,
    TricklingEngine,
    TricklingStream,
    assert_nothing_is_lost_or_done_twice,
    collector_of,
    graded_in,
    run_cases,
)
from scripted import (
    LAYOUTS,
    Layout,
    joined_process_group,
    on_ranks,
    prompts_of,
    ranks_of,
    start_graders,
)

from megatron_rlvr.protocols import EngineError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "user_reward.py").write_text(JOURNAL_REWARD, encoding="ascii")
    return tmp_path


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(LAYOUTS[0], id="1"),
        pytest.param(LAYOUTS[3], id="4 replicas", marks=pytest.mark.soak),
        pytest.param(LAYOUTS[5], id="2 replicas of 2"),
    ],
)
def test_nothing_is_graded_or_trained_twice_and_nothing_is_lost(layout: Layout, folder: Path):
    assert_nothing_is_lost_or_done_twice(layout, folder)


def test_a_batch_is_full_unless_the_set_or_the_rounds_are_used_up(folder: Path):
    full = short = 0
    for case, (steps, _) in zip(CASES, on_ranks(run_cases, 1, LAYOUTS[0], CASES, folder)[0], strict=True):
        for step in steps:
            if step.size == case.prompts:
                full += 1
            else:
                short += 1
                drawn = step.metrics["rollout/rounds"] * case.prompts
                assert drawn == pytest.approx(min(case.max_rounds * case.prompts, case.set_size))
    assert full > 60
    assert short > 5


def test_unfinished_responses_are_resumed_only_with_rollout_partial(folder: Path):
    case = Case(seed=3, set_size=60, prompts=3, group_size=4, steps=4, partial=False, oversampling=3.0)
    (both,) = on_ranks(run_cases, 1, LAYOUTS[0], [case, replace(case, partial=True)], folder)
    (without, resumed_without), (with_partial, resumed) = both
    assert resumed_without == 0
    assert resumed > 0
    assert all(tokens == 0 for step in without for _, _, tokens in step.in_progress)
    assert any(tokens > 0 for step in with_partial for _, _, tokens in step.in_progress)
    mixed = [versions for step in with_partial for _, versions, _ in step.batch.values() if len(set(versions)) > 1]
    assert mixed, "some response was sampled from several weights, and records the version of each token"


def test_tokens_are_never_older_than_allowed(folder: Path):
    wide = Case(0, 60, 2, 4, steps=10, partial=True, oversampling=4.0, max_staleness=1, accuracies=(0.5,))
    for case in (wide, replace(wide, overlap=True)):
        ((steps, _),) = on_ranks(run_cases, 1, LAYOUTS[0], [case], folder)[0]
        oldest = [
            step - 1 - versions[0] for step, seen in enumerate(steps, start=1) for _, versions, _ in seen.batch.values()
        ]
        assert max(oldest) == 1
    free = replace(wide, max_staleness=100)
    ((steps, _),) = on_ranks(run_cases, 1, LAYOUTS[0], [free], folder)[0]
    stale = [step - 1 - v[0] for step, seen in enumerate(steps, start=1) for _, v, _ in seen.batch.values()]
    assert max(stale) > 1, "the bound was never needed"


def let_groups_become_stale(layout: Layout, folder: Path) -> tuple[int, int, int]:
    """Number of this rank's groups that became stale, and then of its groups in progress and of its ready groups."""
    from megatron_rlvr.distributed import process_group
    from megatron_rlvr.rollout.group_buffer import FinishedGroup

    with joined_process_group(), start_graders(folder) as graders:
        ranks = ranks_of(layout)
        case = Case(0, 60, 6, 3, steps=1, partial=True, max_rounds=10, max_staleness=1)
        engine = TricklingEngine(case, ranks.rank)
        collector = collector_of(case, engine, prompts_of([0.5] * 60), ranks, graders, process_group.store())
        groups = collector.collect(1).groups
        buffer = collector._buffer
        buffer.ready = [FinishedGroup(1000 + g.order, g.group) for g in groups]
        collector._start = lambda: None  # a leader would resume them
        buffer.in_progress = []
        collector.begin(10)
        collector.close()
        return len(groups), len(buffer.in_progress), len(buffer.ready)


def test_stale_groups_are_restarted_by_their_leaders_alone(folder: Path):
    layout = LAYOUTS[5]
    found = on_ranks(let_groups_become_stale, layout.world_size, layout, folder)
    leaders = [replica[0] for replica in layout.replicas]
    assert [ready for _, _, ready in found] == [0] * layout.world_size
    assert [in_progress for _, in_progress, _ in found] == [
        stale if rank in leaders else 0 for rank, (stale, _, _) in enumerate(found)
    ]
    assert sum(stale for stale, _, _ in found) == 2 * 6, "every rank of a replica has its groups"


def fail_on_one(layout: Layout, folder: Path) -> tuple[str, int, int]:
    """A permanent failure of one leader's servers; then the next step, which succeeds."""
    from megatron_rlvr.distributed import process_group

    class FailingStream(TricklingStream):
        """The first of each leader answers four requests, too few for a batch; then one fails, the other is silent."""

        answers_left = 4

        def get(self, timeout_seconds: float) -> Any:
            if self.engine.version == 0 and not self.answers_left:
                if ranks.rank == 1:
                    raise EngineError("all servers have exited")
                time.sleep(min(timeout_seconds, 0.001))
                return None
            answer = super().get(timeout_seconds)
            self.answers_left -= answer is not None
            return answer

    class FailingEngine(TricklingEngine):
        @contextmanager
        def open(self, sampling: Any) -> Iterator[TricklingStream]:
            yield FailingStream(self)

    with joined_process_group(), start_graders(folder) as graders:
        ranks = ranks_of(layout)
        case = Case(0, 40, 6, 3, steps=1, partial=True, max_rounds=10, max_staleness=4)
        engine = FailingEngine(case, ranks.rank)
        collector = collector_of(case, engine, prompts_of([0.5] * 40), ranks, graders, process_group.store())
        with pytest.raises(EngineError) as caught:
            collector.collect(1)
        buffer = collector._buffer
        held = sum(len(g.graded) + len(g.partial) for g in buffer.in_progress) + len(buffer.ready)
        engine.update_weights(None, 1)
        again = collector.collect(2)
        return str(caught.value), held, again.size


def test_a_failure_is_raised_on_every_rank_and_sampled_groups_are_not_lost(folder: Path):
    answers = on_ranks(fail_on_one, 4, LAYOUTS[5], folder)
    assert {message for message, _, _ in answers} == {"all servers have exited"}
    assert {size for _, _, size in answers} == {6}
    assert sum(held for _, held, _ in answers) > 0
    assert set(graded_in(folder).values()) == {1}


def save_while_servers_fail(layout: Layout, folder: Path, failure: Exception) -> tuple[int, str, int]:
    """A leader fails in the background, and a checkpoint is saved after that; then the step is collected.

    Returns: number of graded completions in the checkpoint, message of the failure, size of the batch.
    """
    from megatron_rlvr.distributed import process_group

    class FailingStream(TricklingStream):
        """Every leader gets four answers; then the first stream of one fails, and the others are silent."""

        engine: "FailingEngine"
        answers_left = 4

        def get(self, timeout_seconds: float) -> Any:
            if not self.answers_left and not self.engine.streams[1:]:
                if ranks.rank == layout.replicas[-1][0]:
                    raise failure
                time.sleep(min(timeout_seconds, 0.001))
                return None
            answer = super().get(timeout_seconds)
            self.answers_left -= answer is not None and not self.engine.streams[1:]
            return answer

    class FailingEngine(TricklingEngine):
        def __init__(self, case: Case, rank: int) -> None:
            super().__init__(case, rank)
            self.streams: list[TricklingStream] = []

        @contextmanager
        def open(self, sampling: Any) -> Iterator[TricklingStream]:
            self.streams.append(FailingStream(self))
            yield self.streams[-1]

    with joined_process_group(), start_graders(folder) as graders:
        ranks = ranks_of(layout)
        case = Case(0, 60, 6, 3, steps=1, partial=True, max_rounds=10)
        engine = FailingEngine(case, ranks.rank)
        collector = collector_of(case, engine, prompts_of([0.5] * 60), ranks, graders, process_group.store())
        collector.begin(1)
        if collector._group_sampler is not None:
            collector._group_sampler._thread.join()
        state = collector.state()
        saved = sum(len(g.graded) for g in state["in_progress"]) + 3 * len(state["unreported"])
        message, rollout = "", None
        try:
            rollout = collector.collect(1)
        except type(failure) as error:
            message = str(error)
        rollout = rollout or collector.collect(2)
        return saved, message, rollout.size


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[5]], ids=["1", "2 replicas of 2"])
@pytest.mark.parametrize("failure", [EngineError("all servers have exited"), LookupError("other")])
def test_a_checkpoint_is_saved_whatever_has_failed_in_the_background(failure: Exception, layout: Layout, folder: Path):
    found = on_ranks(save_while_servers_fail, layout.world_size, layout, folder, failure)
    # Servers are tried once more; any other failure ends the next step.
    assert {message for _, message, _ in found} == {"" if isinstance(failure, EngineError) else str(failure)}
    assert {size for _, _, size in found} == {6}
    assert found[0][0] >= 4, "a completion that was answered is not saved"
    assert set(graded_in(folder).values()) == {1}


def stop_one(layout: Layout, folder: Path) -> tuple[bool, int, int, float, float]:
    """One rank stops in the middle of a step; a second collector resumes from its state and collects that step.

    Returns: whether the first was stopped, number of graded completions in its state, size of the batch of the second,
        its response tokens by the metrics, and its response tokens counted on this replica.
    """
    import torch.distributed as dist

    from megatron_rlvr.distributed import process_group
    from megatron_rlvr.rollout.collector import CollectionStoppedError

    class SlowStream(TricklingStream):
        def get(self, timeout_seconds: float) -> Any:
            time.sleep(0.02)  # a leader checks for SIGTERM five times a second
            if ranks.rank and leader.add("finished", 0) < 3:
                return None  # otherwise the others could end the step before that leader has started
            return super().get(timeout_seconds)

    class SlowEngine(TricklingEngine):
        @contextmanager
        def open(self, sampling: Any) -> Iterator[TricklingStream]:
            yield SlowStream(self)

    with joined_process_group(), start_graders(folder) as graders:
        ranks = ranks_of(layout)
        case = Case(0, 60, 8, 3, steps=1, partial=True, max_rounds=10, max_staleness=4)
        prompts = prompts_of([0.5, 1.0] * 30)
        seen = [0]
        leader = dist.PrefixStore("leader that stops", process_group.store())

        def new_collector(number: int, stop_after: float) -> Any:
            store = dist.PrefixStore(f"collector {number}", process_group.store())
            return collector_of(
                case,
                SlowEngine(case, ranks.rank),
                prompts,
                ranks,
                graders,
                store,
                stop_wanted=lambda: ranks.rank == 0 and seen[0] >= stop_after,
            )

        def count(finished: int) -> None:
            seen[0] += finished
            leader.add("finished", finished if ranks.rank == 0 else 0)

        first = new_collector(1, 3)
        stopped = False
        try:
            first.collect(1, count)
        except CollectionStoppedError:
            stopped = True
        state = [first.state()]
        dist.broadcast_object_list(state, src=0)
        saved = sum(len(g.graded) for g in state[0]["in_progress"]) + 3 * len(state[0]["unreported"])
        second = new_collector(2, float("inf"))
        second.restore(state[0])
        rollout = second.collect(1, count)
        tokens = rollout.metrics["rollout/response_tokens"]
        counted = sum(len(c.token_ids) for group in rollout.sampled for c in group.completions)
        if ranks.replica_rank:
            counted = 0
        return stopped, saved, rollout.size, tokens, float(counted)


def test_a_step_that_is_stopped_on_one_rank_stops_on_all_and_resumes_with_all_that_was_sampled(folder: Path):
    answers = on_ranks(stop_one, 4, LAYOUTS[5], folder)
    assert {stopped for stopped, *_ in answers} == {True}
    assert {size for _, _, size, _, _ in answers} == {8}
    saved = {count for _, count, _, _, _ in answers}
    assert len(saved) == 1
    assert saved.pop() > 2
    assert set(graded_in(folder).values()) == {1}, "a completion of the first collector was graded again"
    # The metrics of the step count the completions of both collectors.
    assert {tokens for _, _, _, tokens, _ in answers} == {sum(counted for *_, counted in answers)}
