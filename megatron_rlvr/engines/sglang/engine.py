"""Rollout engine that samples on SGLang servers, one request for each completion.

The leader (first rank) of each data-parallel replica talks to the servers. The other ranks take part in the
collectives by which all ranks know whether sampling or a weight sync has failed, so that none is left waiting.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_rlvr.distributed import accelerator, process_group
from megatron_rlvr.distributed.collectives import raise_on_all_ranks
from megatron_rlvr.distributed.counters import Counters
from megatron_rlvr.engines.sglang import colocation
from megatron_rlvr.engines.sglang.client import Server
from megatron_rlvr.engines.sglang.completions import CompletionCodec
from megatron_rlvr.engines.sglang.pool import ServerPool, failures_in
from megatron_rlvr.engines.sglang.request import RequestStream
from megatron_rlvr.engines.sglang.weight_sync.base import WeightSync
from megatron_rlvr.engines.two_temperatures import TwoTemperatures
from megatron_rlvr.protocols import EngineError, Sampling
from megatron_rlvr.types import Completion, CompletionRequest

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0


class SglangEngine:
    """Samples completions on servers; see protocols.StreamingEngine.

    Args:
        pool: Servers, on the leader of a data-parallel replica; None on other ranks.
        weight_sync: Pushes the policy's weights to the servers.
        stop_token_ids: Tokens that end a response, of which they stay the last token.
        vocab_size: Size of the vocabulary.
        max_sequence_tokens: Maximum number of tokens of a prompt and its response together.
        colocated: The servers share the GPUs with training (`rollout.colocated`).
        two_temperatures: Temperatures by entropy; None for that of the sampling parameters.

    Attributes:
        pool: Servers, on a leader.
        weight_sync: Pushes weights.
        codec: Makes the servers' requests, and completions from their answers.
    """

    def __init__(
        self,
        pool: ServerPool | None,
        weight_sync: WeightSync,
        *,
        stop_token_ids: Sequence[int],
        vocab_size: int,
        max_sequence_tokens: int,
        colocated: bool = False,
        two_temperatures: TwoTemperatures | None = None,
    ) -> None:
        self.pool = pool
        self.weight_sync = weight_sync
        self.codec = CompletionCodec(
            stop_token_ids=stop_token_ids,
            vocab_size=vocab_size,
            max_sequence_tokens=max_sequence_tokens,
            two_temperatures=two_temperatures,
        )
        self._colocated = colocated
        self._store = process_group.store()
        self._generate_calls = 0  # the same on every rank
        self._version: int | None = None
        weight_sync.announce = self.codec.versions.__setitem__

    def update_weights(self, named_tensors: "Iterable[tuple[str, torch.Tensor]]", version: int) -> None:
        """Push new weights to all servers; a collective over the world.

        Requests may be running: they wait, and continue with the new weights. A server that fails is removed from
        rotation.

        Raises:
            EngineError: On every rank, if no server took the weights.
        """
        self._yield_memory()  # to the servers' weights
        if self.pool is None:
            self.weight_sync.push(named_tensors, version)
            self._yield_memory()
            raise_on_all_ranks(None)
        else:
            with self.pool.pushing_weights():
                # A server would crash if it loaded weights into memory that it has released.
                without_memory = self._order_memory(colocation.resume_weights)
                weights, failures = self.weight_sync.push(named_tensors, version, without_memory)
                self._yield_memory()  # that of the whole tensors gathered for the push, to the servers' KV caches
                # Of several failures of a server, the first is the reason.
                failures = self._order_memory(colocation.resume_all) | failures
                self.pool.weights_pushed(weights, failures)
            reasons = "; ".join(f"{url}: {reason}" for url, reason in failures.items())
            none_left = f"no server took the weights of version {version}; {reasons}"
            raise_on_all_ranks(None if self.pool.in_rotation else EngineError(none_left))
        self._version = version

    def _yield_memory(self) -> None:
        """Return cached GPU memory on every rank before colocated servers resume theirs, which fails if there is none.

        A collective over the world if servers are colocated.
        """
        if self._colocated:
            accelerator.release_cached_memory()
            dist.barrier()

    def release_memory(self) -> None:
        """Have colocated servers release their memory for training until the next `update_weights`."""
        if not self._colocated:
            return
        for url, reason in self._order_memory(colocation.release).items():
            logger.warning("server %s may not have released its memory: %s", url, reason)
        dist.barrier()

    def _order_memory(self, order: Callable[[Server], Awaitable[None]]) -> dict[str, str]:
        """Run ``order`` on all colocated servers, from the main rank. Returns {URL: reason} of failures."""
        if not self._colocated or self.pool is None or dist.get_rank() != 0:
            return {}
        return failures_in(self.pool.everywhere(order, check_health=False))

    @property
    def version(self) -> int:
        """Version of the weights that were last pushed to the servers."""
        assert self._version is not None
        return self._version

    def generate(self, requests: Sequence[CompletionRequest], sampling: Sampling) -> Iterator[Completion]:
        """Yield one completion for each request as it arrives; a collective over the world.

        Every rank must exhaust the iterator; only leaders have requests. Temperature 0 takes the most likely token and
        returns log_softmax(logits). The same requests get the same answers again if the servers run with
        --enable-deterministic-inference.

        Raises:
            EngineError: On every rank, if the servers fail for good, or a request cannot be sent to any server.
        """
        self._generate_calls += 1
        counters = Counters(self._store, f"generate/{self._generate_calls}")
        failure = None
        try:
            if requests:
                yield from self.completions(requests, sampling)
        except EngineError as error:
            failure = error
        finally:
            counters.leave()
        # The slowest rank may take longer than the timeout of a collective.
        counters.wait_for_all(dist.get_world_size())
        raise_on_all_ranks(failure)

    def completions(
        self,
        requests: Sequence[CompletionRequest],
        sampling: Sampling,
        stop_wanted: Callable[[], bool] = lambda: False,
    ) -> Iterator[Completion]:
        """Yield the completions of this leader's requests as they arrive; not a collective.

        Args:
            stop_wanted: Asked once a second; if it returns True, the iterator ends and the other requests are aborted.

        Raises:
            EngineError: The servers fail for good, or a request cannot be sent to any server.
        """
        if self.pool is None:
            raise RuntimeError("this rank is not the leader of its data-parallel replica; give requests to the leader")
        with self.open(sampling) as stream:
            stream.submit(requests)
            for _ in requests:
                while (answer := stream.get(_POLL_SECONDS)) is None:
                    if stop_wanted():
                        return
                yield answer[1]

    @contextmanager
    def open(self, sampling: Sampling) -> "Iterator[SglangStream]":
        """Open a stream of requests and completions, on a leader."""
        if self._version is None or self.pool is None:
            raise RuntimeError("the servers have no weights of this run to sample from; call update_weights first")
        with self.pool.open() as stream:
            yield SglangStream(self, stream, sampling)

    def close(self) -> None:
        """Disconnect from the servers.

        Memory that servers have released is not resumed: a trainer that exits in the middle of a step may still hold
        it, and a server that cannot get its memory back crashes. The next trainer finds out which memory is missing
        (see `colocation.recover`).
        """
        self.weight_sync.close()
        if self.pool is not None:
            self.pool.close()


class SglangStream:
    """Accepts completion requests and returns completions as they arrive; see protocols.RolloutStream."""

    def __init__(self, engine: SglangEngine, stream: RequestStream, sampling: Sampling) -> None:
        self._engine = engine
        self._stream = stream
        self._sampling = sampling

    def submit(self, requests: Sequence[CompletionRequest], resume_from: Sequence[Completion | None] = ()) -> None:
        """Queue requests.

        Args:
            resume_from: Partial response of each request from an earlier stream, to be continued; empty for none.
        """
        codec, version = self._engine.codec, self._engine.version
        pairs = zip(requests, resume_from or [None] * len(requests), strict=True)
        self._stream.submit([codec.encode(request, part, self._sampling, version) for request, part in pairs])

    def get(self, timeout_seconds: float | None = None) -> tuple[CompletionRequest, Completion] | None:
        """Return the next finished completion, or None if there is none in time.

        Raises:
            EngineError: The servers fail for good.
        """
        return self._stream.get(timeout_seconds)

    def abort(self) -> list[tuple[CompletionRequest, Completion]]:
        """End all requests. Returns the finished completions not yet taken, and the partial ones of the others."""
        return self._stream.abort()
