"""Runs of the asynchronous collector on engines that trickle, fail and stall, step by step."""

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
from scripted import (
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
from megatron_rlvr.protocols import WeightsMissingError
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
    case: Case, engine: Any, prompts: list[Prompt], ranks: Any, graders: Any, store: Any, **more: Any
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


def graded_in(folder: Path) -> Counter[str]:
    journal = folder / "graded"
    return Counter(journal.read_text().splitlines() if journal.exists() else [])


def assert_nothing_is_lost_or_done_twice(layout: Layout, folder: Path, run: Any = run_cases) -> None:
    """Run all cases on the ranks of ``layout`` by ``run``, then account for every response of every step."""
    per_rank = on_ranks(run, layout.world_size, layout, CASES, folder)
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
