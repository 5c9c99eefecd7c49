"""The rollout phase on SGLang servers: how many requests run at once, and how long the longest response takes.

    KV cache of a token = 2 x layers x key-value heads x head x bytes, sharded over the tensor-parallel GPUs of a server
    a decoding step     = max(operations / (peak mfu), (weights + cache) / (bandwidth share)) + exchanges + overhead

A server has n responses to produce and a running batch of at most b requests. While requests queue, the running batch
is full; then the last b finish, with fewer of them running at each step until the longest response ends. The phase
cannot be shorter than the longest response times a step of a batch of one.
"""

import math
from dataclasses import dataclass

from megatron_rlvr.planner.devices import Device
from megatron_rlvr.planner.roofline import Efficiency
from megatron_rlvr.planner.shapes import ModelShape
from megatron_rlvr.planner.workload import Workload

# Seconds of a step for scheduling, sampling and launching kernels. A guess.
STEP_OVERHEAD = 1e-3
# Seconds of one exchange of a few rows between the GPUs of a node. A guess.
_EXCHANGE_LATENCY = 1e-5
_WEIGHT_BYTES = 2


@dataclass(frozen=True)
class RolloutPlan:
    """The servers of a step, and the seconds of its rollout phase.

    Attributes:
        servers: Number of servers.
        tensor: GPUs of each server.
        weights: Bytes of weights on each GPU.
        cache: Bytes of KV cache on each GPU.
        cached_tokens: Number of tokens that a server's KV cache holds.
        capacity: Number of requests of average length that a server's KV cache holds.
        running: Maximum size of a server's running batch.
        prefill: Seconds for the prompts.
        saturated: Seconds with a full running batch, while requests queue.
        tail: Seconds after the last request has started.
    """

    servers: int
    tensor: int
    weights: float
    cache: float
    cached_tokens: float
    capacity: float
    running: float
    prefill: float
    saturated: float
    tail: float

    @property
    def seconds(self) -> float:
        return self.prefill + self.saturated + self.tail


def rollout_plans(
    shape: ModelShape,
    device: Device,
    efficiency: Efficiency,
    work: Workload,
    gpus: int,
    free: float,
    tensor: int | None,
) -> list[RolloutPlan]:
    """List the ways to divide GPUs into servers that can hold the longest sequence.

    Args:
        gpus: Number of GPUs.
        free: Bytes on each GPU that a server may use.
        tensor: GPUs of a server; None for any power of two within a node.
    """
    sizes = [tensor] if tensor else [2**i for i in range(8) if 2**i <= device.gpus_per_node]
    found = [
        _rollout_plan(shape, device, efficiency, work, gpus // size, size, free)
        for size in sizes
        if gpus % size == 0 and shape.heads % size == 0
    ]
    return [plan for plan in found if plan is not None]


def _rollout_plan(
    shape: ModelShape,
    device: Device,
    efficiency: Efficiency,
    work: Workload,
    servers: int,
    tensor: int,
    free: float,
) -> RolloutPlan | None:
    weights = _WEIGHT_BYTES * shape.parameters / tensor
    cache = free - weights
    # With more GPUs than key-value heads, a head is replicated.
    token_bytes = shape.key_value_bytes(_WEIGHT_BYTES) / min(tensor, shape.key_value_heads)
    cached_tokens = max(cache, 0.0) / token_bytes
    if cached_tokens < work.max_sequence:
        return None
    responses = work.completions / work.informative_share / servers
    # Mean length of a running request: a longer one runs for longer, so it is half of the mean square over the mean.
    context = work.mean_prompt + work.responses.mean_square / (2 * work.responses.mean)
    capacity = cached_tokens / context
    running = min(responses, capacity, work.max_inflight or math.inf)
    server = DecodingServer(shape, device, efficiency, tensor)
    saturated = (responses / running - 1) * work.responses.mean * server.step_seconds(running, context)
    tail = sum(
        width * server.step_seconds(max(running * work.responses.survival(tokens), 1.0), work.mean_prompt + tokens)
        for tokens, width in work.responses.points
    )
    prefill = responses * (2 * shape.active_parameters * work.mean_prompt) / (tensor * device.flops * efficiency.mfu)
    return RolloutPlan(servers, tensor, weights, cache, cached_tokens, capacity, running, prefill, saturated, tail)


@dataclass(frozen=True)
class DecodingServer:
    """Roofline of one server that decodes on ``tensor`` GPUs."""

    shape: ModelShape
    device: Device
    efficiency: Efficiency
    tensor: int

    def step_seconds(self, batch: float, context: float) -> float:
        """Return the seconds to decode one token for each of ``batch`` requests with ``context`` tokens on average."""
        shape = self.shape
        flops = 2 * shape.active_parameters * batch + 4 * shape.layers * shape.query_width * context * batch
        moved = _WEIGHT_BYTES * self._weights_read(batch) / self.tensor
        moved += batch * context * shape.key_value_bytes(_WEIGHT_BYTES) / min(self.tensor, shape.key_value_heads)
        compute = flops / (self.tensor * self.device.flops * self.efficiency.mfu)
        memory = moved / (self.device.bandwidth * self.efficiency.bandwidth)
        return max(compute, memory) + self._exchanges(batch) + STEP_OVERHEAD

    def _weights_read(self, batch: float) -> float:
        """Return the number of parameters that a step reads; of the experts, those that some request is routed to."""
        shape = self.shape
        per_expert = 3 * shape.hidden * shape.expert_ffn * sum(shape.moe_layers)
        unused = (1 - shape.top_k / shape.experts) ** batch if shape.experts else 0.0
        return shape.active_parameters - per_expert * shape.top_k + per_expert * shape.experts * (1 - unused)

    def _exchanges(self, batch: float) -> float:
        if self.tensor == 1:
            return 0.0
        data = 2 * _WEIGHT_BYTES * batch * self.shape.hidden * (self.tensor - 1) / self.tensor
        return 2 * self.shape.layers * (_EXCHANGE_LATENCY + data / (self.device.link * self.efficiency.bandwidth))
