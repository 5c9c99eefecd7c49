"""Training sequences whose values identify them, and packed streams read back token by token."""

import numpy as np
from hypothesis import strategies as st

from megatron_rlvr.batching.batch import MicroBatch, TrainingSequence, sequence_and_position
from megatron_rlvr.batching.packing import Packing

TOKENS = st.lists(st.integers(0, 200_000), min_size=1, max_size=7)
PACKINGS = st.builds(
    Packing,
    budget=st.integers(1, 60),
    pad_multiple=st.sampled_from([1, 2, 4]),
    sequence_multiple=st.sampled_from([1, 2, 6]),
    micro_batch_multiple=st.integers(1, 4),
    quadratic=st.sampled_from([0.0, 0.1]),
)


def training_sequence(number, prompt, response, advantage=0.5):
    """A sequence whose log-probabilities identify it: -2.03 is position 3 of sequence 2."""
    logp = -(number + 0.01 * np.arange(len(response)))
    return TrainingSequence(
        number,
        np.array(prompt, dtype=np.int32),
        np.array(response, dtype=np.int32),
        logp.astype(np.float32),
        advantage,
        weight_versions=np.arange(len(response), dtype=np.int32),
    )


def unpacked(packed: MicroBatch, i: int) -> TrainingSequence:
    """Sequence ``i`` of a stream, read token by token; checks padding, rows and token ids on the way."""
    start = int(packed.cu_seqlens[i])
    mine = [r for r in range(len(packed.rows)) if packed.sequence[r] == i]
    rows = packed.rows[mine].tolist()
    stop, following = int(rows[-1]) + 1, int(packed.cu_seqlens[i + 1])
    assert stop <= following
    assert packed.tokens[stop:following].tolist() == [0] * (following - stop)
    whole = [packed.tokens[start].item()]
    for position in range(start, stop):
        whole.append(packed.targets[position].item())
        if position + 1 < stop:
            assert packed.tokens[position + 1] == packed.targets[position]
    assert rows == list(range(stop - len(rows), stop)), "the last positions predict the response, in order"
    ids = packed.token_ids[mine].tolist()
    assert [token & (2**20 - 1) for token in ids] == list(range(len(ids)))
    assert [sequence_and_position(token) for token in ids] == [(ids[0] >> 20, t) for t in range(len(ids))]
    (number,) = {token >> 20 for token in ids}
    (advantage,) = set(packed.advantages[mine].tolist())
    prompt = len(whole) - len(rows)
    return TrainingSequence(
        number,
        np.array(whole[:prompt]),
        np.array(whole[prompt:]),
        packed.rollout_logp[mine].numpy(),
        advantage,
        packed.weight_versions[mine].numpy(),
    )
