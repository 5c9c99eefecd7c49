"""Command line of the analyses."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_rlvr.analysis.command import analyses, temperatures
from megatron_rlvr.analysis.command.models import find_models
from megatron_rlvr.analysis.command.sampling import sample
from megatron_rlvr.analysis.command.sources import check_tokens, read_source
from megatron_rlvr.analysis.command.weights import parameters
from megatron_rlvr.analysis.entropies import PAPER_THRESHOLD
from megatron_rlvr.analysis.report import ANALYSES
from megatron_rlvr.analysis.results import Result, check_plots, write_result
from megatron_rlvr.command_line import Parser, path, positive_int, small_int
from megatron_rlvr.config import ParallelSettings
from megatron_rlvr.evaluation.command.target import Target
from megatron_rlvr.hf.files import read_config
from megatron_rlvr.input_files import is_file
from megatron_rlvr.launch import launched, start_ranks
from megatron_rlvr.startup.process import quiet_libraries

DESCRIPTION = """\
The token analyses of "Beyond the 80/20 rule" on a model of your own. Each writes JSON, CSV, PNG and SVG, into
SOURCE/analysis or --out. `rlvr report` shows the results in RUN_DIR/analysis.

    rlvr analyze tokens RUN                                  entropies as the run recorded them
    rlvr analyze tokens SOURCE --model M                     entropies of the responses under a model
    rlvr analyze change SOURCE --base M --model M ...        entropies under a base and under models trained from it
    rlvr analyze change SOURCE --base M --model RUN --step 10 20 30
    rlvr analyze gradient SOURCE --model M                   policy gradient by token entropy
    rlvr analyze parameters --base M --model M               share of parameters that changed in bfloat16
    rlvr analyze temperatures --model M --high 0.6 1 1.4 --low 0.6 1 --out DIR -- --sets FILE --samples 8
    rlvr analyze tokens OUT --model M -- --sets FILE ...     responses sampled now, by rlvr evaluate M --out OUT

tokens        histogram and percentiles of token entropies beside the paper's threshold; tokens of highest and lowest
              mean entropy
change        entropy change in each 5 % of the base entropies; share of the base's top tokens that are still at the
              top; percentiles
gradient      norm of the part of the policy gradient that each 5 % of the tokens adds, by entropy
parameters    by layer and by kind of tensor
temperatures  accuracy with one temperature above an entropy threshold and another one below it

SOURCE is a run with recorded responses, an evaluation (rlvr evaluate --out), or a file of lines {"prompt": TEXT,
"response": TEXT, "advantage": NUMBER if known}. M is a Hugging Face folder, a checkpoint, or the folder of a run.
Models that score are sharded as --tensor, --pipeline and --context say, over --ranks processes of this machine.
Words after -- are those of rlvr evaluate, which samples the responses first.
docs/forks.md describes the files.
"""

_SCORING = ("tokens", "change", "gradient")


def main(arguments: Sequence[str], prog: str) -> int:
    """Run an analysis, print the files that it has written, and return the exit status."""
    words, evaluate = _split(arguments)
    parser = _parser(prog)
    options = parser.parse_args(words)
    _check(options, evaluate, parser)
    check_plots()
    out: Path = options.out or _place(options) / ANALYSES
    if options.analysis == "parameters":
        (base,), (model,) = find_models([options.base], None), find_models(options.model, options.step)
        results: list[Result] | None = [parameters(base, model, out)]
    elif options.analysis == "temperatures":
        (model,) = find_models(options.model, options.step)
        grid = temperatures.Grid(options.threshold, sorted(set(options.high)), sorted(set(options.low)))
        if status := temperatures.sample_grid(options.model[0], _first(options.step), out, grid, evaluate or []):
            return status
        results = temperatures.temperatures(str(model.weights), out, grid)
    else:
        if evaluate is not None and not launched():
            sampled_from = options.base if options.analysis == "change" else options.model[0]
            step = None if options.analysis == "change" else _first(options.step)
            if status := sample(sampled_from, step, options.source, evaluate):
                return status
        if options.model and not launched() and (ranks := options.ranks or _parallel(options).replica) > 1:
            _models(options)  # raises an error that says what a model lacks, before ranks start
            return start_ranks("analyze", words, ranks)
        quiet_libraries()
        results = _scored(options, out)
    for result in results or []:  # None: another rank writes
        for file in write_result(out, result):
            sys.stdout.write(f"{file}\n")
    return 0


def _place(options: argparse.Namespace) -> Path:
    """Return the folder in which the folder of the results is by default."""
    if options.analysis not in _SCORING:
        return Path()
    return options.source.parent if is_file(options.source) else options.source


def _scored(options: argparse.Namespace, out: Path) -> list[Result] | None:
    models = _models(options)
    source = read_source(options.source, models[0].folder if models else None, options.responses)
    check_tokens(source, [model.folder for model in models])
    if not models:
        return analyses.tokens(source, None, options.least)
    how = analyses.Scoring(
        parallel=_parallel(options),
        dtype=options.dtype,
        budget=options.tokens_per_micro_batch,
        place=out,
        temperature=options.temperature or source.temperature,
    )
    if options.analysis == "gradient":
        return analyses.gradient(source, models[0], how, options.bins)
    scored = analyses.score(source, models, how)
    if scored is None:
        return None
    if options.analysis == "tokens":
        return analyses.tokens(source, scored, options.least)
    return analyses.change(source, scored, options.bins)


def _models(options: argparse.Namespace) -> list[Target]:
    models = [] if options.model is None else find_models(options.model, options.step)
    if options.analysis == "change":
        models = find_models([options.base], None) + models
    for model in models:
        read_config(model.folder)
    return models


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Return the words before the first ``--``, and those after it, or None without one."""
    if "--" not in arguments:
        return list(arguments), None
    place = list(arguments).index("--")
    return list(arguments[:place]), list(arguments[place + 1 :])


