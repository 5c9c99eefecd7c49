"""Command line of ablations."""

import sys
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from megatron_rlvr.ablation.cells import check_unchanged, failure, run_cells, unfinished
from megatron_rlvr.ablation.outcomes import read_outcomes
from megatron_rlvr.ablation.results import make_results, write_results
from megatron_rlvr.ablation.slurm import slurm_script
from megatron_rlvr.ablation.spec import Ablation, prepare, write_files
from megatron_rlvr.analysis.results import Result
from megatron_rlvr.command_line import Parser, path, positive_int, small_int, table_console
from megatron_rlvr.config.yaml_format import shown

DESCRIPTION = """\
Runs the arms of an ablation over its seeds, and compares them with the baseline: accuracy with its standard error,
paired differences with intervals over seeds and problems, time and tokens to a given accuracy, curves with bands. Each
run resumes, and so does the whole: the same command runs what is missing. A run that fails is reported, and the others
continue. docs/ablations.md describes SPEC.yaml and the results.

    rlvr ablate SPEC.yaml                       one run after the other
    rlvr ablate SPEC.yaml --slurm | sbatch      a Slurm array; --results afterwards

Exit status: 0; 1 if a run has failed; 2 for wrong input; 128 + n after signal n, when runs in progress were saved.
"""


def main(arguments: Sequence[str], prog: str) -> int:
    """Run what is missing of an ablation, write its results, and return the exit status."""
    parser = Parser(prog, description=DESCRIPTION)
    parser.add_argument("spec", type=path, metavar="SPEC.yaml", help="specification of the ablation")
    parser.add_argument(
        "--jobs", type=positive_int, metavar="N", help="runs beside each other (default: 1; with --slurm: 8)"
    )
    parser.add_argument(
        "--ranks", type=positive_int, metavar="N", help="ranks of each run (default: that of rlvr train)"
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--index", type=small_int, metavar="K", help="run one cell, and write no results")
    chosen.add_argument("--list", action="store_true", help="print index, arm, seed and state of all cells")
    chosen.add_argument("--slurm", action="store_true", help="print the script of a Slurm array")
    chosen.add_argument("--results", action="store_true", help="run nothing, and write the results of finished runs")
    options = parser.parse_args(arguments)
    for flag in ("jobs", "ranks"):
        alone = options.list or options.results or (flag == "jobs" and options.index is not None)
        if getattr(options, flag) is not None and alone:
            parser.error(f"--{flag} {getattr(options, flag)}: has no effect here; remove it")
    ablation = prepare(options.spec)
    cells = ablation.cells
    if options.index is not None and not 0 <= options.index < len(cells):
        parser.error(f"--index {options.index}: no cell; give one from 0 to {len(cells) - 1}")
    check_unchanged(cells)
    write_files(ablation)
    if options.slurm:
        sys.stdout.write(slurm_script(ablation, jobs=options.jobs or 8, ranks=options.ranks))
        return 0
    if options.list:
        for cell in cells:
            _say(f"{cell.index}\t{cell.arm}\t{cell.seed}\t{unfinished(cell) or 'finished'}")
        return 0
    _show_unused(ablation)
    if not options.results:
        chosen_cells = cells if options.index is None else [cells[options.index]]
        failed, signum = run_cells(ablation, chosen_cells, jobs=options.jobs or 1, ranks=options.ranks, say=_say)
        if signum:
            return 128 + signum
        if options.index is not None:
            return 1 if failed else 0
    outcomes, missing = read_outcomes(ablation)
    results = make_results(ablation, outcomes, missing)
    written = write_results(ablation, outcomes, results)
    _show(results)
    failures = {index: why for index in missing if (why := failure(cells[index])) is not None}
    for index, why in failures.items():
        _say(f"{cells[index].name}: failed, {why}; see {cells[index].log}")
    _say(f"results: {written}")
    return 1 if failures else 0


def _show_unused(ablation: Ablation) -> None:
    """Print what arms leave out of the settings of the base and of all arms: a difference that no one wrote."""
    for cell in ablation.cells[: len(ablation.spec.arms)]:
        for each in cell.settings.unused:
            other = f"{each.other}={shown(each.other_value)}"
            _say(f"{cell.arm}: {each.key}={shown(each.value)} is not used with {other}")


def _show(results: Sequence[Result]) -> None:
    """Print the tables of arms and differences, and the conclusion."""
    console = table_console()
    for result in results[:2]:
        table = Table(title=result.title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for number, column in enumerate(result.columns):
            table.add_column(Text(column), justify="right" if number else "left", overflow="fold")
        for row in result.rows:
            table.add_row(*(Text(_shown(value)) for value in row))
        console.print(table)
        console.print()
    console.print(Text(str(results[0].metrics["conclusion"])), soft_wrap=True)


def _shown(value: object) -> str:
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
