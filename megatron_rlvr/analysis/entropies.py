"""Statistics of token entropies: their distribution, and how they change from a model to one trained from it.

All functions take entropies in nats, of the same tokens in the same order where there are two models. The sources are
sections 3 and 4 of "Beyond the 80/20 rule" (Wang et al., 2025).
"""

from dataclasses import dataclass

import numpy as np

PAPER_THRESHOLD = 0.672
"""80th percentile of the paper's Qwen3-8B on AIME'24 and AIME'25, in nats."""

PERCENTILES = (1, 5, 10, 20, 25, 50, 75, 80, 90, 95, 99)
_NEAR_ZERO = 0.01


@dataclass(frozen=True)
class Distribution:
    """Distribution of n entropies.

    Attributes:
        tokens: n.
        mean: Mean, in nats.
        percentiles: {percent: nats}.
        near_zero: Share of entropies below 0.01 nats.
        edges: [b + 1] edges of the histogram's bins, in nats.
        counts: [b] entropies in each bin, of which the sum is n; the last bin includes its upper edge.
    """

    tokens: int
    mean: float
    percentiles: dict[int, float]
    near_zero: float
    edges: np.ndarray
    counts: np.ndarray


def distribution(entropy: np.ndarray, width: float = 0.05) -> Distribution:
    """Return the distribution of entropies [n], n >= 1, with a histogram of bins of ``width`` nats from 0."""
    values = entropy.astype(np.float64)
    bins = int(np.floor(values.max() / width)) + 1
    edges = np.arange(bins + 1) * width
    # Rounding may put the highest entropy above the last edge, and that of a sure token a little below 0.
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
    return Distribution(
        tokens=len(values),
        mean=float(values.mean()),
        percentiles=dict(zip(PERCENTILES, np.percentile(values, PERCENTILES).tolist(), strict=True)),
        near_zero=float((values < _NEAR_ZERO).mean()),
        edges=edges,
        counts=counts,
    )


@dataclass(frozen=True)
class BinChange:
    """Change of the entropies in a bin of the base model's.

    Attributes:
        low, high: Percentiles of the base entropies between which the bin is.
        tokens: Number of tokens.
        base, other: Mean entropies, in nats.
    """

    low: float
    high: float
    tokens: int
    base: float
    other: float

    @property
    def change(self) -> float:
        """Mean change, in nats."""
        return self.other - self.base


def equal_bins(base: np.ndarray, bins: int) -> list[np.ndarray]:
    """Return the places of the tokens of ``bins`` bins of equally many tokens, by rising entropy ``base`` [n].

    Equal entropies are in the order of the tokens, so that every bin has its share of them. Fewer bins if there are
    fewer tokens.
    """
    return np.array_split(np.argsort(base, kind="stable"), min(bins, len(base)))


def change_by_bin(base: np.ndarray, other: np.ndarray, bins: int = 20) -> list[BinChange]:
    """Return the mean change of entropies in each of `equal_bins`.

    Args:
        base: [n] entropies under the base model.
        other: [n] entropies of the same tokens under the other model.
        bins: Number of bins.
    """
    parts = equal_bins(base, bins)
    ends = np.cumsum([len(part) for part in parts]) / len(base) * 100
    return [
        BinChange(
            low=float(end - len(part) / len(base) * 100),
            high=float(end),
            tokens=len(part),
            base=float(base[part].mean(dtype=np.float64)),
            other=float(other[part].mean(dtype=np.float64)),
        )
        for part, end in zip(parts, ends, strict=True)
    ]


def overlap(base: np.ndarray, other: np.ndarray, fraction: float = 0.2) -> float:
    """Return the share of the base's ``ceil(fraction * n)`` highest entropies that are among the other's as well.

    Equal entropies are in the order of the tokens.
    """
    count = int(np.ceil(fraction * len(base)))
    top = [set(np.argsort(-values, kind="stable")[:count].tolist()) for values in (base, other)]
    return len(top[0] & top[1]) / count
