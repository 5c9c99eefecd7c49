"""Tables of an evaluation for people: metrics as rows, sets as columns."""

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_rlvr.evaluation.statistics import Estimate
from megatron_rlvr.evaluation.summary import SetSummary

SETS_IN_A_TABLE = 4
"""More columns are narrower than their values where a terminal has 100 characters."""


def tables_of(summaries: Mapping[str, SetSummary], *, tokens_per_second: float | None) -> list[Table]:
    """Return the metrics of all sets as tables of a few sets each.

    Args:
        tokens_per_second: Response tokens per second of sampling; None if nothing was sampled.
    """
    names, tables = list(summaries), []
    for start in range(0, len(names), SETS_IN_A_TABLE):
        some = names[start : start + SETS_IN_A_TABLE]
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("")
        for name in some:
            table.add_column(Text(name), justify="right")
        for label, values in _rows([summaries[name] for name in some]):
            table.add_row(label, *values)
        tables.append(table)
    if tables and tokens_per_second is not None:
        tables[-1].add_row("tokens/s (all sets)", f"{tokens_per_second:,.0f}")
    return tables


def show(tables: Sequence[Table], lines: Sequence[str]) -> None:
    """Print tables, an empty line between them, and some lines to stdout."""
    console = Console(highlight=False)
    for i, table in enumerate(tables):
        console.print(*([""] if i else []), table, sep="\n", soft_wrap=True)
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def shown(estimate: Estimate) -> str:
    """Return an estimate in percent with its standard error, such as `41.7 +- 8.6`."""
    if not math.isfinite(estimate.value):
        return "-"
    error = f" +- {100 * estimate.error:.1f}" if math.isfinite(estimate.error) else ""
    return f"{100 * estimate.value:.1f}{error}"


def _rows(sets: Sequence[SetSummary]) -> list[tuple[str, list[str]]]:
    size = max(s.group_size for s in sets)
    rows = [
        ("problems x completions", [f"{s.problems} x {s.group_size}" for s in sets]),
        *([("completions so far", [f"{s.completions:,}" for s in sets])] if not all(s.complete for s in sets) else []),
        (f"avg@{size}, %", [shown(s.accuracy) for s in sets]),
        *(
            (f"pass@{k}, %", [shown(s.pass_at[k]) for s in sets])
            for k in sorted({k for s in sets for k in s.pass_at if k > 1})
        ),
    ]
    if any(s.majority is not None for s in sets):
        rows.append((f"maj@{size}, %", [shown(s.majority) if s.majority is not None else "-" for s in sets]))
    rows.append(("truncated, %", [_percent(s.truncated) for s in sets]))
    if any(s.no_answer is not None for s in sets):
        rows.append(("without an answer, %", [_percent(s.no_answer) for s in sets]))
    rows.append(("grader failed, %", [_percent(s.failed) for s in sets]))
    for label, values in (
        ("tokens: mean", [s.tokens_mean for s in sets]),
        ("tokens: median", [s.tokens_median for s in sets]),
        ("tokens: 95 %", [s.tokens_p95 for s in sets]),
    ):
        rows.append((label, [f"{value:,.0f}" if math.isfinite(value) else "-" for value in values]))
    return rows


def _percent(share: float | None) -> str:
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.1f}"
