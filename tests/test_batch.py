"""Packing against a loop over tokens, and the two planners against what they promise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlvr.batch import MicroBatch, Sample, micro_batch_plan, pack, spread


def sample(number, prompt, response, advantage=0.5):
    """Log-probabilities that name the sample and the position: 2.03 is position 3 of sample 2, negated."""
    logp = -(number + 0.01 * np.arange(len(response)))
    return Sample(
        number, np.array(prompt, dtype=np.int32), np.array(response, dtype=np.int32), logp.astype(np.float32), advantage
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


_TOKENS = st.lists(st.integers(0, 200_000), min_size=1, max_size=7)
_SAMPLES = st.lists(st.tuples(_TOKENS, _TOKENS, st.floats(-2, 2, width=32)), max_size=6)


@settings(deadline=None)
@given(parts=_SAMPLES, pad_multiple=st.sampled_from([1, 2, 4, 8]))
def test_unpacking_a_stream_gives_the_samples_back(parts, pad_multiple):
    samples = [sample(7 * i, *part) for i, part in enumerate(parts)]
    packed = pack(samples, pad_multiple)
    assert len(packed.tokens) % pad_multiple == 0
    assert 0 <= len(packed.tokens) - sum(s.input_length for s in samples) < max(2, pad_multiple + (not samples))
    assert packed.max_length == int(np.diff(packed.cu_seqlens).max())
    assert len(set(packed.token_ids.tolist())) == len(packed.token_ids) == len(packed.rows)
    for i, original in enumerate(samples):
        found = unpacked(packed, i)
        assert (found.number, found.advantage) == (original.number, original.advantage)
        for name in ("prompt_ids", "response_ids", "rollout_logp"):
            np.testing.assert_array_equal(getattr(found, name), getattr(original, name))


def unpacked(packed: MicroBatch, i: int) -> Sample:
    """Sequence ``i`` of a stream, token by token: each row says what is predicted, at its place in its sequence."""
    start, stop = packed.cu_seqlens[i : i + 2].tolist()
    whole = [packed.tokens[start].item()]
    for position in range(start, stop):
        whole.append(packed.targets[position].item())
        if position + 1 < stop:
            assert packed.tokens[position + 1] == packed.targets[position]
    mine = [r for r in range(len(packed.rows)) if packed.sequence[r] == i]
    rows = packed.rows[mine].tolist()
    assert rows == list(range(stop - len(rows), stop)), "the last positions predict the response, in order"
    ids = packed.token_ids[mine].tolist()
    assert [token & (2**20 - 1) for token in ids] == list(range(len(ids)))
    (number,) = {token >> 20 for token in ids}
    (advantage,) = set(packed.advantages[mine].tolist())
    prompt = len(whole) - len(rows)
    return Sample(
        number, np.array(whole[:prompt]), np.array(whole[prompt:]), packed.rollout_logp[mine].numpy(), advantage
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
    assert pack([sample(2**24 - 1, [1], [2] * (2**20 - 1))]).token_ids[-1] == 2**44 - 2


# Planning -----------------------------------------------------------------------------------------------------------


def long_tailed_lengths(count, seed):
    """Responses as they are in practice: a median of about 2,000 tokens, some at the cap of 20,480."""
    lengths = np.random.default_rng(seed).lognormal(7.6, 0.9, count)
    return np.clip(lengths, 50, 20_480).astype(int).tolist()


@pytest.mark.parametrize("quadratic", [0.0, 1e-4, 1e-3])
def test_the_slowest_rank_is_within_a_tenth_of_the_mean_for_long_tailed_lengths(quadratic):
    for seed in range(5):
        lengths = long_tailed_lengths(512, seed)
        parts = spread(lengths, 8, quadratic)
        work = [sum(lengths[i] + quadratic * lengths[i] ** 2 for i in part) for part in parts]
        assert max(work) <= 1.1 * sum(work) / 8
        assert sorted(i for part in parts for i in part) == list(range(512))
    naive = [sum(lengths[i] + quadratic * lengths[i] ** 2 for i in range(r, 512, 8)) for r in range(8)]
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


@given(
    lengths=st.lists(st.lists(st.integers(1, 50), max_size=20), min_size=1, max_size=5),
    budget=st.integers(1, 60),
    multiple=st.integers(1, 4),
)
def test_micro_batches_keep_the_budget_and_are_equally_many_on_every_rank(lengths, budget, multiple):
    plans = micro_batch_plan(lengths, budget, multiple)
    (count,) = {len(plan) for plan in plans}
    assert count >= 1
    assert count % multiple == 0
    needed = 1
    for plan, here in zip(plans, lengths, strict=True):
        assert sorted(i for micro in plan for i in micro) == list(range(len(here)))
        filled = [micro for micro in plan if micro]
        assert plan[: len(filled)] == filled, "empty micro-batches come last"
        for micro in filled:
            assert sum(here[i] for i in micro) <= budget or len(micro) == 1
        sums = sorted(sum(here[i] for i in micro) for micro in filled)
        assert len(sums) < 2 or sums[0] + sums[1] > budget, "no two of them would fit into one"
        needed = max(needed, len(filled))
    assert count < needed + multiple, "no more than the busiest rank needs"


def test_a_sequence_longer_than_the_budget_gets_a_micro_batch_of_its_own():
    assert micro_batch_plan([[4, 25, 3, 3]], 10) == [[[1], [0, 2, 3]]]
    assert micro_batch_plan([[25], [], [3]], 10) == [[[0]], [[]], [[0]]]
