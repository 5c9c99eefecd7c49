"""Packed streams against sequences written out by hand, and against a loop over tokens."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import TOKENS, training_sequence, unpacked

from megatron_rlvr.batching.batch import pack, sequence_and_position


def test_a_packed_stream_is_aligned_to_the_token():
    """Two sequences written out by hand: prompt 1 2 3 response 4 5, and prompt 6 response 7 8 9."""
    packed = pack(
        [training_sequence(5, [1, 2, 3], [4, 5], 0.5), training_sequence(2, [6], [7, 8, 9], -2.0)], pad_multiple=4
    )
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


def test_padding_follows_each_sequence_and_the_stream_and_enters_no_row_vector():
    """The same two sequences, of 4 and 3 positions, each padded to 6, and the stream from 12 to 24."""
    packed = pack(
        [training_sequence(5, [1, 2, 3], [4, 5]), training_sequence(2, [6], [7, 8, 9])],
        pad_multiple=8,
        sequence_multiple=6,
    )
    assert packed.tokens.tolist() == [1, 2, 3, 4, 0, 0, 6, 7, 8, 0, 0, 0] + 12 * [0]
    assert packed.targets.tolist() == [2, 3, 4, 5, 0, 0, 7, 8, 9, 0, 0, 0] + 12 * [0]
    assert packed.cu_seqlens.tolist() == [0, 6, 12, 24]
    assert packed.max_length == 12
    assert packed.rows.tolist() == [2, 3, 6, 7, 8]
    assert packed.targets[packed.rows].tolist() == [4, 5, 7, 8, 9]
    assert packed.sequence.tolist() == [0, 0, 1, 1, 1]
    assert {len(packed.token_ids), len(packed.advantages), len(packed.rollout_logp)} == {5}


_SEQUENCES = st.lists(st.tuples(TOKENS, TOKENS, st.floats(-2, 2, width=32)), max_size=6)


@settings(deadline=None)
@given(parts=_SEQUENCES, pad_multiple=st.sampled_from([1, 2, 4, 8]), sequence_multiple=st.sampled_from([1, 4, 6]))
def test_unpacking_a_stream_returns_the_sequences(parts, pad_multiple, sequence_multiple):
    sequences = [training_sequence(7 * i, *part) for i, part in enumerate(parts)]
    packed = pack(sequences, pad_multiple, sequence_multiple)
    assert len(packed.tokens) % pad_multiple == 0
    assert packed.positions == sum(s.input_length for s in sequences)
    lengths = np.diff(packed.cu_seqlens).tolist()
    assert all(length % sequence_multiple == 0 for length in lengths)
    assert packed.max_length == max(lengths)
    for length, original in zip(lengths, sequences, strict=False):
        assert 0 <= length - original.input_length < sequence_multiple
    tail = sum(lengths[len(sequences) :])
    assert 0 <= tail < max(2, math.lcm(pad_multiple, sequence_multiple) + (not sequences))
    assert len(set(packed.token_ids.tolist())) == len(packed.token_ids) == len(packed.rows)
    for i, original in enumerate(sequences):
        found = unpacked(packed, i)
        assert (found.number, found.advantage) == (original.number, original.advantage)
        for name in ("prompt_ids", "response_ids", "rollout_logp"):
            np.testing.assert_array_equal(getattr(found, name), getattr(original, name))


@pytest.mark.parametrize("pad_multiple", [1, 2, 8])
def test_a_stream_without_sequences_is_padding_without_rows(pad_multiple):
    empty = pack([], pad_multiple)
    assert len(empty.tokens) == len(empty.targets) == pad_multiple
    assert empty.cu_seqlens.tolist() == [0, pad_multiple]
    for name in ("rows", "token_ids", "sequence", "rollout_logp", "advantages"):
        assert len(getattr(empty, name)) == 0
    assert (empty.rows.dtype, empty.advantages.dtype) == (torch.int64, torch.float32)
    assert empty.to(torch.device("cpu")).max_length == pad_multiple


def test_token_ids_do_not_depend_on_the_place_in_a_stream():
    sequences = [training_sequence(n, [1] * (1 + n % 3), [2] * (1 + n % 5)) for n in (0, 1, 2, 2**24 - 1)]
    by_layout = [
        [token for part in parts for token in pack(part, multiple).token_ids.tolist()]
        for parts, multiple in (
            ([sequences], 1),
            ([sequences[::-1]], 8),
            ([sequences[:1], sequences[3:], sequences[1:3]], 4),
        )
    ]
    assert len({tuple(sorted(ids)) for ids in by_layout}) == 1
    assert len(set(by_layout[0])) == sum(len(s.response_ids) for s in sequences)


def test_sequences_whose_tokens_cannot_be_given_ids_are_refused():
    with pytest.raises(ValueError, match="2\\^24 sequences"):
        pack([training_sequence(2**24, [1], [2])])
    with pytest.raises(ValueError, match="2\\^20 tokens"):
        pack([training_sequence(0, [1], [2] * 2**20)])
    last = pack([training_sequence(2**24 - 1, [1], [2] * (2**20 - 1))]).token_ids[-1]
    assert last == 2**44 - 2
    assert sequence_and_position(int(last)) == (2**24 - 1, 2**20 - 2)
