"""Connecting to the servers of a run: routers are replaced by their workers, and every server is checked."""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist

from megatron_rlvr.config import RolloutSettings, SettingsError
from megatron_rlvr.distributed import accelerator, transport
from megatron_rlvr.distributed.collectives import raise_on_all_ranks
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.engines.sglang import colocation
from megatron_rlvr.engines.sglang.answers import shown
from megatron_rlvr.engines.sglang.api_key import key_of
from megatron_rlvr.engines.sglang.client import Server, ServerError, ServerInfo
from megatron_rlvr.engines.sglang.pool import ServerPool
from megatron_rlvr.engines.sglang.router import workers_of

logger = logging.getLogger(__name__)

_DTYPE_ALIASES = {"half": "float16", "float": "float32"}


def connect(
    settings: RolloutSettings,
    ranks: Ranks,
    hf_config: Mapping[str, Any],
    *,
    max_sequence_tokens: int,
    dtype: str | None = None,
    same_transport: bool = False,
    evaluation_servers: Sequence[str] = (),
    key: str | None = None,
    model: str = "model.path",
) -> ServerPool | None:
    """Connect the leader of each data-parallel replica to the servers; a collective over the world.

    Args:
        settings: Settings of the rollout, with the servers' URLs.
        ranks: Ranks of the run.
        hf_config: config.json of the model.
        max_sequence_tokens: Maximum number of tokens of a prompt and its response together.
        dtype: Precision in which the trainer computes, and servers must as well; None for any.
        same_transport: The trainer will form process groups with the servers (`sync.method: distributed`). On GPUs,
            both sides then need the same NCCL; servers that do not report theirs are not refused.
        evaluation_servers: URLs to connect to instead, those of `evaluate.servers`, which the main rank alone uses.
        key: Setting or flag that names the servers, for messages; None for that of the settings.
        model: Setting or argument that names the model, for messages.

    Returns:
        The pool of a leader; None on other ranks.

    Raises:
        SettingsError: On every rank, if a server does not answer, or does not fit the run. The problem of each further
            server is logged.
    """
    key = key or ("evaluate.servers" if evaluation_servers else "rollout.servers")
    api_key = key_of(settings)

    def pool_of(urls: Sequence[str]) -> ServerPool:
        return ServerPool(
            urls,
            max_inflight=math.ceil(settings.max_inflight / (1 if evaluation_servers else ranks.data_size)),
            retries=settings.retries,
            patience_seconds=settings.server_timeout_seconds,
            api_key=api_key,
        )

    urls: list[str] = []
    problems: list[str] = []
    if ranks.is_main:
        with closing(pool_of(evaluation_servers or settings.servers)) as pool_of_settings:
            find_workers = partial(workers_of, patience_seconds=pool_of_settings.patience_seconds)
            urls, problems = expand(pool_of_settings.everywhere(find_workers), key)
    found: list[list[str]] = [urls]
    dist.broadcast_object_list(found, src=0)
    pool = pool_of(in_turn(found[0], ranks.data_rank, ranks.data_size)) if ranks.replica_rank == 0 else None
    if ranks.is_main and pool is not None:
        colocated = settings.colocated and not evaluation_servers
        wanted = _Wanted(
            hf_config,
            max_sequence_tokens,
            dtype,
            transport=transport.version() if same_transport and accelerator.has_gpu() else None,
            model=model,
        )
        problems += _problems(pool, wanted, colocated=colocated, key=key)
        for problem in problems[1:]:
            logger.error(problem)
    try:
        raise_on_all_ranks(SettingsError(problems[0]) if problems else None)
    except SettingsError:
        if pool is not None:
            pool.close()
        raise
    return pool


def in_turn(urls: Sequence[str], leader: int, leaders: int) -> list[str]:
    """Return the servers in the order in which a leader uses them: each leader begins at another place.

    Of servers with as few requests, a leader takes the first. If all leaders began with the same one, many leaders with
    few requests would leave the last servers idle.
    """
    first = leader * len(urls) // leaders
    return [*urls[first:], *urls[:first]]


def served_folder(urls: Sequence[str], api_key: str | None) -> str | None:
    """Return the folder from which the first server has loaded its model; None if it does not report it.

    Args:
        urls: Servers.
        api_key: Key that they demand; None if they demand none.

    Raises:
        SettingsError: If the server does not answer.
    """
    with closing(ServerPool(urls[:1], max_inflight=1, retries=0, patience_seconds=0.0, api_key=api_key)) as pool:
        (answer,) = pool.everywhere(lambda server: server.info()).values()
    if isinstance(answer, ServerError):
        raise SettingsError(_unusable(urls[0], answer, "--servers"))
    return answer.model_path


