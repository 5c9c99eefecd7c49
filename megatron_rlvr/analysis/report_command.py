"""Command line of the report."""

import sys
from collections.abc import Sequence

from megatron_rlvr.analysis.report import REPORT, write_report
from megatron_rlvr.command_line import Parser, path, positive_int
from megatron_rlvr.errors import InputError

DESCRIPTION = """\
Writes one HTML file about one or several runs: what they do, their curves over each other, recorded responses with the
entropy of every token and the alternatives at each selected one, and the tokens that fork most. It needs no network,
and may be written while a run is in progress. docs/forks.md describes the page.
"""


class OutputError(InputError):
    """A report that cannot be written."""


def main(arguments: Sequence[str], prog: str) -> int:
    """Write a report, print its path and return the exit status."""
    parser = Parser(prog, description=DESCRIPTION)
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN_DIR", help="run folders (run.dir)")
    parser.add_argument("--output", type=path, help=f"file of the page; default: {REPORT} in the first RUN_DIR")
    parser.add_argument(
        "--least", type=positive_int, default=10, metavar="N", help="fewest occurrences of a listed token (default: 10)"
    )
    options = parser.parse_args(arguments)
    output = options.output or options.runs[0] / REPORT
    try:
        write_report(options.runs, output, least=options.least)
    except OSError as error:
        raise OutputError(f"{output} cannot be written ({error}); give another --output") from None
    sys.stdout.write(f"{output}\n")
    return 0
