"""Sampler: from requests to graded completions, with the real graders and an engine that answers by a script."""

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import (
    CORRECT,
    CRASH,
    HANG,
    INCORRECT,
    SHARE,
    PlainTokenizer,
    ScriptedEngine,
    answer,
    prompts_of,
    start_graders,
    write_reward,
)

from megatron_rlvr.config import RewardSettings
from megatron_rlvr.reward.graders import GraderPool
from megatron_rlvr.rollout.sampler import Sampler, request_seed, requests_for
from megatron_rlvr.types import CompletionRequest, Prompt

SAMPLING = SimpleNamespace(temperature=1.0, top_p=1.0, max_response_tokens=20)


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reward(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def graders(reward_folder: Path) -> Iterator[GraderPool]:
    with start_graders(reward_folder) as pool:
        yield pool


def sampler_of(engine: Any, graders: Any, **reward: Any) -> Sampler:
    return Sampler(engine, PlainTokenizer(), graders, RewardSettings(**reward))  # type: ignore[arg-type]


def test_completions_are_in_the_order_of_the_requests_each_with_its_own_grade(graders: GraderPool):
    prompts = prompts_of([0.5] * 12)
    # Half of the gold answers are the other verdict, so that a grade by another prompt's answer is noticed.
    prompts = [Prompt(p.id, p.token_ids, str(i % 2), p.source, p.extra) for i, p in enumerate(prompts)]
    requests = [request for prompt in prompts for request in requests_for(prompt, 5, 0, "test")]
    requests = requests[::3] + requests[1::3] + requests[2::3]
    engine = ScriptedEngine()
    finished: list[int] = []
    graded = sampler_of(engine, graders).run(requests, SAMPLING, on_finished=finished.append)
    expected = [answer(request) for request in requests]
    assert [(c.prompt_id, c.index) for c, _ in graded] == [(r.prompt.id, r.index) for r in requests]
    assert [c.token_ids.tolist() for c, _ in graded] == [c.token_ids.tolist() for c in expected]
    correct = [str(c.token_ids[0]) == r.prompt.answer for c, r in zip(expected, requests, strict=True)]
    assert [grade.correct for _, grade in graded] == correct
    assert [grade.reward for _, grade in graded] == [1.0 if is_correct else -1.0 for is_correct in correct]
    assert 10 < sum(correct) < 50
    assert all(grade.failure is None for _, grade in graded)
    assert engine.asked == [(request, SAMPLING) for request in requests]
    assert finished == [1] * 60


def test_rewards_are_those_of_the_settings_and_a_float_below_correct_is_a_reward_without_being_correct(
    graders: GraderPool,
):
    (prompt,) = prompts_of([0.5])
    requests = requests_for(prompt, 3, 0, "test")
    engine = ScriptedEngine(lambda request: ((CORRECT, INCORRECT, SHARE)[request.index], 6, False))
    graded = sampler_of(engine, graders, correct=3.0, incorrect=0.5).run(requests, SAMPLING)
    assert [(grade.reward, grade.correct) for _, grade in graded] == [(3.0, True), (0.5, False), (0.25, False)]


def test_the_overlong_penalty_enters_the_reward_but_not_the_verdict(graders: GraderPool):
    (prompt,) = prompts_of([0.5])
    requests = requests_for(prompt, 8, 0, "test")
    lengths = (15, 16, 18, 20)
    engine = ScriptedEngine(lambda r: ((CORRECT, INCORRECT)[r.index // 4], lengths[r.index % 4], False))
    sampler = sampler_of(engine, graders, overlong_buffer=5)
    graded = sampler.run(requests, SAMPLING, overlong_penalty=True)
    # By hand: a cap of 20 and a buffer of 5 leave 15 tokens free, and each one after that costs a fifth.
    penalties = [0.0, 0.2, 0.6, 1.0]
    assert [grade.reward for _, grade in graded] == pytest.approx(
        [1 - p for p in penalties] + [-1 - p for p in penalties]
    )
    assert [grade.correct for _, grade in graded] == [True] * 4 + [False] * 4
    without = sampler.run(requests, SAMPLING)
    assert [grade.reward for _, grade in without] == [1.0] * 4 + [-1.0] * 4


def test_a_hanging_and_a_raising_reward_function_cost_only_their_own_response(reward_folder: Path):
    (prompt,) = prompts_of([0.5])
    requests = requests_for(prompt, 5, 0, "test")
    engine = ScriptedEngine(lambda request: ((CORRECT, HANG, CORRECT, CRASH, CORRECT)[request.index], 6, False))
    with start_graders(reward_folder, timeout_seconds=3.0) as graders:
        graded = sampler_of(engine, graders).run(requests, SAMPLING)
    grades = [grade for _, grade in graded]
    assert [grade.correct for grade in grades] == [True, False, True, False, True]
    assert [grade.reward for grade in grades] == [1.0, -1.0, 1.0, -1.0, 1.0]
    failures = [grade.failure or "" for grade in grades]
    assert [bool(failure) for failure in failures] == [False, True, False, True, False]
    assert failures[1].startswith("timeout")
    assert failures[3].startswith("error: KeyError")


def test_completions_are_graded_while_others_are_still_being_sampled(graders: GraderPool):
    submitted: list[Future[Any]] = []

    class Recorder:
        def submit(self, prompt: Prompt, response: str) -> "Future[Any]":
            submitted.append(graders.submit(prompt, response))
            return submitted[-1]

    class PatientEngine(ScriptedEngine):
        def generate(self, requests: Any, sampling: Any) -> Iterator[Any]:
            for number, request in enumerate(requests):
                yield answer(request)
                assert submitted[number].result(timeout=30).failure is None  # before the next one is sampled

    requests = [request for prompt in prompts_of([0.5] * 4) for request in requests_for(prompt, 2, 0, "test")]
    assert len(sampler_of(PatientEngine(), Recorder()).run(requests, SAMPLING)) == 8


def test_no_requests_give_no_completions(graders: GraderPool):
    assert sampler_of(ScriptedEngine(), graders).run([], SAMPLING) == []


def test_seeds_are_unique_and_depend_on_run_occasion_prompt_and_index_alone():
    prompts = [*prompts_of([0.5] * 40), *prompts_of([0.5] * 40, "other/1")]
    occasions = ["evaluate", *(f"train/{order}" for order in range(30))]
    requests: list[CompletionRequest] = []
    for run_seed in (0, 1):
        for occasion in occasions:
            for prompt in prompts:
                requests += requests_for(prompt, 4, run_seed, occasion)
    assert [r.index for r in requests[:4]] == [0, 1, 2, 3]
    seeds = {request.seed for request in requests}
    assert len(seeds) == len(requests) == 2 * 31 * 80 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Every bit is about as often set as not.
    bits = [sum(seed >> bit & 1 for seed in seeds) / len(seeds) for bit in range(63)]
    assert all(0.48 < share < 0.52 for share in bits)
    # Repeated runs sample alike with every version of the code: printf '7/train/12/3/set/0' | b2sum -l 64
    digest = bytes.fromhex("5182119634b99aa4")
    assert request_seed(7, "train/12", "set/0", 3) == int.from_bytes(digest, "little") // 2