def expand(
    answers: Mapping[str, list[str] | ServerError | None], key: str = "rollout.servers"
) -> tuple[list[str], list[str]]:
    """Return the URLs of all servers, and one sentence for each problem.

    Args:
        answers: {URL of a setting: result of `workers_of`}.
        key: The setting, for messages.

    Returns:
        Every URL once, in order, each router replaced by its workers; and the problems.
    """
    urls: dict[str, None] = {}
    problems = []
    for url, answer in answers.items():
        if isinstance(answer, ServerError):
            problems.append(_unusable(url, answer, key))
        else:
            urls |= dict.fromkeys([url] if answer is None else answer)
    return list(urls), problems


@dataclass(frozen=True)
class _Wanted:
    """Properties that a run needs of every server.

    Attributes:
        hf_config, max_sequence_tokens, dtype, model: As for `connect`.
        transport: Version of NCCL; None for any.
    """

    hf_config: Mapping[str, Any]
    max_sequence_tokens: int
    dtype: str | None = None
    transport: str | None = None
    model: str = "model.path"


def _problems(pool: ServerPool, wanted: _Wanted, *, colocated: bool, key: str) -> list[str]:
    """Return one sentence for each server that cannot be used. Waits for servers that are starting."""

    async def ask(server: Server) -> ServerInfo:
        if colocated:
            await colocation.recover(server, pool.patience_seconds)
        await server.wait_until_healthy(pool.patience_seconds)
        return await server.info()

    problems = []
    for url, answer in pool.everywhere(ask).items():
        if isinstance(answer, ServerError):
            problems.append(_unusable(url, answer, key))
        elif problem := _mismatch(answer, wanted):
            problems.append(f"{key}={url}: {problem}")
    return problems


def _unusable(url: str, error: ServerError, key: str) -> str:
    return f"{key}={url}: the server cannot be used ({error}); start it, or remove it from the list"


def _mismatch(info: ServerInfo, wanted: _Wanted) -> str | None:
    """Return why a server does not fit the run and what to do, or None."""
    hf_config, longest, dtype = wanted.hf_config, wanted.max_sequence_tokens, wanted.dtype
    pairs = {
        "model_type": (info.model_type, hf_config["model_type"]),
        "architectures": (info.architectures, list(hf_config.get("architectures") or info.architectures)),
        "vocabulary": (info.vocab_size, hf_config["vocab_size"]),
    }
    differing = [f"{name} {shown(theirs)}, not {ours}" for name, (theirs, ours) in pairs.items() if theirs != ours]
    if differing:
        return f"the server serves another model ({', '.join(differing)}); start it on {wanted.model}"
    if info.context_length < longest:
        return (
            f"the server's context length of {info.context_length} tokens is below data.max_prompt_tokens + "
            f"rollout.max_response_tokens = {longest}; start it with --context-length {longest}"
        )
    served = _served_dtype(info.dtype, hf_config)
    if dtype is not None and served is not None and served != dtype:
        option = f" (--dtype {info.dtype})" if info.dtype != served else ""
        return (
            f"the server computes in {shown(served)}{option}, and model.dtype is {dtype}; start it with --dtype {dtype}"
        )
    if wanted.transport is not None and info.transport is not None and info.transport != wanted.transport:
        return (
            f"the server has {transport.NAME} {shown(info.transport)} and the trainer {wanted.transport}, which do not "
            f"connect; install the same {transport.PACKAGE} in both environments, or choose sync.method=disk"
        )
    if info.preferred_sampling_params:
        return (
            f"the server adds its own sampling parameters ({shown(info.preferred_sampling_params)}); start it without "
            "--preferred-sampling-params"
        )
    return None


def _served_dtype(option: str | None, hf_config: Mapping[str, Any]) -> str | None:
    """Return the precision of a server with the option ``--dtype``; None if it is not known.

    With auto, SGLang computes in the dtype that config.json names, but serves float32 models in float16.
    """
    if option == "auto":
        named = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32").removeprefix("torch.")
        return "float16" if named == "float32" else named
    return _DTYPE_ALIASES.get(option, option) if option is not None else None
