"""Synchronous collector over ranks: a scripted engine, the real graders, and a direct count of all that was sampled."""

import contextlib
import functools
import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from scripted import (
    CORRECT,
    CRASH,
    HANG,
    INCORRECT,
    LAYOUTS,
    NOTHING,
    SHARE,
    Layout,
    PlainTokenizer,
    Script,
    ScriptedEngine,
    answer,
    by_accuracy,
    by_verdicts,
    joined_process_group,
    on_ranks,
    prompts_of,
    ranks_of,
    start_graders,
    write_reward,
)

from megatron_rlvr.config import RewardSettings, RolloutSettings
from megatron_rlvr.errors import InputError
from megatron_rlvr.types import CompletionRequest, Prompt

MIXED, ALL_CORRECT, ALL_INCORRECT = (CORRECT, INCORRECT), (CORRECT, CORRECT), (INCORRECT, INCORRECT)
ONE_RANK = LAYOUTS[0]


@dataclass(frozen=True)
class Case:
    """A run of a few steps over a prompt set."""

    set: list[Prompt]
    script: Script
    prompts: int
    steps: int
    group_size: int = 2
    dynamic: bool = True
    max_rounds: int = 10
    overlong_buffer: int = 0
    shuffle: bool = False
    seed: int = 0
    timeout_seconds: float = 60.0
    leaders_only: bool = False


@dataclass(frozen=True)
class Trained:
    """A group of the batch: its responses, which the seeds make unique, and their grades."""

    order: int
    prompt_id: str
    responses: list[list[int]]
    rewards: list[float]
    correct: list[bool]


@dataclass(frozen=True)
class Step:
    """Result of a step on one rank."""

    batch: list[Trained]
    size: int
    metrics: dict[str, float]
    sampled: list[str]
    requests: list[CompletionRequest]
    calls: list[int]
    """Number of requests of each call of the engine."""
    finished: int
    warnings: list[str]


def run_cases(layout: Layout, cases: Sequence[Case], folder: Path) -> list[list[Step]]:
    """On each rank: every step of every case. Graders with the same timeout are shared."""
    with joined_process_group():
        ranks = ranks_of(layout)
        timeouts = {case.timeout_seconds for case in cases}
        with contextlib.ExitStack() as stack:
            graders = {seconds: stack.enter_context(start_graders(folder, seconds)) for seconds in timeouts}
            return [run_case(case, ranks, graders[case.timeout_seconds]) for case in cases]


def run_case(case: Case, ranks: Any, graders: Any) -> list[Step]:
    from megatron_rlvr.rollout.collector import logger

    engine = ScriptedEngine(case.script)
    collector = collector_of(case, ranks, graders, engine)
    settings = collector._settings
    warnings = Warnings()
    logger.addHandler(warnings)
    steps = []
    for step in range(1, case.steps + 1):
        engine.asked, engine.calls, warnings.texts = [], [], []
        finished: list[int] = []
        rollout = collector.collect(step, finished.append)
        batch = [
            Trained(
                order=ordered.order,
                prompt_id=ordered.group.prompt.id,
                responses=[c.token_ids.tolist() for c in ordered.group.completions],
                rewards=[grade.reward for grade in ordered.group.grades],
                correct=[grade.correct for grade in ordered.group.grades],
            )
            for ordered in rollout.groups
        ]
        requests = [request for request, _ in engine.asked]
        assert all(sampling is settings for _, sampling in engine.asked)
        sampled = [group.prompt.id for group in rollout.sampled]
        steps.append(
            Step(batch, rollout.size, rollout.metrics, sampled, requests, engine.calls, sum(finished), warnings.texts)
        )
    logger.removeHandler(warnings)
    return steps


def collector_of(case: Case, ranks: Any, graders: Any, engine: ScriptedEngine, **options: Any) -> Any:
    from megatron_rlvr.data.cursor import PromptCursor
    from megatron_rlvr.data.prompts import FilePrompts, PromptSet
    from megatron_rlvr.rollout.sampler import Sampler
    from megatron_rlvr.rollout.synchronous import SynchronousCollector

    settings = RolloutSettings(
        group_size=case.group_size,
        max_response_tokens=20,
        dynamic_sampling=case.dynamic,
        max_rounds=case.max_rounds,
    )
    reward = RewardSettings(overlong_buffer=case.overlong_buffer)
    count = len(case.set)
    prompt_set = PromptSet(case.set, (FilePrompts("set", 0, count, float(count), 0),))
    return SynchronousCollector(
        Sampler(engine, PlainTokenizer(), graders, reward, leaders_only=case.leaders_only),  # type: ignore[arg-type]
        PromptCursor(prompt_set, case.seed, case.shuffle),
        ranks,
        settings,
        groups_per_batch=case.prompts,
        seed=case.seed,
        **options,
    )


