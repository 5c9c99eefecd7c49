"""The rules of selection on one rank, against numbers by hand and a sort. Ranks are tested in tests/multi_rank."""

import math
import random
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch

from megatron_rlvr.algo.quantile import NonFiniteError, exact_mean
from megatron_rlvr.algo.selection import (
    SIGNALS,
    Candidates,
    Keep,
    Rule,
    Selection,
    rare_and_confident,
    scheduled_fraction,
    select,
    selected_tokens,
)
from megatron_rlvr.algo.selection import _noise as noise_of

RESPONSES, POSITIONS, FRACTION = 400, 250, 0.2
# Token ids as the batch makes them: the number of the sequence above 20 bits of the position.
IDS = (torch.arange(RESPONSES).unsqueeze(1) * 2**20 + torch.arange(POSITIONS)).flatten()
KEEP_A_FRACTION: tuple[Keep, ...] = ("top", "bottom", "random")
# Seeds as a run derives them from its own seed and the step.
SEEDS = [0, 1, 2, 12, 13, 1_000_003, 7_000_021 * 1_000_003 + 500, 2**63 - 1, 2**64 + 5]


def candidates_of(entropy, token_ids, logp=None, advantages=None, gradient=None) -> Candidates:
    """Tokens; what is not given is not known, as the policy reports it."""
    unknown = torch.full_like(entropy, torch.nan)
    others = (unknown if each is None else each for each in (logp, advantages, gradient))
    return Candidates(token_ids, entropy, *others)


def selected(keep: Keep, entropies, token_ids, seed: int, fraction: float = FRACTION) -> Selection:
    parts = [candidates_of(*each) for each in zip(entropies, token_ids, strict=True)]
    return select(parts, Rule(keep=keep, fraction=fraction, seed=seed), per_micro_batch=False, group=None)


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
    return noise_of(ids, seed).double()


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
    assert shuffled.thresholds == {}


