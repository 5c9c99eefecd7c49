"""Results of an ablation: tables as JSON and CSV, and one HTML page with them and the curves.

DIR/arms.json, arms.csv                 an arm a row: accuracies, what it took to reach the target, what was sampled
DIR/differences.json, differences.csv   each arm against the baseline, on each set
DIR/runs.json, runs.csv                 a run a row
DIR/ablation.html                       all of it, with curves: means over seeds, and bands of one standard error
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from megatron_rlvr import __version__, atomic
from megatron_rlvr.ablation.comparison import arm_accuracy, compare, conclude
from megatron_rlvr.ablation.outcomes import Outcome
from megatron_rlvr.ablation.spec import PAGE, Ablation
from megatron_rlvr.analysis.curves import PANELS, evaluation_panel, panel_curves
from megatron_rlvr.analysis.report import page
from megatron_rlvr.analysis.results import Cell as Value
from megatron_rlvr.analysis.results import Result, write_result
from megatron_rlvr.config import names_of
from megatron_rlvr.write_errors import explained

_AT_THE_END = ("entropy/mean", "rollout/response_tokens_mean")
_SEED_ERROR = "/standard_error_over_seeds"


def make_results(ablation: Ablation, outcomes: Sequence[Outcome], missing: Mapping[int, str]) -> list[Result]:
    """Return the tables: arms, differences, runs. The conclusion is a metric of the first.

    Args:
        missing: {index: reason} of cells without an outcome.
    """
    sets = names_of(ablation.cells[0].settings.evaluate.sets)
    return [
        _arms(ablation, outcomes, sets),
        _differences(ablation, outcomes, sets),
        _runs(ablation, outcomes, missing, sets),
    ]


def write_results(ablation: Ablation, outcomes: Sequence[Outcome], results: Sequence[Result]) -> Path:
    """Write tables and page into the folder of the ablation; return the path of the page. Raises WriteError."""
    folder = ablation.folder
    with explained("the results of the ablation", folder):
        for result in results:
            write_result(folder, result)
        atomic.write_text(folder / PAGE, page(folder.name, _page_data(ablation, outcomes, results), "rlvr ablate"))
    return folder / PAGE


def _arms(ablation: Ablation, outcomes: Sequence[Outcome], sets: Sequence[str]) -> Result:
    spec = ablation.spec
    columns = ["arm", "seeds"]
    for name in sets:
        columns += [f"{name}: accuracy", "standard error"]
    if spec.target is not None:
        columns += [f"seeds that reach {spec.target:g}", "step", "seconds", "response tokens"]
    columns += ["all response tokens", "groups sampled", "share dropped", "entropy at the end", "response length"]
    rows: list[list[Value]] = []
    for arm in spec.arms:
        own = [outcome for outcome in outcomes if outcome.cell.arm == arm]
        row: list[Value] = [arm, len(own)]
        for name in sets:
            mean = arm_accuracy(outcomes, arm, name)
            row += [mean.value, mean.error] if mean is not None else [None, None]
        if spec.target is not None:
            reached = [outcome.reached for outcome in own if outcome.reached is not None]
            row += [len(reached), *(_mean([getattr(r, key) for r in reached]) for key in ("step", "seconds", "tokens"))]
        sampled = _mean([outcome.total("rollout/groups_sampled") for outcome in own])
        dropped = _mean([outcome.total("rollout/groups_dropped") for outcome in own])
        row += [_mean([outcome.total("rollout/response_tokens") for outcome in own]), sampled]
        row += [dropped / sampled if dropped is not None and sampled else None]
        row += [
            _mean_known([outcome.last(key) for outcome in own])
            for key in ("entropy/mean", "rollout/response_tokens_mean")
        ]
        rows.append(row)
    conclusion = conclude(ablation, compare(ablation, outcomes, ablation.evaluation))
    return Result("arms", "Arms", {"conclusion": conclusion, "baseline": spec.baseline}, columns, rows)


def _differences(ablation: Ablation, outcomes: Sequence[Outcome], sets: Sequence[str]) -> Result:
    columns = ["set", "arm", "seeds", "problems", "difference", "standard error", "95 % from", "95 % to"]
    columns += ["for all arms at once, on this set, from", "to"]
    rows: list[list[Value]] = [
        [d.evaluation, d.arm, d.seeds, d.problems, d.mean.value, d.mean.error, *d.interval, *d.corrected]
        for name in sets
        for d in compare(ablation, outcomes, name)
    ]
    return Result("differences", f"Accuracy minus that of {ablation.spec.baseline}", {}, columns, rows)


def _runs(ablation: Ablation, outcomes: Sequence[Outcome], missing: Mapping[int, str], sets: Sequence[str]) -> Result:
    columns = ["index", "arm", "seed", "state", *(f"{name}: accuracy" for name in sets)]
    columns += ["target: step", "target: seconds", "target: response tokens"]
    columns += ["all seconds", "all response tokens", "groups sampled", "groups dropped"]
    rows: list[list[Value]] = []
    by_index = {outcome.cell.index: outcome for outcome in outcomes}
    for cell in ablation.cells:
        outcome = by_index.get(cell.index)
        if outcome is None:
            rows.append([cell.index, cell.arm, cell.seed, missing[cell.index], *[None] * (len(columns) - 4)])
            continue
        reached = outcome.reached
        rows.append(
            [
                *(cell.index, cell.arm, cell.seed, "finished"),
                *(fmean(outcome.accuracy[name].values()) for name in sets),
                *((reached.step, reached.seconds, reached.tokens) if reached else (None, None, None)),
                *(outcome.total(key) for key in ("time/step", "rollout/response_tokens")),
                *(outcome.total(key) for key in ("rollout/groups_sampled", "rollout/groups_dropped")),
            ]
        )
    return Result("runs", "Runs", {}, columns, rows)


def _page_data(ablation: Ablation, outcomes: Sequence[Outcome], results: Sequence[Result]) -> dict[str, Any]:
    arms = [arm for arm in ablation.spec.arms if any(outcome.cell.arm == arm for outcome in outcomes)]
    curves = [arm_curves([o.metrics for o in outcomes if o.cell.arm == arm]) for arm in arms]
    panels = [
        replace(panel, errors={key: key + _SEED_ERROR for key in panel.keys}, note=_note(panel.stacked), stacked=False)
        for panel in (evaluation_panel(curves), *PANELS)
    ]
    return {
        "version": __version__,
        "parts": ["result", "curves", "runs"],
        "conclusion": results[0].metrics["conclusion"],
        "result": [
            {"title": r.title, "columns": list(r.columns), "rows": [[_finite(v) for v in row] for row in r.rows]}
            for r in results
        ],
        "curves": panel_curves(panels, curves),
        "runs": [_arm_words(ablation, outcomes, arm) for arm in arms],
    }


def _arm_words(ablation: Ablation, outcomes: Sequence[Outcome], arm: str) -> dict[str, Any]:
    own = [outcome.cell for outcome in outcomes if outcome.cell.arm == arm]
    words = [("seeds", ", ".join(str(cell.seed) for cell in own))]
    settings = (own[0].file.parent / "arm.yaml").read_text(encoding="utf-8")
    return {"name": arm, "folder": str(own[0].file.parent), "words": words, "settings": settings}


def arm_curves(runs: Sequence[Mapping[int, Mapping[str, float]]]) -> dict[int, dict[str, float]]:
    """Return the mean over runs of each metric at each step, and its standard error, at steps that all runs have."""
    found: dict[int, dict[str, float]] = {}
    for step in runs[0]:
        if not all(step in run for run in runs):
            continue
        values: dict[str, float] = {}
        for key in runs[0][step]:
            numbers = [run[step][key] for run in runs if key in run[step]]
            if len(numbers) < len(runs):
                continue
            values[key] = fmean(numbers)
            if len(numbers) > 1:
                values[key + _SEED_ERROR] = stdev(numbers) / math.sqrt(len(numbers))
        found[step] = values
    return found


def _note(times: bool) -> str:
    return "Means over seeds; bands are one standard error." + (
        " Times depend on what else the machine did." if times else ""
    )


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _mean_known(values: Sequence[float | None]) -> float | None:
    return _mean([value for value in values if value is not None])


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
