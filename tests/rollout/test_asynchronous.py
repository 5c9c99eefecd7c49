"""Asynchronous collector over ranks: random delays, aborts and failures, and a direct count of every token.

The engine is scripted, so that the tokens of each response are known, however often it was aborted and resumed; the
collector, its threads, the counters in the store, the graders and the ranks are the real ones. The reward function
records the responses that it grades.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import (
    LAYOUTS,
    Layout,
    PlainTokenizer,
    answer,
    joined_process_group,
    on_ranks,
    prompts_of,
    ranks_of,
    start_graders,
)

from megatron_rlvr.config import RewardSettings, RolloutSettings
from megatron_rlvr.protocols import EngineError, WeightsMissingError
from megatron_rlvr.reward.graders import Verdict
from megatron_rlvr.rollout.sampler import Sampler
from megatron_rlvr.types import Completion, CompletionRequest, Prompt

JOURNAL_REWARD = """\
import os
import sys


def first_token(prompt, response):
    file = os.open(os.path.join(os.path.dirname(__file__), "graded"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, (response + "\\n").encode())
    os.close(file)
    return response.split()[0] == prompt.answer
"""


@dataclass(frozen=True)
class Case:
    """A run of a few steps."""

    seed: int
    set_size: int
    prompts: int
    group_size: int
    steps: int
    partial: bool
    dynamic: bool = True
    max_rounds: int = 4
    oversampling: float = 1.0
    overlap: bool = False
    max_staleness: int = 8
    failures: float = 0.0
    """Probability that a stream fails with `WeightsMissingError`."""
    accuracies: tuple[float, ...] = (0.0, 0.5, 0.5, 1.0)


@dataclass(frozen=True)
class Step:
    """Result of a step on one rank.

    Attributes:
        batch: {(order, index): (tokens, versions, reward)}.
        ready: Responses of the groups that are carried over.
        in_progress: (order, graded completions, tokens of partial completions) of each group.
        sampled: Number of completions.
        finished: (response, whether its group is informative) of the groups of the step.
    """

    batch: dict[tuple[int, int], tuple[list[int], list[int], float]]
    size: int
    metrics: dict[str, float]
    ready: list[str]
    in_progress: list[tuple[int, int, int]]
    sampled: int
    finished: list[tuple[str, bool]]


class TricklingEngine:
    """Answers by the script after a random time; an abort truncates a response at random. Weights may change."""

    def __init__(self, case: Case, rank: int) -> None:
        self.case = case
        self.dice = random.Random(case.seed * 100 + rank)
        self.version = 0
        self.resumed = 0
        self.grading: list[Future[Verdict]] = []
        """Outstanding verdicts."""

    def waits_for_graders(self) -> bool:
        self.grading = [verdict for verdict in self.grading if not verdict.done()]
        return bool(self.grading)

    def update_weights(self, named_tensors: Any, version: int) -> None:
        self.version = version

    @contextmanager
    def open(self, sampling: Any) -> Iterator["TricklingStream"]:
        stream = TricklingStream(self)
        yield stream
        stream.closed = True


class TricklingStream:
    def __init__(self, engine: TricklingEngine) -> None:
        self.engine = engine
        self.dice = engine.dice
        self.running: list[tuple[int, CompletionRequest, Completion]] = []
        self.closed = False
        self.now = 0
        """Time in calls of `get` that found the graders idle, so that the number of completions that are sampled before
        a batch is full does not depend on the load of the machine."""
        self.fails_at = self.dice.randint(1, 20) if self.dice.random() < engine.case.failures else None

    def submit(self, requests: Sequence[CompletionRequest], resume_from: Sequence[Completion | None]) -> None:
        for request, partial in zip(requests, resume_from, strict=True):
            whole = answer(request)
            held = partial.token_ids if partial is not None else whole.token_ids[:0]
            assert whole.token_ids[: len(held)].tolist() == held.tolist(), "the partial response is the engine's own"
            assert len(held) < len(whole.token_ids)
            self.engine.resumed += len(held) > 0
            old = partial.weight_versions if partial is not None else held
            new = np.full(len(whole.token_ids) - len(held), self.engine.version, dtype=np.int32)
            whole = replace(whole, weight_versions=np.concatenate([old, new]).astype(np.int32))
            self.running.append((self.now + self.dice.randint(1, 60), request, whole))

    def get(self, timeout_seconds: float) -> tuple[CompletionRequest, Completion] | None:
        self.now += not self.engine.waits_for_graders()
        if self.fails_at is not None and self.now > self.fails_at:
            raise WeightsMissingError("no server holds the current weights")
        time.sleep(min(timeout_seconds, 0.001))
        ready = [item for item in self.running if item[0] <= self.now]
        if not ready:
            return None
        self.running.remove(ready[0])
        return ready[0][1:]

    def abort(self) -> list[tuple[CompletionRequest, Completion]]:
        assert not self.closed
        answers = []
        for _, request, whole in self.running:
            fate = self.dice.random()
            if fate < 0.2:
                answers.append((request, whole))  # it was already complete
            elif fate < 0.9:
                cut = self.dice.randrange(len(whole.token_ids))
                parts = {key: getattr(whole, key)[:cut] for key in ("token_ids", "logprobs", "weight_versions")}
                answers.append((request, replace(whole, **parts, finish_reason="abort")))
        self.running = []
        return answers


class WatchedSampler(Sampler):
    """The real sampler, which reports outstanding verdicts to the engine."""

    def submit_to_graders(self, prompt: Prompt, completion: Completion) -> Future[Verdict]:
        verdict = super().submit_to_graders(prompt, completion)
        self.engine.grading.append(verdict)  # type: ignore[attr-defined]
        return verdict


def collector_of(
    case: Case, engine: Any, prompts: Sequence[Any], ranks: Any, graders: Any, store: Any, **more: Any
) -> Any:
    """The real collector of a rank, on a scripted engine."""
    import torch.distributed as dist

    from megatron_rlvr.data.cursor import PromptCursor
    from megatron_rlvr.data.prompts import FilePrompts, PromptSet
    from megatron_rlvr.rollout.asynchronous import AsynchronousCollector

    reward = RewardSettings(overlong_buffer=0)
    parts: dict[str, Any] = {
        "sampler": WatchedSampler(engine, PlainTokenizer(), graders, reward, leaders_only=True),  # type: ignore[arg-type]
        "cursor": PromptCursor(PromptSet(prompts, (FilePrompts("set", 0, len(prompts), 1.0, 0),)), 0, True),
        "ranks": ranks,
        "settings": RolloutSettings(
            engine="sglang",
            servers=["http://localhost:1"],
            group_size=case.group_size,
            max_response_tokens=20,
            dynamic_sampling=case.dynamic,
            max_rounds=case.max_rounds,
            partial=case.partial,
            oversampling=case.oversampling,
            max_staleness=case.max_staleness,
        ),
        "groups_per_batch": case.prompts,
        "seed": case.seed,
        "store": store,
        "sync": dist.barrier,
    }
    return AsynchronousCollector(**parts | more)


def run_cases(layout: Layout, cases: Sequence[Case], folder: Path) -> list[tuple[list[Step], int]]:
    """On each rank: every step of every case, and the number of resumed responses."""
    with joined_process_group():
        ranks = ranks_of(layout)
        with start_graders(folder) as graders:
            return [run_case(case, number, ranks, graders) for number, case in enumerate(cases)]


def run_case(case: Case, number: int, ranks: Any, graders: Any) -> tuple[list[Step], int]:
    import torch.distributed as dist

    from megatron_rlvr.distributed import process_group

    engine = TricklingEngine(case, ranks.rank)
    dice = random.Random(case.seed)
    prompts = prompts_of([dice.choice(case.accuracies) for _ in range(case.set_size)])
    syncs = []
    store = dist.PrefixStore(f"case{number}", process_group.store())
    collector = collector_of(case, engine, prompts, ranks, graders, store, sync=lambda: syncs.append(dist.barrier()))
    steps = []
    for step in range(1, case.steps + 1):
        sampled: list[int] = []
        rollout = collector.collect(step, sampled.append)
        steps.append(
            Step(
                batch={
                    (g.order, c.index): (c.token_ids.tolist(), c.weight_versions.tolist(), grade.reward)
                    for g in rollout.groups
                    for c, grade in zip(g.group.completions, g.group.grades, strict=True)
                },
                size=rollout.size,
                metrics=rollout.metrics,
                ready=[response_of(c) for g in collector._buffer.ready for c in g.group.completions],
                in_progress=[
                    (g.order, len(g.graded), sum(len(c.token_ids) for c in g.partial.values()))
                    for g in collector._buffer.in_progress
                ],
                sampled=sum(sampled),
                finished=[(response_of(c), g.informative) for g in rollout.sampled for c in g.completions],
            )
        )
        if case.overlap and step < case.steps:
            collector.begin(step + 1)
        engine.update_weights(None, step)
    collector.close()
    assert [t.name for t in threading.enumerate() if t.name == "group sampler"] == []
    return steps, engine.resumed


def response_of(completion: Completion) -> str:
    return " ".join(map(str, completion.token_ids.tolist()))


def random_cases(count: int) -> list[Case]:
    dice = random.Random(1)
    cases = []
    for seed in range(count):
        prompts = dice.randint(1, 6)
        cases.append(
            Case(
                seed=seed,
                set_size=dice.choice([2, 7, 20, 60]),
                prompts=prompts,
                group_size=dice.randint(2, 4),
                steps=5,
                partial=dice.random() < 0.6,
                dynamic=dice.random() < 0.8,
                oversampling=dice.choice([1.0, 1.5, 3.0]),
                overlap=dice.random() < 0.4,
                failures=dice.choice([0.0, 0.0, 0.3]),
            )
        )
    return [case if case.dynamic else replace(case, max_rounds=10) for case in cases]


CASES = random_cases(24)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "user_reward.py").write_text(JOURNAL_REWARD, encoding="ascii")
    return tmp_path


def graded_in(folder: Path) -> Counter[str]:
    journal = folder / "graded"
    return Counter(journal.read_text().splitlines() if journal.exists() else [])


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3], LAYOUTS[5]], ids=["1", "4 replicas", "2 replicas of 2"])
def test_nothing_is_graded_or_trained_twice_and_nothing_is_lost(layout: Layout, folder: Path):
    per_rank = on_ranks(run_cases, layout.world_size, layout, CASES, folder)
    assert set(graded_in(folder).values()) == {1}, "every response is graded once"
    expected_grades = resumed = in_progress = surplus = 0
    leaders = [replica[0] for replica in layout.replicas]
    for number, case in enumerate(CASES):
        steps = [[per_rank[rank][number][0][i] for rank in range(layout.world_size)] for i in range(case.steps)]
        resumed += sum(per_rank[rank][number][1] for rank in leaders)
        trained: Counter[str] = Counter()
        finished: dict[str, bool] = {}
        for step, ranks in enumerate(steps, start=1):
            for replica in layout.replicas:
                for rank in replica[1:]:
                    assert ranks[rank].batch == ranks[replica[0]].batch
                    assert ranks[rank].in_progress == []
            assert all(r.metrics == ranks[0].metrics and r.size == ranks[0].size for r in ranks)
            batch = [item for leader in leaders for item in ranks[leader].batch.items()]
            assert sorted({order for (order, _), _ in batch}) == list(range(ranks[0].size))
            assert len(batch) == ranks[0].size * case.group_size
            for (_, _), (tokens, versions, reward) in batch:
                assert len(versions) == len(tokens)
                assert versions == sorted(versions)
                assert versions[-1] <= step - 1
                assert reward == (1.0 if tokens[0] == 1 else -1.0)
                trained[" ".join(map(str, tokens))] += 1
            for leader in leaders:
                finished |= dict(ranks[leader].finished)
            left = sum(len(ranks[leader].in_progress) for leader in leaders)
            assert ranks[0].metrics["rollout/groups_in_progress"] == left
            in_progress += left
            surplus += sum(len(ranks[leader].ready) for leader in leaders)
        assert set(trained.values()) <= {1}
        # Every response of a finished, informative group was trained on or is carried over.
        ready = Counter(text for leader in leaders for text in steps[-1][leader].ready)
        informative = Counter(text for text, informative in finished.items() if informative or not case.dynamic)
        assert trained + ready == informative
        # Every graded response belongs to a group that is finished or in progress, and so does every sampled one.
        graded = sum(count for leader in leaders for _, count, _ in steps[-1][leader].in_progress)
        expected_grades += len(finished) + graded
        assert sum(r.sampled for step in steps for r in step) == len(finished) + graded
    assert sum(graded_in(folder).values()) == expected_grades
    assert resumed > 20
    assert in_progress > 20
    assert surplus > 20


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
