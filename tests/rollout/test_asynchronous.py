"""Collecting from servers over ranks: random delays, faults, aborts and failures, and a direct account of every token.

The engine is scripted, so that what each response must be is known, however often it was cut and gone on with; the
collector, its threads, the counters in the store, the graders and the ranks are the real ones. The reward function
writes down what it graded.
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
    samples: int
    steps: int
    partial: bool
    dynamic: bool = True
    max_rounds: int = 4
    oversampling: float = 1.0
    overlap: bool = False
    max_staleness: int = 8
    failures: float = 0.0
    """Chance that a stream fails for want of weights."""
    accuracies: tuple[float, ...] = (0.0, 0.5, 0.5, 1.0)


@dataclass(frozen=True)
class Step:
    """What one rank saw of a step: {(order, sample): (tokens, versions, reward)} of its batch, and what is kept."""

    batch: dict[tuple[int, int], tuple[list[int], list[int], float]]
    size: int
    metrics: dict[str, float]
    kept: list[str]
    begun: list[tuple[int, int, int]]
    """(order, samples graded, tokens of partial samples)."""
    sampled: int
    settled: list[tuple[str, bool]]


class TricklingEngine:
    """Answers by the script after a random time; an abort cuts a response wherever it is. Weights change under it."""

    def __init__(self, case: Case, rank: int) -> None:
        self.case = case
        self.dice = random.Random(case.seed * 100 + rank)
        self.version = 0
        self.resumed = 0
        self.judging: list[Future[Verdict]] = []
        """Of answers that were handed to the graders."""

    def waits_for_graders(self) -> bool:
        self.judging = [verdict for verdict in self.judging if not verdict.done()]
        return bool(self.judging)

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
        """The time in which answers take their time, in calls of `get` that found the graders idle: how much is sampled
        before a batch is full does not depend on how busy the machine is."""
        self.fails_at = self.dice.randint(1, 20) if self.dice.random() < engine.case.failures else None

    def submit(self, requests: Sequence[CompletionRequest], begun: Sequence[Completion | None]) -> None:
        for request, so_far in zip(requests, begun, strict=True):
            whole = answer(request)
            held = so_far.token_ids if so_far is not None else whole.token_ids[:0]
            assert whole.token_ids[: len(held)].tolist() == held.tolist(), "it goes on with what it was given"
            assert len(held) < len(whole.token_ids)
            self.engine.resumed += len(held) > 0
            old = so_far.weight_versions if so_far is not None else held
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
                answers.append((request, whole))  # it was complete already
            elif fate < 0.9:
                cut = self.dice.randrange(len(whole.token_ids))
                parts = {key: getattr(whole, key)[:cut] for key in ("token_ids", "logprobs", "weight_versions")}
                answers.append((request, replace(whole, **parts, finish_reason="abort")))
        self.running = []
        return answers


class WatchedSampler(Sampler):
    """The real one; the engine learns what is being graded."""

    def judge(self, prompt: Prompt, completion: Completion) -> Future[Verdict]:
        verdict = super().judge(prompt, completion)
        self.engine.judging.append(verdict)  # type: ignore[attr-defined]
        return verdict


def collector_of(
    case: Case, engine: Any, prompts: Sequence[Any], ranks: Any, graders: Any, store: Any, **more: Any
) -> Any:
    """The real collector of a rank, on a scripted engine."""
    import torch.distributed as dist

    from megatron_rlvr.data.cursor import PromptCursor
    from megatron_rlvr.data.prompts import FilePrompts, PromptSet
    from megatron_rlvr.rollout.asynchronous import AsynchronousCollector

    parts: dict[str, Any] = {
        "sampler": WatchedSampler(engine, PlainTokenizer(), graders, RewardSettings(), leaders_only=True),  # type: ignore[arg-type]
        "cursor": PromptCursor(PromptSet(prompts, (FilePrompts("set", 0, len(prompts), 1.0, 0),)), 0, True),
        "ranks": ranks,
        "rollout": RolloutSettings(
            engine="sglang",
            servers=["http://localhost:1"],
            group_size=case.samples,
            max_response_tokens=20,
            dynamic_sampling=case.dynamic,
            max_rounds=case.max_rounds,
            partial=case.partial,
            oversampling=case.oversampling,
            max_staleness=case.max_staleness,
        ),
        "reward": RewardSettings(overlong_buffer=0),
        "prompts": case.prompts,
        "seed": case.seed,
        "store": store,
        "sync": dist.barrier,
    }
    return AsynchronousCollector(**parts | more)


def run_cases(layout: Layout, cases: Sequence[Case], folder: Path) -> list[tuple[list[Step], int]]:
    """On each rank: every step of every case, and how many responses were gone on with."""
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
                kept=[response_of(c) for g in collector._kept for c in g.group.completions],
                begun=[
                    (g.order, len(g.graded), sum(len(c.token_ids) for c in g.partial.values()))
                    for g in collector._begun
                ],
                sampled=sum(sampled),
                settled=[(response_of(c), g.informative) for g in rollout.sampled for c in g.completions],
            )
        )
        if case.overlap and step < case.steps:
            collector.begin(step + 1)
        engine.update_weights(None, step)
    collector.close()
    assert [t.name for t in threading.enumerate() if t.name == "harvest"] == []
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
                samples=dice.randint(2, 4),
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
    expected_grades = resumed = begun = surplus = 0
    leaders = [replica[0] for replica in layout.replicas]
    for number, case in enumerate(CASES):
        steps = [[per_rank[rank][number][0][i] for rank in range(layout.world_size)] for i in range(case.steps)]
        resumed += sum(per_rank[rank][number][1] for rank in leaders)
        trained: Counter[str] = Counter()
        settled: dict[str, bool] = {}
        for step, ranks in enumerate(steps, start=1):
            for replica in layout.replicas:
                for rank in replica[1:]:
                    assert ranks[rank].batch == ranks[replica[0]].batch
                    assert ranks[rank].begun == []
            assert all(r.metrics == ranks[0].metrics and r.size == ranks[0].size for r in ranks)
            batch = [item for leader in leaders for item in ranks[leader].batch.items()]
            assert sorted({order for (order, _), _ in batch}) == list(range(ranks[0].size))
            assert len(batch) == ranks[0].size * case.samples
            for (_, _), (tokens, versions, reward) in batch:
                assert len(versions) == len(tokens)
                assert versions == sorted(versions)
                assert versions[-1] <= step - 1
                assert reward == (1.0 if tokens[0] == 1 else -1.0)
                trained[" ".join(map(str, tokens))] += 1
            for leader in leaders:
                settled |= dict(ranks[leader].settled)
            begun += sum(len(ranks[leader].begun) for leader in leaders)
            surplus += sum(len(ranks[leader].kept) for leader in leaders)
            assert ranks[0].metrics["rollout/groups_in_progress"] == sum(len(ranks[leader].begun) for leader in leaders)
        assert set(trained.values()) <= {1}
        # What is finished and informative has been trained on, or waits; the rest of it was of no use.
        waiting = Counter(text for leader in leaders for text in steps[-1][leader].kept)
        informative = Counter(text for text, informative in settled.items() if informative or not case.dynamic)
        assert trained + waiting == informative
        # All that was graded belongs to a finished group, or to one that goes on.
        in_progress = sum(samples for leader in leaders for _, samples, _ in steps[-1][leader].begun)
        expected_grades += len(settled) + in_progress
        # Orders are dealt without a gap: each is settled or goes on.
        assert sum(r.sampled for step in steps for r in step) == len(settled) + in_progress
    assert sum(graded_in(folder).values()) == expected_grades
    assert resumed > 20
    assert begun > 20
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


def test_unfinished_responses_start_again_unless_partial_ones_are_kept(folder: Path):
    case = Case(seed=3, set_size=60, prompts=3, samples=4, steps=4, partial=False, oversampling=3.0)
    (both,) = on_ranks(run_cases, 1, LAYOUTS[0], [case, replace(case, partial=True)], folder)
    (anew, resumed_anew), (gone_on, resumed) = both
    assert resumed_anew == 0
    assert resumed > 0
    assert all(tokens == 0 for step in anew for _, _, tokens in step.begun)
    assert any(tokens > 0 for step in gone_on for _, _, tokens in step.begun)
    mixed = [versions for step in gone_on for _, versions, _ in step.batch.values() if len(set(versions)) > 1]
    assert mixed, "some response was sampled from several weights, and says so token by token"


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
    assert max(stale) > 1, "or the bound was never needed"


def send_back(layout: Layout, folder: Path) -> tuple[int, int, int]:
    """Groups of this rank that became stale, groups that it has begun after that, and groups that it has kept."""
    from megatron_rlvr.distributed import process_group
    from megatron_rlvr.rollout.group_buffer import OrderedGroup

    with joined_process_group(), start_graders(folder) as graders:
        ranks = ranks_of(layout)
        case = Case(0, 60, 6, 3, steps=1, partial=True, max_rounds=10, max_staleness=1)
        engine = TricklingEngine(case, ranks.rank)
        collector = collector_of(case, engine, prompts_of([0.5] * 60), ranks, graders, process_group.store())
        groups = collector.collect(1).groups
        collector._kept = [OrderedGroup(1000 + g.order, g.group) for g in groups]
        collector._start = lambda: None  # a leader would go on with them
        collector._begun = []
        collector.begin(10)
        collector.close()
        return len(groups), len(collector._begun), len(collector._kept)


def test_groups_that_are_sampled_again_are_their_leaders_alone(folder: Path):
    layout = LAYOUTS[5]
    found = on_ranks(send_back, layout.world_size, layout, folder)
    leaders = [replica[0] for replica in layout.replicas]
    assert [kept for _, _, kept in found] == [0] * layout.world_size
    assert [begun for _, begun, _ in found] == [
        stale if rank in leaders else 0 for rank, (stale, _, _) in enumerate(found)
    ]
    assert sum(stale for stale, _, _ in found) == 2 * 6, "every rank of a replica has its groups"


def fail_on_one(layout: Layout, folder: Path) -> tuple[str, int, int]:
    """A failure of one leader's servers, for good; then the step is asked for again."""
    from megatron_rlvr.distributed import process_group

    class FailingStream(TricklingStream):
        """The first of each leader answers four requests, which is no batch; then one fails and the other is silent."""

        answers_left = 4

        def get(self, timeout_seconds: float) -> Any:
            if self.engine.version == 0 and not self.answers_left:
                if ranks.rank == 1:
                    raise EngineError("all of them are gone")
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
        held = sum(len(g.graded) + len(g.partial) for g in collector._begun) + len(collector._kept)
        engine.update_weights(None, 1)
        again = collector.collect(2)
        return str(caught.value), held, again.size


