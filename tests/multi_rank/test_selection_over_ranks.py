"""The exact global threshold, and the selection built on it, against a sort of everything in one place."""

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from launcher import Ranks, joined_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rlvr.algo.quantile import NonFiniteError, global_top_fraction_mask
from megatron_rlvr.algo.selection import SIGNALS, Candidates, Rule, select

SIZES = (1, 2, 3, 4)
FRACTIONS = (0.1, 0.2, 0.3, 0.7, 1.0, 1e-9)


@dataclass(frozen=True)
class Tokens:
    """All tokens, their ids, and the rank of 4 that holds each (modulo the number of ranks)."""

    values: np.ndarray
    ids: np.ndarray
    owner: np.ndarray

    def of_rank(self, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        mine = self.owner % size == rank
        return torch.from_numpy(self.values[mine]), torch.from_numpy(self.ids[mine])


def tokens_of(values: np.ndarray, seed: int, owner: np.ndarray | None = None) -> Tokens:
    """Tokens with random, distant ids, on random ranks unless ``owner`` is given."""
    random = np.random.default_rng(seed)
    ids = random.choice(2**44, size=len(values), replace=False).astype(np.int64)
    owner = random.integers(4, size=len(values)) if owner is None else owner
    return Tokens(values.astype(np.float32), ids, owner)


def kinds_of_tokens() -> dict[str, Tokens]:
    random = np.random.default_rng(0)
    normal = random.normal(size=1001)
    kinds = {
        "random": tokens_of(normal, 1),
        "many ties": tokens_of(random.integers(0, 4, 300), 2),
        "all equal": tokens_of(np.full(47, 0.25), 3),
        "negative": tokens_of(-np.abs(normal) - 1, 4),
        "zeros of both signs": tokens_of(np.where(random.random(60) < 0.5, -0.0, 0.0), 5),
        "zeros of both signs among others": tokens_of(random.choice([-1.0, -0.0, 0.0, 1.0], 80), 6),
        "subnormal": tokens_of(random.integers(-3, 4, 90) * 1e-45, 7),
        "largest and smallest": tokens_of(random.choice([-3.4e38, -1e-38, 1e-38, 3.4e38], 70), 8),
        "neighbouring floats": tokens_of(np.float32(0.7) + random.integers(0, 5, 200) * np.float32(2**-24), 9),
        "all on one rank": tokens_of(normal[:200], 10, owner=np.full(200, 1)),
        "two ranks without any": tokens_of(normal[:200], 11, owner=random.choice([0, 3], 200)),
    }
    return kinds | {f"{n} tokens": tokens_of(normal[:n], 20 + n) for n in (0, 1, 2, 10, 30)}


def kept_by_a_sort(tokens: Tokens, fraction: float) -> tuple[set[int], float]:
    """Ids of the first ceil(fraction N) in the order (largest value, smallest id), and the last value among them."""
    order = sorted(range(len(tokens.values)), key=lambda i: (-tokens.values[i], tokens.ids[i]))
    first = order[: math.ceil(Fraction(str(fraction)) * len(order))]
    return {int(tokens.ids[i]) for i in first}, float(tokens.values[first[-1]]) if first else math.inf


class Collectives(TorchDispatchMode):
    """Counts the calls that reach the back end, and the bytes of their tensors on this rank."""

    calls = bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.calls += 1
            self.bytes += sum(tensor.nbytes for tensor in args[0])
        return function(*args, **(kwargs or {}))


def top_fractions(kinds: dict[str, Tokens]) -> dict:
    """Return {(kind, fraction): (ids kept on this rank, decision, collectives, bytes sent)}."""
    with joined_process_group() as group:
        found = {}
        for name, tokens in kinds.items():
            values, ids = tokens.of_rank(group.rank(), group.size())
            for fraction in FRACTIONS:
                with Collectives() as sent:
                    mask, info = global_top_fraction_mask(values, fraction, token_ids=ids, group=group)
                found[name, fraction] = (ids[mask].tolist(), info, sent.calls, sent.bytes)
        return found


def with_bad_values(kinds: dict[str, Tokens]) -> list[int | None]:
    """Return the token that the error names on this rank, for each kind of tokens; a good call follows each."""
    with joined_process_group() as group:
        named: list[int | None] = []
        for tokens in kinds.values():
            values, ids = tokens.of_rank(group.rank(), group.size())
            try:
                global_top_fraction_mask(values, 0.2, token_ids=ids, group=group)
                named.append(None)
            except NonFiniteError as error:
                named.append(error.token_id)
            global_top_fraction_mask(values.nan_to_num(0, 0, 0), 0.2, token_ids=ids, group=group)
        return named


@pytest.mark.parametrize("size", SIZES)
def test_exactly_the_ceiling_of_the_fraction_is_kept_and_the_same_for_any_sharding(ranks: Ranks, size):
    kinds = kinds_of_tokens()
    by_rank = ranks.run(top_fractions, size, kinds)
    for name, tokens in kinds.items():
        for fraction in FRACTIONS:
            parts, infos, calls, sent = zip(*(found[name, fraction] for found in by_rank), strict=True)
            wanted, threshold = kept_by_a_sort(tokens, fraction)
            kept = [token for part in parts for token in part]
            assert sorted(kept) == sorted(wanted), (name, fraction)
            assert all(info == infos[0] for info in infos), "the same decision on every rank"
            assert (infos[0].kept, infos[0].total) == (len(wanted), len(tokens.values))
            assert infos[0].threshold == threshold
            assert infos[0].ties == int((tokens.values == np.float32(threshold)).sum())
            assert (set(calls), set(sent)) == ({infos[0].collectives}, {infos[0].bytes_sent}), "as reported"
            assert max(calls) <= 12
            assert max(sent) <= 128 * 1024


def costs(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Collectives and bytes of this rank for values without ties and for values that all tie, of several sizes."""
    with joined_process_group() as group:
        found = []
        for n in sizes:
            ids = torch.arange(n) * 2 + group.rank()
            for values in (ids / (2.0 * n), torch.ones(n)):
                with Collectives() as sent:
                    global_top_fraction_mask(values, 0.2, token_ids=ids, group=group)
                found.append((sent.calls, sent.bytes))
        return found


def test_the_traffic_does_not_depend_on_the_number_of_tokens(ranks: Ranks):
    distinct, split = (3, 8 * (2048 + 2048 + 1024)), (10, 8 * (2048 + 2048 + 1024 + 16 + 6 * 1024))
    assert ranks.run(costs, 2, (10, 1000, 300_000)) == [[distinct, split] * 3] * 2


def test_a_value_that_is_not_finite_is_an_error_on_every_rank_and_no_rank_hangs(ranks: Ranks):
    kinds = {}
    for value in (np.nan, np.inf, -np.inf):
        for at in ([0], [99], range(10, 90, 7)):
            tokens = tokens_of(np.linspace(0, 1, 100), 30)
            tokens.values[at] = value
            kinds[f"{value} at {at}"] = tokens
    for size in (1, 3):
        by_rank = ranks.run(with_bad_values, size, kinds)
        for tokens, *named in zip(kinds.values(), *by_rank, strict=True):
            assert named == [tokens.ids[~np.isfinite(tokens.values)].min()] * size, "the smallest id, on every rank"


# Selection --------------------------------------------------------------------------------------------------------

SELECTIONS: dict[str, Rule] = {
    "top": Rule(keep="top", fraction=0.2, seed=7),
    "bottom": Rule(keep="bottom", fraction=0.8, seed=7),
    "random": Rule(keep="random", fraction=0.3, seed=7),
    "all": Rule(keep="all", fraction=1.0, seed=7),
}
# Rules that compare tokens by several values, or split them: these are made from the entropy and the id, so that every
# rank makes the same ones.
FAMILY: dict[str, Rule] = {
    **{f"{signal} {keep}": Rule(keep=keep, signal=signal) for signal in SIGNALS for keep in ("top", "bottom")},
    **{f"{signal} by sign": Rule(signal=signal, by_sign=True) for signal in SIGNALS},
    "band": Rule(keep="band", band=(0.4, 0.7), signal="covariance", by_sign=True),
    "guard": Rule(keep="all", guard_probability=0.3, guard_quantile=0.4),
}


def candidates_of(values: torch.Tensor, ids: torch.Tensor) -> Candidates:
    """Tokens of these entropies, with other values that tie often and depend on the ids only."""
    return Candidates(ids, values, -(ids % 7).float() / 3, (ids % 3 - 1).float(), (ids % 5).float() / 4)


def selections(tokens: Tokens, how: dict[str, Rule], micro_batches: int, per_micro_batch: bool = False) -> dict:
    """Return {name: (ids kept on this rank, the selection without masks)}, with the tokens split into micro-batches."""
    with joined_process_group() as group:
        values, ids = tokens.of_rank(group.rank(), group.size())
        # The last micro-batch is always empty, as on a rank that has run out of sequences.
        bounds = [*np.linspace(0, len(ids), micro_batches + 1).astype(int), len(ids)]
        parts = [slice(start, stop) for start, stop in pairwise(bounds)]
        found = {}
        for name, rule in how.items():
            candidates = [candidates_of(values[p], ids[p]) for p in parts]
            chosen = select(candidates, rule, per_micro_batch=per_micro_batch, group=group)
            assert [len(mask) for mask in chosen.masks] == [p.stop - p.start for p in parts]
            kept = [i for p, mask in zip(parts, chosen.masks, strict=True) for i in ids[p][mask].tolist()]
            found[name] = (
                kept,
                chosen.total,
                chosen.kept,
                chosen.thresholds.get("threshold"),
                chosen.entropy_kept,
                chosen.entropy_dropped,
            )
        return found


def one_selection(by_rank: list[dict], name: str) -> tuple[set[int], tuple]:
    """Ids kept on all ranks, and the statistics, which are the same on every rank."""
    statistics = {found[name][1:] for found in by_rank}
    assert len(statistics) == 1
    kept = [i for found in by_rank for i in found[name][0]]
    assert len(kept) == len(set(kept))
    return set(kept), statistics.pop()


def test_the_selection_and_its_statistics_are_the_same_for_any_ranks_and_micro_batches(ranks: Ranks):
    tokens = tokens_of(np.random.default_rng(3).gamma(0.5, size=1000), 3)
    value_of = dict(zip(tokens.ids.tolist(), tokens.values.tolist(), strict=True))
    layouts = [(1, 1), (1, 5), (2, 1), (3, 2), (4, 7)]
    random_sets = []
    family: dict[str, list[Any]] = {name: [] for name in FAMILY}
    for size, micro_batches in layouts:
        by_rank = ranks.run(selections, size, tokens, SELECTIONS | FAMILY, micro_batches)
        kept = {}
        for name in FAMILY:
            family[name].append(one_selection(by_rank, name))
        for name in SELECTIONS:
            kept[name], (total, count, threshold, entropy_kept, entropy_dropped) = one_selection(by_rank, name)
            entropies = [value_of[i] for i in kept[name]]
            assert (total, count) == (1000, len(kept[name]))
            assert entropy_kept == pytest.approx(math.fsum(entropies), rel=1e-12)
            assert entropy_dropped == pytest.approx(math.fsum(value_of.values()) - math.fsum(entropies), abs=1e-9)
            border = {"top": min, "bottom": max}.get(name)
            assert threshold == (border(entropies) if border else None)
        assert kept["top"] == kept_by_a_sort(tokens, 0.2)[0]
        assert kept["bottom"] == set(value_of) - kept["top"], "the ablation is the complement of the method"
        assert kept["all"] == set(value_of)
        random_sets.append(kept["random"])
    assert len(random_sets[0]) == 300
    assert all(chosen == random_sets[0] for chosen in random_sets)
    for name, found in family.items():
        # Entropies are summed in another order in another layout; what is decided is the same.
        assert all(kept == found[0][0] and counts[:3] == found[0][1][:3] for kept, counts in found), name
        assert 0 < found[0][1][1] < 1000, name


def test_per_micro_batch_the_fraction_of_each_micro_batch_is_selected_by_itself(ranks: Ranks):
    tokens = tokens_of(np.random.default_rng(4).random(101), 4)
    by_rank = ranks.run(selections, 2, tokens, {"each": Rule()}, 3, True)
    wanted = set()
    for rank in range(2):
        values, ids = (t.numpy() for t in tokens.of_rank(rank, 2))
        bounds = np.linspace(0, len(ids), 4).astype(int)
        for start, stop in pairwise(bounds):
            part = Tokens(values[start:stop], ids[start:stop], np.zeros(stop - start, dtype=np.int64))
            wanted |= kept_by_a_sort(part, 0.2)[0]
    kept, (total, count, threshold, *_) = one_selection(by_rank, "each")
    assert kept == wanted
    assert (total, count, threshold) == (101, len(wanted), None)


def refusal(rule: Rule, per_micro_batch: bool, bad_rank: int) -> str:
    with joined_process_group(timeout_seconds=60) as group:
        rank = group.rank()
        values, ids = torch.rand(6), torch.arange(6) + 100 * rank
        if rank == bad_rank:
            values[4] = torch.nan
        try:
            candidates = [candidates_of(values[:3], ids[:3]), candidates_of(values[3:], ids[3:])]
            select(candidates, rule, per_micro_batch=per_micro_batch, group=group)
        except ValueError as error:
            return str(error)
        return "nothing"


def test_an_entropy_that_is_not_finite_stops_every_rank_in_every_selection(ranks: Ranks):
    rules = [(Rule(), False), (Rule(keep="bottom"), True), (Rule(keep="random"), True), (Rule(keep="all"), False)]
    rules += [(Rule(signal="gradient"), True), (Rule(signal="covariance", by_sign=True), False)]
    for rule, per_micro_batch in rules:
        messages = ranks.run(refusal, 2, rule, per_micro_batch, 1)
        assert len(set(messages)) == 1
        assert "token id 104 is not finite" in messages[0]
