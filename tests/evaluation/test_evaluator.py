"""Evaluation over ranks: a scripted engine and the real graders against a direct count."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

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
from megatron_rlvr.evaluation.folder import evaluation_folder
from megatron_rlvr.evaluation.majority import same_by_text
from megatron_rlvr.types import Completion, CompletionRequest, Prompt

if TYPE_CHECKING:
    from megatron_rlvr.evaluation.training import TrainingEvaluation

SAMPLES, CAP, SEED = 3, 20, 5
SETS: dict[str, Sequence[Prompt]] = {
    "many": prompts_of([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0, 0.2, 0.2], "many"),
    "one": prompts_of([0.5], "one"),
    "none correct": prompts_of([0.0] * 4, "none correct"),
}
DESCRIPTION: dict[str, Any] = {
    "target": {"path": "m"},
    "prompts": {},
    "sampling": {"group_size": SAMPLES},
    "reward": {"function": "user_reward:first_token", "correct": 1.0, "incorrect": -1.0, "answer_after": None},
    "sets": {
        name: {"path": name, "problems": len(own), "prompt_key": None, "answer_key": None, "id_key": None}
        for name, own in SETS.items()
    },
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
    resumed: dict[str, float]
    asked_resumed: list[CompletionRequest]
    errors: list[str]
    asked_first: list[CompletionRequest]
    asked_again: list[CompletionRequest]
    samplings: set[tuple[float, float, int]]
    expected_count: int
    finished: int
    tokens: int


def evaluation_of(
    engine: ScriptedEngine, graders: Any, layout: Layout, run: Path, share: slice | None = None
) -> TrainingEvaluation:
    from megatron_rlvr.evaluation.evaluator import Evaluator, share_of
    from megatron_rlvr.evaluation.training import TrainingEvaluation
    from megatron_rlvr.rollout.sampler import Sampler

    files = [EvaluationFileSettings(path=f"{name}.jsonl") for name in SETS]
    settings = EvaluateSettings(sets=files, group_size=SAMPLES, temperature=0.5, top_p=0.25)
    # The reward settings are those of training: neither they nor a penalty for length may enter an accuracy.
    reward = RewardSettings(correct=-1.0, incorrect=-2.0, overlong_buffer=10)
    sampler = Sampler(engine, PlainTokenizer(), graders, reward)  # type: ignore[arg-type]
    share = share or share_of(ranks_of(layout), leaders_only=False)
    evaluator = Evaluator(sampler, settings, SETS, share=share, same=same_by_text, max_response_tokens=CAP, seed=SEED)
    return TrainingEvaluation(evaluator, DESCRIPTION, run)


def evaluate_repeatedly(layout: Layout, folder: Path, run: Path) -> Outcome:
    import torch.distributed as dist

    from megatron_rlvr.evaluation.records import RecordsError

    with joined_process_group(), start_graders(folder) as graders:
        engine = ScriptedEngine()
        evaluation = evaluation_of(engine, graders, layout, run)
        finished: list[int] = []
        evaluation.start(1)
        first = evaluation.run(1, finished.append)
        asked_first, engine.asked = engine.asked, []
        evaluation.start(2)
        again = evaluation.run(2, lambda tokens: None)
        asked_again, engine.asked = engine.asked, []
        records = evaluation_folder(run, 2) / "records" / f"{dist.get_rank():05d}.jsonl"
        if records.exists():  # as if this rank had been killed while it wrote its second record
            lines = records.read_bytes().splitlines(keepends=True)
            records.write_bytes(lines[0] + lines[1][:40] if len(lines) > 1 else lines[0])
        dist.barrier()
        resumed = evaluation.run(2, lambda tokens: None)
        asked_resumed = [request for request, _ in engine.asked]
        errors = []
        if dist.get_rank() == 0:
            foreign = evaluation_folder(run, 2) / "records" / "00009.jsonl"
            foreign.write_text(lines[0].decode().replace('"seed": ', '"seed": 1').replace('"index": ', '"index": 7'))
        dist.barrier()
        try:
            evaluation.run(2, lambda tokens: None)
        except RecordsError as error:
            errors.append(str(error))
        return Outcome(
            first,
            again,
            resumed,
            asked_resumed,
            errors,
            [request for request, _ in asked_first],
            [request for request, _ in asked_again],
            {(s.temperature, s.top_p, s.max_response_tokens) for _, s in asked_first},
            evaluation.share_size(),
            len(finished),
            sum(finished),
        )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    folder = write_reward(tmp_path_factory.mktemp("reward"))
    runs = tmp_path_factory.mktemp("runs")
    return {
        name: on_ranks(evaluate_repeatedly, layout.world_size, layout, folder, runs / name)
        for name, layout in LAYOUTS.items()
    }


def identity(request: CompletionRequest) -> tuple[str, int, int]:
    return request.prompt.id, request.index, request.seed


def standard_error(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


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
        hits = [correct[prompt.id] for prompt in prompts]
        by_problem: dict[str, list[float]] = {
            "accuracy": [own / SAMPLES for own in hits],
            "score": [own / SAMPLES - 2.0 for own in hits],  # the mean of -1 for a correct answer and -2 for others
            "pass_at_2": [
                mean(any(pair) for pair in combinations([i < own for i in range(SAMPLES)], 2)) for own in hits
            ],
            f"pass_at_{SAMPLES}": [own > 0 for own in hits],
        }
        expected = {
            **{metric: mean(values) for metric, values in by_problem.items()},
            **{f"{metric}_standard_error": standard_error(values) for metric, values in by_problem.items()},
            "failed_fraction": 0.0,
            "response_tokens_mean": sum(len(c.token_ids) for c in completions.values()) / count,
            "truncated_fraction": sum(c.finish_reason == "length" for c in completions.values()) / count,
        }
        expected = {key: value for key, value in expected.items() if math.isfinite(value)}
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
        for outcome in ranks:
            for metrics in (outcome.first, outcome.again, outcome.resumed):
                assert metrics == pytest.approx(outcomes["1"][0].first, rel=1e-12)


def test_completions_are_distributed_evenly_and_counted_in_advance(outcomes: dict[str, list[Outcome]]):
    for ranks in outcomes.values():
        counts = [len(outcome.asked_first) for outcome in ranks]
        assert max(counts) - min(counts) <= 1
        assert sum(counts) == 14 * SAMPLES
        assert [outcome.finished for outcome in ranks] == counts
        assert [outcome.expected_count for outcome in ranks] == counts


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_recorded_is_not_sampled_again(name: str, outcomes: dict[str, list[Outcome]]):
    ranks = outcomes[name]
    asked = [identity(request) for outcome in ranks for request in outcome.asked_resumed]
    assert len(asked) == len(set(asked)) == 14 * SAMPLES - len(ranks), "each rank had kept one record"
    for outcome in ranks:
        (error,) = outcome.errors
        assert "does not belong to this evaluation; choose another --out" in error


def test_sampling_parameters_are_those_of_the_evaluation_with_the_cap_of_training(outcomes: dict[str, list[Outcome]]):
    found = [outcome.samplings for ranks in outcomes.values() for outcome in ranks]
    assert all(samplings == {(0.5, 0.25, CAP)} for samplings in found)


def evaluate_on_servers_that_lose_their_weights(layout: Layout, folder: Path, run: Path) -> tuple[Any, ...]:
    """Metrics, versions of the pushed weights, reported steps, and requests of a trainer's evaluation."""
    from megatron_rlvr.protocols import WeightsMissingError
    from megatron_rlvr.trainer import Trainer

    class ForgettingEngine(ScriptedEngine):
        """Fails in the middle of its first two calls."""

        def __init__(self) -> None:
            super().__init__()
            self.versions: list[int] = []
            self.answered: list[tuple[str, int, int]] = []

        def update_weights(self, named_tensors: Any, version: int) -> None:
            self.versions.append(version)

        def generate(self, requests: Sequence[CompletionRequest], sampling: Any) -> Iterator[Completion]:
            fails = len(self.calls) < 2
            by_key = {(r.prompt.id, r.index): r for r in requests}
            for number, completion in enumerate(super().generate(requests, sampling)):
                if fails and number == len(requests) // 2:
                    break
                self.answered.append(identity(by_key[completion.prompt_id, completion.index]))
                yield completion
            if fails:
                raise WeightsMissingError("no server holds the current weights")

    with joined_process_group(), start_graders(folder) as graders:
        engine = ForgettingEngine()
        reported: list[int] = []
        progress = SimpleNamespace(
            evaluating=lambda total: nullcontext(lambda tokens: None),
            evaluated=lambda step, metrics: reported.append(step),
        )
        trainer: Any = Trainer.__new__(Trainer)  # with only the attributes that evaluations need
        trainer.evaluation, trainer.progress = evaluation_of(engine, graders, layout, run), progress
        trainer.engine, trainer.policy = engine, SimpleNamespace(export_weights=lambda: iter(()))
        trainer.background = None
        return trainer.evaluate(7), engine.versions, reported, engine.answered


