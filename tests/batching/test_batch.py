"""Packing against a loop over tokens, the planners against what they promise, trimming against its definition."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlvr.batching.batch import (
    MicroBatch,
    Packing,
    Sample,
    cut,
    micro_batch_plan,
    micro_batches_needed,
    pack,
    sample_and_position,
    spread,
)
from megatron_rlvr.batching.trim import Work, trim


def sample(number, prompt, response, advantage=0.5):
    """Log-probabilities that name the sample and the position: 2.03 is position 3 of sample 2, negated."""
    logp = -(number + 0.01 * np.arange(len(response)))
    return Sample(
        number,
        np.array(prompt, dtype=np.int32),
        np.array(response, dtype=np.int32),
        logp.astype(np.float32),
        advantage,
        weight_versions=np.arange(len(response), dtype=np.int32),
    )


def test_a_packed_stream_is_aligned_to_the_token():
    """Two sequences written out by hand: prompt 1 2 3 response 4 5, and prompt 6 response 7 8 9."""
    packed = pack([sample(5, [1, 2, 3], [4, 5], 0.5), sample(2, [6], [7, 8, 9], -2.0)], pad_multiple=4)
    assert packed.tokens.tolist() == [1, 2, 3, 4, 6, 7, 8, 0]
    assert packed.targets.tolist() == [2, 3, 4, 5, 7, 8, 9, 0]
    assert packed.cu_seqlens.tolist() == [0, 4, 7, 8]
    assert packed.max_length == 4
    assert packed.rows.tolist() == [2, 3, 4, 5, 6]  # they predict 4 5 7 8 9
    assert packed.targets[packed.rows].tolist() == [4, 5, 7, 8, 9]
    assert packed.sequence.tolist() == [0, 0, 1, 1, 1]
    assert packed.token_ids.tolist() == [5 << 20, (5 << 20) + 1, 2 << 20, (2 << 20) + 1, (2 << 20) + 2]
    assert packed.advantages.tolist() == [0.5, 0.5, -2.0, -2.0, -2.0]
    np.testing.assert_allclose(packed.rollout_logp, [-5.0, -5.01, -2.0, -2.01, -2.02], rtol=1e-6)
    dtypes = {name: getattr(packed, name).dtype for name in ("tokens", "cu_seqlens", "rows", "rollout_logp")}
    assert dtypes == {
        "tokens": torch.int64,
        "cu_seqlens": torch.int32,
        "rows": torch.int64,
        "rollout_logp": torch.float32,
    }


def test_padding_ends_each_sequence_and_then_the_stream_and_no_vector_sees_it():
    """The same two sequences, of 4 and 3 positions, each padded to 6, and the stream from 12 to 24."""
    packed = pack([sample(5, [1, 2, 3], [4, 5]), sample(2, [6], [7, 8, 9])], pad_multiple=8, sequence_multiple=6)
    assert packed.tokens.tolist() == [1, 2, 3, 4, 0, 0, 6, 7, 8, 0, 0, 0] + 12 * [0]
    assert packed.targets.tolist() == [2, 3, 4, 5, 0, 0, 7, 8, 9, 0, 0, 0] + 12 * [0]
    assert packed.cu_seqlens.tolist() == [0, 6, 12, 24]
    assert packed.max_length == 12
    assert packed.rows.tolist() == [2, 3, 6, 7, 8]
    assert packed.targets[packed.rows].tolist() == [4, 5, 7, 8, 9]
    assert packed.sequence.tolist() == [0, 0, 1, 1, 1]
    assert {len(packed.token_ids), len(packed.advantages), len(packed.rollout_logp)} == {5}


_TOKENS = st.lists(st.integers(0, 200_000), min_size=1, max_size=7)
_SAMPLES = st.lists(st.tuples(_TOKENS, _TOKENS, st.floats(-2, 2, width=32)), max_size=6)


@settings(deadline=None)
@given(parts=_SAMPLES, pad_multiple=st.sampled_from([1, 2, 4, 8]), sequence_multiple=st.sampled_from([1, 4, 6]))
def test_unpacking_a_stream_gives_the_samples_back(parts, pad_multiple, sequence_multiple):
    samples = [sample(7 * i, *part) for i, part in enumerate(parts)]
    packed = pack(samples, pad_multiple, sequence_multiple)
    assert len(packed.tokens) % pad_multiple == 0
    assert packed.positions == sum(s.input_length for s in samples)
    lengths = np.diff(packed.cu_seqlens).tolist()
    assert all(length % sequence_multiple == 0 for length in lengths)
    assert packed.max_length == max(lengths)
    for length, original in zip(lengths, samples, strict=False):
        assert 0 <= length - original.input_length < sequence_multiple
    tail = sum(lengths[len(samples) :])
    assert 0 <= tail < max(2, math.lcm(pad_multiple, sequence_multiple) + (not samples))
    assert len(set(packed.token_ids.tolist())) == len(packed.token_ids) == len(packed.rows)
    for i, original in enumerate(samples):
        found = unpacked(packed, i)
        assert (found.number, found.advantage) == (original.number, original.advantage)
        for name in ("prompt_ids", "response_ids", "rollout_logp"):
            np.testing.assert_array_equal(getattr(found, name), getattr(original, name))


def unpacked(packed: MicroBatch, i: int) -> Sample:
    """Sequence ``i`` of a stream, token by token: each row says what is predicted, at its place in its sequence."""
    start = packed.cu_seqlens[i].item()
    mine = [r for r in range(len(packed.rows)) if packed.sequence[r] == i]
    rows = packed.rows[mine].tolist()
    stop = rows[-1] + 1
    assert stop <= packed.cu_seqlens[i + 1]
    assert packed.tokens[stop : packed.cu_seqlens[i + 1]].tolist() == [0] * (packed.cu_seqlens[i + 1].item() - stop)
    whole = [packed.tokens[start].item()]
    for position in range(start, stop):
        whole.append(packed.targets[position].item())
        if position + 1 < stop:
            assert packed.tokens[position + 1] == packed.targets[position]
    assert rows == list(range(stop - len(rows), stop)), "the last positions predict the response, in order"
    ids = packed.token_ids[mine].tolist()
    assert [token & (2**20 - 1) for token in ids] == list(range(len(ids)))
    assert [sample_and_position(token) for token in ids] == [(ids[0] >> 20, t) for t in range(len(ids))]
    (number,) = {token >> 20 for token in ids}
    (advantage,) = set(packed.advantages[mine].tolist())
    prompt = len(whole) - len(rows)
    return Sample(
        number,
        np.array(whole[:prompt]),
        np.array(whole[prompt:]),
        packed.rollout_logp[mine].numpy(),
        advantage,
        packed.weight_versions[mine].numpy(),
    )


@pytest.mark.parametrize("pad_multiple", [1, 2, 8])
def test_a_stream_without_samples_is_padding_without_rows(pad_multiple):
    empty = pack([], pad_multiple)
    assert len(empty.tokens) == len(empty.targets) == pad_multiple
    assert empty.cu_seqlens.tolist() == [0, pad_multiple]
    for name in ("rows", "token_ids", "sequence", "rollout_logp", "advantages"):
        assert len(getattr(empty, name)) == 0
    assert (empty.rows.dtype, empty.advantages.dtype) == (torch.int64, torch.float32)
    assert empty.to(torch.device("cpu")).max_length == pad_multiple


def test_token_ids_belong_to_the_token_not_to_its_place_in_a_stream():
    samples = [sample(n, [1] * (1 + n % 3), [2] * (1 + n % 5)) for n in (0, 1, 2, 2**24 - 1)]
    by_layout = [
        [token for part in parts for token in pack(part, multiple).token_ids.tolist()]
        for parts, multiple in (
            ([samples], 1),
            ([samples[::-1]], 8),
            ([samples[:1], samples[3:], samples[1:3]], 4),
        )
    ]
    assert len({tuple(sorted(ids)) for ids in by_layout}) == 1
    assert len(set(by_layout[0])) == sum(len(s.response_ids) for s in samples)


def test_samples_that_cannot_be_numbered_are_refused():
    with pytest.raises(ValueError, match="2\\^24 samples"):
        pack([sample(2**24, [1], [2])])
    with pytest.raises(ValueError, match="2\\^20 tokens"):
        pack([sample(0, [1], [2] * 2**20)])
    last = pack([sample(2**24 - 1, [1], [2] * (2**20 - 1))]).token_ids[-1]
    assert last == 2**44 - 2
    assert sample_and_position(int(last)) == (2**24 - 1, 2**20 - 2)


# Planning -----------------------------------------------------------------------------------------------------------


def long_tailed_lengths(count, seed):
    """Sequences as they are in practice: a median of about 4,000 tokens, some at the cap of 20,480."""
    lengths = np.random.default_rng(seed).lognormal(8.3, 0.9, count)
    return np.clip(lengths, 200, 20_480).astype(int).tolist()


# Attention's share in models: of 32 and 8 billion parameters about 2e-5, of 0.6 billion 1.3e-4 (Policy.quadratic_cost).
QUADRATICS = (0.0, 2e-5, 1.3e-4, 1e-3)


def costs(lengths, quadratic):
    return [n + quadratic * n**2 for n in lengths]


@pytest.mark.parametrize("quadratic", QUADRATICS)
def test_the_slowest_rank_is_within_a_tenth_of_the_mean_for_long_tailed_lengths(quadratic):
    """Or of the longest sequence, where that alone costs more than a rank's share: nothing can divide it."""
    divisible = 0
    for seed in range(5):
        lengths = long_tailed_lengths(512, seed)
        cost = costs(lengths, quadratic)
        for ranks in (2, 4, 8, 16, 32, 64):
            parts = spread(lengths, ranks, quadratic)
            mean = sum(cost) / ranks
            assert max(sum(cost[i] for i in part) for part in parts) <= 1.1 * max(mean, *cost)
            assert sorted(i for part in parts for i in part) == list(range(512))
            divisible += max(cost) <= mean
    assert divisible > 25, "of 30; in most the longest sequence decides nothing"
    naive = [sum(cost[r::8]) for r in range(8)]
    assert max(naive) > 1.1 * sum(naive) / 8, "dealing them out in turn would not do"


