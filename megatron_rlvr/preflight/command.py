"""The command line: which checks there are, what each needs, and running them one after the other on all ranks.

What is wrong with arguments or settings is told in one line, with status 2, before torch is imported.
"""

import argparse
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_rlvr.config import SettingsError
from megatron_rlvr.config.loading import load_settings
from megatron_rlvr.preflight.results import Finding, Report, from_sentence
from megatron_rlvr.signals import Signals, Stopped
from megatron_rlvr.startup.resolve import Resolved, describe_plan, resolve, world_size
from megatron_rlvr.train import INPUT_ERRORS, check_megatron, complain, is_main, quiet_libraries

if TYPE_CHECKING:
    from megatron_rlvr.preflight.context import Fault, Site

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        what: it looks at, for a person.
        needs: checks without which it cannot be tried.
    """

    name: str
    what: str
    needs: tuple[str, ...] = ()


CHECKS = (
    Check("settings", "the run that these settings describe"),
    Check("ranks", "all ranks joined, hosts, clocks", ("settings",)),
    Check("versions", "the same packages everywhere, in the tested range", ("ranks",)),
    Check("accelerators", "GPUs: as many as ranks, alike, free, with bfloat16", ("ranks",)),
    Check("bandwidth", "GB/s in every group of the layout, the slowest named", ("ranks",)),
    Check("disk", "run.dir: room, speed, shared by all hosts, replacing is atomic", ("ranks",)),
    Check("grader", "a right and a wrong answer to the first prompt", ("ranks",)),
    Check("servers", "rollout.servers: reachable, the run's model, long enough", ("ranks",)),
    Check("rehearsal", "one step on a few prompts by the run's own code", ("grader", "servers")),
    Check("gap", "log-probabilities of engine and policy, for the same tokens", ("rehearsal",)),
    Check("memory", "the peak of the rehearsal and of the largest micro-batches", ("rehearsal",)),
    Check("restored", "servers hold the weights of model.path", ("rehearsal",)),
)
_NAMES = tuple(check.name for check in CHECKS)
_ALWAYS = ("settings", "ranks")
# A rank waits for another no longer than this: nothing here takes minutes, unless models are read from a slow disk.
_MOST_MINUTES = 10.0


def main(arguments: Sequence[str], description: str) -> NoReturn:
    """Entry point; exits with 0 if nothing failed, 1 if something did, 2 for wrong input, 128 + n after signal n.

    Args:
        description: of --help.
    """
    options, flags = _parse(arguments, description)
    quiet_libraries()
    signals = Signals()
    if is_main():  # launchers end the others
        signals.listen()
    report = Report(sys.stdout, sys.stderr, enabled=is_main())
    try:
        resolved = _resolve(options.config, flags)
        report.say(describe_plan(resolved))
        report.say("")
        report.add(Finding("settings", "passed", _in_short(resolved)))
        _run(resolved, signals, options, report)
        _finish(report, options.json)
    except INPUT_ERRORS as error:
        complain(error)
        _leave(2)
    except Stopped as stopped:
        _leave(stopped.exit_status)
    _leave(0 if report.passed else 1)


def _parse(arguments: Sequence[str], description: str) -> tuple[argparse.Namespace, list[str]]:
    """Our own flags, and those of the run."""
    parser = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="torchrun ... %(prog)s CONFIG.yaml [FLAGS] [--section.key VALUE ...]",
        epilog="checks:\n" + "\n".join(f"  {check.name:<13} {check.what}" for check in CHECKS),
    )
    add = parser.add_argument
    add("config", metavar="CONFIG.yaml", help="the settings of the run; its flags (--section.key VALUE) go with them")
    add("--only", nargs="+", default=[], metavar="NAME", help="these checks, and what they need")
    add("--skip", nargs="+", default=[], metavar="NAME", help="all but these checks, and what needs them")
    add("--json", type=Path, metavar="FILE", help="write what was found there as well")
    add("--full-length", action="store_true", help="rehearse with responses up to rollout.max_response_tokens, not 64")
    add("--longest", action="store_true", help="try the largest micro-batches on a CPU too; on GPUs they are")
    options, flags = parser.parse_known_args(list(arguments))
    for flag, names in (("--only", options.only), ("--skip", options.skip)):
        for name in names:
            if name not in _NAMES:
                parser.error(f"{flag} {name} is no check; choose from {', '.join(_NAMES)}")
            if flag == "--skip" and name in _ALWAYS:
                parser.error(f"--skip {name} cannot be: all other checks need it; drop it")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json} cannot be written (no such folder); make it, or choose another")
    return options, flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n" if is_main() else "")


def _resolve(config: str, flags: list[str]) -> Resolved:
    settings = load_settings(config, flags)
    ranks = world_size(settings.parallel)
    if ranks > 1 and "RANK" not in os.environ:
        raise SettingsError(
            f"{ranks} ranks are needed, and this is one process; start it as the run: "
            f"torchrun --nproc-per-node {ranks} {sys.argv[0]} {config}, or by its launcher with PREFLIGHT=1"
        )
    resolved = resolve(settings, show_progress=is_main())
    check_megatron(resolved, running=True)
    return resolved


def _in_short(resolved: Resolved) -> str:
    settings = resolved.settings
    start = f", going on after step {resolved.start.step}" if resolved.start else ""
    return f"{resolved.world_size} rank(s), {settings.run.steps} steps into {settings.run.dir}{start}"


# Running ------------------------------------------------------------------------------------------------------------


def chosen(only: Sequence[str], skip: Sequence[str]) -> list[Check]:
    """The checks to try, in order: with ``only`` what these need as well, and what puts things back."""
    wanted = set(only or _NAMES)
    for check in reversed(CHECKS):
        if check.name in wanted:
            wanted |= set(check.needs)
    if "rehearsal" in wanted:
        wanted.add("restored")
    return [check for check in CHECKS if check.name in wanted and check.name not in skip]


def _run(resolved: Resolved, signals: Signals, options: argparse.Namespace, report: Report) -> None:
    """All checks after the settings. Every rank does the same."""
    from megatron_rlvr.distributed import process_group
    from megatron_rlvr.preflight.context import Meeting, Site
    from megatron_rlvr.preflight.machines import join

    checks = chosen(options.only, options.skip)[1:]
    report.note("ranks", "waiting for all of them")
    start = time.perf_counter()
    try:
        # At full length responses may take as long as in the run.
        ranks = join(resolved.settings, most_minutes=math.inf if options.full_length else _MOST_MINUTES)
    except (SettingsError, RuntimeError) as error:
        if not is_main():
            complain(error)
            _leave(1)
        report.add(replace(_of_error("ranks", error), seconds=time.perf_counter() - start))
        for check in checks[1:]:
            report.add(Finding(check.name, "not tried", "needs ranks, which failed"))
        return
    site = Site(resolved, ranks, signals, full_length=options.full_length, longest=options.longest)
    functions = _functions()
    running = checks[0]

    def give_up(fault: "Fault") -> None:
        report.add(_of_fault(running.name, fault))
        for check in checks[checks.index(running) + 1 :]:
            report.add(Finding(check.name, "not tried", f"ranks are stuck in {running.name}"))
        site.remove_folders()
        _finish(report, options.json)
        _leave(1)

    meeting = Meeting(site, give_up)
    with site.resources:
        for running in checks:
            finding = _not_tried(running, report, options.skip)
            if finding is None:
                report.note(running.name, running.what)
                start = time.perf_counter()
                results = meeting.all_run(partial(functions[running.name], site))
                finding = replace(_of_all(running.name, results), seconds=round(time.perf_counter() - start, 2))
            report.add(finding)
    process_group.shut_down()


def _functions() -> "dict[str, Callable[[Site], Finding]]":
    from megatron_rlvr.preflight import bandwidth, disk, grading, machines, rehearsal, servers

    return {
        "ranks": machines.check_ranks,
        "versions": machines.check_versions,
        "accelerators": machines.check_accelerators,
        "bandwidth": bandwidth.check_bandwidth,
        "disk": disk.check_disk,
        "grader": grading.check_grader,
        "servers": servers.check_servers,
        "rehearsal": rehearsal.check_rehearsal,
        "gap": rehearsal.check_gap,
        "memory": rehearsal.check_memory,
        "restored": rehearsal.check_restored,
    }


def _not_tried(check: Check, report: Report, skipped: Sequence[str]) -> Finding | None:
    """That a check cannot be tried, where it cannot."""
    results = {finding.name: finding.result for finding in report.findings}
    for needed in check.needs:
        if needed in skipped:
            return Finding(check.name, "not tried", f"needs {needed}, which was skipped")
        if results.get(needed) in ("failed", "not tried"):
            why = "failed" if results[needed] == "failed" else "was not tried"
            return Finding(check.name, "not tried", f"needs {needed}, which {why}")
    return None


def _of_all(name: str, results: "Sequence[Finding | Fault]") -> Finding:
    """The main rank's finding, unless the check failed on a rank."""
    faults = [result for result in results if not isinstance(result, Finding)]
    if faults:
        return _of_fault(name, faults[0])
    return next(result for result in results if isinstance(result, Finding))


def _of_fault(name: str, fault: "Fault") -> Finding:
    return from_sentence(name, f"rank {fault.rank}: {fault.sentence}")


def _of_error(name: str, error: Exception) -> Finding:
    if isinstance(error, SettingsError):
        return from_sentence(name, str(error))
    logger.exception("the ranks did not come together")
    return from_sentence(name, f"{error}; see the traceback, and docs/preflight.md, ranks")


def _finish(report: Report, path: Path | None) -> None:
    report.close()
    if path is not None:
        report.write_json(path)


def _leave(status: int) -> NoReturn:
    """Ends this process at once: other ranks may be gone, and leaving the process group would wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
