"""The cursor that leaves out prompts by their pass rates: what it draws, and that a resumed one draws the same."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlvr.config import DifficultySettings
from megatron_rlvr.data.cursor import PromptCursor
from megatron_rlvr.data.difficulty import DifficultyCursor
from megatron_rlvr.data.prompts import FilePrompts, PromptSet
from megatron_rlvr.types import Prompt

RULE: dict[str, Any] = {"retire_above": 0.7, "rest_below": 0.3, "rest_steps": 3}


def make_set(*counts: int) -> PromptSet:
    prompts: list[Prompt] = []
    files: list[FilePrompts] = []
    for name, count in zip("abc", counts, strict=False):
        files.append(FilePrompts(name, len(prompts), count, float(count), 0))
        prompts += [Prompt(f"{name}/{i}", np.zeros(1, np.int32), "1", name) for i in range(count)]
    return PromptSet(prompts, tuple(files))


def run(cursor: DifficultyCursor, steps: range, size: int, skill: np.ndarray, seed: int) -> list[list[str]]:
    """Draw prompts for some steps and record pass rates that depend on prompt and step only."""
    drawn = []
    for step in steps:
        ids = [prompt.id for prompt in cursor.take(size)]
        drawn.append(ids)
        random = np.random.default_rng([seed, step])
        correct = dict(zip("abc", random.permutation(3), strict=True))
        cursor.record(step, [(i, min(4, int(skill[int(i[2:])]) + int(correct[i[0]])), 4) for i in ids])
    return drawn


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 6),
    st.integers(0, 12),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_a_resumed_cursor_draws_what_an_uninterrupted_one_does(counts, size, stop, shuffle, seed):
    prompt_set = make_set(*counts)
    size = min(size, len(prompt_set))
    skill = np.random.default_rng(seed).integers(0, 4, 9)
    expected = run(DifficultyCursor(prompt_set, seed, shuffle, **RULE), range(1, 13), size, skill, seed)
    first = DifficultyCursor(prompt_set, seed, shuffle, **RULE)
    before = run(first, range(1, stop + 1), size, skill, seed)
    saved = json.dumps(first.state())
    second = DifficultyCursor(prompt_set, seed, shuffle, **RULE)
    second.take(1)
    second.restore(json.loads(saved))
    assert json.dumps(second.state()) == saved
    peeked = [prompt.id for prompt in second.peek(size)]
    assert json.dumps(second.state()) == saved
    after = run(second, range(stop + 1, 13), size, skill, seed)
    assert before + after == expected
    assert not after or after[0] == peeked
    assert second.drawn == 12 * size
    assert all(len(set(ids)) == size for ids in expected)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(4, 12), st.integers(1, 4), st.integers(0, 2**32))
def test_no_prompt_is_drawn_while_it_is_retired_or_rests_if_enough_others_are_there(count, size, seed):
    prompt_set = make_set(count)
    random = np.random.default_rng(seed)
    cursor = DifficultyCursor(prompt_set, seed, **RULE)
    rates: dict[str, tuple[float, int]] = {}
    for step in range(1, 15):
        out = {i for i, (rate, at) in rates.items() if rate > 0.7 or (rate < 0.3 and step - at <= 3)}
        ids = [prompt.id for prompt in cursor.take(size)]
        others = count - len(out)
        assert sum(i not in out for i in ids) == min(size, others)
        found = {i: int(random.integers(5)) for i in ids}
        cursor.record(step, [(i, correct, 4) for i, correct in found.items()])
        rates |= {i: (correct / 4, step) for i, correct in found.items()}
        retired = sum(rate > 0.7 for rate, _ in rates.values())
        resting = sum(rate < 0.3 and step + 1 - at <= 3 for rate, at in rates.values())
        new = count - len(rates)
        assert cursor.metrics() == {
            "data/prompts_retired": retired,
            "data/prompts_resting": resting,
            "data/prompts_new": new,
            "data/prompts_active": count - retired - resting - new,
        }


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), min_size=4, max_size=8),
    st.integers(0, 2**32),
)
def test_no_prompt_is_drawn_twice_in_a_step_and_a_step_resumed_in_its_middle_is_the_same(counts, steps, seed):
    prompt_set = make_set(*counts)
    cursor = DifficultyCursor(prompt_set, seed, **RULE)
    random = np.random.default_rng(seed)
    for step, parts in enumerate(steps, start=1):
        most = cursor.most_in_a_step(parts[0])
        drawn: list[str] = []
        for part in parts:
            peeked = [prompt.id for prompt in cursor.peek(most - len(drawn))]
            again = DifficultyCursor(prompt_set, seed, **RULE)
            again.restore(json.loads(json.dumps(cursor.state())))
            size = min(part, most - len(drawn))
            ids = [prompt.id for prompt in cursor.take(size)]
            assert ids == peeked[:size] == [prompt.id for prompt in again.take(size)]
            drawn += ids
        assert len(set(drawn)) == len(drawn)
        cursor.record(step, [(i, int(random.integers(5)), 4) for i in drawn])


def test_with_most_prompts_retired_no_step_of_two_draws_has_one_twice():
    cursor = DifficultyCursor(make_set(100), 0, retire_above=0.7)
    cursor.record(1, [(f"a/{i}", 4, 4) for i in range(90)])
    for step in range(2, 102):
        ids = [prompt.id for prompt in cursor.take(4) + cursor.take(4)]
        assert len(set(ids)) == 8
        assert all(int(i[2:]) >= 90 for i in ids)
        cursor.record(step, [])


def test_the_others_are_drawn_in_the_order_that_they_have_without_difficulty():
    prompt_set = make_set(7, 5)
    plain = PromptCursor(prompt_set, 3)
    one_epoch = [prompt.id for prompt in plain.take(12)]
    cursor = DifficultyCursor(prompt_set, 3, retire_above=0.5)
    assert [prompt.id for prompt in cursor.take(12)] == one_epoch
    retired = one_epoch[::3]
    cursor.record(1, [(i, 3, 4) for i in retired])
    second = [prompt.id for prompt in plain.take(12)]
    assert [prompt.id for prompt in cursor.take(8)] == [i for i in second if i not in retired]
    cursor.record(2, [])
    third = [prompt.id for prompt in plain.take(12)]
    drawn = [i for i in third if i not in retired]
    assert [prompt.id for prompt in cursor.peek(5)] == drawn[:5]
    assert [prompt.id for prompt in cursor.peek(12)] == drawn + [i for i in third if i in retired]
    assert [prompt.id for prompt in cursor.take(12)] == [prompt.id for prompt in cursor.peek(0)] + drawn + [
        i for i in third if i in retired
    ]
    assert cursor.most_in_a_step(2) == 8
    assert cursor.most_in_a_step(10) == 10


def test_a_pass_rate_at_the_bound_neither_retires_nor_rests():
    cursor = DifficultyCursor(make_set(4), 0, False, retire_above=0.29, rest_below=0.07, rest_steps=1)
    cursor.record(1, [("a/0", 29, 100), ("a/1", 7, 100), ("a/2", 30, 100), ("a/3", 6, 100)])
    metrics = cursor.metrics()
    assert (metrics["data/prompts_retired"], metrics["data/prompts_resting"]) == (1, 1)
    assert [prompt.id for prompt in cursor.take(2)] == ["a/0", "a/1"]


def test_a_checkpoint_without_pass_rates_continues_at_its_place_and_forgets_prompts_that_are_gone():
    prompt_set = make_set(6)
    plain = PromptCursor(prompt_set, 1)
    plain.take(4)
    cursor = DifficultyCursor(prompt_set, 1, **RULE)
    cursor.restore(json.loads(json.dumps(plain.state())))
    assert cursor.drawn == 4
    assert [p.id for p in cursor.take(2)] == [p.id for p in plain.take(2)]
    cursor.record(1, [("a/5", 4, 4), ("a/0", 4, 4)])
    fewer = DifficultyCursor(make_set(5), 1, accept_changes=True, **RULE)
    fewer.restore(cursor.state())
    assert fewer.metrics()["data/prompts_retired"] == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "data.difficulty: has no effect without retire_above or rest_below; set one"),
        ({"rest_below": 0.1}, "data.difficulty.rest_below=0.1: needs data.difficulty.rest_steps; set it"),
        ({"retire_above": 0.9, "rest_steps": 3}, "data.difficulty.rest_steps=3: needs data.difficulty.rest_below"),
        ({"retire_above": 0.2, "rest_below": 0.3, "rest_steps": 1}, "data.difficulty.rest_below=0.3: above"),
    ],
)
def test_settings_that_do_nothing_or_contradict_each_other_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DifficultySettings.model_validate(values)
