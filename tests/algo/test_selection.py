"""Random selection, and selection in one micro-batch. Thresholds over ranks are tested in tests/multi_rank."""

import pytest
import torch

from megatron_rlvr.algo.selection import Keep, Selection, micro_batch_mask, select, selection_scores

RESPONSES, POSITIONS, FRACTION = 400, 250, 0.2
# Token ids as the batch makes them: the number of the sequence above 20 bits of the position.
IDS = (torch.arange(RESPONSES).unsqueeze(1) * 2**20 + torch.arange(POSITIONS)).flatten()
KEEP_A_FRACTION: tuple[Keep, ...] = ("top", "bottom", "random")
# Seeds as a run derives them from its own seed and the step.
SEEDS = [0, 1, 2, 12, 13, 1_000_003, 7_000_021 * 1_000_003 + 500, 2**63 - 1, 2**64 + 5]


def selected(keep: Keep, entropies, token_ids, seed: int, fraction: float = FRACTION) -> Selection:
    return select(entropies, token_ids, keep=keep, fraction=fraction, per_micro_batch=False, seed=seed, group=None)


def chosen(seed: int, ids: torch.Tensor = IDS) -> torch.Tensor:
    return selected("random", [torch.zeros(len(ids))], [ids], seed).masks[0]


def assert_binomial(counts: torch.Tensor, trials: int, share: float) -> None:
    """No count is further from its mean than 5 standard deviations, and their spread is that of independent draws."""
    deviation = (trials * share * (1 - share)) ** 0.5
    z = (counts - trials * share) / deviation
    assert z.abs().max() < 5
    assert 0.8 < z.std() < 1.2


@pytest.mark.parametrize("seed", SEEDS)
def test_random_tokens_are_distributed_evenly_over_responses_positions_and_neighbours(seed):
    mask = chosen(seed).view(RESPONSES, POSITIONS).double()
    assert mask.sum() == RESPONSES * POSITIONS * FRACTION
    assert_binomial(mask.sum(1), POSITIONS, FRACTION)
    assert_binomial(mask.sum(0), RESPONSES, FRACTION)
    for pairs in (mask[:, 1:] * mask[:, :-1], mask[1:] * mask[:-1]):
        assert float(pairs.mean()) == pytest.approx(FRACTION**2, abs=0.004)


def test_random_tokens_are_the_same_for_a_seed_and_independent_between_seeds():
    masks = [chosen(seed) for seed in SEEDS]
    assert all(torch.equal(chosen(seed), mask) for seed, mask in zip(SEEDS, masks, strict=True))
    for i, first in enumerate(masks):
        for second in masks[:i]:
            shared = float((first & second).double().mean())
            assert shared == pytest.approx(FRACTION**2, abs=0.004)


# Consecutive ids, ids of many responses, and ids of the first tokens of consecutive responses.
SEQUENCES = {
    "consecutive": torch.arange(100_000),
    "as in a batch": IDS,
    "first of each response": torch.arange(100_000) * 2**20,
}


def noise(seed: int, ids: torch.Tensor) -> torch.Tensor:
    return selection_scores(torch.zeros(len(ids)), ids, keep="random", seed=seed).double()


@pytest.mark.parametrize("ids", SEQUENCES.values(), ids=SEQUENCES.keys())
@pytest.mark.parametrize("seed", SEEDS)
def test_the_noise_of_related_ids_is_uniform_by_kolmogorov(seed, ids):
    n = len(ids)
    x = noise(seed, ids).sort().values
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum(steps[1:] - x, x - steps[:-1]).max()
    # Independent uniform draws exceed 2.4 once in 50,000 times, and fall below 0.4 once in 300. 27 sequences are tried.
    assert 0.4 < float(distance) * n**0.5 < 2.4


@pytest.mark.parametrize("ids", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_the_noises_of_two_seeds_and_of_neighbouring_ids_are_independent_by_chi_square(ids):
    cells = [(noise(seed, ids) * 16).long() for seed in SEEDS]
    pairs = [(a, b) for i, a in enumerate(cells) for b in cells[:i]]
    pairs += [(a[1:], a[:-1]) for a in cells]
    for a, b in pairs:
        counts = torch.bincount(a * 16 + b, minlength=256).double()
        expected = len(a) / 256
        # 255 degrees of freedom: 255 +- 22.6, here within 4.5 standard deviations.
        assert 155 < float(((counts - expected) ** 2 / expected).sum()) < 357


def test_random_tokens_do_not_depend_on_the_order_of_micro_batches():
    order = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(0))
    parts = list(IDS[order].split(30_011))
    shuffled = selected("random", [torch.rand(len(p)) for p in parts], parts, seed=5)
    kept = torch.cat([ids[mask] for ids, mask in zip(parts, shuffled.masks, strict=True)])
    assert torch.equal(kept.sort().values, IDS[chosen(5)])
    assert shuffled.threshold is None


def test_a_micro_batch_alone_is_selected_like_a_mini_batch_of_one_micro_batch():
    entropy = torch.rand(101, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(101) * 3
    for keep in KEEP_A_FRACTION:
        mask = micro_batch_mask(entropy, ids, keep=keep, fraction=0.3, seed=9)
        assert torch.equal(mask, selected(keep, [entropy], [ids], seed=9, fraction=0.3).masks[0])
        assert int(mask.sum()) == 31


def test_without_tokens_nothing_is_selected():
    for keep in KEEP_A_FRACTION:
        for entropies in ([], [torch.empty(0)]):
            ids = [torch.empty(0, dtype=torch.int64) for _ in entropies]
            nothing = selected(keep, entropies, ids, seed=0, fraction=0.3)
            assert (nothing.kept, nothing.total, nothing.entropy_kept) == (0, 0, 0.0)
            assert [len(mask) for mask in nothing.masks] == [0] * len(entropies)
