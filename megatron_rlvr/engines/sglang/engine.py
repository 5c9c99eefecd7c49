"""Sampling from SGLang servers: one request a completion, token ids in and out, never text.

One rank of each replica, its leader, talks to the servers; the others take part in what all ranks agree on: whether
sampling or a change of weights has failed, so that none is left waiting in a collective.

A server returns log_softmax(logits / temperature) before top-p, and leaves the stop token in the response, as the
embedded engine does. It is trusted with neither: every answer is checked against its request before it is used.
"""

import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch.distributed as dist

from megatron_rlvr.config import RolloutSettings, SettingsError
from megatron_rlvr.distributed import accelerator, process_group
from megatron_rlvr.distributed.collectives import raise_on_all_ranks
from megatron_rlvr.distributed.counters import Counters
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.engines.sglang import colocation
from megatron_rlvr.engines.sglang.client import Server, ServerFault, ServerInfo, UnusableServer
from megatron_rlvr.engines.sglang.pool import RequestStream, ServerPool, Weights, faults
from megatron_rlvr.engines.sglang.request import GivenUp, ServerRequest
from megatron_rlvr.engines.sglang.router import expand, workers_of
from megatron_rlvr.protocols import EngineError, Sampling
from megatron_rlvr.types import Completion, CompletionRequest, empty_completion

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# Bounds one attempt on a server that is healthy and yet loses a request; a hung server is noticed by its health.
_SECONDS_A_REQUEST, _SECONDS_A_TOKEN = 60.0, 0.5


class WeightSync(Protocol):
    """Hands the policy's weights to the servers.

    Attributes:
        announce: is told what servers will call the weights of a version, on every rank, before any server can sample
            from them. A fast server goes on with them while a slow one is still loading.
    """

    announce: Callable[[str, int], None]

    def push(
        self,
        named_tensors: "Iterable[tuple[str, torch.Tensor]]",
        version: int,
        without: Mapping[str, str] | None = None,
    ) -> tuple[Weights, dict[str, str]]:
        """What servers now sample from, and {URL: why it does not have it}.

        A collective over the world, in which every rank exhausts the iterator. Requests that are running on servers
        wait, and go on with the new weights.

        Args:
            without: main rank: {URL: why} of servers that cannot take weights; they are among those that lack them.
        """

    def close(self) -> None:
        """Removes what is left of it, on servers too: the pool is still open."""