class Warnings(logging.Handler):
    """Records the logged messages."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def in_step_order(per_rank: list[list[Step]]) -> list[list[Step]]:
    """[step][rank] instead of [rank][step]."""
    return [list(steps) for steps in zip(*per_rank, strict=True)]


def whole_batch(layout: Layout, ranks: Sequence[Step]) -> list[Trained]:
    """The batch over all replicas, checked to be the same on all ranks of a replica."""
    groups: list[Trained] = []
    for replica in layout.replicas:
        for rank in replica:
            assert ranks[rank].batch == ranks[replica[0]].batch
        groups += ranks[replica[0]].batch
    groups.sort(key=lambda group: group.order)
    assert [group.order for group in groups] == list(range(ranks[0].size))
    return groups


def random_cases(count: int) -> list[Case]:
    """Sets of 1 to 40 prompts of which few or many are informative; batches from a fraction of the set to beyond it."""
    dice = random.Random(0)
    cases = []
    for seed in range(count):
        kinds = dice.choice([(0.0, 1.0, 0.5), (0.0, 0.5, 0.5), (0.0, 1.0, 1.0, 0.3), (0.2, 0.8)])
        cases.append(
            Case(
                set=prompts_of([dice.choice(kinds) for _ in range(dice.choice([1, 3, 8, 20, 40]))]),
                script=by_accuracy,
                prompts=dice.randint(1, 6),
                steps=4,
                group_size=dice.randint(2, 4),
                dynamic=dice.random() < 0.85,
                max_rounds=dice.randint(1, 4),
                overlong_buffer=dice.choice([0, 8]),
                shuffle=True,
                seed=seed,
            )
        )
    return [case if case.dynamic else replace(case, max_rounds=10) for case in cases]


CASES = random_cases(60)
FEW_CASES = CASES[:15]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reward(tmp_path_factory.mktemp("reward"))


@functools.cache
def random_runs(layout: Layout, folder: Path) -> list[list[list[Step]]]:
    """[case][step][rank] of the random cases: of all on one rank, of a few on several."""
    cases = CASES if layout == ONE_RANK else FEW_CASES
    per_rank = on_ranks(run_cases, layout.world_size, layout, cases, folder)
    return [in_step_order(list(case)) for case in zip(*per_rank, strict=True)]


def on_one_rank(case: Case, folder: Path) -> list[Step]:
    ((steps,),) = on_ranks(run_cases, 1, ONE_RANK, [case], folder)
    return steps


def groups_drawn(case: Case, step: Step) -> list[list[CompletionRequest]]:
    """Requests of a run on one rank, split into groups: the order of the requests is then the order of drawing."""
    groups = [step.requests[start : start + case.group_size] for start in range(0, len(step.requests), case.group_size)]
    assert all([r.index for r in group] == list(range(case.group_size)) for group in groups)
    assert all(len({r.prompt.id for r in group}) == 1 for group in groups)
    return groups


def is_correct(case: Case, request: CompletionRequest) -> bool:
    return case.script(request)[0] == CORRECT


def reward_of(case: Case, request: CompletionRequest) -> float:
    """1 or -1; the last ``overlong_buffer`` of the 20 tokens cost up to 1."""
    length = case.script(request)[1]
    over = max(0, length - (20 - case.overlong_buffer))
    return (1.0 if is_correct(case, request) else -1.0) - (over / case.overlong_buffer if over else 0.0)


def test_every_informative_group_enters_one_batch_in_the_order_drawn(folder: Path):
    carried_over = replaced = 0
    for case, steps in zip(CASES, random_runs(ONE_RANK, folder), strict=True):
        waiting: list[list[CompletionRequest]] = []
        for (step,) in steps:
            carried = len(waiting)
            drawn = groups_drawn(case, step)
            mixed = [group for group in drawn if 0 < sum(is_correct(case, r) for r in group) < case.group_size]
            waiting += mixed if case.dynamic else drawn
            expected, waiting = waiting[: case.prompts], waiting[case.prompts :]
            batch = whole_batch(ONE_RANK, [step])
            assert step.size == len(expected)
            for trained, group in zip(batch, expected, strict=True):
                assert trained.prompt_id == group[0].prompt.id
                assert trained.responses == [answer(r).token_ids.tolist() for r in group]
                assert trained.rewards == pytest.approx([reward_of(case, r) for r in group])
                assert trained.correct == [is_correct(case, r) for r in group]
            assert step.metrics["rollout/groups_carried"] == carried
            assert step.metrics["rollout/groups_surplus"] == len(waiting)
            carried_over += bool(carried)
            replaced += case.dynamic and len(drawn) > len(mixed) and step.size == case.prompts
    assert carried_over > 15
    assert replaced > 15


def test_leaders_alone_make_the_requests_that_all_ranks_of_a_replica_would(folder: Path):
    layout = Layout(((0, 2), (1, 3)))
    cases = [replace(case, leaders_only=True) for case in FEW_CASES]
    per_rank = on_ranks(run_cases, layout.world_size, layout, cases, folder)
    for number, alone in enumerate(random_runs(ONE_RANK, folder)[: len(cases)]):
        for step, (expected,) in enumerate(alone):
            ranks = [per_rank[rank][number][step] for rank in range(layout.world_size)]
            assert whole_batch(layout, ranks) == whole_batch(ONE_RANK, [expected])
            assert ranks[0].metrics == pytest.approx(expected.metrics)
            assert sum(len(rank.requests) for rank in ranks[:2]) == len(expected.requests)
            assert [rank.requests for rank in ranks[2:]] == [[], []]
            assert all(len(rank.calls) == len(expected.calls) for rank in ranks), "each round is a call on every rank"


def test_a_step_draws_no_more_prompts_than_it_may(folder: Path):
    limited = used_up = 0
    for case, steps in zip(CASES, random_runs(ONE_RANK, folder), strict=True):
        for (step,) in steps:
            drawn = [count // case.group_size for count in step.calls]
            assert len(drawn) <= (case.max_rounds if case.dynamic else 1)
            assert sum(drawn) <= len(case.set)
            # A round may draw four times what is missing, and what is missing only shrinks.
            missing = case.prompts - step.metrics["rollout/groups_carried"]
            assert all(count <= 4 * missing for count in drawn)
            assert all(drawn)
            if step.size == case.prompts:
                assert step.warnings == []
                continue
            (warning,) = step.warnings
            assert f"trains on {step.size} of {case.prompts} groups" in warning
            if sum(drawn) == len(case.set):
                used_up += 1
                assert "the set has no other prompts" in warning
            else:
                limited += 1
                assert len(drawn) == case.max_rounds
                assert f"rollout.max_rounds={case.max_rounds} is reached" in warning
    assert limited > 10
    assert used_up > 10


def error_over_groups(case: Case, step: Step, value: Callable[[CompletionRequest], float]) -> float:
    """Standard error of a mean over responses, of groups of one size: that of the mean of the groups' means."""
    means = [mean([float(value(r)) for r in group]) for group in groups_drawn(case, step)]
    return stdev(means) / math.sqrt(len(means))


