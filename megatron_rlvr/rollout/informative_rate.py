"""Estimate of the share of groups that are informative, from which the number of prompts to draw follows."""

from dataclasses import dataclass

# Upper bound on the groups sampled for each missing one, reached when almost no group is informative.
MAX_GROUPS_PER_MISSING = 4.0


@dataclass(frozen=True)
class InformativeRate:
    """Ratio of informative to finished groups over recent steps; the weight of a step halves with each later step.

    Both counts start at 1: with no evidence, every group is expected to be informative.
    """

    informative: float = 1.0
    finished: float = 1.0

    def plus(self, informative: float, finished: float) -> "InformativeRate":
        """Return the estimate that also counts ``finished`` groups, ``informative`` ones among them."""
        return InformativeRate(self.informative + informative, self.finished + finished)

    def after_step(self, informative: float, finished: float) -> "InformativeRate":
        """Return the estimate after a step with these counts: the past and the step at half their weight."""
        counts = self.plus(informative, finished)
        return InformativeRate(counts.informative / 2, counts.finished / 2)

    def groups_for(self, missing: int) -> float:
        """Return the expected number of groups to sample for ``missing`` informative ones; not rounded."""
        return missing / max(self.informative / self.finished, 1 / MAX_GROUPS_PER_MISSING)
