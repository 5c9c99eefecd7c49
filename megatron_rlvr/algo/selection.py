"""Selection of the response tokens that carry the policy gradient: the forking tokens, or another rule of this family.

A rule compares tokens by a signal, and keeps a fraction: the largest values (top), the smallest (bottom), those between
two quantiles (band), a reproducible random set (random), or every token (all). Tokens that are selected together share
one threshold, over all data-parallel ranks; with ``by_sign``, those of positive and of negative advantage have their
own. A guard drops rare, confident tokens from any of these. docs/method.md has the formulas and their sources.

Every decision is a prefix of one total order (signal, then token id) or a comparison with a number that is the same on
every rank, so the set depends neither on the number of ranks nor on how tokens fall into micro-batches.

Shapes: R response tokens of a micro-batch, n tokens of any list.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlvr.algo.quantile import as_written, exact_mean, global_top_fraction_mask, refuse_non_finite

Keep = Literal["top", "bottom", "band", "random", "all"]
Signal = Literal["entropy", "surprisal", "covariance", "gradient"]


@dataclass(frozen=True)
class Candidates:
    """Data of tokens to select from, each [n], under the policy before the update.

    Attributes:
        token_ids: int64, unique over all ranks; they break ties and drive random selection.
        entropy: float32 nats.
        logp: float32 nats, log-probability of the token.
        advantages: float32.
        gradient: float32, norm of the gradient of ``logp`` by the logits; NaN where it is not known.
    """

    token_ids: Tensor
    entropy: Tensor
    logp: Tensor
    advantages: Tensor
    gradient: Tensor

    @staticmethod
    def concatenated(parts: Sequence["Candidates"]) -> "Candidates":
        """Join lists of tokens; none at all if there are no lists."""
        if not parts:
            return Candidates(torch.empty(0, dtype=torch.int64), *torch.empty(4, 0))
        return Candidates(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Candidates)))

    def __getitem__(self, which: Tensor) -> "Candidates":
        """Return the tokens that a mask or indices name."""
        return Candidates(*(getattr(self, f.name)[which] for f in fields(self)))


@dataclass(frozen=True)
class Rule:
    """A rule of selection.

    Attributes:
        keep: Which part of the order by signal to keep.
        fraction: Share of the tokens to keep, in (0, 1], with keep top, bottom and random.
        band: Quantiles between which a signal is kept, low < high in [0, 1], with keep band.
        signal: The value by which tokens are compared; not used with keep random and all.
        by_sign: Select the fraction of the tokens of positive and of negative advantage separately, and no others.
        guard_probability: Drop tokens of positive advantage below this probability that are confident; 0 for no guard.
        guard_quantile: Share of the improbable tokens of positive advantage that counts as confident: those of lowest
            entropy.
        seed: Seed of random selection, the same on every rank.
    """

    keep: Keep = "top"
    fraction: float | Fraction = 0.2
    band: tuple[float, float] | None = None
    signal: Signal = "entropy"
    by_sign: bool = False
    guard_probability: float = 0.0
    guard_quantile: float = 0.75
    seed: int = 0


@dataclass(frozen=True)
class Selection:
    """Masks of a list of micro-batches, and statistics of the selection, the same on every rank.

    Attributes:
        masks: [R] bool for each micro-batch of this rank, True for selected tokens.
        total: Number of tokens to select from, over all ranks.
        kept: Number of selected tokens, over all ranks.
        guarded: Number of tokens that the guard has dropped, over all ranks.
        thresholds: Values of the signal at the ends of what is kept, before the guard: {"threshold": smallest value
            kept (largest, with keep bottom)}, or {"threshold_low", "threshold_high"} for the ends of a band; with
            ``by_sign`` two of each, "threshold_positive" and "threshold_negative". Empty if no threshold is shared.
        entropy_kept: Sum of the selected tokens' entropies in nats, over all ranks.
        entropy_dropped: Sum of the other tokens' entropies in nats, over all ranks.
    """

    masks: list[Tensor]
    total: int
    kept: int
    guarded: int
    thresholds: dict[str, float]
    entropy_kept: float
    entropy_dropped: float


def scheduled_fraction(start: float | Fraction, end: float | Fraction, steps: int, step: int) -> Fraction:
    """Fraction of a step: linear from ``start`` in step 1 to ``end`` in step ``steps``, and ``end`` afterwards.

        f = start + (end - start) min(1, (step - 1) / (steps - 1))

    Args:
        start: Fraction in step 1.
        end: Fraction from step ``steps`` on.
        steps: At least 2.
        step: Number of the training step, from 1.

    Returns: the fraction, exact for the numbers as written.
    """
    return as_written(start) + (as_written(end) - as_written(start)) * min(Fraction(step - 1, steps - 1), Fraction(1))


def select(
    micro_batches: Sequence[Candidates], rule: Rule, *, per_micro_batch: bool, group: dist.ProcessGroup | None
) -> Selection:
    """Select tokens of a list of micro-batches on all ranks. A collective over ``group``.

    Args:
        micro_batches: Tokens of each micro-batch of this rank.
        rule: The rule, the same on every rank.
        per_micro_batch: Select from each micro-batch by itself instead of with thresholds for all of them.
        group: Data-parallel ranks; None for this rank alone.

    Raises: NonFiniteError on every rank if one of them holds an entropy or a signal that is not finite.
    """
    everything = Candidates.concatenated(micro_batches)
    _refuse_non_finite(everything, rule, group)
    if per_micro_batch:
        each = [selected_tokens(candidates, rule) for candidates in micro_batches]
        nothing = torch.zeros_like(everything.token_ids[:0], dtype=torch.bool)
        mask = torch.cat([nothing, *(part.mask for part in each)])
        chosen = Selected(mask, torch.cat([nothing, *(part.guarded for part in each)]), {})
    else:
        chosen = selected_tokens(everything, rule, group)
    mask = chosen.mask
    entropy = everything.entropy.double()
    sums = torch.stack([mask.sum(), (~mask).sum(), chosen.guarded.sum(), entropy[mask].sum(), entropy[~mask].sum()])
    if group is not None:
        dist.all_reduce(sums, group=group)
    kept, dropped, guarded, entropy_kept, entropy_dropped = sums.tolist()
    return Selection(
        masks=list(mask.split([len(candidates.token_ids) for candidates in micro_batches])),
        total=int(kept + dropped),
        kept=int(kept),
        guarded=int(guarded),
        thresholds=chosen.thresholds,
        entropy_kept=entropy_kept,
        entropy_dropped=entropy_dropped,
    )


class Selected(NamedTuple):
    """Result of `selected_tokens`.

    Attributes:
        mask: [n] bool, the selected tokens.
        guarded: [n] bool, tokens that would be selected but for the guard.
        thresholds: See `Selection`.
    """

    mask: Tensor
    guarded: Tensor
    thresholds: dict[str, float]


def selected_tokens(candidates: Candidates, rule: Rule, group: dist.ProcessGroup | None = None) -> Selected:
    """Select from the tokens that share thresholds: those of all ranks of ``group``. A collective.

    Args:
        candidates: [n] tokens of this rank; n may differ per rank and be 0.
        rule: The rule, the same on every rank.
        group: Ranks that share the tokens; None for this rank alone.

    Raises: NonFiniteError on every rank if one of them holds a signal that is not finite.
    """
    thresholds: dict[str, float] = {}
    if rule.keep == "all":
        mask = torch.ones_like(candidates.token_ids, dtype=torch.bool)
    else:
        values = _values(candidates, rule, group)
        mask = torch.zeros_like(candidates.token_ids, dtype=torch.bool)
        parts = {"": torch.ones_like(mask)}
        if rule.by_sign:
            parts = {"_positive": candidates.advantages > 0, "_negative": candidates.advantages < 0}
        for suffix, part in parts.items():
            mask[part], found = _kept(values[part], candidates.token_ids[part], rule, group)
            thresholds |= {name + suffix: value for name, value in found.items() if math.isfinite(value)}
    spurious = rare_and_confident(candidates, rule, group)
    return Selected(mask & ~spurious, mask & spurious, thresholds)


def rare_and_confident(candidates: Candidates, rule: Rule, group: dist.ProcessGroup | None = None) -> Tensor:
    """Tokens that a guard drops: improbable ones of positive advantage, where the policy was sure of another token.

        A > 0,    p < guard_probability,    H among the ceil(guard_quantile N) lowest of the N tokens with the first two

    Spurious tokens of STAPO (arXiv 2602.15620). A collective over ``group`` if there is a guard.

    Args:
        candidates: [n] tokens of this rank.
        rule: Its numbers of the guard are read.
        group: Ranks that share the tokens; None for this rank alone.

    Returns: [n] bool; all False without a guard.
    """
    found = torch.zeros_like(candidates.token_ids, dtype=torch.bool)
    if not rule.guard_probability:
        return found
    rare = (candidates.advantages > 0) & (candidates.logp < math.log(rule.guard_probability))
    ids, entropy = candidates.token_ids[rare], candidates.entropy[rare]
    found[rare] = global_top_fraction_mask(-entropy, rule.guard_quantile, token_ids=ids, group=group)[0]
    return found


def _kept(values: Tensor, ids: Tensor, rule: Rule, group: dist.ProcessGroup | None) -> tuple[Tensor, dict[str, float]]:
    """Return the mask of the kept values, and the thresholds by name."""

    def top(fraction: float | Fraction) -> tuple[Tensor, float]:
        mask, info = global_top_fraction_mask(values, fraction, token_ids=ids, group=group)
        return mask, info.threshold

    if rule.keep == "band":
        assert rule.band is not None
        low, high = (as_written(quantile) for quantile in rule.band)
        mask, smallest = top(1 - low)
        thresholds = {"threshold_low": smallest}
        if high < 1:
            above, first_above = top(1 - high)
            mask, thresholds["threshold_high"] = mask & ~above, first_above
        return mask, thresholds
    mask, smallest = top(rule.fraction)
    if rule.keep == "random":
        return mask, {}
    return mask, {"threshold": smallest if rule.keep == "top" else -smallest}


# Signals ------------------------------------------------------------------------------------------------------------


def _values(candidates: Candidates, rule: Rule, group: dist.ProcessGroup | None) -> Tensor:
    """[n] float32 values of which the largest are kept."""
    if rule.keep == "random":
        return _noise(candidates.token_ids, rule.seed)
    values = SIGNALS[rule.signal](candidates, group)
    return -values if rule.keep == "bottom" else values


def _covariance(candidates: Candidates, group: dist.ProcessGroup | None) -> Tensor:
    """A token's term of the covariance of advantage and log-probability: (A - mean A) (ln p - mean ln p).

    The means are over the tokens that share a threshold. Clip-Cov and KL-Cov (arXiv 2505.22617) rank tokens by it.
    """
    advantage, logp = candidates.advantages.double(), candidates.logp.double()
    return ((advantage - exact_mean(advantage, group)) * (logp - exact_mean(logp, group))).float()


SIGNALS: dict[Signal, Callable[[Candidates, dist.ProcessGroup | None], Tensor]] = {
    "entropy": lambda candidates, _: candidates.entropy,
    "surprisal": lambda candidates, _: -candidates.logp,
    "covariance": _covariance,
    "gradient": lambda candidates, _: candidates.gradient,
}


def _refuse_non_finite(candidates: Candidates, rule: Rule, group: dist.ProcessGroup | None) -> None:
    """Raise NonFiniteError on every rank for a value of any, whatever the rule then compares on which rank."""
    refuse_non_finite(candidates.entropy, candidates.token_ids, group)
    if rule.signal in ("surprisal", "covariance"):
        refuse_non_finite(candidates.logp, candidates.token_ids, group, "log-probability")
    if rule.signal == "gradient":
        refuse_non_finite(candidates.gradient, candidates.token_ids, group, "gradient norm")


def _noise(token_ids: Tensor, seed: int) -> Tensor:
    """[n] float32 in [0, 1): a mix of token id and seed by multiplications and shifts in wrapping int64."""
    offset = (seed * 0x9E3779B97F4A7C1 + 0x632BE59BD9B4E019) % 2**64
    x = token_ids + (offset - 2**64 if offset >= 2**63 else offset)
    for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    return (x & 0xFFFFFF).float() / 0x1000000
