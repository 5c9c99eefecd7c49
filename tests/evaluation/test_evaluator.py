"""Evaluation over ranks: a scripted engine and the real graders against a direct count."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import (
    CORRECT,
    Layout,
    PlainTokenizer,
    ScriptedEngine,
    answer,
    by_accuracy,
    joined_process_group,
    on_ranks,
    prompts_of,
    ranks_of,
    start_graders,
    write_reward,
)

from megatron_rlvr.config import EvaluateSettings, EvaluationFileSettings, RewardSettings
from megatron_rlvr.types import Completion, CompletionRequest, Prompt

SAMPLES, CAP, SEED = 3, 20, 5
SETS: dict[str, Sequence[Prompt]] = {
    "many": prompts_of([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0, 0.2, 0.2], "many"),
    "one": prompts_of([0.5], "one"),
    "none correct": prompts_of([0.0] * 4, "incorrect"),
}
LAYOUTS = {
    "1": Layout(((0,),)),
    "2": Layout(((0,), (1,))),
    "2 that share a replica": Layout(((0, 1),)),
    "4": Layout(((0, 1), (2, 3))),  # more ranks than the smallest set has completions
}


@dataclass(frozen=True)
class Outcome:
    """Two evaluations on one rank."""

    first: dict[str, float]
    again: dict[str, float]
    asked_first: list[CompletionRequest]
    asked_again: list[CompletionRequest]
    samplings: set[tuple[float, float, int]]
    expected_count: int
    finished: int


def evaluate_twice(layout: Layout, folder: Path) -> Outcome:
    from megatron_rlvr.evaluation.evaluator import Evaluator
    from megatron_rlvr.rollout.sampler import Sampler

    files = [EvaluationFileSettings(path=f"{name}.jsonl") for name in SETS]
    settings = EvaluateSettings(sets=files, group_size=SAMPLES, temperature=0.5, top_p=0.25)
    with joined_process_group(), start_graders(folder) as graders:
        engine = ScriptedEngine()
        # The reward settings are those of training: neither they nor a penalty for length may enter an accuracy.
        reward = RewardSettings(correct=-1.0, incorrect=-2.0, overlong_buffer=10)
        sampler = Sampler(engine, PlainTokenizer(), graders, reward)  # type: ignore[arg-type]
        evaluator = Evaluator(sampler, ranks_of(layout), settings, SETS, max_response_tokens=CAP, seed=SEED)
        finished: list[int] = []
        first = evaluator.run(finished.append)
        asked_first, engine.asked = engine.asked, []
        again = evaluator.run()
        return Outcome(
            first,
            again,
            [request for request, _ in asked_first],
            [request for request, _ in engine.asked],
            {(s.temperature, s.top_p, s.max_response_tokens) for _, s in asked_first},
            evaluator.requests_of_this_rank(),
            sum(finished),
        )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    folder = write_reward(tmp_path_factory.mktemp("reward"))
    return {name: on_ranks(evaluate_twice, layout.world_size, layout, folder) for name, layout in LAYOUTS.items()}


def identity(request: CompletionRequest) -> tuple[str, int, int]:
    return request.prompt.id, request.index, request.seed


@pytest.mark.parametrize("name", LAYOUTS)
def test_accuracy_and_pass_at_k_are_a_direct_count(name: str, outcomes: dict[str, list[Outcome]]):
    requests = [request for outcome in outcomes[name] for request in outcome.asked_first]
    for set_name, prompts in SETS.items():
        completions = {}
        correct = Counter({prompt.id: 0 for prompt in prompts})
        for request in requests:
            if request.prompt.id in correct:
                completions[request.prompt.id, request.index] = answer(request)
                correct[request.prompt.id] += by_accuracy(request)[0] == CORRECT
        assert sorted(completions) == sorted((prompt.id, n) for prompt in prompts for n in range(SAMPLES))
        count = len(prompts) * SAMPLES
        expected = {
            "accuracy": correct.total() / count,
            f"pass_at_{SAMPLES}": sum(hits > 0 for hits in correct.values()) / len(prompts),
            "response_tokens_mean": sum(len(c.token_ids) for c in completions.values()) / count,
            "truncated_fraction": sum(c.finish_reason == "length" for c in completions.values()) / count,
        }
        for outcome in outcomes[name]:
            metrics = {
                key.rpartition("/")[2]: value
                for key, value in outcome.first.items()
                if key.startswith(f"eval/{set_name}/")
            }
            assert metrics == pytest.approx(expected)
    assert len(requests) == len({identity(request) for request in requests}) == 14 * SAMPLES


def test_every_layout_and_every_evaluation_uses_the_same_random_streams(outcomes: dict[str, list[Outcome]]):
    streams = {
        tuple(sorted(identity(request) for outcome in ranks for request in getattr(outcome, field)))
        for ranks in outcomes.values()
        for field in ("asked_first", "asked_again")
    }
    assert len(streams) == 1
    assert len({seed for _, _, seed in streams.pop()}) == 14 * SAMPLES
    for ranks in outcomes.values():
        assert all(outcome.first == outcome.again == ranks[0].first for outcome in ranks)
        assert ranks[0].first == pytest.approx(outcomes["1"][0].first)


def test_completions_are_distributed_evenly_and_counted_in_advance(outcomes: dict[str, list[Outcome]]):
    for ranks in outcomes.values():
        counts = [len(outcome.asked_first) for outcome in ranks]
        assert max(counts) - min(counts) <= len(SETS)
        assert [outcome.finished for outcome in ranks] == counts
        assert [outcome.expected_count for outcome in ranks] == counts


def test_sampling_parameters_are_those_of_the_evaluation_with_the_cap_of_training(outcomes: dict[str, list[Outcome]]):
    found = [outcome.samplings for ranks in outcomes.values() for outcome in ranks]
    assert all(samplings == {(0.5, 0.25, CAP)} for samplings in found)


def evaluate_on_servers_that_lose_their_weights(layout: Layout, folder: Path) -> tuple[dict[str, float], Any, Any]:
    """Metrics, versions of the pushed weights, and reported steps of a trainer's evaluation."""
    from megatron_rlvr.evaluation.evaluator import Evaluator
    from megatron_rlvr.protocols import WeightsMissingError
    from megatron_rlvr.rollout.sampler import Sampler
    from megatron_rlvr.trainer import Trainer

    class ForgettingEngine(ScriptedEngine):
        """Fails in the middle of its second call, and of its fifth: in the second set, and then in the third."""

        def __init__(self) -> None:
            super().__init__()
            self.versions: list[int] = []

        def update_weights(self, named_tensors: Any, version: int) -> None:
            self.versions.append(version)

        def generate(self, requests: Sequence[CompletionRequest], sampling: Any) -> Iterator[Completion]:
            fails = len(self.calls) in (1, 4)
            for number, completion in enumerate(super().generate(requests, sampling)):
                if fails and number == len(requests) // 2:
                    break
                yield completion
            if fails:
                raise WeightsMissingError("no server holds the current weights")

    files = [EvaluationFileSettings(path=f"{name}.jsonl") for name in SETS]
    settings = EvaluateSettings(sets=files, group_size=SAMPLES, temperature=0.5, top_p=0.25)
    with joined_process_group(), start_graders(folder) as graders:
        engine = ForgettingEngine()
        sampler = Sampler(engine, PlainTokenizer(), graders, RewardSettings())  # type: ignore[arg-type]
        evaluator = Evaluator(sampler, ranks_of(layout), settings, SETS, max_response_tokens=CAP, seed=SEED)
        reported: list[int] = []
        progress = SimpleNamespace(
            evaluating=lambda total: nullcontext(lambda count: None),
            evaluated=lambda step, metrics: reported.append(step),
        )
        trainer: Any = Trainer.__new__(Trainer)  # with only the attributes that evaluations need
        trainer.evaluator, trainer.progress, trainer.engine = evaluator, progress, engine
        trainer.policy = SimpleNamespace(export_weights=lambda: iter(()))
        return trainer.evaluate(7), engine.versions, reported


def test_weights_that_servers_have_lost_are_pushed_again_and_the_evaluation_is_repeated(
    outcomes: dict[str, list[Outcome]], tmp_path: Path
):
    layout = LAYOUTS["2"]
    found = on_ranks(evaluate_on_servers_that_lose_their_weights, layout.world_size, layout, write_reward(tmp_path))
    assert found == [(outcomes["2"][0].first, [7, 7], [7])] * layout.world_size