@given(lengths=st.lists(st.integers(1, 100), max_size=40), ranks=st.integers(1, 8), quadratic=st.floats(0, 1))
def test_spreading_is_a_partition_in_which_no_move_to_an_idler_rank_would_help(lengths, ranks, quadratic):
    parts = spread(lengths, ranks, quadratic)
    assert len(parts) == ranks
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(part == sorted(part) for part in parts)
    cost = [n + quadratic * n * n for n in lengths]
    work = [sum(cost[i] for i in part) for part in parts]
    for part, load in zip(parts, work, strict=True):
        assert not part or load - min(cost[i] for i in part) <= min(work) + 1e-9 * load
    if len(lengths) >= ranks:
        assert all(parts), "no rank is idle"


_PACKINGS = st.builds(
    Packing,
    budget=st.integers(1, 60),
    pad_multiple=st.sampled_from([1, 2, 4]),
    sequence_multiple=st.sampled_from([1, 2, 6]),
    micro_batch_multiple=st.integers(1, 4),
    quadratic=st.sampled_from([0.0, 0.1]),
)


@given(lengths=st.lists(st.lists(st.integers(1, 50), max_size=20), min_size=1, max_size=5), packing=_PACKINGS)
def test_streams_keep_the_budget_with_their_padding_and_are_equally_many_on_every_rank(lengths, packing):
    plans = micro_batch_plan(lengths, packing)
    (count,) = {len(plan) for plan in plans}
    assert count == max(micro_batches_needed(here, packing) for here in lengths)
    assert count >= 1
    assert count % packing.micro_batch_multiple == 0
    for plan, here in zip(plans, lengths, strict=True):
        assert sorted(i for micro in plan for i in micro) == list(range(len(here)))
        cost = costs(here, packing.quadratic)
        work = [sum(cost[i] for i in micro) for micro in plan]
        assert work == sorted(work, reverse=True), "the most expensive first, empty ones last"
        for micro in plan:
            stream = packing.pack([sample(i, [1] * here[i], [2]) for i in micro])
            assert len(stream.tokens) <= packing.budget or len(micro) <= 1


