"""The analyses of entropies as results: numbers, table and plot of each."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from megatron_rlvr.analysis.command.models import hugging_face_folder, name_of
from megatron_rlvr.analysis.command.sources import Source, SourceError
from megatron_rlvr.analysis.entropies import (
    PAPER_THRESHOLD,
    PERCENTILES,
    change_by_bin,
    distribution,
    equal_bins,
    overlap,
)
from megatron_rlvr.analysis.results import Cell, Curve, Plot, Result
from megatron_rlvr.analysis.token_means import TokenMean, TokenMeans
from megatron_rlvr.config import ParallelSettings
from megatron_rlvr.evaluation.command.target import Target

if TYPE_CHECKING:
    from megatron_rlvr.distributed.ranks import Ranks

_LISTED = 100
_TIMEOUT_MINUTES = 60.0
_TOP = 0.2


@dataclass(frozen=True)
class Scoring:
    """How models score responses.

    Attributes:
        parallel: Layout in which the models are sharded.
        dtype: Precision.
        budget: Most tokens of a micro-batch.
        place: Folder for the weights of a checkpoint while it scores.
        temperature: Temperature of the distributions.
    """

    parallel: ParallelSettings
    dtype: Literal["float32", "bfloat16"]
    budget: int
    place: Path
    temperature: float


@dataclass(frozen=True)
class Scored:
    """Entropies of all tokens of all responses, one response after the other, under each model.

    Attributes:
        names: Name of each model.
        steps: Training step of each model; None if it is not known.
        entropies: [n] for each model, in nats.
    """

    names: list[str]
    steps: list[int | None]
    entropies: list[np.ndarray]


@contextmanager
def _ranks(parallel: ParallelSettings) -> "Iterator[Ranks]":
    from megatron_rlvr.distributed import process_group
    from megatron_rlvr.distributed.ranks import initialize_ranks

    yield initialize_ranks(parallel, _TIMEOUT_MINUTES)
    process_group.shut_down()


def score(source: Source, models: Sequence[Target], how: Scoring) -> Scored | None:
    """Return the entropies of the responses under each model; None on a rank that writes no results."""
    from megatron_rlvr.analysis.command.scoring import entropies, load
    from megatron_rlvr.distributed.collectives import on_main_rank

    found = []
    with _ranks(how.parallel) as ranks:
        for model in models:
            with hugging_face_folder(model, how.place, on_main_rank) as folder:
                policy = load(folder, how.parallel, ranks, dtype=how.dtype, temperature=how.temperature)
                found.append(np.concatenate(entropies(policy, source.responses, how.budget)))
        is_main = ranks.is_main
    names, steps = [name_of(model) for model in models], [model.step for model in models]
    return Scored(names, steps, found) if is_main else None


def tokens(source: Source, scored: Scored | None, least: int) -> list[Result]:
    """Return the distribution of entropies, the tokens of highest and lowest mean entropy, and percentiles by step.

    Args:
        source: Responses.
        scored: Their entropies under one model; None for those recorded.
        least: Fewest occurrences of a token that is listed.
    """
    name, entropy = ("recorded", _recorded(source)) if scored is None else (scored.names[0], scored.entropies[0])
    d = distribution(entropy)
    means, start = TokenMeans(), 0
    for response in source.responses:
        end = start + len(response.token_ids)
        means.add(response.token_ids, entropy[start:end], np.zeros(end - start, bool))
        start = end
    most, fewest = means.extremes(_LISTED, least, source.text_of)
    results = [
        Result(
            "entropy",
            "Token entropies",
            {
                "model": name,
                "responses": len(source.responses),
                "tokens": d.tokens,
                "mean": d.mean,
                "share below 0.01 nats": d.near_zero,
                **{f"percentile {percent}": value for percent, value in d.percentiles.items()},
                "80th percentile in the paper": PAPER_THRESHOLD,
                **source.notes,
            },
            ("from (nats)", "to (nats)", "tokens"),
            [*zip(d.edges[:-1].tolist(), d.edges[1:].tolist(), d.counts.tolist(), strict=True)],
            Plot(
                "entropy (nats)",
                "tokens",
                [Curve(name, d.edges[:-1].tolist(), d.counts.tolist())],
                steps=True,
                log_y=True,
                marks={"80th percentile": d.percentiles[80], "80th percentile in the paper": PAPER_THRESHOLD},
            ),
        ),
        _listed("forking_tokens", "Tokens of highest mean entropy", most, least),
        _listed("sure_tokens", "Tokens of lowest mean entropy", fewest, least),
    ]
    steps = sorted({response.step for response in source.responses if response.step is not None})
    if scored is None and len(steps) > 1:
        parts = {step: [r.entropy for r in source.responses if r.step == step] for step in steps}
        by_step = [np.concatenate([part for part in parts[step] if part is not None]) for step in steps]
        results.append(_by_step([f"step {step}" for step in steps], list(steps), by_step, {"text": "of each step"}))
    return results


def _recorded(source: Source) -> np.ndarray:
    found = [response.entropy for response in source.responses if response.entropy is not None]
    if len(found) < len(source.responses):
        raise SourceError("responses without recorded entropies; give --model, which scores them")
    return np.concatenate(found)


def _listed(name: str, title: str, means: Sequence[TokenMean], least: int) -> Result:
    rows: list[Sequence[Cell]] = [(mean.text, mean.token_id, mean.count, mean.entropy) for mean in means]
    return Result(
        name, title, {"fewest occurrences": least}, ("token", "id", "occurrences", "mean entropy"), rows, cloud=True
    )


def _by_step(
    names: Sequence[str], steps: Sequence[int | None], entropies: Sequence[np.ndarray], metrics: dict[str, Cell]
) -> Result:
    percentiles = np.stack([np.percentile(entropy.astype(np.float64), PERCENTILES) for entropy in entropies])
    rows: list[Sequence[Cell]] = [
        (name, len(entropy), float(entropy.mean(dtype=np.float64)), *values.tolist())
        for name, entropy, values in zip(names, entropies, percentiles, strict=True)
    ]
    x, label = _axis(steps)
    return Result(
        "entropy_by_step",
        "Percentiles of token entropies over training",
        metrics,
        ("model", "tokens", "mean", *(f"percentile {p}" for p in PERCENTILES)),
        rows,
        Plot(
            label,
            "entropy (nats)",
            [
                Curve(f"percentile {p}", x, percentiles[:, i].tolist())
                for i, p in enumerate(PERCENTILES)
                if p in (50, 75, 80, 90, 95, 99)
            ],
        ),
    )


def _axis(steps: Sequence[int | None]) -> tuple[list[float], str]:
    """Return places of models on the axis of a plot, and its label; the first model without step is that of step 0."""
    known = [0 if number == 0 and step is None else step for number, step in enumerate(steps)]
    numbers = [float(step) for step in known if step is not None]
    if len(numbers) == len(steps) and numbers == sorted(set(numbers)):
        return numbers, "training step"
    return [float(number) for number in range(len(steps))], "number of the model"


def change(source: Source, scored: Scored, bins: int) -> list[Result]:
    """Return how the entropies of each model after the first differ from it: by bin, in the top fifth, in percentiles.

    Args:
        source: Responses.
        scored: Their entropies under the base, which is the first, and other models.
        bins: Number of bins by base entropy.
    """
    base, *others = scored.entropies
    rows: list[Sequence[Cell]] = []
    curves: list[Curve] = []
    for model, entropy in zip(scored.names[1:], others, strict=True):
        found = change_by_bin(base, entropy, bins)
        rows += [(model, b.low, b.high, b.tokens, b.base, b.other, b.change) for b in found]
        curves.append(Curve(model, [b.high for b in found], [b.change for b in found]))
    overlaps = [overlap(base, entropy, _TOP) for entropy in others]
    x, label = _axis(scored.steps)
    metrics: dict[str, Cell] = {"base": scored.names[0], "tokens": len(base), **source.notes}
    return [
        Result(
            "entropy_change",
            "Entropy change by base entropy",
            metrics,
            ("model", "from (percentile)", "to", "tokens", "base entropy", "entropy", "change"),
            rows,
            Plot("percentile of the base entropy", "mean change (nats)", curves),
        ),
        Result(
            "top_overlap",
            "Overlap of the fifth of highest entropy",
            metrics | {"fraction": _TOP},
            ("model", "share of the base's positions"),
            list(zip(scored.names[1:], overlaps, strict=True)),
            Plot(label, "share of the base's positions", [Curve("overlap", x, [1.0, *overlaps])]),
        ),
        _by_step(scored.names, scored.steps, scored.entropies, metrics),
    ]


def gradient(source: Source, model: Target, how: Scoring, bins: int) -> list[Result] | None:
    """Return how much of the policy gradient each bin of entropies adds; None on a rank that writes no results.

    The number of bins is a multiple of five, so that the highest fifth of the tokens are whole bins.
    """
    from megatron_rlvr.analysis.command.scoring import entropies, gradients_by_bin, load
    from megatron_rlvr.distributed.collectives import on_main_rank

    if any(response.advantage is None for response in source.responses):
        raise SourceError("responses without advantages have no policy gradient; give those of a run or an evaluation")
    with _ranks(how.parallel) as ranks, hugging_face_folder(model, how.place, on_main_rank) as folder:
        policy = load(folder, how.parallel, ranks, dtype=how.dtype, temperature=how.temperature, gradients=True)
        entropy = np.concatenate(entropies(policy, source.responses, how.budget))
        parts = equal_bins(entropy, bins)
        bin_of = np.empty(len(entropy), np.int64)
        for number, part in enumerate(parts):
            bin_of[part] = number
        found = gradients_by_bin(policy, source.responses, bin_of, len(parts), how.budget)
        is_main = ranks.is_main
    if not is_main:
        return None
    ends = np.cumsum([0, *map(len, parts)]) / len(entropy) * 100
    squares = found.norms**2 / max(float((found.norms**2).sum()), np.finfo(float).tiny)
    top = slice(len(parts) - len(parts) // 5, None)
    rows: list[Sequence[Cell]] = [
        (
            float(ends[i]),
            float(ends[i + 1]),
            len(part),
            float(entropy[part].mean(dtype=np.float64)),
            float(found.norms[i]),
            float(found.shares[i]),
            float(squares[i]),
        )
        for i, part in enumerate(parts)
    ]
    return [
        Result(
            "gradient",
            "Policy gradient by token entropy",
            {
                "model": name_of(model),
                "responses": len(source.responses),
                "tokens": len(entropy),
                "norm of the gradient": found.norm,
                "share of the highest fifth": float(found.shares[top].sum()),
                "squared norm of the highest fifth's bins": float(squares[top].sum()),
                **source.notes,
            },
            ("from (percentile)", "to", "tokens", "mean entropy", "norm", "share", "share of squared norms"),
            rows,
            Plot(
                "percentile of the entropy",
                "share",
                [
                    Curve("of the gradient, <g_b, g> / <g, g>", ends[1:].tolist(), found.shares.tolist()),
                    Curve("of the bins' squared norms", ends[1:].tolist(), squares.tolist()),
                ],
            ),
        )
    ]
