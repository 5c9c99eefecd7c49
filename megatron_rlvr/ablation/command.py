"""Command line of ablations."""

import sys
from collections.abc import Sequence

from megatron_rlvr.ablation.cells import check_unchanged, is_finished, run_cells
from megatron_rlvr.ablation.spec import prepare
from megatron_rlvr.command_line import Parser, path, positive_int


def main(arguments: Sequence[str], prog: str) -> int:
    """Run what is missing of an ablation, write its results, and return the exit status."""
    parser = Parser(prog, description="")
    parser.add_argument("spec", type=path, metavar="SPEC.yaml")
    parser.add_argument("--jobs", type=positive_int, default=1, metavar="N")
    parser.add_argument("--ranks", type=positive_int, metavar="N")
    options = parser.parse_args(arguments)
    ablation = prepare(options.spec)
    check_unchanged(ablation.cells)
    failed, signum = run_cells(ablation, ablation.cells, jobs=options.jobs, ranks=options.ranks, say=_say)
    return 128 + signum if signum else 1 if failed else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
