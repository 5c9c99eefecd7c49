"""Runs the checks after `settings` in order on all ranks; some make objects that later ones use."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from megatron_rlvr.distributed import process_group
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.engines.sglang.pool import ServerPool
from megatron_rlvr.errors import RlvrError
from megatron_rlvr.preflight import bandwidth, checkpoint, disk, grading, machines, memory, ports, rehearsal, servers
from megatron_rlvr.preflight.barrier import CheckBarrier
from megatron_rlvr.preflight.checks import Check, unmet_need
from megatron_rlvr.preflight.context import PreflightContext, RankFailure
from megatron_rlvr.preflight.rehearsal import Rehearsal
from megatron_rlvr.preflight.results import CheckResult, Report, failure
from megatron_rlvr.signals import Signals
from megatron_rlvr.startup.process import is_main, leave, print_error
from megatron_rlvr.startup.resolve import Resolved

logger = logging.getLogger(__name__)

# A rank waits this long for another: no check takes minutes, unless models are read from a slow disk.
_MAX_MINUTES = 10.0


class CheckFunctions:
    """The functions of the checks.

    The servers' connections, and the rehearsal, pass from the check that makes them to the later ones that use them.
    """

    def __init__(self, context: PreflightContext) -> None:
        self._context = context
        self._pool: ServerPool | None = None
        self._rehearsal: Rehearsal | None = None

    def run(self, name: str) -> CheckResult:
        """Run a check on this rank. A collective over the world."""
        run: dict[str, Callable[[], CheckResult]] = {
            "ranks": partial(machines.check_ranks, self._context),
            "versions": partial(machines.check_versions, self._context),
            "accelerators": partial(machines.check_accelerators, self._context),
            "bandwidth": partial(bandwidth.check_bandwidth, self._context),
            "disk": partial(disk.check_disk, self._context),
            "grader": partial(grading.check_grader, self._context),
            "servers": self._servers,
            "ports": lambda: ports.check_ports(self._context, self._pool),
            "rehearsal": self._rehearse,
            "mismatch": lambda: rehearsal.check_mismatch(self._context, self._rehearsed()),
            "memory": lambda: memory.check_memory(self._context, self._rehearsed()),
            "checkpoint": lambda: checkpoint.check_checkpoint(self._context, self._rehearsed()),
            "restored": lambda: rehearsal.check_restored(self._context, self._pool, self._rehearsed()),
        }
        return run[name]()

    def _servers(self) -> CheckResult:
        result, self._pool = servers.check_servers(self._context)
        return result

    def _rehearse(self) -> CheckResult:
        result, self._rehearsal = rehearsal.check_rehearsal(self._context, self._pool)
        return result

    def _rehearsed(self) -> Rehearsal:
        assert self._rehearsal is not None, "the checks that use the rehearsal need it"
        return self._rehearsal


def run_checks(
    checks: Sequence[Check],
    resolved: Resolved,
    signals: Signals,
    report: Report,
    *,
    skipped: Sequence[str],
    full_length: bool,
    largest_micro_batches: bool,
) -> None:
    """Run checks, the first of which is `ranks`, and report their results. Every rank must call it.

    Args:
        skipped: Names of the checks that the user skips.
        full_length: See `PreflightContext`; responses may then take as long as in the run, so ranks wait for longer.
        largest_micro_batches: See `PreflightContext`.
    """
    ranks = _join(checks, resolved, report, max_minutes=math.inf if full_length else _MAX_MINUTES)
    if ranks is None:
        return
    resources = ExitStack()
    context = PreflightContext(resolved, ranks, signals, full_length, largest_micro_batches, resources)
    functions = CheckFunctions(context)
    running = checks[0]

    def give_up(stuck_behind: RankFailure) -> None:
        report.add(_rank_failure(running.name, stuck_behind))
        for check in checks[checks.index(running) + 1 :]:
            report.add(CheckResult(check.name, "not tried", f"ranks are stuck in {running.name}"))
        context.remove_folders()
        report.close()
        leave(1)

    barrier = CheckBarrier(context, give_up)
    with resources:
        for running in checks:
            result = unmet_need(running, report.results, skipped)
            if result is None:
                report.check_started(running.name, running.description)
                start = time.perf_counter()
                results = barrier.run(partial(functions.run, running.name))
                result = replace(_combined(running.name, results), seconds=round(time.perf_counter() - start, 2))
            report.add(result)
    process_group.shut_down()


def _join(checks: Sequence[Check], resolved: Resolved, report: Report, *, max_minutes: float) -> Ranks | None:
    """Join the process group. If it fails, report that on the main rank and return None; exit on other ranks."""
    report.check_started("ranks", "waiting for all of them")
    start = time.perf_counter()
    try:
        return machines.join_ranks(resolved.settings, max_minutes=max_minutes)
    except (RlvrError, RuntimeError) as error:
        if not is_main():
            print_error(error)
            leave(1)
        if isinstance(error, RlvrError):
            result = failure("ranks", str(error))
        else:
            logger.exception("the ranks did not join")
            result = failure("ranks", f"{error}; see the traceback, and docs/preflight.md, ranks")
        report.add(replace(result, seconds=time.perf_counter() - start))
        for check in checks[1:]:
            report.add(CheckResult(check.name, "not tried", "needs ranks, which failed"))
        return None


def _combined(name: str, results: Sequence[CheckResult | RankFailure]) -> CheckResult:
    """Return the main rank's result, or the first failure if the check failed on a rank."""
    for result in results:
        if isinstance(result, RankFailure):
            return _rank_failure(name, result)
    return next(result for result in results if isinstance(result, CheckResult))


def _rank_failure(name: str, error: RankFailure) -> CheckResult:
    return failure(name, f"rank {error.rank}: {error.sentence}")