def test_metrics_are_a_direct_count_of_what_was_sampled(folder: Path):
    for case, steps in zip(CASES, random_runs(ONE_RANK, folder), strict=True):
        for (step,) in steps:
            answers = [answer(request) for request in step.requests]
            mixed = [g for g in groups_drawn(case, step) if len({is_correct(case, r) for r in g}) == 2]
            drawn = len(step.requests) // case.group_size
            expected = {
                "reward/failures": 0,
                "rollout/response_tokens": sum(len(c.token_ids) for c in answers),
                "rollout/rounds": len(step.calls),
                "rollout/groups_in_progress": 0,
                "rollout/groups": step.size,
                "rollout/groups_sampled": drawn,
                "rollout/groups_dropped": drawn - len(mixed) if case.dynamic else 0,
                "rollout/groups_carried": step.metrics["rollout/groups_carried"],  # checked above
                "rollout/groups_surplus": step.metrics["rollout/groups_surplus"],
            }
            if answers:
                expected |= {
                    "reward/mean": mean([reward_of(case, r) for r in step.requests]),
                    "reward/score": mean([1.0 if is_correct(case, r) else -1.0 for r in step.requests]),
                    "reward/accuracy": mean([is_correct(case, r) for r in step.requests]),
                    "rollout/response_tokens_mean": mean([len(c.token_ids) for c in answers]),
                    "rollout/truncated_fraction": mean([c.finish_reason == "length" for c in answers]),
                }
            errors: dict[str, Callable[[CompletionRequest], float]] = {
                "reward/mean": functools.partial(reward_of, case),
                "reward/accuracy": functools.partial(is_correct, case),
                "rollout/response_tokens_mean": lambda r: len(answer(r).token_ids),
                "rollout/truncated_fraction": lambda r: answer(r).finish_reason == "length",
            }
            found = {key: value for key, value in step.metrics.items() if not key.endswith("_standard_error")}
            assert found == pytest.approx(expected)
            # A variance of zero is a difference of large numbers.
            assert {key: step.metrics[key] for key in step.metrics.keys() - found.keys()} == pytest.approx(
                {f"{key}_standard_error": error_over_groups(case, step, of) for key, of in errors.items()}
                if drawn > 1
                else {},
                abs=1e-6,
            )
            assert step.finished == len(step.requests)
            assert step.sampled == [group[0].prompt.id for group in groups_drawn(case, step)]


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=lambda layout: str(layout.replicas))
def test_batch_metrics_and_seeds_are_the_same_for_every_layout(layout: Layout, folder: Path):
    one_rank = random_runs(ONE_RANK, folder)[: len(FEW_CASES)]
    for alone, together in zip(one_rank, random_runs(layout, folder), strict=True):
        for (one,), ranks in zip(alone, together, strict=True):
            assert whole_batch(layout, ranks) == whole_batch(ONE_RANK, [one])
            assert [rank.size for rank in ranks] == [one.size] * layout.world_size
            for rank in ranks:
                assert rank.metrics == ranks[0].metrics
            assert ranks[0].metrics == pytest.approx(one.metrics)
            requests = [(r.prompt.id, r.index, r.seed) for rank in ranks for r in rank.requests]
            assert sorted(requests) == sorted((r.prompt.id, r.index, r.seed) for r in one.requests)
            assert [rank.finished for rank in ranks] == [len(rank.requests) for rank in ranks]
            sampled = [prompt_id for replica in layout.replicas for prompt_id in ranks[replica[0]].sampled]
            assert sorted(sampled) == sorted(one.sampled)
            assert ranks[0].warnings == one.warnings
            assert all(rank.warnings == [] for rank in ranks[1:])