def fewest(lengths, room):
    """The smallest number of bins, by trying everything."""
    best = len(lengths)

    def place(i, bins):
        nonlocal best
        if len(bins) >= best:
            return
        if i == len(lengths):
            best = len(bins)
            return
        for b in range(len(bins)):
            if bins[b] + lengths[i] <= room:
                place(i + 1, bins[:b] + [bins[b] + lengths[i]] + bins[b + 1 :])
        place(i + 1, [*bins, lengths[i]])

    place(0, [])
    return best


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=8), room=st.integers(30, 60))
def test_micro_batches_are_as_few_as_first_fit_decreasing_is_proven_to_need(lengths, room):
    """At most 11/9 of the fewest + 6/9 (Dosa, 2007)."""
    needed = micro_batches_needed(lengths, Packing(room))
    assert max(1, fewest(lengths, room)) <= needed <= max(1, (11 * fewest(lengths, room) + 6) // 9)


@pytest.mark.parametrize("quadratic", QUADRATICS[:2])
def test_micro_batches_cost_nearly_the_same_over_ranks_and_within_one(quadratic):
    """Of 512 long-tailed sequences on 8 and 16 ranks: pipelines do not wait, neither in time nor for each other."""
    for seed in range(3):
        lengths = long_tailed_lengths(512, seed)
        for ranks in (8, 16):
            parts = [[lengths[i] for i in part] for part in spread(lengths, ranks, quadratic)]
            plans = micro_batch_plan(parts, Packing(32_768, quadratic=quadratic))
            work = np.array(
                [
                    [sum(costs([here[i] for i in micro], quadratic)) for micro in plan]
                    for here, plan in zip(parts, plans, strict=True)
                ]
            )
            assert work.max(axis=0).sum() <= 1.05 * work.sum(axis=1).mean(), "ranks in step at every micro-batch"
            assert work.max() <= 1.15 * work.mean()


def test_a_sequence_longer_than_the_budget_gets_a_micro_batch_of_its_own():
    assert micro_batch_plan([[4, 25, 3, 3]], Packing(10)) == [[[1], [0, 2, 3]]]
    assert micro_batch_plan([[25], [], [3]], Packing(10)) == [[[0]], [[]], [[0]]]
    assert micro_batch_plan([[3, 4], [3]], Packing(3, pad_multiple=4)) == [[[1], [0]], [[0], []]]


def test_streams_that_only_fit_when_filled_to_the_brim_stay_as_they_fitted():
    """Evenly spread, 6 + 3 | 5 + 4 would leave no room for the last 2: it needs 6 + 4 | 5 + 3 + 2."""
    assert cut([6, 5, 4, 3, 2], 2, Packing(10)) == [[0, 2], [1, 3, 4]]
    assert cut([6, 5, 4, 3, 2], 2, Packing(11)) == [[0, 3, 4], [1, 2]]


# Trimming -----------------------------------------------------------------------------------------------------------


def work_of(samples_by_batch, selected):
    """Micro-batches with a mask from {(sample, position)} and log-probabilities that name both."""
    batches = [pack(samples) for samples in samples_by_batch]
    pairs = [[sample_and_position(token) for token in batch.token_ids.tolist()] for batch in batches]
    return Work(
        batches,
        [torch.tensor([pair in selected for pair in part], dtype=torch.bool) for part in pairs],
        [torch.tensor([-(n + 0.001 * t) for n, t in part], dtype=torch.float32) for part in pairs],
    )


def test_a_trimmed_stream_ends_with_the_last_selected_token():
    """Written out by hand: sample 3 loses its last token, 1 has no advantage, 2 has no selected token."""
    samples = [
        [sample(1, [1], [2, 3], advantage=0.0), sample(3, [4, 5], [6, 7, 8], advantage=-1.0)],
        [sample(2, [9], [10])],
    ]
    trimmed = trim(work_of(samples, {(1, 0), (1, 1), (3, 1)}), Packing(100, pad_multiple=4), agree=lambda needed: 2)
    first, second = trimmed.batches
    assert first.tokens.tolist() == [4, 5, 6, 0]
    assert first.targets.tolist() == [5, 6, 7, 0]
    assert first.cu_seqlens.tolist() == [0, 3, 4]
    assert first.rows.tolist() == [1, 2]
    assert first.token_ids.tolist() == [3 << 20, (3 << 20) + 1]
    assert first.advantages.tolist() == [-1.0, -1.0]
    assert [mask.tolist() for mask in trimmed.masks] == [[False, True], []]
    np.testing.assert_allclose(trimmed.old_logp[0], [-3.0, -3.001])
    assert (second.tokens.tolist(), len(second.rows), len(trimmed.old_logp[1])) == ([0] * 4, 0, 0)
    assert [batch.positions for batch in trimmed.batches] == [3, 0]


@settings(deadline=None)
@given(data=st.data(), packing=_PACKINGS)
def test_trimming_leaves_the_needed_tokens_and_all_before_them_and_nothing_else(data, packing):
    parts = data.draw(st.lists(st.tuples(_TOKENS, _TOKENS, st.sampled_from([0.0, -1.5, 0.5, math.inf])), max_size=8))
    samples = [sample(5 * i + 1, *part) for i, part in enumerate(parts)]
    cut_at = data.draw(st.integers(0, len(samples)))
    tokens = [(s.number, t) for s in samples for t in range(len(s.response_ids))]
    selected = set(data.draw(st.lists(st.sampled_from(tokens)))) if tokens else set()
    asked = []

    def agree(needed):
        asked.append(needed)
        return needed + packing.micro_batch_multiple

    trimmed = trim(work_of([samples[:cut_at], samples[cut_at:]], selected), packing, agree)
    (needed,) = asked
    assert len(trimmed.batches) == needed + packing.micro_batch_multiple

    wanted = {}
    for s in samples:
        positions = [t for n, t in selected if n == s.number and s.advantage != 0]
        if positions:
            wanted[s.number] = (s, max(positions) + 1)
    found = []
    for batch, mask, old_logp in zip(trimmed.batches, trimmed.masks, trimmed.old_logp, strict=True):
        pairs = [sample_and_position(token) for token in batch.token_ids.tolist()]
        assert mask.tolist() == [pair in selected for pair in pairs]
        np.testing.assert_array_equal(old_logp, np.array([-(n + 0.001 * t) for n, t in pairs], dtype=np.float32))
        for i in range(len(batch.sequence.unique())):
            left = unpacked(batch, i)
            whole, length = wanted[left.number]
            np.testing.assert_array_equal(left.prompt_ids, whole.prompt_ids)
            np.testing.assert_array_equal(left.response_ids, whole.response_ids[:length])
            np.testing.assert_array_equal(left.rollout_logp, whole.rollout_logp[:length])
            np.testing.assert_equal(left.advantage, whole.advantage)
            found.append(left.number)
        assert len(batch.tokens) <= packing.budget or len(batch.sequence.unique()) <= 1
    assert sorted(found) == sorted(wanted)
    assert needed == micro_batches_needed(
        [s.input_length - len(s.response_ids) + n for s, n in wanted.values()], packing
    )


def test_trimming_keeps_the_version_of_the_weights_of_each_token():
    versions = np.array([17, 18, 18], dtype=np.int32)
    whole = work_of([[replace(sample(4, [1], [2, 3, 4]), weight_versions=versions)]], {(4, 1)})
    assert trim(whole, Packing(9), agree=lambda needed: needed).batches[0].weight_versions.tolist() == [17, 18]