def test_a_micro_batch_alone_is_selected_like_a_mini_batch_of_one_micro_batch():
    entropy = torch.rand(101, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(101) * 3
    for keep in KEEP_A_FRACTION:
        mask = selected_tokens(candidates_of(entropy, ids), Rule(keep=keep, fraction=0.3, seed=9)).mask
        assert torch.equal(mask, selected(keep, [entropy], [ids], seed=9, fraction=0.3).masks[0])
        assert int(mask.sum()) == 31


def test_without_tokens_nothing_is_selected():
    for keep in KEEP_A_FRACTION:
        for entropies in ([], [torch.empty(0)]):
            ids = [torch.empty(0, dtype=torch.int64) for _ in entropies]
            nothing = selected(keep, entropies, ids, seed=0, fraction=0.3)
            assert (nothing.kept, nothing.total, nothing.entropy_kept) == (0, 0, 0.0)
            assert [len(mask) for mask in nothing.masks] == [0] * len(entropies)


# The family of rules, against a sort ---------------------------------------------------------------------------------


def by_a_sort(rows: list[dict[str, float]], rule: Rule) -> set[int]:
    """Ids of the tokens that a rule selects, from the definitions, in float64 and exact fractions."""
    if rule.keep == "all":
        kept = {int(row["id"]) for row in rows}
    else:
        signs = [1, -1] if rule.by_sign else [None]
        kept = set()
        for sign in signs:
            part = [row for row in rows if sign is None or row["advantage"] * sign > 0]
            value = {row["id"]: signal_of(row, rows, rule.signal) for row in part}
            down = sorted(value, key=lambda i: (-value[i], i))
            up = sorted(value, key=lambda i: (value[i], i))
            n, share = len(part), Fraction(str(rule.fraction))
            if rule.keep == "top":
                kept |= {int(i) for i in down[: math.ceil(share * n)]}
            elif rule.keep == "bottom":
                kept |= {int(i) for i in up[: math.ceil(share * n)]}
            else:
                low, high = (Fraction(str(q)) for q in rule.band or ())
                kept |= {int(i) for i in down[math.ceil((1 - high) * n) : math.ceil((1 - low) * n)]}
    if rule.guard_probability:
        rare = [r for r in rows if r["advantage"] > 0 and math.exp(r["logp"]) < rule.guard_probability]
        rare.sort(key=lambda row: (row["entropy"], row["id"]))
        kept -= {int(row["id"]) for row in rare[: math.ceil(Fraction(str(rule.guard_quantile)) * len(rare))]}
    return kept


def signal_of(row: dict[str, float], rows: list[dict[str, float]], signal: str) -> float:
    if signal == "surprisal":
        return -row["logp"]
    if signal == "covariance":
        mean = {key: math.fsum(r[key] for r in rows) / len(rows) for key in ("advantage", "logp")}
        return (row["advantage"] - mean["advantage"]) * (row["logp"] - mean["logp"])
    return row[signal]


def random_rows(seed: int, n: int, ties: bool) -> list[dict[str, float]]:
    """Tokens with distant ids in random order; with ties, of few distinct entropies, log-probabilities and norms."""
    source = random.Random(seed)

    def number(scale: float) -> float:
        return scale * (source.randrange(4) if ties else source.random())

    ids = source.sample(range(2**44), n)
    return [
        {
            "id": i,
            "entropy": number(0.5),
            "logp": -number(2.0),
            "advantage": source.choice([-0.5, 0.0, 1.5]),
            "gradient": number(0.25),
        }
        for i in ids
    ]


def tensors_of(rows: list[dict[str, float]]) -> Candidates:
    ids = torch.tensor([int(row["id"]) for row in rows], dtype=torch.int64)
    names = ("entropy", "logp", "advantage", "gradient")
    return Candidates(ids, *(torch.tensor([row[name] for row in rows], dtype=torch.float32) for name in names))


FAMILY: list[dict[str, Any]] = [
    *({"signal": s, "keep": k, "by_sign": b} for s, k, b in product(SIGNALS, ("top", "bottom"), (False, True))),
    *({"signal": s, "keep": "band", "band": band} for s in SIGNALS for band in ((0.5, 0.8), (0.0, 0.3), (0.7, 1.0))),
    {"keep": "band", "band": (0.1, 0.6), "by_sign": True},
    {"keep": "all", "guard_probability": 0.2},
    {"keep": "top", "guard_probability": 0.5, "guard_quantile": 0.3, "signal": "surprisal"},
    {"keep": "top", "fraction": Fraction(1, 3)},
]


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("numbers", FAMILY, ids=lambda numbers: "-".join(map(str, numbers.values())))
def test_every_rule_selects_what_a_sort_selects(numbers, ties):
    rule = Rule(**numbers)
    for n in (0, 1, 2, 10, 101):
        rows = random_rows(n, n, ties)
        if ties and rule.signal == "covariance":
            continue  # equal in exact arithmetic only: see the next test
        chosen = select([tensors_of(rows)], rule, per_micro_batch=False, group=None)
        ids = [row["id"] for row in rows]
        in_fp32 = [{k: v if k == "id" else float(torch.tensor(v)) for k, v in row.items()} for row in rows]
        wanted = by_a_sort(in_fp32, rule)
        assert {ids[i] for i in chosen.masks[0].nonzero().flatten().tolist()} == wanted
        assert (chosen.kept, chosen.total) == (len(wanted), n)


def test_bands_that_touch_partition_the_tokens_and_the_upper_one_is_the_top_fraction():
    rows = tensors_of(random_rows(1, 997, ties=True))
    masks = [selected_tokens(rows, Rule(keep="band", band=band)).mask for band in ((0.0, 0.5), (0.5, 0.8), (0.8, 1.0))]
    assert torch.equal(torch.stack(masks).sum(0), torch.ones(997, dtype=torch.int64))
    assert torch.equal(masks[2], selected_tokens(rows, Rule(keep="top", fraction=0.2)).mask)


def test_the_covariance_of_four_tokens_is_the_one_computed_by_hand():
    """Means: A 0.5, ln p -2. Terms: 1.5 * 1, -0.5 * -1, 0.5 * 2, -1.5 * -2."""
    tokens = candidates_of(
        torch.zeros(4), torch.arange(4), torch.tensor([-1.0, -3, 0, -4]), torch.tensor([2.0, 0, 1, -1])
    )
    assert SIGNALS["covariance"](tokens, None).tolist() == [1.5, 0.5, 1.0, 3.0]
    assert selected_tokens(tokens, Rule(signal="covariance", fraction=0.5)).mask.tolist() == [True, False, False, True]


def test_the_thresholds_are_the_ends_of_what_is_kept():
    entropy = torch.arange(10) / 8
    tokens = candidates_of(entropy, torch.arange(10), advantages=torch.tensor([1.0, -1.0]).repeat(5))
    for rule, wanted in (
        (Rule(fraction=0.3), {"threshold": 7 / 8}),
        (Rule(keep="bottom", fraction=0.3), {"threshold": 2 / 8}),
        (Rule(keep="band", band=(0.2, 0.7)), {"threshold_low": 2 / 8, "threshold_high": 7 / 8}),
        (Rule(keep="band", band=(0.2, 1.0)), {"threshold_low": 2 / 8}),
        (Rule(fraction=0.4, by_sign=True), {"threshold_positive": 6 / 8, "threshold_negative": 7 / 8}),
        (Rule(keep="all"), {}),
    ):
        assert selected_tokens(tokens, rule).thresholds == wanted
    one_sign = candidates_of(entropy, torch.arange(10), advantages=torch.ones(10))
    assert selected_tokens(one_sign, Rule(fraction=0.4, by_sign=True)).thresholds == {"threshold_positive": 6 / 8}


def test_the_guard_drops_rare_confident_tokens_of_positive_advantage_only():
    """Six tokens with p = 0.001 but one, A > 0 but one. Of the four rare ones, three have the lowest entropies."""
    tokens = candidates_of(
        entropy=torch.tensor([0.1, 0.2, 0.3, 2.0, 0.0, 0.0]),
        token_ids=torch.arange(6),
        logp=torch.tensor([0.001, 0.001, 0.001, 0.001, 0.5, 0.001]).log(),
        advantages=torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -1.0]),
    )
    rule = Rule(keep="all", guard_probability=0.002, guard_quantile=0.75)
    assert rare_and_confident(tokens, rule).tolist() == [True, True, True, False, False, False]
    chosen = select([tokens], rule, per_micro_batch=False, group=None)
    assert (chosen.kept, chosen.guarded) == (3, 3)
    assert select([tokens], Rule(fraction=0.5, guard_probability=0.002), per_micro_batch=False, group=None).guarded == 2


