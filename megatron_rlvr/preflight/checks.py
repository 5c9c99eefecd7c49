"""The checks in the order in which they run, and what each of them needs. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlvr.preflight.results import CheckResult


@dataclass(frozen=True)
class Check:
    """One check, which is one line of the table.

    Attributes:
        name: Name in the table and on the command line.
        description: Subject of the check, for people.
        needs: Names of the checks without which this one cannot run.
    """

    name: str
    description: str
    needs: tuple[str, ...] = ()


CHECKS = (
    Check("settings", "the run that these settings describe"),
    Check("ranks", "all ranks joined, hosts, clocks", ("settings",)),
    Check("versions", "the same packages on every rank, in the tested range", ("ranks",)),
    Check("accelerators", "GPUs: one per rank, identical, free, with bfloat16", ("ranks",)),
    Check("bandwidth", "GB/s in every group of the layout, the slowest named", ("ranks",)),
    Check("disk", "run.dir: space, speed, shared by all hosts, atomic replacement", ("ranks",)),
    Check("grader", "a correct and an incorrect answer to the first prompt", ("ranks",)),
    Check("servers", "rollout.servers: reachable, the run's model, a sufficient context length", ("ranks",)),
    Check("ports", "listening sockets that other hosts reach, servers that answer anyone", ("servers",)),
    Check("rehearsal", "one step on a few prompts by the run's own code", ("grader", "servers")),
    Check("mismatch", "log-probabilities of engine and policy for the same tokens", ("rehearsal",)),
    Check("memory", "the peak of the rehearsal and of the largest micro-batches", ("rehearsal",)),
    Check("checkpoint", "a save: memory of the hosts, limits of containers, time", ("disk", "rehearsal")),
    Check("restored", "servers hold the weights of model.path", ("rehearsal",)),
)
NAMES = tuple(check.name for check in CHECKS)
REQUIRED = ("settings", "ranks")
"""Checks that all others need."""


def select_checks(only: Sequence[str], skip: Sequence[str]) -> list[Check]:
    """Return the checks to run, in order.

    Args:
        only: Names of checks; the checks that they need are added, and `restored` after a rehearsal. [] for all.
        skip: Names of checks to leave out.
    """
    selected = set(only or NAMES)
    for check in reversed(CHECKS):
        if check.name in selected:
            selected |= set(check.needs)
    if "rehearsal" in selected:
        selected.add("restored")
    return [check for check in CHECKS if check.name in selected and check.name not in skip]


def unmet_need(check: Check, results: Sequence[CheckResult], skipped: Sequence[str]) -> CheckResult | None:
    """Return the result of a check that cannot run because of another; None if it can run."""
    statuses = {result.name: result.status for result in results}
    for needed in check.needs:
        if needed in skipped:
            return CheckResult(check.name, "not tried", f"needs {needed}, which was skipped")
        if statuses.get(needed) in ("failed", "not tried"):
            reason = "failed" if statuses[needed] == "failed" else "was not tried"
            return CheckResult(check.name, "not tried", f"needs {needed}, which {reason}")
    return None
