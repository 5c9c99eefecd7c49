"""Sampling from SGLang servers: one request a completion, token ids in and out, never text.

One rank of each replica, its leader, talks to the servers; the others take part in what all ranks agree on: whether
sampling or a change of weights has failed, so that none is left waiting in a collective.

A server returns log_softmax(logits / temperature) before top-p, and leaves the stop token in the response, as the
embedded engine does. It is trusted with neither: every answer is checked against its request before it is used.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch.distributed as dist

from megatron_rlvr.config import RolloutSettings, SettingsError
from megatron_rlvr.policy.ranks import Ranks
from megatron_rlvr.protocols import Sampling
from megatron_rlvr.rollout.server import Server, ServerFault, ServerInfo, UnusableServer
from megatron_rlvr.rollout.servers import Job, ServerPool, ServersError, Weights
from megatron_rlvr.types import Completion, SampleRequest

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# Bounds one attempt on a server that is healthy and yet loses a request; a hung server is noticed by its health.
_SECONDS_A_REQUEST, _SECONDS_A_TOKEN = 60.0, 0.5


class WeightSync(Protocol):
    """Hands the policy's weights to the servers."""

    def hand_over(
        self, named_tensors: "Iterable[tuple[str, torch.Tensor]]", version: int
    ) -> tuple[Weights, dict[str, str]]:
        """What servers now sample from, and {URL: why it does not have it}; a collective over the world."""

    def close(self) -> None:
        """Removes what is left of it."""


class SglangEngine:
    """Samples completions on servers; see protocols.RolloutEngine.

    Args:
        pool: of this rank, if it leads its replica.
        sync: hands the weights over.
        stop_token_ids: sampling one of them ends a response, of which it stays the last token.
        vocab_size: token ids are below it.
        longest: tokens that a prompt and its response may have together.
    """

    def __init__(
        self,
        pool: ServerPool | None,
        sync: WeightSync,
        *,
        stop_token_ids: Sequence[int],
        vocab_size: int,
        longest: int,
    ) -> None:
        self._pool = pool
        self._sync = sync
        self._stop_token_ids = frozenset(stop_token_ids)
        self._vocab_size = vocab_size
        self._longest = longest
        self._label: str | None = None
        self._version = -1

    def update_weights(self, named_tensors: "Iterable[tuple[str, torch.Tensor]]", version: int) -> None:
        """Gives all servers new weights; one that fails is taken out. A collective over the world.

        Raises: ServersError on every rank if no server took them.
        """
        self._label = None
        weights, failures = self._sync.hand_over(named_tensors, version)
        if self._pool is not None:
            self._pool.use(weights, failures)
        failure = None
        if self._pool is not None and not self._pool.usable:
            failure = f"no server took the weights of version {version}; " + "; ".join(
                f"{url}: {reason}" for url, reason in failures.items()
            )
        _agree(failure)
        self._label, self._version = weights.label, version

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Iterator[Completion]:
        """Yields one completion a request as it arrives; a collective over the world, to be exhausted by every rank.

        Only leaders have requests. Temperature 0 takes the likeliest token and reports log_softmax(logits). The same
        requests are answered alike again where the servers run with --enable-deterministic-inference.

        Raises: ServersError on every rank, if servers fail for good, or a request cannot be sent to any.
        """
        if self._label is None:
            raise RuntimeError("the servers have no weights of this run to sample from; call update_weights first")
        if self._pool is None:
            if requests:
                raise RuntimeError("this rank does not lead its replica and has requests; give them to the leader")
            _agree(None)
            return
        failure = None
        with self._pool.watched():
            try:
                jobs = [self._job(request, sampling, self._label) for request in requests]
                yield from self._pool.stream(jobs)
            except (ServersError, ValueError) as error:
                failure = str(error)
            _agree(failure)

    def close(self) -> None:
        """Lets the servers go."""
        if self._pool is not None:
            self._pool.close()
        self._sync.close()

    def _job(self, request: SampleRequest, sampling: Sampling, label: str) -> Job:
        prompt, response = request.prompt.token_ids, sampling.max_response_tokens
        name = f"sample {request.sample} of prompt {request.prompt.id}"
        if not len(prompt) or prompt.min() < 0 or prompt.max() >= self._vocab_size:
            # A server does not survive it.
            raise ValueError(f"{name} is empty or holds a token id outside the vocabulary of {self._vocab_size}")
        if len(prompt) + response > self._longest:
            raise ValueError(f"{name} has {len(prompt)} + {response} tokens, more than the agreed {self._longest}")
        parameters = {
            "max_new_tokens": response,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "stop_token_ids": sorted(self._stop_token_ids),
            "sampling_seed": request.seed,
        }
        return Job(
            name=name,
            body={"input_ids": prompt.tolist(), "return_logprob": True, "sampling_params": parameters},
            read=partial(self._read, request, response, label, self._version),
            timeout_seconds=_SECONDS_A_REQUEST + _SECONDS_A_TOKEN * response,
        )

    def _read(self, request: SampleRequest, most: int, label: str, version: int, answer: Any) -> Completion:
        """The completion in a server's answer; a fault if it is not one of ``request`` under weights ``label``."""
        try:
            meta, tokens = answer["meta_info"], answer["output_ids"]
            reason, found = meta["finish_reason"], meta["weight_version"]
            if reason["type"] == "abort":
                raise ServerFault(f"it gave the request up: {reason.get('message')}")
            logprobs, logprob_tokens, *_ = zip(*meta["output_token_logprobs"], strict=True)
        except (LookupError, TypeError, ValueError):
            raise UnusableServer("its answer lacks tokens, log-probabilities or a reason to end") from None
        if found != label:
            raise UnusableServer(f"it sampled from weights {found}, not {label}")
        if wrong := self._wrong(tokens, logprobs, logprob_tokens, most):
            raise UnusableServer(f"its answer holds {wrong}")
        last = tokens[-1]
        # At the cap a server says length, whatever the last token is.
        stopped = reason["type"] == "stop" or last in self._stop_token_ids
        if reason["type"] == "stop" and reason.get("matched") != last:
            raise UnusableServer(f"its answer was stopped by {reason.get('matched')!r} and ends with token {last}")
        if not stopped and len(tokens) < most:
            raise UnusableServer(
                f"its answer of {len(tokens)} tokens was ended by {reason['type']!r}, not the cap {most}"
            )
        return Completion(
            prompt_id=request.prompt.id,
            sample=request.sample,
            token_ids=np.array(tokens, dtype=np.int32),
            logprobs=np.array(logprobs, dtype=np.float32),
            finish_reason="stop" if stopped else "length",
            weight_version=version,
        )

    def _wrong(
        self, tokens: list[Any], logprobs: Sequence[Any], logprob_tokens: Sequence[Any], most: int
    ) -> str | None:
        """What cannot be true of a response."""
        if not 1 <= len(tokens) <= most:
            return f"{len(tokens)} tokens, not 1 to {most}"
        outside = [token for token in tokens if type(token) is not int or not 0 <= token < self._vocab_size]
        if outside:
            return f"token id {outside[0]!r}, outside the vocabulary of {self._vocab_size}"
        if list(logprob_tokens) != tokens:
            return "log-probabilities of other tokens"
        # Rounding may leave a certain token a little above 0.
        bad = [p for p in logprobs if not isinstance(p, int | float) or not math.isfinite(p) or p > 1e-3]
        return f"log-probability {bad[0]!r}" if bad else None


