"""The analyses as results: numbers, table and plot of each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from megatron_rlvr.analysis.entropies import PAPER_THRESHOLD, change_by_bin, distribution, overlap
from megatron_rlvr.analysis.results import Cell, Curve, Plot, Result
from megatron_rlvr.analysis.token_means import TokenMean, TokenMeans
from megatron_rlvr.config import ParallelSettings
from megatron_rlvr.errors import InputError
from megatron_rlvr.recording.files import RecordedResponse, read_recorded

if TYPE_CHECKING:
    import torch

_LISTED = 100
_TIMEOUT_MINUTES = 60.0


class NothingRecordedError(InputError):
    """A run folder without recorded responses."""


class NoTemperatureError(InputError):
    """A run folder whose settings cannot be read, while models are to score its responses."""


class UnlikeModelsError(InputError):
    """Models whose parameters cannot be compared."""


@dataclass(frozen=True)
class Scored:
    """Responses with their entropies under each model.

    Attributes:
        responses: Recorded responses.
        models: Name of each model; the only one is "recorded" if no model has scored the responses.
        entropies: For each model, entropies [n] of all tokens of all responses, in nats.
    """

    responses: list[RecordedResponse]
    models: list[str]
    entropies: list[np.ndarray]


def scored(
    run: Path, models: Sequence[Path], parallel: ParallelSettings, *, dtype: Literal["float32", "bfloat16"], budget: int
) -> Scored | None:
    """Return the recorded responses of a run with their entropies; None on a rank that writes no results.

    Args:
        run: Run folder.
        models: Hugging Face folders that score the responses, one after the other; none: entropies as recorded.
        parallel: Layout in which the models are sharded.
        dtype: Precision of scoring.
        budget: Most tokens of a micro-batch.

    Raises: NothingRecordedError, NoTemperatureError for a run without responses, or without settings.
    """
    responses = list(read_recorded(run))
    if not responses:
        raise NothingRecordedError(
            f"{run} has no recorded responses (rollouts/step_N.parquet); set log.rollouts above 0"
        )
    if not models:
        return Scored(responses, ["recorded"], [np.concatenate([response.entropy for response in responses])])
    from megatron_rlvr.analysis.command.scoring import entropies, load
    from megatron_rlvr.analysis.runs import read_runs
    from megatron_rlvr.distributed import process_group
    from megatron_rlvr.distributed.ranks import initialize_ranks

    settings = read_runs([run])[0].settings
    if settings is None:
        raise NoTemperatureError(f"{run}/config.yaml cannot be read, which has rollout.temperature; restore the file")
    temperature = settings.rollout.temperature
    ranks = initialize_ranks(parallel, _TIMEOUT_MINUTES)
    found = [
        np.concatenate(entropies(load(m, parallel, ranks, dtype=dtype, temperature=temperature), responses, budget))
        for m in models
    ]
    is_main = ranks.is_main
    process_group.shut_down()
    return Scored(responses, [str(model) for model in models], found) if is_main else None


def tokens(found: Scored, least: int) -> list[Result]:
    """Return the distribution of entropies, and the tokens of highest and lowest mean entropy."""
    (entropy,) = found.entropies
    d = distribution(entropy)
    means, texts, start = TokenMeans(), dict[int, str](), 0
    for response in found.responses:
        end = start + len(response.token_ids)
        means.add(response.token_ids, entropy[start:end], response.selected)
        texts |= zip(response.token_ids.tolist(), response.texts, strict=True)
        start = end
    most, fewest = means.extremes(_LISTED, least, texts.__getitem__)
    return [
        Result(
            "entropy",
            "Token entropies",
            {
                "model": found.models[0],
                "tokens": d.tokens,
                "mean": d.mean,
                "share below 0.01 nats": d.near_zero,
                **{f"percentile {percent}": value for percent, value in d.percentiles.items()},
                "80th percentile in the paper": PAPER_THRESHOLD,
            },
            ("from (nats)", "to (nats)", "tokens"),
            [*zip(d.edges[:-1].tolist(), d.edges[1:].tolist(), d.counts.tolist(), strict=True)],
            Plot(
                "entropy (nats)",
                "tokens",
                [Curve(found.models[0], d.edges[:-1].tolist(), d.counts.tolist())],
                steps=True,
                log_y=True,
                marks={"80th percentile": d.percentiles[80], "in the paper": PAPER_THRESHOLD},
            ),
        ),
        _listed("forking_tokens", "Tokens of highest mean entropy", most, least),
        _listed("sure_tokens", "Tokens of lowest mean entropy", fewest, least),
    ]


def _listed(name: str, title: str, means: Sequence[TokenMean], least: int) -> Result:
    rows: list[Sequence[Cell]] = [(mean.text, mean.token_id, mean.count, mean.entropy) for mean in means]
    return Result(name, title, {"fewest occurrences": least}, ("token", "id", "occurrences", "mean entropy"), rows)


def change(found: Scored) -> list[Result]:
    """Return the entropy change by bin of base entropy of each model after the first, and the overlap of top tokens."""
    base, *others = found.entropies
    rows: list[Sequence[Cell]] = []
    curves: list[Curve] = []
    for model, entropy in zip(found.models[1:], others, strict=True):
        bins = change_by_bin(base, entropy)
        rows += [(model, b.low, b.high, b.tokens, b.base, b.other, b.change) for b in bins]
        curves.append(Curve(model, [b.high for b in bins], [b.change for b in bins]))
    overlaps = [overlap(base, entropy) for entropy in others]
    return [
        Result(
            "entropy_change",
            "Entropy change by base entropy",
            {"base": found.models[0], "tokens": len(base)},
            ("model", "from (percentile)", "to", "tokens", "base entropy", "entropy", "change"),
            rows,
            Plot("percentile of the base entropy", "mean change (nats)", curves),
        ),
        Result(
            "top_overlap",
            "Overlap of the fifth of highest entropy",
            {"base": found.models[0], "fraction": 0.2},
            ("model", "share of the base's positions"),
            list(zip(found.models[1:], overlaps, strict=True)),
        ),
    ]


def parameters(base: Path, model: Path) -> Result:
    """Return the share of parameters that differ in bfloat16.

    Args:
        base: Hugging Face folder.
        model: Hugging Face folder, checkpoint or run of the same architecture.

    Raises: UnlikeModelsError if a tensor of one model is missing in the other, or has another shape.
    """
    from megatron_rlvr.analysis.parameters import by, changes

    found = list(changes(_pairs(base, model)))
    count, changed = sum(c.count for c in found), sum(c.changed for c in found)
    rows: list[Sequence[Cell]] = []
    for key in ("kind", "layer", "name"):
        rows += [
            (key, "none" if value is None else str(value), n, differ, differ / n)
            for value, (n, differ) in by(found, key).items()
        ]
    layers = [(layer, differ / n) for layer, (n, differ) in by(found, "layer").items() if isinstance(layer, int)]
    layers.sort()
    return Result(
        "parameters",
        "Changed parameters by layer",
        {"base": str(base), "model": str(model), "parameters": count, "changed": changed, "share": changed / count},
        ("by", "value", "parameters", "changed", "share"),
        rows,
        Plot("layer", "share changed", [Curve("bfloat16", [float(x) for x, _ in layers], [y for _, y in layers])]),
    )


def _pairs(base: Path, model: Path) -> "Iterator[tuple[str, torch.Tensor, torch.Tensor]]":
    """Yield (name, tensor of the base, tensor of the model) for every weight, one at a time."""
    from megatron_rlvr.evaluation.command.target import find_target
    from megatron_rlvr.hf.files import read_config
    from megatron_rlvr.hf.weights import TensorReader

    reader = TensorReader(base, read_config(base))
    left = reader.names()
    for name, tensor in find_target(model, None).named_tensors():
        if name not in left:
            raise UnlikeModelsError(
                f"{model} has {name} and {base} has not; give a model that was trained from the base"
            )
        left.remove(name)
        other = reader.read(name)
        if other.shape != tensor.shape:
            raise UnlikeModelsError(
                f"{name} is {tuple(tensor.shape)} in {model} and {tuple(other.shape)} in {base}; give a model that was "
                "trained from the base"
            )
        yield name, other, tensor
    if left:
        raise UnlikeModelsError(
            f"{base} has {min(left)} and {model} has not; give a model that was trained from the base"
        )