def _first(steps: Sequence[int] | None) -> int | None:
    return steps[0] if steps else None


def _check(options: argparse.Namespace, evaluate: Sequence[str] | None, parser: Parser) -> None:
    """End with one line if the options do not fit together."""
    name = options.analysis
    if options.step is not None and name != "change" and len(options.step) > 1:
        parser.error(f"--step {options.step[1]}: {name} looks into one model; give one step")
    if options.step is not None and options.model is None:
        parser.error("--step: has no effect without --model; remove it")
    if name == "temperatures":
        if evaluate is None:
            parser.error("the words of rlvr evaluate are missing; give -- --sets FILE, or -- --like RUN")
        values = [options.threshold, *options.high, *options.low]
        if not all(0 <= value < math.inf for value in values):
            parser.error("--threshold, --high, --low: not finite or below 0; give nats and temperatures")
    if name == "gradient" and options.bins % 5:
        parser.error(f"--bins {options.bins}: the highest fifth of the tokens is no whole bin; give a multiple of 5")
    if name == "parameters" and evaluate is not None:
        parser.error("--: parameters samples no responses; remove it and the words after it")
    if name == "tokens" and options.model is None:
        given = options.ranks or options.temperature or evaluate is not None or _parallel(options).replica > 1
        if given:
            parser.error(
                "--ranks, --tensor, --pipeline, --context, --temperature and --: have no effect without --model; "
                "remove them"
            )


def _parallel(options: argparse.Namespace) -> ParallelSettings:
    return ParallelSettings(tensor=options.tensor, pipeline=options.pipeline, context=options.context)


def _parser(prog: str) -> Parser:
    parser = Parser(prog, description=DESCRIPTION, usage="%(prog)s ANALYSIS [SOURCE] [FLAG ...] [-- FLAG ...]")
    names = (*_SCORING, "parameters", "temperatures")
    verbs = parser.add_subparsers(dest="analysis", required=True, metavar=" | ".join(names))
    for name in names:
        add = verbs.add_parser(name).add_argument
        if name in _SCORING:
            add("source", type=path, metavar="SOURCE", help="run, evaluation or file with the responses")
        if name in ("change", "parameters"):
            add("--base", type=path, required=True, metavar="M", help="base model")
        several = "+" if name == "change" else 1
        add("--model", type=path, nargs=several, required=name != "tokens", metavar="M", help="model to look into")
        add("--step", type=small_int, nargs="+", metavar="N", help="steps of the run --model (default: its last)")
        default = f"SOURCE/{ANALYSES}" if name in _SCORING else f"./{ANALYSES}"
        add("--out", type=path, metavar="DIR", help=f"folder of the results (default: {default})")
        if name in _SCORING:
            _add_scoring(add, name)
        if name == "temperatures":
            add(
                "--threshold",
                type=float,
                default=PAPER_THRESHOLD,
                metavar="NATS",
                help="entropy at temperature 1 above which --high is used (default: %(default)s, the paper's)",
            )
            for flag in ("--high", "--low"):
                add(flag, type=float, nargs="+", required=True, metavar="T", help="temperatures of the grid")
    return parser


def _add_scoring(add: Callable[..., Any], name: str) -> None:
    """Add the options of analyses for which a model scores responses."""
    add("--responses", type=positive_int, metavar="N", help="so many responses, spread over all (default: all)")
    if name == "tokens":
        add("--least", type=positive_int, default=10, metavar="N", help="fewest occurrences of a listed token")
    else:
        add("--bins", type=positive_int, default=20, metavar="N", help="bins of equally many tokens (default: 20)")
    add("--temperature", type=_temperature, metavar="T", help="of the entropies (default: that of the sampling)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="precision (default: bfloat16)")
    add("--ranks", type=positive_int, metavar="N", help="processes on this machine (default: one model copy)")
    add("--tokens-per-micro-batch", type=positive_int, default=8192, metavar="N", help="(default: 8192)")
    for size in ("tensor", "pipeline", "context"):
        add(f"--{size}", type=positive_int, default=1, metavar="N", help=f"parallel.{size} (default: 1)")


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is no temperature; give a number above 0")
    return value
