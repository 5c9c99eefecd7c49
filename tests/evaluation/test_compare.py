"""Comparisons of two evaluations: pairing, numbers against SciPy, words, and unlike settings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats as scipy_stats

from megatron_rlvr.evaluation.compare import _lines_of_set, compare, compare_sets, unlike_settings
from megatron_rlvr.evaluation.folder import write_description
from megatron_rlvr.evaluation.records import Record, RecordsError, RecordWriter


def records_of(verdicts: np.ndarray, name: str = "aime24", start: int = 0) -> list[Record]:
    return [
        Record(f"{name}/{start + p}", i, 0, 5, "stop", "1", None, bool(verdict), float(verdict), None, 0.0)
        for p, row in enumerate(verdicts)
        for i, verdict in enumerate(row)
    ]


def two_models(problems: int = 30, completions: int = 16, better: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(4)
    rates = random.beta(0.4, 0.6, size=(problems, 1))
    first = random.random((problems, completions)) < rates
    return first, random.random((problems, completions)) < np.clip(rates + better, 0, 1)


KEYS = {"prompt_key": None, "answer_key": None, "id_key": None}


def describe(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "target": {"path": "/models/a", "step": None},
        "prompts": {"template": "auto", "suffix": ""},
        "sampling": {"temperature": 1.0, "group_size": 16},
        "reward": {"function": "math", "correct": 1.0, "incorrect": -1.0, "answer_after": None},
        "sets": {"aime24": {"path": "/data/aime24.jsonl", "problems": 30, "answers": "12ab", **KEYS}},
    }
    return {key: value | changes.get(key, {}) for key, value in base.items()}


def write(folder: Path, records: list[Record], **changes: Any) -> Path:
    write_description(folder, describe(**changes))
    with RecordWriter(folder, 0) as writer:
        for record in records:
            writer.write(record, "")
    return folder


def test_numbers_are_those_of_paired_tests():
    first, second = two_models()
    found = compare_sets(records_of(first), records_of(second)[::-1])
    d = second.mean(axis=1) - first.mean(axis=1)
    assert found.difference.value == pytest.approx(d.mean())
    assert found.difference.error == pytest.approx(scipy_stats.sem(d))
    assert (found.up, found.down) == ((d > 0).sum(), (d < 0).sum())
    assert found.sign_p == pytest.approx(scipy_stats.binomtest(found.up, found.up + found.down).pvalue)
    expected = scipy_stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=10_000, random_state=np.random.default_rng(2)
    )
    assert found.permutation.p == pytest.approx(expected.pvalue, abs=0.01)
    mostly_first, mostly_second = first.mean(axis=1) > 0.5, second.mean(axis=1) > 0.5
    assert [int(p.split("/")[1]) for p in found.flipped_up] == list(np.flatnonzero(~mostly_first & mostly_second))
    assert [int(p.split("/")[1]) for p in found.flipped_down] == list(np.flatnonzero(mostly_first & ~mostly_second))
    assert found.interval is not None
    assert found.interval[0] < found.difference.value < found.interval[1]
    assert found.permutation.significant


def test_problems_that_only_one_evaluation_has_are_left_out():
    first, second = two_models(10)
    found = compare_sets(records_of(first), records_of(second[4:], start=4) + records_of(second[:3], start=10))
    assert found.problems == [f"aime24/{p}" for p in range(4, 10)]
    again = compare_sets(records_of(first)[::-1], records_of(second[4:], start=4)[::-1])
    assert again.interval == found.interval, "whatever the order in which responses were graded"
    assert (found.only_first, found.only_second) == (4, 3)
    assert found.difference.value == pytest.approx(second[4:].mean() - first[4:].mean())
    with pytest.raises(RecordsError, match="no problem is in both"):
        compare_sets(records_of(first), records_of(second, start=10))


def test_equal_models_are_called_equal_as_often_as_the_level_says():
    significant = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        rates = random.beta(0.4, 0.6, size=(20, 1))
        a, b = (random.random((20, 2)) < rates for _ in range(2))
        significant += compare_sets(records_of(a), records_of(b)).permutation.significant
    assert significant <= 0.09 * 200


def test_the_report_says_what_differs_how_sure_it_is_and_what_could_be_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    first, second = two_models()
    a = write(tmp_path / "a", records_of(first))
    b = write(tmp_path / "b", records_of(second), sampling={"temperature": 0.6}, target={"path": "/models/b"})
    assert compare([a, b, a], as_json=False) == 0
    text = capsys.readouterr().out
    assert "unlike settings: sampling.temperature: 1.0 in A, 0.6 in B" in text
    assert "/models" not in text, "that the models differ is the point"
    found = compare_sets(records_of(first), records_of(second))
    assert "aime24: 30 problems x 16 completions" in text
    assert f"better {found.up}, worse {found.down}, equal {30 - found.up - found.down}" in text
    assert f"solved      {len(found.flipped_up)}: aime24/" in text
    noise, changed = f"{100 * found.permutation.smallest:.1f}", found.up + found.down
    assert (
        "B is better than A, at the level of 5 %. If the direction of each difference were chance, these 30 problems, "
        f"{changed} of which differ, would show {noise} points or more in fewer than 1 of 20 comparisons\n"
    ) in text
    warning = "a difference may come from these settings, and not from the models"
    assert text.count(warning) == 1, "not for A with itself"
    assert f"no difference is shown: no problem differs, and at the level {TAKES}" in text, "A with itself"
    assert "not complete" not in text
    part = write(tmp_path / "part", records_of(second)[:70])
    assert compare([a, part], as_json=False) == 0
    text = capsys.readouterr().out
    assert f"B  {part}  (not complete: 70 of 480 completions)\n" in text
    assert "aime24: 5 problems x 16, 6 completions" in text
    assert compare([a, b], as_json=True) == 0
    content = json.loads(capsys.readouterr().out)
    assert content[0]["complete"] == [True, True]
    assert content[0]["sets"]["aime24"]["difference"] == pytest.approx(found.difference.value)
    assert content[0]["sets"]["aime24"]["flipped_up"] == found.flipped_up


TAKES = "of 5 % it takes at least 6 that differ"


@pytest.mark.parametrize(
    ("first", "second", "difference", "meaning"),
    [
        (
            [[0]],
            [[1]],
            "+100.0 points, no interval (one problem)",
            f"only 1 of 1 problem differs, and at the level {TAKES}",
        ),
        ([[1]], [[1]], "+0.0 points, no interval (one problem)", f"no problem differs, and at the level {TAKES}"),
        (
            [[0, 1]] * 40,
            [[1, 0]] * 40,
            "+0.0 points, no interval (the same for every problem)",
            f"no problem differs, and at the level {TAKES}",
        ),
        (
            [[0, 0]] * 5,
            [[1, 0]] * 5,
            "+50.0 points, no interval (the same for every problem)",
            f"only 5 of 5 problems differ, and at the level {TAKES}",
        ),
        (
            [[0]] * 30,
            [[1]] * 5 + [[0]] * 25,
            "+16.7 points, 95 % interval +3.3 to +30.0",
            f"only 5 of 30 problems differ, and at the level {TAKES}. The interval does not contain 0, but it is "
            "approximate; the permutation test decides",
        ),
        (
            [[0, 0]] * 8,
            [[1, 0]] * 8,
            "+50.0 points, no interval (the same for every problem)",
            "B is better than A, at the level of 5 %. If the direction of each difference were chance, these 8 "
            "problems, 8 of which differ, would show 50.0 points or more in fewer than 1 of 20 comparisons",
        ),
        (  # 7 of 8 changes up: p = 2 x 9 / 2^8 = 0.070, which the interval does not show
            [[0]] * 7 + [[1]] + [[0]] * 22,
            [[1]] * 7 + [[0]] * 23,
            "+20.0 points, 95 % interval +3.3 to +36.7",
            "no difference is shown. With these 30 problems, 8 of which differ, a difference below 26.7 points is "
            "noise; a true difference of 38.6 points would be found about four times out of five. The interval does "
            "not contain 0, but it is approximate; the permutation test decides",
        ),
        (  # even 100 points would be significant only if all six problems show them
            [[0]] * 3 + [[1]] * 3,
            [[1]] * 3 + [[0]] * 3,
            "+0.0 points, 95 % interval -66.7 to +66.7",
            "no difference is shown. With these 6 problems, 6 of which differ, a difference below 100.0 points is "
            "noise",
        ),
    ],
)
def test_the_words_are_true_of_few_problems_and_agree_with_the_numbers(
    first: list[list[int]], second: list[list[int]], difference: str, meaning: str
):
    found = compare_sets(records_of(np.array(first)), records_of(np.array(second)))
    lines = list(_lines_of_set("aime24", found))
    assert f"  difference  {difference}" in lines
    assert lines[-1].removeprefix("  meaning     ").removeprefix("no difference is shown: ") == meaning
    assert (found.as_json()["interval"] is None) == ("no interval" in difference)
    json.dumps(found.as_json(), allow_nan=False)


def test_settings_are_unlike_if_they_change_what_is_measured():
    assert unlike_settings(describe(), describe(target={"path": "/models/b", "step": 40})) == []
    precise = describe(target={"dtype": "float32"})
    assert unlike_settings(describe(target={"dtype": "bfloat16"}), precise) == [
        'target.dtype: "bfloat16" in A, "float32" in B'
    ]
    moved = {"aime24": {"path": "/other.jsonl", "problems": 30, "answers": "12ab", "prompt_key": "problem"}}
    assert unlike_settings(describe(), describe(sets=moved)) == []
    changed = {"aime24": {"path": "/data/aime24.jsonl", "problems": 30, "answers": "ffff", "prompt_key": None}}
    assert unlike_settings(describe(), describe(sets=changed)) == ['sets.aime24.answers: "12ab" in A, "ffff" in B']
    assert unlike_settings(describe(), describe(sets={"math500": {"problems": 500}})) == []
    assert unlike_settings(describe(), describe(prompts={"suffix": "!"})) == ['prompts.suffix: "" in A, "!" in B']


def test_what_cannot_be_compared_is_refused(tmp_path: Path):
    first, _ = two_models(5)
    a = write(tmp_path / "a", records_of(first))
    other = describe()
    other["sets"] = {"math500": other["sets"]["aime24"]}
    write(tmp_path / "other", records_of(first, "math500"))
    write_description(tmp_path / "other", other)
    with pytest.raises(RecordsError, match=r"have no set in common \(aime24; math500\)"):
        compare([a, tmp_path / "other"], as_json=False)
    empty = write(tmp_path / "empty", [])
    with pytest.raises(RecordsError, match="empty has no records yet; run its evaluation"):
        compare([a, empty], as_json=False)
    with pytest.raises(RecordsError, match="is no evaluation"):
        compare([a, tmp_path / "nothing"], as_json=False)
