"""Summaries, majorities and hints against counts that are made otherwise."""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from statistics import mean, median, stdev

import numpy as np
import pytest

from megatron_rlvr.evaluation.majority import SameByGrader, majorities, majority_correct, same_by_text
from megatron_rlvr.evaluation.records import Record
from megatron_rlvr.evaluation.report import show, shown, tables_of
from megatron_rlvr.evaluation.summary import hints, summarize, summarize_sets
from megatron_rlvr.reward.graders import GraderPool
from megatron_rlvr.types import Prompt


def record(
    problem: str, index: int, answer: str | None, correct: bool = False, *, tokens: int = 5, failure: str | None = None
) -> Record:
    reason = "length" if tokens >= 20 else "stop"
    return Record(problem, index, 0, tokens, reason, "0", answer, correct, float(correct), failure, 0.0)


def random_records(problems: int, completions: int) -> list[Record]:
    random = np.random.default_rng(problems)
    found = []
    for p in range(problems):
        for index in range(completions):
            answer = random.choice(["0", "1", "2", "3", ""])
            failure = "timeout" if random.random() < 0.1 else None
            named = None if answer == "" or failure else str(answer)
            tokens = int(random.integers(1, 21))
            found.append(record(f"set/{p}", index, named, named == "0", tokens=tokens, failure=failure))
    return found


def test_every_metric_is_a_direct_count():
    records = random_records(23, 6)
    table: dict[str, list[Record]] = {f"set/{p}": [r for r in records if r.problem == f"set/{p}"] for p in range(23)}
    summaries = summarize_sets(
        records[::-1],
        {"set": 23, "empty": 4},
        group_size=6,
        pass_at=None,
        majority=majorities(records, same_by_text),
        names_answers=True,
    )
    found = summaries["set"]
    assert found.complete
    assert not summaries["empty"].complete
    assert math.isnan(summaries["empty"].accuracy.value)
    assert found.accuracy.value == pytest.approx(mean(r.correct for r in records))
    assert list(found.pass_at) == [1, 2, 4, 6]
    for k, estimate in found.pass_at.items():
        subsets = [any(r.correct for r in chosen) for own in table.values() for chosen in combinations(own, k)]
        assert estimate.value == pytest.approx(mean(subsets))
    assert found.truncated == mean(r.tokens >= 20 for r in records)
    assert found.no_answer == mean(r.answer is None and r.failure is None for r in records)
    assert found.failed == mean(r.failure is not None for r in records) > 0
    assert (found.tokens_mean, found.tokens_median) == pytest.approx(
        (mean(r.tokens for r in records), median(r.tokens for r in records))
    )
    assert found.tokens_p95 == np.percentile([r.tokens for r in records], 95)
    assert found.majority is not None
    assert found.majority.value == pytest.approx(mean(map(majority_by_count, table.values())))
    metrics = found.metrics()
    assert metrics["accuracy"] == found.accuracy.value
    assert metrics["pass_at_4"] == found.pass_at[4].value
    assert metrics["majority_at_6"] == found.majority.value
    shares: dict[str, list[float]] = {
        "accuracy": [mean(r.correct for r in own) for own in table.values()],
        "score": [mean(r.reward for r in own) for own in table.values()],
        "pass_at_6": [any(r.correct for r in own) for own in table.values()],
        "majority_at_6": [majority_by_count(own) for own in table.values()],
    }
    for name, values in shares.items():
        assert metrics[f"{name}_standard_error"] == pytest.approx(stdev(values) / math.sqrt(23))
    assert "pass_at_4_standard_error" in metrics
    assert summaries["empty"].as_json()["accuracy"] == {"value": None, "standard_error": None, "problems": 0}


def majority_by_count(records: Sequence[Record]) -> float:
    votes = [r.answer for r in records if r.answer is not None]
    most = max(map(votes.count, votes), default=0)
    winners = {answer for answer in votes if votes.count(answer) == most}
    return ("0" in winners) / len(winners) if winners else 0.0


def test_an_unfinished_evaluation_counts_problems_and_not_completions():
    records = [record("s/a", 0, "0", True), *(record("s/b", i, "1") for i in range(4))]
    found = summarize(records, problems=3, group_size=4, pass_at=(1, 4), majority=None)
    assert found.accuracy.value == 0.5
    assert found.pass_at[4].problems == 1, "the other problem has too few completions"
    assert not found.complete
    assert found.no_answer is None