def test_the_ranks_of_a_replica_share_its_requests_evenly(folder: Path):
    for layout in LAYOUTS[1:]:
        for steps in random_runs(layout, folder):
            for ranks in steps:
                for replica in layout.replicas:
                    for counts in zip(*(ranks[rank].calls for rank in replica), strict=True):
                        assert max(counts) - min(counts) <= 1


def test_no_seed_is_used_twice_although_prompts_are_drawn_again(folder: Path):
    again = 0
    for steps in random_runs(ONE_RANK, folder):
        requests = [request for (step,) in steps for request in step.requests]
        assert len({request.seed for request in requests}) == len(requests)
        again += len({(r.prompt.id, r.index) for r in requests}) < len(requests)
    assert again > 10


def prompts_with(verdicts: Sequence[tuple[int, ...]]) -> list[Prompt]:
    prompts = prompts_of([0.0] * len(verdicts))
    return [replace(p, extra={"verdicts": v}) for p, v in zip(prompts, verdicts, strict=True)]


def test_all_correct_and_all_incorrect_groups_are_replaced(folder: Path):
    verdicts = [ALL_CORRECT, MIXED, ALL_INCORRECT, MIXED, ALL_CORRECT, MIXED, MIXED, MIXED, MIXED, ALL_INCORRECT]
    (step,) = on_one_rank(Case(prompts_with(verdicts), by_verdicts, prompts=3, steps=1), folder)
    # By hand: 3 prompts give 1 mixed group; at a rate of 2 / 4, 4 are drawn for the other 2, and 3 are mixed.
    assert step.calls == [6, 8]
    assert [group.prompt_id for group in step.batch] == ["set/1", "set/3", "set/5"]
    assert step.metrics["rollout/groups_dropped"] == 3
    assert step.metrics["rollout/groups_surplus"] == 1


