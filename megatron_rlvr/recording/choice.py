"""Choice of the responses of a step that are recorded: whole groups, and of each kind of response one.

Groups with both correct and incorrect responses precede others, which are trained on without dynamic sampling only. Of
a group that does not fit whole, each kind is taken in turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A response of the step.

    Attributes:
        number: Number of the training sequence, the same in every layout.
        group: Place of its group in the batch.
        correct: Whether the answer is correct.
        truncated: Whether the response was ended by the cap on its tokens.
        oldest_version: Oldest version of the weights that sampled one of its tokens.
    """

    number: int
    group: int
    correct: bool
    truncated: bool
    oldest_version: int


def choose(candidates: Sequence[Candidate], count: int) -> list[int]:
    """Return the numbers of at most ``count`` responses, ascending; the same for any order of the candidates.

    Of each kind that the step has there is one, if so many fit: the stalest response, a truncated one, a correct and an
    incorrect one. The others are those of the same groups, the group of the stalest response first, the one with most
    truncated responses second, and then of the groups in the order of the batch, those first that have correct and
    incorrect responses.
    """
    groups: dict[int, list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda c: c.number):
        groups.setdefault(candidate.group, []).append(candidate)
    if not groups:
        return []
    # A tie goes to the first group: without stale and truncated responses, the first group is one of the two.
    stalest = min(groups, key=lambda g: (min(c.oldest_version for c in groups[g]), g))
    truncated = min(groups, key=lambda g: (-sum(c.truncated for c in groups[g]), g))
    mixed = {g: len({c.correct for c in groups[g]}) == 2 for g in groups}
    order = dict.fromkeys([stalest, truncated, *sorted(groups, key=lambda g: (not mixed[g], g))])
    ordered = [candidate for group in order for candidate in _kinds_in_turn(groups[group])]
    kinds = (lambda c: c.truncated, lambda c: c.correct, lambda c: not c.correct)
    one_of_each = [ordered[0], *(c for kind in kinds if (c := next(filter(kind, ordered), None)) is not None)]
    chosen = dict.fromkeys(candidate.number for candidate in (*one_of_each, *ordered))
    return sorted(list(chosen)[:count])


def _kinds_in_turn(group: Sequence[Candidate]) -> list[Candidate]:
    """Responses of a group: the stalest one, then a truncated, a correct and an incorrect one in turn."""
    stalest = min(group, key=lambda c: (c.oldest_version, c.number))
    rest = [c for c in group if c is not stalest]
    kinds = [
        [c for c in rest if c.truncated],
        [c for c in rest if c.correct and not c.truncated],
        [c for c in rest if not (c.correct or c.truncated)],
    ]
    longest = max(map(len, kinds))
    return [stalest, *(kind[i] for i in range(longest) for kind in kinds if i < len(kind))]