def test_a_failure_reaches_every_rank_and_what_was_sampled_is_still_there(folder: Path):
    answers = on_ranks(fail_on_one, 4, LAYOUTS[5], folder)
    assert {message for message, _, _ in answers} == {"all of them are gone"}
    assert {size for _, _, size in answers} == {6}
    assert sum(held for _, held, _ in answers) > 0
    assert set(graded_in(folder).values()) == {1}


def save_while_servers_fail(layout: Layout, folder: Path, failure: Exception) -> tuple[int, str, int]:
    """A leader fails in the background, and a checkpoint is made after that; then the step is asked for."""
    from megatron_rlvr.distributed import process_group

    class FailingStream(TricklingStream):
        """Every leader is answered four times, and the first stream of one fails then; the others are silent."""

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
        if collector._harvest is not None:
            collector._harvest._thread.join()
        state = collector.state()
        in_hand = sum(len(g.graded) for g in state["begun"]) + 3 * len(state["settled_early"])
        told, rollout = "", None
        try:
            rollout = collector.collect(1)
        except type(failure) as error:
            told = str(error)
        rollout = rollout or collector.collect(2)
        return in_hand, told, rollout.size


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[5]], ids=["1", "2 replicas of 2"])
@pytest.mark.parametrize("failure", [EngineError("all of them are gone"), LookupError("of another kind")])
def test_a_checkpoint_is_made_whatever_has_failed_in_the_background(failure: Exception, layout: Layout, folder: Path):
    found = on_ranks(save_while_servers_fail, layout.world_size, layout, folder, failure)
    # Servers are tried once more; what else has failed ends the next step.
    assert {told for _, told, _ in found} == {"" if isinstance(failure, EngineError) else str(failure)}
    assert {size for _, _, size in found} == {6}
    assert found[0][0] >= 4, "all that was answered is saved"
    assert set(graded_in(folder).values()) == {1}


