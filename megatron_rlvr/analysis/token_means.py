"""Mean entropy by token: which tokens fork most, and which are the surest.

The sums are of float64 over the vocabulary, and take in a batch of tokens at a time, so that any number of tokens can
be streamed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenMean:
    """A token and its occurrences.

    Attributes:
        token_id: Id in the vocabulary.
        text: Text of the token.
        count: Number of occurrences.
        entropy: Mean entropy of the distributions that it was sampled from, in nats.
        selected: Share of its occurrences that were selected.
    """

    token_id: int
    text: str
    count: int
    entropy: float
    selected: float


class TokenMeans:
    """Sums by token id."""

    def __init__(self) -> None:
        self._sums = np.zeros((3, 0))  # occurrences, entropies, selected

    def add(self, token_ids: np.ndarray, entropy: np.ndarray, selected: np.ndarray) -> None:
        """Take in n tokens: ids [n], entropies [n] in nats, and the mask [n]."""
        if not len(token_ids):
            return
        size = max(self._sums.shape[1], int(token_ids.max()) + 1)
        weights = (None, entropy.astype(np.float64), selected.astype(np.float64))
        sums = np.stack([np.bincount(token_ids, weight, size) for weight in weights]).astype(np.float64)
        sums[:, : self._sums.shape[1]] += self._sums
        self._sums = sums

    def extremes(
        self, number: int, least: int, text_of: Callable[[int], str]
    ) -> tuple[list[TokenMean], list[TokenMean]]:
        """Return the tokens of highest and of lowest mean entropy, each at most ``number``, the most extreme first.

        Args:
            number: Length of each list.
            least: Fewest occurrences of a token that is listed.
            text_of: Text of a token id.
        """
        ids = np.flatnonzero(self._sums[0] >= max(1, least))
        count, entropy, selected = self._sums[:, ids]
        order = np.lexsort((ids, -entropy / count))

        def listed(places: Sequence[int] | np.ndarray) -> list[TokenMean]:
            return [
                TokenMean(
                    token_id=int(ids[i]),
                    text=text_of(int(ids[i])),
                    count=int(count[i]),
                    entropy=float(entropy[i] / count[i]),
                    selected=float(selected[i] / count[i]),
                )
                for i in places
            ]

        return listed(order[:number]), listed(order[::-1][:number])