def test_answers_that_the_grader_finds_equal_vote_together():
    answers = ["0.5", r"\frac12", "1/2", "2", "2", r"\sqrt{4}", "4/2", "7"]
    records = [record("s/p", i, answer) for i, answer in enumerate(answers)]
    right = [
        record("s/q", 0, "3", True),
        record("s/q", 1, "6/2", True),
        *(record("s/q", 2 + i, str(i)) for i in range(4)),
    ]
    with GraderPool(workers=1, timeout_seconds=60.0) as graders:
        graded = [graders.submit(Prompt("", np.zeros(0, np.int32), "1/2", ""), text) for text in (r"\boxed{0.5}", "?")]
        assert [(v.result().value, v.result().answer) for v in graded] == [(True, "0.5"), (False, None)]
        same = SameByGrader(graders.submit, None)
        groups: list[list[str]] = []
        for answer in answers:
            equal = [g for g, accepts in zip(groups, same(answer, [g[0] for g in groups]), strict=True) if accepts]
            equal[0].append(answer) if equal else groups.append([answer])
        assert [len(group) for group in groups] == [3, 4, 1]
        assert majority_correct(records, same) == 0.0
        assert majority_correct(right, same) == 1.0, "the texts of the correct answers differ, and each has one vote"
        unlike = list(same("12", ["21", "1{2", "012", "12"]))
        assert unlike == [False, False, True, True]
        thinks = SameByGrader(graders.submit, "</think>")
        assert list(thinks("0.5", ["1/2"])) == [True]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([], 0.0),
        ([None, None], 0.0),
        (["0"], 1.0),
        (["0", "1"], 0.5),
        (["0", "1", "2"], 1 / 3),
        (["0", "0", "1"], 1.0),
        (["0", "1", "1", None, None, None], 0.0),
        (["0", "0", "1", "1", "2"], 0.5),
    ],
)
def test_a_tie_counts_by_the_probability_that_the_correct_answer_is_drawn(answers: list[str | None], expected: float):
    records = [record("s/p", i, answer, answer == "0") for i, answer in enumerate(answers)]
    assert majority_correct(records, same_by_text) == pytest.approx(expected)


def test_few_comparisons_are_made():
    asked = []

    def same(answer: str, others: Sequence[str]) -> Iterator[bool]:
        asked.append((answer, list(others)))
        return iter([answer == other for other in others])

    records = [record("s/p", i, answer, answer == "0") for i, answer in enumerate("0011223300")]
    majority_correct(records, same)
    assert asked == [("1", []), ("2", ["1"]), ("3", ["1", "2"])], "each text once, and the correct one never"


def hints_of(records: list[Record], prompt: str) -> list[str]:
    summary = summarize(records, problems=4, group_size=1, pass_at=(1,), majority={r.problem: 0.0 for r in records})
    return hints(summary, prompt=prompt, max_response_tokens=20)


def test_a_hint_names_the_cause_and_the_setting():
    none = [record(f"s/{i}", 0, None) for i in range(4)]
    (hint,) = hints_of(none, "How many?")
    assert hint.startswith(
        "100 % of the responses have no answer, and the prompt does not ask for a box; set data.suffix"
    )
    (hint,) = hints_of(none, r"How many? Put it in \boxed{}.")
    assert hint.endswith("although the prompt asks for a box; read the records")
    some = [record(f"s/{i}", 0, None if i < 2 else "1", tokens=20 if i < 2 else 3) for i in range(4)]
    (hint,) = hints_of(some, "")
    assert hint == "50 % of the responses were truncated; raise rollout.max_response_tokens=20"
    (hint,) = hints_of([record(f"s/{i}", 0, None, tokens=20) for i in range(4)], "")
    assert "no stop token ended them; add the right one to rollout.stop, or raise the cap" in hint
    (hint,) = hints_of([record(f"s/{i}", 0, "1", failure="timeout after 2 s" if i else None) for i in range(4)], "")
    assert hint.startswith("graders reached no verdict on 75 % of the responses (first: timeout after 2 s); raise")
    assert hints_of([record(f"s/{i}", 0, "1") for i in range(4)], "") == []


def test_the_figures_of_many_sets_are_whole_on_a_terminal_of_100_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "100")
    sets = {f"set_{i}": [record(f"set_{i}/{p}", 0, "0", p % (i + 2) == 0) for p in range(60)] for i in range(9)}
    records = [r for own in sets.values() for r in own]
    summaries = summarize_sets(
        records,
        dict.fromkeys(sets, 60),
        group_size=1,
        pass_at=None,
        majority=majorities(records, same_by_text),
        names_answers=True,
    )
    show(tables_of(summaries, tokens_per_second=1234.0), ["the end"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert [name for line in lines for name in line.split() if name in sets] == list(sets)
    accuracies = [line.split("%", 1)[1].split("  ") for line in lines if line.startswith("avg@1")]
    cells = [cell.strip() for row in accuracies for cell in row if cell.strip()]
    assert cells == [shown(s.accuracy) for s in summaries.values()]
    assert lines[-2].split() == ["tokens/s", "(all", "sets)", "1,234"]
    assert lines[-1] == "the end"
