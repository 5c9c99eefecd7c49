"""Trim against its definition."""

import math
from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import PACKINGS, TOKENS, training_sequence, unpacked

from megatron_rlvr.algo.loss import LossInputs
from megatron_rlvr.batching.batch import pack, sequence_and_position
from megatron_rlvr.batching.packing import Packing, micro_batches_needed
from megatron_rlvr.batching.trim import MaskedBatches, trim


def masked_batches(sequences_by_batch, selected):
    """Micro-batches with a mask from {(sequence, position)} and old log-probabilities that identify both."""
    batches = [pack(sequences) for sequences in sequences_by_batch]
    pairs = [[sequence_and_position(token) for token in batch.token_ids.tolist()] for batch in batches]
    return MaskedBatches(
        batches,
        [torch.tensor([pair in selected for pair in part], dtype=torch.bool) for part in pairs],
        [
            LossInputs(
                torch.tensor([-(n + 0.001 * t) for n, t in part], dtype=torch.float32),
                b.advantages,
                scale=b.advantages + 1,
            )
            for part, b in zip(pairs, batches, strict=True)
        ],
    )


def test_a_trimmed_stream_ends_with_the_last_selected_token():
    """By hand: sequence 3 loses its last token, 1 has no advantage, 2 has no selected token."""
    sequences = [
        [training_sequence(1, [1], [2, 3], advantage=0.0), training_sequence(3, [4, 5], [6, 7, 8], advantage=-1.0)],
        [training_sequence(2, [9], [10])],
    ]
    trimmed = trim(
        masked_batches(sequences, {(1, 0), (1, 1), (3, 1)}),
        Packing(100, pad_multiple=4),
        maximum_over_ranks=lambda needed: 2,
    )
    first, second = trimmed.batches
    assert first.tokens.tolist() == [4, 5, 6, 0]
    assert first.targets.tolist() == [5, 6, 7, 0]
    assert first.cu_seqlens.tolist() == [0, 3, 4]
    assert first.rows.tolist() == [1, 2]
    assert first.token_ids.tolist() == [3 << 20, (3 << 20) + 1]
    assert first.advantages.tolist() == [-1.0, -1.0]
    assert [mask.tolist() for mask in trimmed.masks] == [[False, True], []]
    np.testing.assert_allclose(trimmed.inputs[0].old_logp, [-3.0, -3.001])
    assert (second.tokens.tolist(), len(second.rows), len(trimmed.inputs[1].old_logp)) == ([0] * 4, 0, 0)
    assert [batch.positions for batch in trimmed.batches] == [3, 0]
    assert trimmed.inputs[0].scale is not None
    assert trimmed.inputs[0].scale.tolist() == [0.0, 0.0]
    assert trimmed.inputs[0].weights is None


def test_with_a_regularizer_selected_tokens_without_advantage_are_kept():
    sequences = [[training_sequence(1, [1], [2, 3, 4], advantage=0.0), training_sequence(2, [9], [10])]]
    whole = masked_batches(sequences, {(1, 1)})
    kept = {}
    for regularized in (False, True):
        trimmed = trim(whole, Packing(100), maximum_over_ranks=lambda needed: 1, regularized=regularized)
        kept[regularized] = [t for batch in trimmed.batches for t in batch.token_ids.tolist()]
    assert kept == {False: [], True: [1 << 20, (1 << 20) + 1]}


@settings(deadline=None)
@given(data=st.data(), packing=PACKINGS)
def test_trim_keeps_the_needed_tokens_and_all_before_them_and_nothing_else(data, packing):
    parts = data.draw(st.lists(st.tuples(TOKENS, TOKENS, st.sampled_from([0.0, -1.5, 0.5, math.inf])), max_size=8))
    sequences = [training_sequence(5 * i + 1, *part) for i, part in enumerate(parts)]
    cut_at = data.draw(st.integers(0, len(sequences)))
    tokens = [(s.number, t) for s in sequences for t in range(len(s.response_ids))]
    selected = set(data.draw(st.lists(st.sampled_from(tokens)))) if tokens else set()
    counts = []

    def maximum_over_ranks(needed):
        counts.append(needed)
        return needed + packing.micro_batch_multiple

    trimmed = trim(masked_batches([sequences[:cut_at], sequences[cut_at:]], selected), packing, maximum_over_ranks)
    (needed,) = counts
    assert len(trimmed.batches) == needed + packing.micro_batch_multiple

    wanted = {}
    for s in sequences:
        positions = [t for n, t in selected if n == s.number and s.advantage != 0]
        if positions:
            wanted[s.number] = (s, max(positions) + 1)
    found = []
    for batch, mask, inputs in zip(trimmed.batches, trimmed.masks, trimmed.inputs, strict=True):
        pairs = [sequence_and_position(token) for token in batch.token_ids.tolist()]
        assert mask.tolist() == [pair in selected for pair in pairs]
        np.testing.assert_array_equal(inputs.old_logp, np.array([-(n + 0.001 * t) for n, t in pairs], dtype=np.float32))
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


def test_trim_keeps_the_weight_version_of_each_token():
    versions = np.array([17, 18, 18], dtype=np.int32)
    whole = masked_batches([[replace(training_sequence(4, [1], [2, 3, 4]), weight_versions=versions)]], {(4, 1)})
    assert trim(whole, Packing(9), maximum_over_ranks=lambda needed: needed).batches[0].weight_versions.tolist() == [
        17,
        18,
    ]