class SglangEngine:
    """Samples completions on servers; see protocols.StreamingEngine.

    Args:
        pool: of this rank, if it leads its replica.
        sync: hands the weights over.
        stop_token_ids: sampling one of them ends a response, of which it stays the last token.
        vocab_size: token ids are below it.
        longest: tokens that a prompt and its response may have together.
        colocated: servers share the GPUs with training (rollout.colocated).
    """

    def __init__(
        self,
        pool: ServerPool | None,
        sync: WeightSync,
        *,
        stop_token_ids: Sequence[int],
        vocab_size: int,
        longest: int,
        colocated: bool = False,
    ) -> None:
        self._colocated = colocated
        self._pool = pool
        self._sync = sync
        self._stop_token_ids = frozenset(stop_token_ids)
        self._vocab_size = vocab_size
        self._longest = longest
        self._store = process_group.store()
        self._calls = 0
        """Of `generate`, the same on every rank."""
        self._version: int | None = None
        self._versions: dict[str, int] = {}
        sync.announce = self._versions.__setitem__

    def update_weights(self, named_tensors: "Iterable[tuple[str, torch.Tensor]]", version: int) -> None:
        """Gives all servers new weights; one that fails is taken out. A collective over the world.

        Requests may be in flight: they wait, and go on with the new weights.

        Raises: EngineError on every rank if no server took them.
        """
        if self._colocated:  # before servers take their memory back
            accelerator.release_cached_memory()
            dist.barrier()
        if self._pool is None:
            weights, _ = self._sync.push(named_tensors, version)
            raise_on_all_ranks(None)
        else:
            with self._pool.changing_weights():
                # Weights that were loaded into memory that is not there would end the server.
                without_memory = self._memory(colocation.resume_weights)
                weights, failures = self._sync.push(named_tensors, version, without_memory)
                failures = self._memory(colocation.resume_all) | failures  # what failed first is the reason
                self._pool.use(weights, failures)
            reasons = "; ".join(f"{url}: {reason}" for url, reason in failures.items())
            none_left = f"no server took the weights of version {version}; {reasons}"
            raise_on_all_ranks(None if self._pool.usable else EngineError(none_left))
        self._version = version

    def release_memory(self) -> None:
        """Has colocated servers give their memory to training until the next `update_weights`."""
        if not self._colocated:
            return
        for url, reason in self._memory(colocation.release).items():
            logger.warning("server %s may still hold its memory: %s", url, reason)
        dist.barrier()

    def _memory(self, order: Callable[[Server], Awaitable[None]]) -> dict[str, str]:
        """Main rank: gives an order to all servers if they are colocated; {URL: why it failed}."""
        if not self._colocated or self._pool is None or dist.get_rank() != 0:
            return {}
        return faults(self._pool.everywhere(order, healthy=False))

    @property
    def version(self) -> int:
        """Of the weights that servers were last given."""
        assert self._version is not None
        return self._version

    def generate(self, requests: Sequence[CompletionRequest], sampling: Sampling) -> Iterator[Completion]:
        """Yields one completion a request as it arrives; a collective over the world, to be exhausted by every rank.

        Only leaders have requests. Temperature 0 takes the likeliest token and reports log_softmax(logits). The same
        requests are answered alike again where the servers run with --enable-deterministic-inference.

        Raises: EngineError on every rank, if servers fail for good, or a request cannot be sent to any.
        """
        self._calls += 1
        board = Counters(self._store, f"generate/{self._calls}")
        failure = None
        try:
            if requests:
                yield from self._answers(requests, sampling)
        except EngineError as error:
            failure = error
        finally:
            board.leave()
        board.wait_for_all(dist.get_world_size())  # as long as it takes, which a collective would not
        raise_on_all_ranks(failure)

    def _answers(self, requests: Sequence[CompletionRequest], sampling: Sampling) -> Iterator[Completion]:
        """The completions of this rank's requests as they arrive. Raises: EngineError."""
        if self._pool is None:
            raise RuntimeError("this rank does not lead its replica and has requests; give them to the leader")
        with self.open(sampling) as stream:
            stream.submit(requests)
            for _ in requests:
                answer = stream.get()
                assert answer is not None
                yield answer[1]

    @contextmanager
    def open(self, sampling: Sampling) -> "Iterator[SglangStream]":
        """A stream of requests and completions; for leaders."""
        if self._version is None or self._pool is None:
            raise RuntimeError("the servers have no weights of this run to sample from; call update_weights first")
        with self._pool.open() as jobs:
            yield SglangStream(self, jobs, sampling)

    def close(self) -> None:
        """Lets the servers go.

        Memory that they have given to training stays away: whoever leaves in mid-step may still hold it, and a server
        ends if it cannot have its own. The next trainer finds out what is missing (colocation.recover).
        """
        self._sync.close()
        if self._pool is not None:
            self._pool.close()

    def job(self, request: CompletionRequest, begun: Completion | None, sampling: Sampling) -> ServerRequest:
        """What to ask a server for.

        Raises: EngineError for a request that no server could answer, or would not survive.
        """
        prompt, response = request.prompt.token_ids, sampling.max_response_tokens
        name = f"sample {request.index} of prompt {request.prompt.id}"
        if not len(prompt) or prompt.min() < 0 or prompt.max() >= self._vocab_size:
            raise EngineError(f"{name} is empty or holds a token id outside the vocabulary of {self._vocab_size}")
        if len(prompt) + response > self._longest:
            raise EngineError(f"{name} has {len(prompt)} + {response} tokens, more than the agreed {self._longest}")
        assert self._version is not None
        begun = begun or empty_completion(request)
        remaining = response - len(begun.token_ids)
        parameters = {
            "max_new_tokens": remaining,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "stop_token_ids": sorted(self._stop_token_ids),
            "sampling_seed": request.seed,
        }
        return ServerRequest(
            name=name,
            body={
                "input_ids": [*prompt.tolist(), *begun.token_ids.tolist()],
                "return_logprob": True,
                "sampling_params": parameters,
            },
            read=partial(self._read, request, begun, remaining, self._version),
            timeout_seconds=_SECONDS_A_REQUEST + _SECONDS_A_TOKEN * remaining,
        )

    def _read(
        self, request: CompletionRequest, begun: Completion, most: int, oldest: int, answer: Any
    ) -> tuple[CompletionRequest, Completion]:
        """What a server's answer makes of ``begun``; a fault if it cannot be its continuation by ``most`` tokens.

        Args:
            oldest: version of the weights at the time of the request; no token may be of older ones.

        Raises: GivenUp, with the completion as far as it got, if the server ended it early.
        """
        try:
            meta, tokens = answer["meta_info"], answer["output_ids"]
            reason = meta["finish_reason"]
            ended = reason["type"]
            pairs = [(entry[0], entry[1]) for entry in meta.get("output_token_logprobs") or []]
            versions = _versions_of(meta, len(tokens), self._versions)
        except (LookupError, TypeError, ValueError):
            raise UnusableServer("its answer lacks tokens, log-probabilities or a reason to end") from None
        aborted = ended == "abort"
        if wrong := self._wrong(tokens, pairs, 0 if aborted else 1, most):
            raise UnusableServer(f"its answer holds {wrong}")
        if len(versions) and versions.min() < oldest:
            raise UnusableServer(f"it sampled from weights of version {versions.min()}, not {oldest}")
        logprobs = np.array([logprob for logprob, _ in pairs], dtype=np.float32)
        whole = replace(
            begun,
            token_ids=np.concatenate([begun.token_ids, np.array(tokens, dtype=np.int32)]),
            logprobs=np.concatenate([begun.logprobs, logprobs]),
            weight_versions=np.concatenate([begun.weight_versions, versions]),
        )
        # At the cap a server says length, whatever the last token is; and an abort may come too late to matter.
        stopped = ended == "stop" or (bool(tokens) and tokens[-1] in self._stop_token_ids)
        if ended == "stop" and (not tokens or reason.get("matched") != tokens[-1]):
            raise UnusableServer(f"its answer was stopped by {reason.get('matched')!r} and ends with {tokens[-1:]}")
        if stopped or len(tokens) == most:
            return request, replace(whole, finish_reason="stop" if stopped else "length")
        if aborted:
            raise GivenUp(f"it gave the request up: {reason.get('message')}", (request, whole))
        raise UnusableServer(f"its answer of {len(tokens)} tokens was ended by {ended!r}, not the cap {most}")

    def _wrong(self, tokens: list[Any], pairs: list[tuple[Any, Any]], least: int, most: int) -> str | None:
        """What cannot be true of a response."""
        if not least <= len(tokens) <= most:
            return f"{len(tokens)} tokens, not {least} to {most}"
        outside = [token for token in tokens if type(token) is not int or not 0 <= token < self._vocab_size]
        if outside:
            return f"token id {outside[0]!r}, outside the vocabulary of {self._vocab_size}"
        if [token for _, token in pairs] != tokens:
            return "log-probabilities of other tokens"
        # Rounding may leave a certain token a little above 0.
        bad = [p for p, _ in pairs if not isinstance(p, int | float) or not math.isfinite(p) or p > 1e-3]
        return f"log-probability {bad[0]!r}" if bad else None