def test_weights_that_servers_have_lost_are_pushed_again_and_the_evaluation_continues(
    outcomes: dict[str, list[Outcome]], tmp_path: Path
):
    layout = LAYOUTS["2"]
    world = layout.world_size
    found = on_ranks(
        evaluate_on_servers_that_lose_their_weights, world, layout, write_reward(tmp_path), tmp_path / "run"
    )
    for metrics, versions, reported, _ in found:
        assert metrics == pytest.approx(outcomes["2"][0].first)
        assert (versions, reported) == ([7, 7], [7])
    answered = [each for _, _, _, answers in found for each in answers]
    assert len(answered) == len(set(answered)) == 14 * SAMPLES, "no completion is sampled twice"


def evaluate_in_the_background(layout: Layout, folder: Path, run: Path) -> dict[str, Any]:
    """What a rank sees of evaluations beside training: two that finish, others that fail or are resumed."""
    import threading

    import torch.distributed as dist

    from megatron_rlvr.evaluation.background import BackgroundEvaluation
    from megatron_rlvr.protocols import EngineError

    gate = threading.Event()

    class WaitingEngine(ScriptedEngine):
        """Answers half of its requests, and then waits for the gate; its third call fails."""

        def generate(self, requests: Sequence[CompletionRequest], sampling: Any) -> Iterator[Completion]:
            for number, completion in enumerate(super().generate(requests, sampling)):
                if number == len(requests) // 2:
                    if len(self.calls) == 3:
                        raise EngineError("no server was healthy")
                    gate.wait()
                yield completion

    def push(tensors: Any, version: int) -> None:
        pushed.append(version)
        if version == 15:
            raise EngineError("no server took the weights")

    pushed: list[int] = []
    found: dict[str, Any] = {}
    with joined_process_group(), start_graders(folder) as graders:
        engine = WaitingEngine()
        evaluation = evaluation_of(engine, graders, Layout(((0,), (1,))), run, share=slice(None))
        background = BackgroundEvaluation(evaluation, push, threading.Event())
        found["before"] = background.collect(wait=True)
        background.start(5, iter(()))
        found["in flight"] = background.collect(wait=False)
        found["step"] = background.step
        found["stopped"] = background.collect(wait=True, stop_wanted=lambda: True)
        records = evaluation_folder(run, 5) / "records" / "00000.jsonl"
        found["summary"] = (evaluation_folder(run, 5) / "summary.json").exists()
        gate.set()
        found["first"] = background.collect(wait=True)
        found["again"] = background.collect(wait=True)
        found["records"] = records.read_text().count("\n")
        background.start(9, iter(()))
        found["second"] = background.collect(wait=True)
        background.start(12, iter(()))
        found["failed"] = background.collect(wait=True)
        background.start(15, iter(()))
        found["not pushed"] = background.collect(wait=False)
        found["finished"] = evaluation.finished()
        asked = sum(engine.calls)
        background.start(12, iter(()), resumed=True)  # as by the process that resumes the run there
        found["resumed"] = background.collect(wait=True)
        found["asked again"] = sum(engine.calls) - asked
        if dist.get_rank() == 0:  # a disk that is full: a folder is where the next records belong
            shutil.rmtree(evaluation_folder(run, 12) / "records")
            (evaluation_folder(run, 12) / "records").write_text("")
        background.start(12, iter(()), resumed=True)
        found["no disk"] = background.collect(wait=True)
        background.close()
        dist.barrier()
    return found | {"pushed": pushed}


