"""Losses of sequences that are sharded over the ranks of a group, against the same tokens on one rank."""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from launcher import Ranks, joined_process_group
from torch import Tensor

from megatron_rlvr.algo.loss import SelectedTokens, policy_loss
from megatron_rlvr.config import LossSettings

TOKENS, SEQUENCES = 200, 9
# The last two sequences have no selected token: a micro-batch numbers all of its sequences.
WITH_TOKENS = SEQUENCES - 2

SETTINGS = [
    LossSettings(objective="gspo"),
    LossSettings(objective="gspo", clip_low=0.2, clip_high=0.28),
    LossSettings(objective="dapo"),
    LossSettings(objective="cispo"),
    LossSettings(objective="dppo"),
]

# Rank of two that holds a token, by its sequence and its place.
SHARDINGS: dict[str, Callable[[int, int], int]] = {
    "each sequence in halves": lambda sequence, place: int(place >= TOKENS // 2),
    "each sequence in turns": lambda sequence, place: place % 2,
    "whole sequences": lambda sequence, place: sequence % 2,
    "some whole, some in turns": lambda sequence, place: place % 2 if sequence < 3 else 0,
    "all on the first rank": lambda sequence, place: 0,
    "all on the second rank": lambda sequence, place: 1,
}


@dataclass(frozen=True)
class Case:
    """One call of a loss on all tokens, and the rank that holds each token."""

    settings: LossSettings
    logp: Tensor
    tokens: SelectedTokens
    rank: Tensor


@dataclass(frozen=True)
class Outcome:
    """Results of one rank for its tokens."""

    loss: float
    slopes: Tensor
    metrics: dict[str, float]


def loss_of(case: Case, mine: Tensor, group: Any = None) -> Outcome:
    """Compute the loss of the tokens that ``mine`` marks; the others are on other ranks of ``group``."""
    tokens = replace(
        case.tokens,
        **{name: getattr(case.tokens, name)[mine] for name in ("old_logp", "rollout_logp", "advantages", "sequence")},
        context_group=group,
    )
    logp = case.logp[mine].requires_grad_()
    names = {"objective", "clip_low", "clip_high", "dual_clip"}
    loss, metrics = policy_loss(logp, tokens, **case.settings.model_dump(include=names))
    loss.backward()
    assert logp.grad is not None
    return Outcome(loss.item(), logp.grad, {name: float(value) for name, value in metrics.items()})


def on_ranks(cases: list[Case]) -> list[Outcome]:
    with joined_process_group() as group:
        return [loss_of(case, case.rank == torch.distributed.get_rank(group), group) for case in cases]


def random_case(seed: int, settings: LossSettings, rank_of: Callable[[int, int], int]) -> Case:
    """A case of sequences whose mean ratio is inside the bounds, or beyond them on either side."""
    source, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    sequence = torch.tensor([source.randrange(WITH_TOKENS) for _ in range(TOKENS)])
    width = (settings.clip_high if settings.objective == "gspo" else 0.3) * torch.linspace(-3, 3, WITH_TOKENS)
    logp, noise, rollout = torch.randn(3, TOKENS, generator=generator, dtype=torch.float64)
    old = logp - width.double()[sequence] - 0.5 * noise * settings.clip_high
    return Case(
        settings,
        logp,
        SelectedTokens(
            old_logp=old,
            rollout_logp=old + 0.5 * rollout,
            advantages=torch.where(sequence % 2 == 0, 1.0, -0.5).double(),
            sequence=sequence,
            sequences=SEQUENCES,
        ),
        torch.tensor([rank_of(s, place) for place, s in enumerate(sequence.tolist())]),
    )


def test_sharded_sequences_have_the_loss_and_gradient_of_one_rank(ranks: Ranks) -> None:
    # Each case has different tokens: a rank that skipped a collective would take part in that of the next case.
    combinations = list(product(SETTINGS, SHARDINGS))
    cases = [random_case(seed, settings, SHARDINGS[sharding]) for seed, (settings, sharding) in enumerate(combinations)]
    names = [f"{settings.objective}, {sharding}" for settings, sharding in combinations]
    by_rank = ranks.run(on_ranks, 2, cases)
    for name, case, *parts in zip(names, cases, *by_rank, strict=True):
        whole = loss_of(case, torch.ones(TOKENS, dtype=torch.bool))
        slopes = torch.zeros_like(whole.slopes)
        for rank, part in enumerate(parts):
            slopes[case.rank == rank] = part.slopes
        torch.testing.assert_close(
            slopes, whole.slopes, rtol=1e-12, atol=0, msg=functools.partial("{}: {}".format, name)
        )
        assert sum(part.loss for part in parts) == pytest.approx(whole.loss, rel=1e-12), name
        for metric, value in whole.metrics.items():
            assert sum(part.metrics[metric] for part in parts) == pytest.approx(value, rel=1e-12, abs=1e-12), name
        assert 0 < whole.metrics["clip_fraction"] < TOKENS, "the case reaches several regions"


def test_without_the_sum_over_ranks_the_halves_of_a_sequence_would_be_clipped_differently() -> None:
    """The cases above can detect a missing sum over ranks."""
    case = random_case(0, SETTINGS[0], SHARDINGS["each sequence in halves"])
    whole = loss_of(case, torch.ones(TOKENS, dtype=torch.bool))
    alone = sum(loss_of(case, case.rank == rank).metrics["clip_fraction"] for rank in (0, 1))
    assert alone != whole.metrics["clip_fraction"]
