"""Tests of the cursor over a prompt set: shares of files, epochs, distinct ids, and exact resumption."""

import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlvr.data.cursor import PromptCursor
from megatron_rlvr.data.prompts import FilePrompts, PromptSet
from megatron_rlvr.data.rows import DataError
from megatron_rlvr.types import Prompt


def make_set(counts, weights=None, names="abcdefgh"):
    prompts: list[Prompt] = []
    files: list[FilePrompts] = []
    for name, count, weight in zip(names, counts, weights or counts, strict=False):
        files.append(FilePrompts(name, len(prompts), count, float(weight), 0))
        prompts += [Prompt(f"{name}/{i}", np.zeros(1, np.int32), "1", name) for i in range(count)]
    return PromptSet(prompts, tuple(files))


def ids(prompts):
    return [prompt.id for prompt in prompts]


@st.composite
def sets_and_calls(draw):
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    weights = draw(st.one_of(st.none(), st.lists(st.integers(1, 20), min_size=len(counts), max_size=len(counts))))
    calls = draw(st.lists(st.integers(0, sum(counts)), min_size=1, max_size=12))
    return make_set(counts, weights), calls


@settings(deadline=None, derandomize=True, max_examples=300)
@given(sets_and_calls(), st.integers(0, 2**40), st.booleans(), st.data())
def test_a_resumed_cursor_returns_what_an_uninterrupted_one_does(case, seed, shuffle, data):
    prompt_set, calls = case
    uninterrupted = PromptCursor(prompt_set, seed, shuffle)
    expected = [ids(uninterrupted.take(n)) for n in calls]
    stop = data.draw(st.integers(0, len(calls)))
    first = PromptCursor(prompt_set, seed, shuffle)
    before = [ids(first.take(n)) for n in calls[:stop]]
    state = first.state()
    saved = json.dumps(state)
    first.take(len(prompt_set))
    assert json.dumps(state) == saved  # a copy, which later calls do not change
    second = PromptCursor(prompt_set, seed, shuffle)
    second.take(data.draw(st.integers(0, len(prompt_set))))  # restoring replaces this position
    second.restore(json.loads(saved))
    assert json.dumps(second.state()) == saved
    assert before + [ids(second.take(n)) for n in calls[stop:]] == expected
    assert second.epoch == uninterrupted.epoch


@settings(deadline=None, derandomize=True, max_examples=300)
@given(sets_and_calls(), st.integers(0, 2**40), st.booleans())
def test_a_call_returns_distinct_ids_and_an_epoch_of_a_file_has_each_prompt_once(case, seed, shuffle):
    prompt_set, calls = case
    cursor = PromptCursor(prompt_set, seed, shuffle)
    drawn_ids = []
    for n in calls:
        taken = ids(cursor.take(n))
        assert len(taken) == len(set(taken)) == n
        drawn_ids += taken
    for file in prompt_set.files:
        own = [id for id in drawn_ids if id.startswith(file.name + "/")]
        for start in range(0, len(own), file.count):
            epoch = own[start : start + file.count]
            assert len(set(epoch)) == len(epoch)


def test_one_pass_with_default_weights_returns_every_prompt_once():
    for counts in ([5], [30, 40, 1319], [1, 1, 1], [7, 3, 11]):
        prompt_set = make_set(counts)
        cursor = PromptCursor(prompt_set, seed=3)
        for epoch in (1, 2, 3):
            seen: list[str] = []
            while len(seen) < len(prompt_set):
                seen += ids(cursor.take(min(4, len(prompt_set) - len(seen))))
            assert sorted(seen) == sorted(ids(prompt_set.prompts))
            assert cursor.epoch == epoch


def test_no_file_is_ever_one_prompt_behind_the_share_of_its_weight():
    weights = [0.5, 0.3, 0.2]
    cursor = PromptCursor(make_set([100, 1000, 50], weights), seed=0)
    drawn: Counter[str] = Counter()
    for n in range(1, 2001):
        (prompt,) = cursor.take(1)
        drawn[prompt.source] += 1
        for name, weight in zip("abc", weights, strict=True):
            assert drawn[name] >= int(Fraction(str(weight)) * n)
    assert drawn == {"a": 1000, "b": 600, "c": 400}


def test_of_files_with_equal_shares_the_first_is_next():
    cursor = PromptCursor(make_set([2, 2], [1, 1]), seed=0, shuffle=False)
    assert ids(cursor.take(4)) == ["a/0", "b/0", "a/1", "b/1"]


def test_the_file_furthest_behind_its_share_is_next():
    cursor = PromptCursor(make_set([9, 9], [3, 1]), seed=0, shuffle=False)
    # (drawn + 1) / weight: a has 1/3, 2/3, 1 (a tie with b's 1, which the first file wins), then 4/3 against 1.
    assert ids(cursor.take(5)) == ["a/0", "a/1", "a/2", "b/0", "a/3"]