def test_an_evaluation_in_the_background_has_its_metrics_under_its_own_step(
    outcomes: dict[str, list[Outcome]], tmp_path: Path
):
    layout = LAYOUTS["2"]
    folder = write_reward(tmp_path)
    ranks = on_ranks(evaluate_in_the_background, layout.world_size, layout, folder, tmp_path / "run")
    for found in ranks:
        assert (found["before"], found["in flight"], found["step"], found["again"]) == (None, None, 5, None)
        assert found["stopped"] is None
        assert not found["summary"]
        step, metrics, failure = found["first"]
        assert (step, failure) == (5, None)
        assert metrics == pytest.approx(outcomes["2"][0].first)
        assert found["records"] == 14 * SAMPLES
        step, metrics, failure = found["second"]
        assert (step, failure) == (9, None)
        assert metrics == pytest.approx(outcomes["2"][0].first)
        assert found["failed"] == (12, {}, "no server was healthy")
        assert found["not pushed"] == (15, {}, "no server took the weights")
        assert found["finished"] == {5: found["first"][1], 9: found["second"][1]}
        assert found["resumed"] == (12, found["first"][1], None)
        step, metrics, failure = found["no disk"]
        assert (step, metrics) == (12, {})
        assert "File exists" in failure or "Not a directory" in failure
        assert found["pushed"] == [5, 9, 12, 15, 12, 12]
    assert [found["asked again"] for found in ranks] == [14 * SAMPLES - 14 * SAMPLES // 2, 0]


@pytest.mark.parametrize(
    ("step", "finished", "started"), [(4, [0, 2], [4]), (4, [0, 2, 4], []), (5, [0], []), (9, [0], [9]), (2, [], [2])]
)
def test_a_resumed_run_logs_what_was_found_beside_training_and_resumes_the_evaluation_of_its_step(
    step: int, finished: list[int], started: list[int]
):
    from megatron_rlvr.checkpoint.store import RunTotals
    from megatron_rlvr.trainer import Trainer

    logged: dict[int, dict[str, float]] = {}
    begun: list[int] = []

    def start(step: int, tensors: Any, *, resumed: bool) -> None:
        assert resumed
        begun.append(step)

    metrics = {each: {"eval/set/accuracy": each / 10} for each in finished}
    trainer: Any = Trainer.__new__(Trainer)
    trainer.settings = SimpleNamespace(run=SimpleNamespace(steps=9, eval_every=2))
    trainer.totals = RunTotals(step=step, after={"eval/set/accuracy": 0.9})
    trainer.evaluation = SimpleNamespace(finished=lambda: metrics)
    trainer.log = SimpleNamespace(write_missing=logged.__setitem__)
    trainer.policy = SimpleNamespace(export_weights=lambda: iter(()))
    trainer._resume_evaluation(SimpleNamespace(start=start))
    assert (logged, begun) == (metrics, started)
    assert trainer.totals.before == metrics.get(0, {})
    assert trainer.totals.after == ({} if started else metrics[finished[-1]])
