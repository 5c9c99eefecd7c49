"""Curves of the report: which metrics share a panel, with their units, their words and their standard errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_rlvr.analysis.runs import RunFolder


@dataclass(frozen=True)
class Panel:
    """A panel of curves over steps.

    Attributes:
        title: Heading.
        unit: Label of the vertical axis.
        keys: {metric: its word in the legend}.
        errors: {metric: metric with its standard error}.
        note: Sentence below the heading.
        stacked: Whether the values are parts of a whole, drawn above each other.
    """

    title: str
    unit: str
    keys: dict[str, str]
    errors: dict[str, str] = field(default_factory=dict)
    note: str = ""
    stacked: bool = False


_OVER_GROUPS = "Bands are standard errors over groups, as the responses of a group are not independent."


def _with_errors(title: str, unit: str, key: str, label: str) -> Panel:
    """A panel of a mean over responses."""
    return Panel(title, unit, {key: label}, {key: f"{key}_standard_error"}, _OVER_GROUPS)


PANELS = (
    _with_errors("Accuracy of sampled responses", "share", "reward/accuracy", "correct"),
    _with_errors("Reward", "reward", "reward/mean", "mean"),
    Panel(
        "Entropy",
        "nats",
        {"entropy/mean": "all", "entropy/selected_mean": "selected", "entropy/dropped_mean": "dropped"},
    ),
    Panel("Entropy threshold", "nats", {"selection/threshold": "threshold"}),
    _with_errors("Response length", "tokens", "rollout/response_tokens_mean", "mean"),
    Panel(
        "Dynamic sampling",
        "groups",
        {"rollout/groups_sampled": "sampled", "rollout/groups_dropped": "dropped"},
    ),
    Panel(
        "Prompts by difficulty",
        "prompts",
        {"data/prompts_retired": "retired", "data/prompts_resting": "resting", "data/prompts_new": "not yet sampled"},
    ),
    _with_errors("Truncated responses", "share", "rollout/truncated_fraction", "truncated"),
    Panel("Clipping", "share", {"train/clip_fraction": "clipped tokens"}),
    Panel("KL divergence", "nats", {"train/kl": "old to new policy"}),
    Panel("Train-inference mismatch", "nats", {"rollout/logprob_gap_mean": "mean", "rollout/logprob_gap_max": "most"}),
    Panel("Staleness", "steps", {"rollout/staleness_mean": "mean", "rollout/staleness_max": "most"}),
    Panel("Skipped optimizer steps", "steps so far", {"train/skipped_steps": "skipped"}),
    Panel("Gradient norm", "norm", {"train/grad_norm": "before clipping"}),
    Panel(
        "Time of a step",
        "seconds",
        {
            "time/rollout": "rollout",
            "time/score": "score",
            "time/train": "train",
            "time/sync": "sync",
            "time/record": "record",
            "time/save": "save",
        },
        stacked=True,
    ),
)


def curves(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Return panels and values of runs for the page; see `panel_curves`."""
    by_run = [run.metrics for run in runs]
    return panel_curves([evaluation_panel(by_run), *PANELS], by_run)


def panel_curves(panels: Sequence[Panel], by_run: Sequence[Mapping[int, Mapping[str, float]]]) -> dict[str, Any]:
    """Return panels and values for the page; panels that no run has values for are left out.

    Args:
        by_run: {step: {metric: value}} of each run.

    Returns: {"panels": [...], "runs": [{"steps": [...], "values": {metric: [value or null for each step]}}]}.
    """
    present = {key for steps in by_run for values in steps.values() for key in values}
    shown = [panel for panel in panels if present & set(panel.keys)]
    wanted = {key for panel in shown for key in (*panel.keys, *panel.errors.values()) if key in present}
    return {
        "panels": [
            {
                "title": panel.title,
                "unit": panel.unit,
                "note": panel.note,
                "stacked": panel.stacked,
                "series": [
                    {"key": key, "label": label, "error": panel.errors.get(key)}
                    for key, label in panel.keys.items()
                    if key in present
                ],
            }
            for panel in shown
        ],
        "runs": [
            {
                "steps": list(steps),
                "values": {key: [_short(values.get(key)) for values in steps.values()] for key in sorted(wanted)},
            }
            for steps in by_run
        ],
    }


def evaluation_panel(by_run: Sequence[Mapping[int, Mapping[str, float]]]) -> Panel:
    """Return the panel of the accuracies on problem sets that any run has."""
    keys = sorted(
        key
        for key in {key for run in by_run for values in run.values() for key in values}
        if key.startswith("eval/") and key.endswith("/accuracy")
    )
    names = {key: key.removeprefix("eval/").removesuffix("/accuracy") for key in keys}
    return Panel(
        "Evaluations",
        "accuracy",
        names,
        {key: f"{key}_standard_error" for key in keys},
        "Bands are standard errors over problems.",
    )


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