def stop_one(layout: Layout, folder: Path) -> tuple[bool, int, int, float, float]:
    """One rank is told to stop in the middle of a step; another life of the run takes that step."""
    import torch.distributed as dist

    from megatron_rlvr.distributed import process_group
    from megatron_rlvr.rollout.collector import CollectionStoppedError

    class SlowStream(TricklingStream):
        def get(self, timeout_seconds: float) -> Any:
            time.sleep(0.02)  # a leader looks for SIGTERM five times a second
            if ranks.rank and leader.add("finished", 0) < 3:
                return None  # or the others could end the step before that leader has begun
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
        leader = dist.PrefixStore("the one that will stop", process_group.store())

        def born(number: int, stop_after: float) -> Any:
            store = dist.PrefixStore(f"life {number}", process_group.store())
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

        first = born(1, 3)
        stopped = False
        try:
            first.collect(1, count)
        except CollectionStoppedError:
            stopped = True
        state = [first.state()]
        dist.broadcast_object_list(state, src=0)
        in_hand = sum(len(g.graded) for g in state[0]["begun"]) + 3 * len(state[0]["settled_early"])
        second = born(2, float("inf"))
        second.restore(state[0])
        rollout = second.collect(1, count)
        tokens = rollout.metrics["rollout/response_tokens"]
        counted = sum(len(c.token_ids) for group in rollout.sampled for c in group.completions)
        if ranks.replica_rank:
            counted = 0
        return stopped, in_hand, rollout.size, tokens, float(counted)


def test_a_step_that_is_stopped_on_one_rank_stops_on_all_and_goes_on_with_all_that_was_sampled(folder: Path):
    answers = on_ranks(stop_one, 4, LAYOUTS[5], folder)
    assert {stopped for stopped, *_ in answers} == {True}
    assert {size for _, _, size, _, _ in answers} == {8}
    in_hand = {count for _, count, _, _, _ in answers}
    assert len(in_hand) == 1
    assert in_hand.pop() > 2
    assert set(graded_in(folder).values()) == {1}, "or a sample of the first life was graded again"
    # The metrics of the step count what both lives have sampled for it.
    assert {tokens for _, _, _, tokens, _ in answers} == {sum(counted for *_, counted in answers)}