def test_a_step_filled_by_carried_over_groups_samples_nothing_and_has_no_means(folder: Path):
    verdicts = [ALL_INCORRECT, ALL_INCORRECT, *[MIXED] * 10]
    steps = on_one_rank(Case(prompts_with(verdicts), by_verdicts, prompts=2, steps=4), folder)
    # By hand: none of 2 is mixed; then, at a rate of 1 / 3, 6 are drawn and all are mixed, enough for the next two
    # steps; then the rate is 7 / 9, and 3 are drawn for the 2 that are missing.
    assert [step.calls for step in steps] == [[4, 12], [], [], [6]]
    assert [[group.prompt_id for group in step.batch] for step in steps] == [
        ["set/2", "set/3"],
        ["set/4", "set/5"],
        ["set/6", "set/7"],
        ["set/8", "set/9"],
    ]
    assert [step.metrics["rollout/groups_carried"] for step in steps] == [0, 4, 2, 0]
    for step in steps[1:3]:
        assert "reward/mean" not in step.metrics
        assert step.metrics["rollout/response_tokens"] == step.metrics["rollout/rounds"] == 0


def test_a_set_without_an_informative_group_gives_an_empty_batch(folder: Path):
    case = Case(prompts_with([ALL_INCORRECT, ALL_CORRECT] * 20), by_verdicts, prompts=4, steps=2, max_rounds=2)
    for step in on_one_rank(case, folder):
        assert (step.size, step.batch) == (0, [])
        assert len(step.calls) == 2
        assert step.metrics["rollout/groups_dropped"] == step.metrics["rollout/groups_sampled"] > 4
        assert step.metrics["reward/accuracy"] == 0.5
    small = replace(case, set=case.set[:6], max_rounds=10)
    for step in on_one_rank(small, folder):
        assert step.size == 0
        assert sorted(step.sampled) == [f"set/{i}" for i in range(6)]  # each once, then the step ends


def test_without_dynamic_sampling_one_round_keeps_everything(folder: Path):
    verdicts = [ALL_INCORRECT, ALL_CORRECT, MIXED, ALL_INCORRECT, ALL_CORRECT, MIXED]
    case = Case(prompts_with(verdicts), by_verdicts, prompts=3, steps=2, dynamic=False)
    steps = on_one_rank(case, folder)
    assert [step.calls for step in steps] == [[6], [6]]
    assert [group.prompt_id for step in steps for group in step.batch] == [f"set/{i}" for i in range(6)]
    assert [step.metrics["rollout/groups_dropped"] for step in steps] == [0, 0]


def test_a_grader_that_hangs_costs_one_response_which_counts_as_incorrect(folder: Path):
    verdicts = [(CORRECT, HANG), (INCORRECT, HANG), MIXED]
    case = Case(prompts_with(verdicts), by_verdicts, prompts=2, steps=1, max_rounds=2, timeout_seconds=3.0)
    (step,) = on_one_rank(case, folder)
    assert [(group.prompt_id, group.rewards) for group in step.batch] == [("set/0", [1, -1]), ("set/2", [1, -1])]
    assert step.metrics["reward/failures"] == 2
    assert step.metrics["reward/accuracy"] == pytest.approx(2 / 6)


def test_the_overlong_penalty_changes_rewards_but_not_which_groups_are_kept(folder: Path):
    verdicts = [(CORRECT,) * 11, (CORRECT,) * 10 + (INCORRECT,)]
    case = Case(prompts_with(verdicts), by_verdicts, prompts=1, steps=1, group_size=11, overlong_buffer=10)
    (step,) = on_one_rank(case, folder)
    (group,) = step.batch
    assert group.prompt_id == "set/1"
    # Lengths 10 to 20 under a cap of 20 with a buffer of 10: a tenth a token.
    assert group.rewards == pytest.approx([1 - n / 10 for n in range(10)] + [-2])
    assert group.correct == [True] * 10 + [False]
    assert step.metrics["reward/mean"] == pytest.approx((11 + 10 - 1) / 22 - 0.5)
    assert step.metrics["reward/accuracy"] == pytest.approx(21 / 22)


