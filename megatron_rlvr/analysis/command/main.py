"""Command line of the analyses."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rlvr.analysis.command import analyses
from megatron_rlvr.analysis.report import ANALYSES
from megatron_rlvr.analysis.results import write_result
from megatron_rlvr.command_line import Parser, path, positive_int
from megatron_rlvr.config import ParallelSettings
from megatron_rlvr.hf.files import read_config

DESCRIPTION = """\
The token analyses of "Beyond the 80/20 rule" on a model of your own. Each writes JSON, CSV, PNG and SVG, into
RUN_DIR/analysis or --out. `rlvr report` shows the results in RUN_DIR/analysis.

    rlvr analyze tokens RUN_DIR                              entropies as the run recorded them
    rlvr analyze tokens RUN_DIR --model DIR                  entropies of the run's responses under a model
    rlvr analyze change RUN_DIR --base DIR --model DIR ...   entropies under a base and under models trained from it
    rlvr analyze parameters --base DIR --model DIR           share of parameters that changed in bfloat16

tokens      histogram and percentiles of token entropies beside the paper's threshold; tokens of highest and lowest mean
            entropy
change      entropy change in each 5 % of the base entropies; share of the base's top tokens that are still at the top
parameters  by layer and by kind of tensor; the model may be a folder, a checkpoint or a run

Models that score are Hugging Face folders. They are sharded as --tensor, --pipeline and --context say, over
--ranks processes of this machine.
docs/forks.md describes the files.
"""


def main(arguments: Sequence[str], prog: str) -> int:
    """Run an analysis, print the files that it has written, and return the exit status."""
    parser = _parser(prog)
    options = parser.parse_args(arguments)
    if options.analysis == "parameters":
        results = [analyses.parameters(options.base, options.model[0])]
        out = options.out or Path(ANALYSES)
    else:
        out = options.out or options.run / ANALYSES
        folders = [] if options.model is None else options.model
        if options.analysis == "change":
            folders = [options.base, *folders]
        for folder in folders:
            read_config(folder)  # raises an error that says what the folder lacks, before ranks start
        if not folders and (options.ranks or _parallel(options).replica > 1):
            parser.error("--ranks, --tensor, --pipeline, --context: have no effect without --model; remove them")
        if folders and _starts_ranks(options):
            from megatron_rlvr.launch import start_ranks

            return start_ranks("analyze", list(arguments), options.ranks or _parallel(options).replica)
        found = analyses.scored(
            options.run, folders, _parallel(options), dtype=options.dtype, budget=options.tokens_per_micro_batch
        )
        if found is None:  # another rank writes
            return 0
        results = analyses.tokens(found, options.least) if options.analysis == "tokens" else analyses.change(found)
    for result in results:
        for file in write_result(out, result):
            sys.stdout.write(f"{file}\n")
    return 0


def _starts_ranks(options: argparse.Namespace) -> bool:
    from megatron_rlvr.launch import launched

    return not launched() and (options.ranks or _parallel(options).replica) > 1


def _parallel(options: argparse.Namespace) -> ParallelSettings:
    return ParallelSettings(tensor=options.tensor, pipeline=options.pipeline, context=options.context)


def _parser(prog: str) -> Parser:
    parser = Parser(prog, description=DESCRIPTION)
    verbs = parser.add_subparsers(dest="analysis", required=True, metavar="tokens | change | parameters")
    for name in ("tokens", "change", "parameters"):
        verb = verbs.add_parser(name)
        if name != "parameters":
            verb.add_argument("run", type=path, metavar="RUN_DIR", help="run folder with recorded responses")
        if name != "tokens":
            verb.add_argument("--base", type=path, required=True, metavar="DIR", help="Hugging Face folder of the base")
        verb.add_argument(
            "--model",
            type=path,
            nargs="+" if name == "change" else 1,
            required=name != "tokens",
            metavar="DIR",
            help="model to look into",
        )
        verb.add_argument("--out", type=path, metavar="DIR", help="folder of the results (default: RUN_DIR/analysis)")
        if name == "parameters":
            continue
        verb.add_argument(
            "--least", type=positive_int, default=10, metavar="N", help="fewest occurrences of a listed token"
        )
        verb.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="precision of scoring")
        verb.add_argument(
            "--ranks", type=positive_int, metavar="N", help="processes on this machine (default: one model copy)"
        )
        verb.add_argument(
            "--tokens-per-micro-batch", type=positive_int, default=8192, metavar="N", help="(default: 8192)"
        )
        for size in ("tensor", "pipeline", "context"):
            verb.add_argument(
                f"--{size}", type=positive_int, default=1, metavar="N", help=f"parallel.{size} (default: 1)"
            )
    return parser
