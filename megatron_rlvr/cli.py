"""The command ``rlvr``: trains, plans, checks a cluster, serves, converts.

    rlvr train CONFIG.yaml          train; starts the ranks itself
    rlvr plan CONFIG.yaml ...       memory and time of a layout, from config.json alone
    rlvr rehearse CONFIG.yaml ...   a training step at its real shapes, without GPUs
    rlvr preflight CONFIG.yaml      check a cluster before a long run
    rlvr evaluate MODEL --sets ...  accuracy on problem sets, and how sure it is; compare models
    rlvr report RUN_DIR ...         one page about runs: curves, rollouts, forking tokens
    rlvr analyze tokens | change | parameters   what training did to entropies and weights
    rlvr ablate SPEC.yaml           arms of a recipe over seeds, and what they differ in
    rlvr data prepare | overlap     published problem sets; problems in training and evaluation
    rlvr serve MODEL                start SGLang servers on this machine
    rlvr convert to-megatron ...    Hugging Face folder to megatron-core checkpoint
    rlvr convert to-hf ...          megatron-core checkpoint to Hugging Face folder
    rlvr VERB --help                everything about one of them

Exit status: 0; 1 after a fault; 2 and one line on stderr for wrong input; 128 + n after signal n. `rlvr VERB --help`
has what is particular to a verb.
"""

import os
import sys
from collections.abc import Callable, Sequence

from megatron_rlvr import __version__
from megatron_rlvr.errors import RlvrError, one_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit status; some verbs exit by themselves."""
    verb, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("--help", "-h", "help"):
        sys.stdout.write(__doc__)
        return 0
    if verb == "--version":
        sys.stdout.write(f"rlvr {__version__}\n")
        return 0
    if verb not in VERBS:
        sys.stderr.write(f"rlvr: unknown verb {verb!r}; choose from {', '.join(VERBS)}\n")
        return 2
    try:
        return VERBS[verb](rest)
    except RlvrError as error:
        sys.stderr.write(f"megatron_rlvr: {one_line(error)}\n")
        return error.exit_status


def _train(arguments: list[str]) -> int:
    from megatron_rlvr import train
    from megatron_rlvr.launch import launched, run_on_ranks, split_ranks_flag

    if not launched():
        ranks, arguments = split_ranks_flag(arguments)
        if arguments and not {"--help", "-h", "--check"} & set(arguments):
            return run_on_ranks("train", arguments, ranks, arguments[0], arguments[1:])
        if ranks is not None:
            os.environ["WORLD_SIZE"] = str(ranks)
    train.main(arguments)
    return 0


def _preflight(arguments: list[str]) -> int:
    from megatron_rlvr.launch import launched, run_on_ranks, split_ranks_flag
    from megatron_rlvr.preflight import command

    if not launched():
        ranks, arguments = split_ranks_flag(arguments)
        options, flags = command.parse(arguments, "rlvr preflight")
        return run_on_ranks("preflight", arguments, ranks, options.config, flags)
    command.main(arguments, "rlvr preflight")


def _plan(arguments: list[str]) -> int:
    from megatron_rlvr.planner import command

    return command.main(arguments, "rlvr plan")


def _rehearse(arguments: list[str]) -> int:
    from megatron_rlvr.rehearsal import command

    return command.main(arguments, "rlvr rehearse")


def _serve(arguments: list[str]) -> int:
    from megatron_rlvr.engines.sglang.launcher import command

    return command.main(arguments, "rlvr serve")


def _evaluate(arguments: list[str]) -> int:
    from megatron_rlvr.evaluation.command import main as command

    return command.main(arguments, "rlvr evaluate")


def _report(arguments: list[str]) -> int:
    from megatron_rlvr.analysis import report_command

    return report_command.main(arguments, "rlvr report")


def _analyze(arguments: list[str]) -> int:
    from megatron_rlvr.analysis.command.main import main as command

    return command(arguments, "rlvr analyze")


def _ablate(arguments: list[str]) -> int:
    from megatron_rlvr.ablation import command

    return command.main(arguments, "rlvr ablate")


def _data(arguments: list[str]) -> int:
    from megatron_rlvr.data import command

    return command.main(arguments, "rlvr data")


def _convert(arguments: list[str]) -> int:
    from megatron_rlvr.convert import command

    return command.main(arguments, "rlvr convert")


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "plan": _plan,
    "rehearse": _rehearse,
    "preflight": _preflight,
    "evaluate": _evaluate,
    "report": _report,
    "analyze": _analyze,
    "ablate": _ablate,
    "data": _data,
    "serve": _serve,
    "convert": _convert,
}

if __name__ == "__main__":
    sys.exit(main())