def stop_and_resume(layout: Layout, folder: Path) -> list[Any]:
    """On each rank: the batch of a step, that of one that was stopped twice and resumed, and the seeds it asked for."""
    import torch.distributed as dist

    from megatron_rlvr.rollout.collector import CollectionStoppedError
    from megatron_rlvr.rollout.saved_groups import restored_form, saved_form

    case = Case(prompts_of([0.5] * 12), by_accuracy, prompts=6, steps=1, group_size=4)
    with joined_process_group(), start_graders(folder) as graders:
        ranks = ranks_of(layout)
        whole = collector_of(case, ranks, graders, ScriptedEngine(case.script)).collect(1)
        state, asked = None, []
        for patience in (5, 7, None):
            engine = ScriptedEngine(case.script)
            taken: list[Any] = []

            stopping = functools.partial(stop_after, patience, taken)
            options = {"generate": functools.partial(generate_until, engine, stopping, taken), "stop_wanted": stopping}
            collector = collector_of(case, ranks, graders, engine, **options)
            if state is not None:
                collector.restore(restored_form(state, case.set))
            try:
                resumed = collector.collect(1)
            except CollectionStoppedError:
                states: list[Any] = [saved_form(collector.state())]
                dist.broadcast_object_list(states)
                state = states[0]
            asked += [(c.prompt_id, c.index) for c in taken]
        return [_content(whole), _content(resumed), asked]


def stop_after(patience: int | None, taken: list[Any]) -> bool:
    return patience is not None and len(taken) >= patience


def generate_until(engine: Any, stopping: Any, taken: list[Any], requests: Any, sampling: Any) -> Any:
    for completion in engine.generate(requests, sampling):
        if stopping():
            return
        taken.append(completion)
        yield completion


def _content(rollout: Any) -> list[Any]:
    measured = {key: value for key, value in rollout.metrics.items() if not math.isnan(value)}
    return [measured] + [
        (f.order, f.group.prompt.id, [c.token_ids.tolist() for c in f.group.completions], f.group.grades)
        for f in rollout.groups
    ]


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
def test_a_stopped_step_resumes_without_sampling_anything_twice(layout: Layout, folder: Path):
    results = on_ranks(stop_and_resume, layout.world_size, layout, folder)
    for whole, resumed, _ in results:
        assert len(whole) > 1
        assert resumed == whole
    asked = [key for _, _, own in results for key in own]
    assert len(asked) == len(set(asked)) >= 24


def all_fail(folder: Path) -> str:
    case = Case(prompts_with([(CRASH, CRASH)] * 4), by_verdicts, prompts=2, steps=1, dynamic=False)
    with joined_process_group(), start_graders(folder) as graders, pytest.raises(InputError) as raised:
        collector_of(case, ranks_of(ONE_RANK), graders, ScriptedEngine(case.script)).collect(1)
    return str(raised.value)


def test_a_reward_function_that_fails_on_every_response_stops_the_step(folder: Path):
    (message,) = on_ranks(all_fail, 1, folder)
    assert "all 4 responses of step 1" in message
    assert "KeyError: 'no such answer'" in message


def test_a_group_is_informative_if_its_scores_differ_and_left_out_completions_do_not_count(folder: Path):
    verdicts = [(SHARE, CORRECT), (SHARE, SHARE), (NOTHING, CORRECT), (NOTHING, NOTHING), (CRASH, CORRECT)]
    (step,) = on_one_rank(Case(prompts_with(verdicts), by_verdicts, prompts=5, steps=1, max_rounds=1), folder)
    assert [(group.prompt_id, group.rewards) for group in step.batch] == [
        ("set/0", [0.25, 1.0]),
        ("set/4", [-1.0, 1.0]),
    ]
    assert step.batch[0].correct == [False, True]
    metrics = step.metrics
    assert metrics["reward/left_out"] == 3
    assert metrics["reward/accuracy"] == 3 / 7
    assert metrics["reward/score"] == (0.25 + 1 + 0.25 + 0.25 + 1 - 1 + 1) / 7
    assert (metrics["reward/failures"], metrics["rollout/groups_dropped"]) == (1, 3)