class SglangStream:
    """Requests go in, completions come out; see protocols.RolloutStream."""

    def __init__(self, engine: SglangEngine, jobs: RequestStream, sampling: Sampling) -> None:
        self._engine = engine
        self._jobs = jobs
        self._sampling = sampling

    def submit(self, requests: Sequence[CompletionRequest], begun: Sequence[Completion | None] = ()) -> None:
        """Asks for completions; ``begun`` are what earlier streams have got of them."""
        pairs = zip(requests, begun or [None] * len(requests), strict=True)
        self._jobs.submit([self._engine.job(request, so_far, self._sampling) for request, so_far in pairs])

    def get(self, timeout_seconds: float | None = None) -> tuple[CompletionRequest, Completion] | None:
        """The next that is complete, or None if none is in time. Raises: EngineError if servers fail for good."""
        return self._jobs.get(timeout_seconds)

    def abort(self) -> list[tuple[CompletionRequest, Completion]]:
        """Ends all requests: what is complete and was not taken, and what is known of the others."""
        return self._jobs.abort()


def _versions_of(meta: Mapping[str, Any], tokens: int, known: Mapping[str, int]) -> np.ndarray:
    """[T] int32, of each of ``tokens`` new tokens, from the spans that a server tells."""
    spans = meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": tokens}]
    versions = np.full(tokens, -1, dtype=np.int32)
    for span in spans if tokens else []:
        if span["version"] not in known:
            raise UnusableServer(f"it sampled from weights {span['version']}, which are not of this run")
        versions[span["start"] : span["end"]] = known[span["version"]]
    if tokens and versions.min() < 0:
        raise UnusableServer("its answer does not tell the weights of each token")
    return versions


