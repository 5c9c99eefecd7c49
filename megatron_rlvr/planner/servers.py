"""The rollout phase on SGLang servers: how many requests fit at once, and how long the longest response takes.

    cache of a token = 2 x layers x key-value heads x head x bytes, shared by the tensor-parallel GPUs of a server
    a decoding step  = max(operations / (peak mfu), (weights + cache) / (bandwidth share)) + exchanges + overhead

A server has n responses to give and takes b at a time. While others wait, it runs b at a time; then the last b finish,
those that are still going getting fewer step by step until the longest response ends. The phase cannot be shorter than
the longest response times a step of a batch of one.
"""

import math
from dataclasses import dataclass

from megatron_rlvr.planner.devices import Device
from megatron_rlvr.planner.roofline import Efficiency
from megatron_rlvr.planner.shapes import Shape
from megatron_rlvr.planner.workload import Workload

# Of a step: scheduling, sampling, starting kernels. A guess.
STEP_OVERHEAD = 1e-3
# Of one exchange of a few rows between the GPUs of a node. A guess.
_EXCHANGE_LATENCY = 1e-5
_ELEMENT = 2


@dataclass(frozen=True)
class Rollout:
    """The servers of a step.

    Attributes:
        servers: how many.
        tensor: GPUs of each.
        cache: bytes of a GPU that hold keys and values.
        cached_tokens: that a server's cache holds.
        room: requests of the usual length that it holds.
        running: requests that a server works on at once.
        full, tail, prefill: seconds with all slots taken, after the last request has begun, and of prompts.
    """

    servers: int
    tensor: int
    weights: float
    cache: float
    cached_tokens: float
    room: float
    running: float
    prefill: float
    full: float
    tail: float

    @property
    def seconds(self) -> float:
        return self.prefill + self.full + self.tail


def rollouts(
    shape: Shape, device: Device, efficiency: Efficiency, work: Workload, gpus: int, free: float, tensor: int | None
) -> list[Rollout]:
    """Ways to cut so many GPUs, with ``free`` bytes each, into servers that can hold the longest sequence.

    Args:
        tensor: GPUs of a server; None: any number within a node.
    """
    sizes = [tensor] if tensor else [2**i for i in range(8) if 2**i <= device.node]
    found = [
        _rollout(shape, device, efficiency, work, gpus // size, size, free)
        for size in sizes
        if gpus % size == 0 and shape.heads % size == 0
    ]
    return [rollout for rollout in found if rollout is not None]


def _rollout(
    shape: Shape, device: Device, efficiency: Efficiency, work: Workload, servers: int, tensor: int, free: float
) -> Rollout | None:
    weights = _ELEMENT * shape.parameters / tensor
    cache = free - weights
    # A key-value head that is asked for by several GPUs is on each of them.
    of_token = shape.key_value_bytes(_ELEMENT) / min(tensor, shape.groups)
    cached_tokens = max(cache, 0.0) / of_token
    if cached_tokens < work.longest:
        return None
    responses = work.trained / work.informative / servers
    # A running request is older the longer it gets: half of the mean square over the mean.
    held = work.prompt + work.responses.mean_square / (2 * work.responses.mean)
    room = cached_tokens / held
    running = min(responses, room, work.inflight or math.inf)
    server = _Server(shape, device, efficiency, tensor)
    full = (responses / running - 1) * work.responses.mean * server.step(running, held)
    tail = sum(
        width * server.step(max(running * work.responses.survival(tokens), 1.0), work.prompt + tokens)
        for tokens, width in work.responses.points
    )
    prefill = responses * (2 * shape.active_parameters * work.prompt) / (tensor * device.flops * efficiency.mfu)
    return Rollout(servers, tensor, weights, cache, cached_tokens, room, running, prefill, full, tail)


@dataclass(frozen=True)
class _Server:
    shape: Shape
    device: Device
    efficiency: Efficiency
    tensor: int

    def step(self, batch: float, context: float) -> float:
        """Seconds to give ``batch`` requests a token each, at ``context`` tokens on average."""
        shape = self.shape
        flops = 2 * shape.active_parameters * batch + 4 * shape.layers * shape.query * context * batch
        moved = _ELEMENT * self._weights_read(batch) / self.tensor
        moved += batch * context * shape.key_value_bytes(_ELEMENT) / min(self.tensor, shape.groups)
        compute = flops / (self.tensor * self.device.flops * self.efficiency.mfu)
        memory = moved / (self.device.bandwidth * self.efficiency.bandwidth)
        return max(compute, memory) + self._exchanges(batch) + STEP_OVERHEAD

    def _weights_read(self, batch: float) -> float:
        """Parameters that a step touches: of the experts those that some request has chosen."""
        shape = self.shape
        sparse = sum(shape.sparse)
        of_experts = 3 * shape.hidden * shape.expert_feed_forward * sparse
        untouched = (1 - shape.chosen / shape.experts) ** batch if shape.experts else 0.0
        return shape.active_parameters - of_experts * shape.chosen + of_experts * shape.experts * (1 - untouched)

    def _exchanges(self, batch: float) -> float:
        if self.tensor == 1:
            return 0.0
        data = 2 * _ELEMENT * batch * self.shape.hidden * (self.tensor - 1) / self.tensor
        return 2 * self.shape.layers * (_EXCHANGE_LATENCY + data / (self.device.link * self.efficiency.bandwidth))