def connect(
    settings: RolloutSettings, ranks: Ranks, hf_config: Mapping[str, Any], *, longest: int
) -> ServerPool | None:
    """The pool of a leader, None on other ranks; a collective over the world.

    Args:
        hf_config: the model's config.json.
        longest: tokens that a prompt and its response may have together.

    Raises: SettingsError on every rank if a server does not answer or serves another model; each has a line in the log.
    """
    pool = None
    if ranks.replica_rank == 0:
        pool = ServerPool(
            settings.servers,
            max_inflight=math.ceil(settings.max_inflight / ranks.data_size),
            retries=settings.retries,
            patience_seconds=settings.server_timeout_seconds,
        )
    problems: list[str] = []
    if ranks.is_main and pool is not None:
        problems = _problems(pool, hf_config, longest)
        for problem in problems[1:]:
            logger.error(problem)
    try:
        _agree(problems[0] if problems else None, SettingsError)
    except SettingsError:
        if pool is not None:
            pool.close()
        raise
    return pool


def _problems(pool: ServerPool, hf_config: Mapping[str, Any], longest: int) -> list[str]:
    """One sentence for each server that cannot be used. Servers that are starting are waited for."""

    async def ask(server: Server) -> ServerInfo:
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


def _agree(failure: str | None, error: Callable[[str], Exception] = ServersError) -> None:
    """Raises on every rank of the world what failed on any."""
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    found = [f for f in failures if f is not None]
    if found:
        raise error(found[0])
