"""Arms compared with the baseline: differences paired by seed and problem, and a conclusion that they allow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rlvr.ablation.outcomes import Outcome
from megatron_rlvr.ablation.spec import Ablation
from megatron_rlvr.ablation.statistics import CrossedMean, crossed_mean
from megatron_rlvr.evaluation.statistics import LEVEL


@dataclass(frozen=True)
class Difference:
    """Accuracy of an arm minus that of the baseline, on the same seeds and problems.

    Attributes:
        seeds: Number of seeds that both have finished.
        problems: Number of problems.
        corrected: Interval that holds for all arms on this set at once, at the same level (Bonferroni).
    """

    arm: str
    evaluation: str
    seeds: int
    problems: int
    mean: CrossedMean
    interval: tuple[float, float]
    corrected: tuple[float, float]


def accuracy_matrix(outcomes: Sequence[Outcome], evaluation: str) -> np.ndarray:
    """Return [S, P] accuracies of runs on a set, over the problems that all of them have."""
    problems = [p for p in outcomes[0].accuracy[evaluation] if all(p in o.accuracy[evaluation] for o in outcomes)]
    return np.array([[o.accuracy[evaluation][p] for p in problems] for o in outcomes])


def arm_accuracy(outcomes: Sequence[Outcome], arm: str, evaluation: str) -> CrossedMean | None:
    """Return the mean accuracy of an arm; None if no run of it is finished."""
    own = [outcome for outcome in outcomes if outcome.cell.arm == arm]
    return crossed_mean(accuracy_matrix(own, evaluation)) if own else None


def compare(ablation: Ablation, outcomes: Sequence[Outcome], evaluation: str) -> list[Difference]:
    """Compare each arm with the baseline; arms without a seed in common with it are left out."""
    by_cell = {(outcome.cell.arm, outcome.cell.seed): outcome for outcome in outcomes}
    baseline, found = ablation.spec.baseline, []
    comparisons = len(ablation.spec.arms) - 1
    for arm in ablation.spec.arms:
        seeds = [s for s in ablation.spec.seeds if (arm, s) in by_cell and (baseline, s) in by_cell]
        if arm == baseline or not seeds:
            continue
        both = [by_cell[name, seed] for name in (arm, baseline) for seed in seeds]
        matrix = accuracy_matrix(both, evaluation)
        differences = matrix[: len(seeds)] - matrix[len(seeds) :]
        mean = crossed_mean(differences)
        corrected = mean.interval(1 - (1 - LEVEL) / comparisons)
        found.append(Difference(arm, evaluation, len(seeds), differences.shape[1], mean, mean.interval(), corrected))
    return found


def conclude(ablation: Ablation, differences: Sequence[Difference]) -> str:
    """Return one line that claims no more than the intervals allow, which hold for all arms on the set at once."""
    steps = ablation.cells[0].settings.run.steps
    spec = ablation.spec
    if not differences:
        return f"{ablation.evaluation}: nothing can be compared yet; no seed is finished in two arms"
    better = [_claim(d) for d in differences if d.corrected[0] > 0]
    worse = [_claim(d) for d in differences if d.corrected[1] < 0]
    unclear = [_claim(d) for d in differences if not (d.corrected[0] > 0 or d.corrected[1] < 0)]
    parts = []
    if better:
        parts.append(f"better than {spec.baseline}: {', '.join(better)}")
    if worse:
        parts.append(f"worse than {spec.baseline}: {', '.join(worse)}")
    if unclear:
        parts.append(f"no difference to {spec.baseline} shown: {', '.join(unclear)}")
    comparisons, seeds, problems = len(spec.arms) - 1, min(d.seeds for d in differences), differences[0].problems
    together = f"95 % intervals for all {comparisons} comparisons on it at once" if comparisons > 1 else "95 % interval"
    over = f"{seeds} seeds and {problems} problems"
    if seeds == 1:
        over = f"{problems} problems of one seed, which says nothing about other seeds"
    complete = len(differences) == comparisons and all(d.seeds == len(spec.seeds) for d in differences)
    return (
        f"{'' if complete else 'NOT COMPLETE: '}accuracy on {ablation.evaluation} after step {steps}, in points: "
        f"{'; '.join(parts)} ({together}, {over})"
    )


def _claim(d: Difference) -> str:
    low, high = d.corrected
    if not math.isfinite(low):
        return f"{d.arm} {100 * d.mean.value:+.1f} (no interval)"
    return f"{d.arm} {100 * d.mean.value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
