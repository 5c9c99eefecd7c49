"""Check of `rollout.servers`: running, with the run's model, and reachable from every rank that sends requests."""

from collections.abc import Mapping

from megatron_rlvr.config import Settings, SettingsError
from megatron_rlvr.distributed import accelerator, transport
from megatron_rlvr.engines.sglang.client import Server, ServerError
from megatron_rlvr.engines.sglang.connect import connect
from megatron_rlvr.engines.sglang.pool import ServerPool, failures_in
from megatron_rlvr.preflight.context import PreflightContext
from megatron_rlvr.preflight.machines import version_in_range
from megatron_rlvr.preflight.results import CheckResult, failure, first_few

# A run waits for servers that are starting; the preflight expects them to be up.
_MAX_PATIENCE_SECONDS = 60.0
# Oldest and newest version of SGLang; docs/rollouts.md. Tests run against the newest (tools/sglang.txt).
TESTED_SGLANG = (0, 5, 21), (0, 5, 23)


def check_servers(context: PreflightContext) -> tuple[CheckResult, ServerPool | None]:
    """Check that each server has the run's model and context length, and answers the leader of every replica.

    Returns: the result, and on leaders the connections to the servers; None if there are none, or no usable ones.
    """
    settings = context.resolved.settings
    rollout, longest = settings.rollout, settings.max_sequence_tokens
    if rollout.engine == "embedded":
        return CheckResult("servers", "passed", "none: rollout.engine is embedded"), None
    patience = min(rollout.server_timeout_seconds, _MAX_PATIENCE_SECONDS)
    try:
        pool = connect(
            rollout.model_copy(update={"server_timeout_seconds": patience}),
            context.ranks,
            context.resolved.hf_config,
            max_sequence_tokens=longest,
            dtype=settings.model.dtype,
            same_transport=settings.sync.method == "distributed",
        )
    except SettingsError as error:  # raised on every rank
        return failure("servers", str(error)), None
    if pool is not None:
        context.resources.callback(pool.close)
    unreached_by_rank = context.gather(failures_in(pool.everywhere(Server.check_health)) if pool else {})
    for rank, unreached in enumerate(unreached_by_rank):
        for url, reason in unreached.items():
            problem = f"rank {rank} does not reach {url}: {reason}"
            remedy = "give the server an address and a port that every host of the trainer reaches (--host 0.0.0.0)"
            return CheckResult("servers", "failed", problem, remedy), pool
    versions = context.gather(_versions(pool) if context.ranks.is_main else {})[0]
    distinct = sorted({sglang for sglang, _ in versions.values()})
    message = (
        f"{len(versions)} with the run's model and at least {longest} tokens of context, SGLang "
        f"{', '.join(distinct)}{_transport(settings, versions)}: {first_few(list(versions))}"
    )
    untested = [version for version in distinct if not version_in_range(version, *TESTED_SGLANG)]
    if untested:
        oldest, newest = (".".join(map(str, version)) for version in TESTED_SGLANG)
        remedy = (
            f"SGLang {', '.join(untested)} is not tested: use {oldest} to {newest}, or check the result of mismatch"
        )
        return CheckResult("servers", "warned", message, remedy), pool
    return CheckResult("servers", "passed", message), pool


def _versions(pool: ServerPool | None) -> dict[str, tuple[str, str | None]]:
    """Return {URL: (version of SGLang, of NCCL)}; "unknown" and None if the server does not report it."""
    answers = pool.everywhere(lambda server: server.info()) if pool is not None else {}
    return {
        url: ("unknown", None) if isinstance(answer, ServerError) else (answer.sglang or "unknown", answer.transport)
        for url, answer in answers.items()
    }


def _transport(settings: Settings, versions: Mapping[str, tuple[str, str | None]]) -> str:
    """Return what is known of the servers' NCCL, which `connect` has compared; empty if weights take another way."""
    if settings.sync.method != "distributed" or not accelerator.has_gpu():
        return ""
    silent = [url for url, (_, reported) in versions.items() if reported is None]
    if not silent:
        return f" and the trainer's {transport.NAME} {transport.version()}"
    return f", {transport.NAME} not reported by {first_few(silent)} (`rlvr serve` makes servers report it)"


def weight_versions(context: PreflightContext, pool: ServerPool | None) -> dict[str, str]:
    """Return {URL: name of the weights that the server holds} on every rank; "unknown" if it does not answer.

    A collective over the world.
    """
    here: dict[str, str] = {}
    if pool is not None and context.ranks.is_main:
        answers = pool.everywhere(Server.weight_version)
        here = {url: "unknown" if isinstance(answer, ServerError) else str(answer) for url, answer in answers.items()}
    return context.gather(here)[0]
