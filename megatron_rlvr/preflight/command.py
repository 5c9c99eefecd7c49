"""Command line of the preflight.

Wrong arguments or settings end with one line on stderr and status 2, before torch is imported.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron_rlvr import open_files
from megatron_rlvr.command_line import Parser, path
from megatron_rlvr.config.loading import load_settings
from megatron_rlvr.distributed import environment
from megatron_rlvr.errors import RlvrError
from megatron_rlvr.preflight.checks import CHECKS, NAMES, REQUIRED, select_checks
from megatron_rlvr.preflight.results import CheckResult, Report
from megatron_rlvr.signals import Signals, Stopped
from megatron_rlvr.startup.describe import describe_plan
from megatron_rlvr.startup.layout_checks import check_megatron
from megatron_rlvr.startup.model_file import with_model_folder
from megatron_rlvr.startup.process import (
    check_launch,
    end_with_launcher,
    is_main,
    leave,
    print_error,
    quiet_libraries,
)
from megatron_rlvr.startup.resolve import Resolved, resolve

DESCRIPTION = """\
Checks a cluster before a long run: prints a table of what passed, what failed, and how to fix it.

    rlvr preflight CONFIG.yaml                                   as many ranks as `rlvr train`, or --ranks N
    rlvr preflight CONFIG.yaml --rollout.servers '[http://node7:30000]'     with flags of the run
    rlvr preflight CONFIG.yaml --only servers mismatch           after a fix
    rlvr preflight CONFIG.yaml --skip rehearsal --json results.json
    torchrun --nproc-per-node 8 tools/preflight.py CONFIG.yaml   by another launcher, in the same way as the run

Servers must be running. One step is rehearsed by the run's own code, with its layout, engine and servers, on a few
prompts and short responses, in a temporary folder: run.dir is not changed, nothing is resumed, and servers get the
weights of model.path back. docs/preflight.md explains each line and its limits.

Exit status: 0 if nothing failed (a warning is no failure), 1 if something did, 2 and one line on stderr for wrong
arguments or settings, 128 + n after signal n.
"""


def main(arguments: Sequence[str], program: str) -> NoReturn:
    """Run the preflight.

    Exits with 0 if no check failed, 1 if one did, 2 for wrong input, and 128 + n for signal n.

    Args:
        program: Name of the command in messages.
    """
    end_with_launcher()
    open_files.raise_limit()
    options, flags = parse(arguments, program)
    quiet_libraries()
    signals = Signals()
    if is_main():  # launchers end the other ranks
        signals.listen()
    report = Report(sys.stdout, sys.stderr, enabled=is_main(), json_path=options.json)
    try:
        resolved = _resolve(options.config, flags)
        report.print(describe_plan(resolved))
        report.print("")
        report.add(CheckResult("settings", "passed", _summary(resolved)))
        _, *checks = select_checks(options.only, options.skip)
        if checks:
            from megatron_rlvr.preflight.runner import run_checks

            run_checks(
                checks,
                resolved,
                signals,
                report,
                skipped=options.skip,
                full_length=options.full_length,
                largest_micro_batches=options.largest_micro_batches,
            )
        report.close()
    except RlvrError as error:
        print_error(error)
        leave(error.exit_status)
    except Stopped as stopped:
        leave(stopped.exit_status)
    leave(0 if report.passed else 1)


def parse(arguments: Sequence[str], program: str) -> tuple[argparse.Namespace, list[str]]:
    """Return the preflight's own options, and the flags of the run.

    Exits with 0 after ``--help``, and with 2 and one line on stderr if an option is wrong.
    """
    parser = Parser(
        program,
        quiet=not is_main(),
        description=DESCRIPTION,
        usage="%(prog)s CONFIG.yaml [OPTIONS] [--section.key VALUE ...]",
        epilog="checks:\n" + "\n".join(f"  {check.name:<13} {check.description}" for check in CHECKS),
    )
    add = parser.add_argument
    add("config", metavar="CONFIG.yaml", help="settings of the run; flags of the run (--section.key VALUE) may follow")
    add("--only", nargs="+", default=[], metavar="NAME", help="run only these checks, and the checks that they need")
    add("--skip", nargs="+", default=[], metavar="NAME", help="skip these checks, and the checks that need them")
    add("--json", type=path, metavar="FILE", help="also write the results to this file")
    add("--full-length", action="store_true", help="rehearse with responses up to rollout.max_response_tokens, not 64")
    add("--largest-micro-batches", action="store_true",
        help="try the largest micro-batches on a CPU too; on GPUs they always are")  # fmt: skip
    options, flags = parser.parse_known_args(list(arguments))
    for flag, names in (("--only", options.only), ("--skip", options.skip)):
        for name in names:
            if name not in NAMES:
                parser.error(f"{flag} {name}: no such check; choose from {', '.join(NAMES)}")
            if flag == "--skip" and name in REQUIRED:
                parser.error(f"--skip {name}: all other checks need it; remove it")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: the folder does not exist; create it, or choose another")
    return options, flags


def _resolve(config: str, flags: list[str]) -> Resolved:
    settings = with_model_folder(load_settings(config, flags))
    command = f"torchrun --nproc-per-node {{ranks}} {sys.argv[0]} {config}, or by the run's launcher with PREFLIGHT=1"
    check_launch(settings.parallel, command)
    environment.set_defaults(settings.megatron)
    resolved = resolve(settings, show_progress=is_main())
    check_megatron(settings, resolved.hf_config, kernels=True)
    return resolved


def _summary(resolved: Resolved) -> str:
    settings = resolved.settings
    start = f", resuming after step {resolved.start.step}" if resolved.start else ""
    return f"{resolved.world_size} rank(s), {settings.run.steps} steps into {settings.run.dir}{start}"