def test_a_fraction_changes_linearly_and_exactly():
    assert [scheduled_fraction(0.5, 0.2, 4, step) for step in range(1, 7)] == [
        Fraction(1, 2), Fraction(2, 5), Fraction(3, 10), *[Fraction(1, 5)] * 3,
    ]  # fmt: skip


def test_the_mean_of_values_is_that_of_exact_arithmetic_in_any_order():
    source = random.Random(5)
    for scale in (1e-30, 1.0, 1e12):
        values = [scale * source.gauss(0.3, 1.0) for _ in range(1001)]
        found = exact_mean(torch.tensor(values, dtype=torch.float64))
        assert found == pytest.approx(math.fsum(values) / 1001, rel=0, abs=scale * 2e-8)
        source.shuffle(values)
        assert exact_mean(torch.tensor(values, dtype=torch.float64)) == found
    assert exact_mean(torch.empty(0)) == 0.0
    assert exact_mean(torch.tensor([0.1])) == pytest.approx(0.1, rel=1e-7)


@pytest.mark.parametrize(
    ("signal", "which", "quantity"),
    [("entropy", 0, "entropy"), ("surprisal", 1, "log-probability"), ("covariance", 1, "log-probability"),
     ("gradient", 3, "gradient norm")],
)  # fmt: skip
@pytest.mark.parametrize("per_micro_batch", [False, True])
def test_a_signal_that_is_not_finite_is_named(signal, which, quantity, per_micro_batch):
    values = torch.zeros(4, 5)
    values[which, 3] = -torch.inf
    tokens = Candidates(torch.arange(5) + 40, *values)
    with pytest.raises(NonFiniteError, match=f"the {quantity} of token id 43 is not finite"):
        select([tokens], Rule(signal=signal), per_micro_batch=per_micro_batch, group=None)
