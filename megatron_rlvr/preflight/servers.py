"""The servers of `rollout.servers`: there, right, and reachable from every rank that talks to them."""

from megatron_rlvr.config import SettingsError
from megatron_rlvr.engines.sglang.client import Server, ServerFault
from megatron_rlvr.engines.sglang.engine import connect
from megatron_rlvr.engines.sglang.pool import faults
from megatron_rlvr.preflight.context import Site
from megatron_rlvr.preflight.machines import within
from megatron_rlvr.preflight.results import Finding, from_sentence, some

# A run waits for servers that are starting; here they are to be there.
_MOST_PATIENCE_SECONDS = 60.0
_QUICK_SECONDS = 20.0
# docs/rollouts.md
_TESTED = (0, 5, 21), (0, 5, 23)


def check_servers(site: Site) -> Finding:
    """Each serves the run's model, takes its lengths, and answers whoever leads a replica."""
    settings = site.resolved.settings
    rollout = settings.rollout
    if rollout.engine == "embedded":
        return Finding("servers", "passed", "none: rollout.engine is embedded")
    patience = min(rollout.server_timeout_seconds, _MOST_PATIENCE_SECONDS)
    longest = settings.data.max_prompt_tokens + rollout.max_response_tokens
    try:
        site.pool = connect(
            rollout.model_copy(update={"server_timeout_seconds": patience}),
            site.ranks,
            site.resolved.hf_config,
            longest=longest,
        )
    except SettingsError as error:  # on every rank
        return from_sentence("servers", str(error))
    if site.pool is not None:
        site.resources.callback(site.pool.close)
    told = site.gather(faults(site.pool.everywhere(Server.check_health)) if site.pool else {})
    for rank, unreached in enumerate(told):
        for url, reason in unreached.items():
            return Finding(
                "servers",
                "failed",
                f"rank {rank} does not reach {url}: {reason}",
                "give the server an address and a port that every host of the trainer reaches (--host 0.0.0.0)",
            )
    versions = site.gather(_versions(site))[0]
    kinds = sorted(set(versions.values()))
    found = f"{len(versions)} of this model with room for {longest} tokens, sglang {', '.join(kinds)}: "
    found += some(list(versions))
    untested = [version for version in kinds if not within(version, *_TESTED)]
    if untested:
        return Finding(
            "servers",
            "warned",
            found,
            f"sglang {', '.join(untested)} is not tested: take 0.5.21 to 0.5.23, or look at the first gap closely",
        )
    return Finding("servers", "passed", found)


def _versions(site: Site) -> dict[str, str]:
    """{URL: version of its program}, on the main rank; "unknown" where it does not say."""
    if site.pool is None or not site.ranks.is_main:
        return {}

    async def version(server: Server) -> str:
        return str((await server.call("GET", "/server_info", _QUICK_SECONDS)).get("version", "unknown"))

    answers = site.pool.everywhere(version)
    return {url: "unknown" if isinstance(answer, ServerFault) else answer for url, answer in answers.items()}


def weights_on_servers(site: Site) -> dict[str, str]:
    """{URL: what the server calls the weights that it holds}, on every rank; "unknown" where it does not answer."""
    here: dict[str, str] = {}
    if site.pool is not None and site.ranks.is_main:
        answers = site.pool.everywhere(Server.weight_version)
        here = {url: "unknown" if isinstance(answer, ServerFault) else str(answer) for url, answer in answers.items()}
    return site.gather(here)[0]