def connect(
    settings: RolloutSettings, ranks: Ranks, hf_config: Mapping[str, Any], *, longest: int
) -> ServerPool | None:
    """The pool of a leader, None on other ranks; a collective over the world.

    Args:
        hf_config: the model's config.json.
        longest: tokens that a prompt and its response may have together.

    Raises: SettingsError on every rank if a server does not answer or serves another model; each has a line in the log.
    """

    def pool_of(urls: Sequence[str]) -> ServerPool:
        return ServerPool(
            urls,
            max_inflight=math.ceil(settings.max_inflight / ranks.data_size),
            retries=settings.retries,
            patience_seconds=settings.server_timeout_seconds,
        )

    urls: list[str] = []
    problems: list[str] = []
    if ranks.is_main:
        with closing(pool_of(settings.servers)) as unknown:
            urls, problems = expand(unknown.everywhere(partial(workers_of, patience_seconds=unknown.patience_seconds)))
    found: list[list[str]] = [urls]
    dist.broadcast_object_list(found, src=0)
    pool = pool_of(found[0]) if ranks.replica_rank == 0 else None
    if ranks.is_main and pool is not None:
        problems += _problems(pool, hf_config, longest, colocated=settings.colocated)
        for problem in problems[1:]:
            logger.error(problem)
    try:
        raise_on_all_ranks(SettingsError(problems[0]) if problems else None)
    except SettingsError:
        if pool is not None:
            pool.close()
        raise
    return pool


def _problems(pool: ServerPool, hf_config: Mapping[str, Any], longest: int, *, colocated: bool) -> list[str]:
    """One sentence for each server that cannot be used. Servers that are starting are waited for."""

    async def ask(server: Server) -> ServerInfo:
        if colocated:
            await colocation.recover(server, pool.patience_seconds)
        await server.wait_until_healthy(pool.patience_seconds)
        return await server.info()

    problems = []
    for url, info in pool.everywhere(ask).items():
        if isinstance(info, ServerFault):
            problems.append(f"rollout.servers {url} cannot be used ({info}); start it, or drop it from the list")
            continue
        found = {
            "model_type": (info.model_type, hf_config["model_type"]),
            "architectures": (info.architectures, list(hf_config.get("architectures") or info.architectures)),
            "vocabulary": (info.vocab_size, hf_config["vocab_size"]),
        }
        other = [f"{name} {theirs}, not {ours}" for name, (theirs, ours) in found.items() if theirs != ours]
        if other:
            problems.append(f"rollout.servers {url} serves another model ({', '.join(other)}); start it on model.path")
        elif info.context_length < longest:
            problems.append(
                f"rollout.servers {url} takes {info.context_length} tokens, less than data.max_prompt_tokens + "
                f"rollout.max_response_tokens = {longest}; start it with --context-length {longest}"
            )
        elif info.preferred_sampling_params:
            problems.append(
                f"rollout.servers {url} adds sampling parameters of its own ({info.preferred_sampling_params}); start "
                "it without --preferred-sampling-params"
            )
    return problems