def test_without_shuffling_every_epoch_has_the_order_of_the_file():
    cursor = PromptCursor(make_set([3]), seed=0, shuffle=False)
    assert [ids(cursor.take(1))[0] for _ in range(7)] == ["a/0", "a/1", "a/2", "a/0", "a/1", "a/2", "a/0"]


def test_without_shuffling_nothing_is_ever_skipped():
    cursor = PromptCursor(make_set([3]), seed=0, shuffle=False)
    drawn_ids = [ids(cursor.take(n)) for n in (2, 2, 3, 1)]
    assert drawn_ids == [["a/0", "a/1"], ["a/2", "a/0"], ["a/1", "a/2", "a/0"], ["a/1"]]
    assert cursor.state()["files"][0]["skipped"] == []


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.integers(1, 8), st.lists(st.integers(0, 8), max_size=15), st.integers(0, 1000))
def test_a_prompt_that_would_repeat_in_a_call_is_first_in_the_next_call(count, sizes, seed):
    calls = [min(n, count) for n in sizes]
    # Calls of one prompt skip none, so they show the order of each epoch.
    single = PromptCursor(make_set([count]), seed)
    orders = [[single.take(1)[0].id for _ in range(count)] for _ in range(sum(calls) // count + 1)]
    # Oracle: the first of the epoch's remaining prompts, in order, that is not in this call.
    remaining, expected = orders.pop(0), []
    for n in calls:
        call = []
        for _ in range(n):
            call.append(next(id for id in remaining if id not in call))
            remaining.remove(call[-1])
            remaining = remaining or (orders.pop(0) if orders else [])
        expected.append(call)
    cursor = PromptCursor(make_set([count]), seed)
    assert [ids(cursor.take(n)) for n in calls] == expected


def test_a_small_file_with_a_large_weight_gives_all_its_prompts_to_each_call():
    cursor = PromptCursor(make_set([2, 20], [1000, 1]), seed=0)
    for _ in range(5):
        assert Counter(prompt.source for prompt in cursor.take(6)) == {"a": 2, "b": 4}
    assert all(len(file["skipped"]) <= 2 for file in cursor.state()["files"])


def test_the_shuffle_depends_on_epoch_seed_and_file_name_only():
    def epochs(seed, name="a"):
        cursor = PromptCursor(make_set([50], names=[name]), seed)
        return [[id.split("/")[1] for id in ids(cursor.take(50))] for _ in range(3)]

    orders = [order for seed, name in [(0, "a"), (1, "a"), (0, "b")] for order in epochs(seed, name)]
    assert len({tuple(order) for order in orders}) == 9
    assert epochs(0) == epochs(0)
    single_file = ids(PromptCursor(make_set([50]), 0).take(50))
    with_another_file = [id for id in ids(PromptCursor(make_set([50, 50]), 0).take(100)) if id.startswith("a/")]
    assert single_file == with_another_file


def test_the_shuffle_of_a_seed_never_changes():
    # Recorded values. A change would silently reorder the data of every resumed run.
    assert ids(PromptCursor(make_set([8]), seed=0).take(8)) == [f"a/{i}" for i in (1, 2, 5, 4, 7, 0, 6, 3)]


def test_all_prompts_are_equally_likely_to_be_first():
    first = Counter(PromptCursor(make_set([5]), seed).take(1)[0].id for seed in range(2000))
    assert set(first) == {f"a/{i}" for i in range(5)}
    assert all(abs(count - 400) < 90 for count in first.values())  # five standard deviations


def test_requesting_more_prompts_than_the_set_has_is_an_error():
    cursor = PromptCursor(make_set([2, 3]), seed=0)
    with pytest.raises(DataError, match="6 prompts were requested at once, but the set has 5"):
        cursor.take(6)
    assert cursor.take(0) == []
    assert len(cursor.take(5)) == 5


def test_a_negative_seed_is_refused():
    with pytest.raises(DataError, match=r"run\.seed=-1: negative"):
        PromptCursor(make_set([2]), seed=-1)


def test_a_changed_data_set_is_an_error_that_leaves_the_cursor_unchanged():
    cursor = PromptCursor(make_set([4, 3], [2, 1]), seed=5)
    cursor.take(3)
    state = cursor.state()
    cases = [
        (PromptCursor(make_set([4, 2], [2, 1]), 5), "the number of prompts of b is 2, but 3 in the checkpoint"),
        (PromptCursor(make_set([4, 3], [2, 2]), 5), "the weight of b is 2.0, but 1.0 in the checkpoint"),
        (PromptCursor(make_set([4, 3], [2, 1], "ac"), 5), "data.train: the files are a, c, but a, b in the checkpoint"),
        (PromptCursor(make_set([4], [2]), 5), "data.train: the files are a, but a, b in the checkpoint"),
        (PromptCursor(make_set([4, 3], [2, 1]), 6), "run.seed=6: the checkpoint has 5"),
        (PromptCursor(make_set([4, 3], [2, 1]), 5, shuffle=False), "data.shuffle=False: the checkpoint has True"),
    ]
    for other, message in cases:
        before = other.state()
        with pytest.raises(DataError, match=message):
            other.restore(state)
        assert other.state() == before
