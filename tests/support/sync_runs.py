"""Functions for the ranks of weight sync tests: a policy trains for a step, and servers sample with its weights."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from policy_runs import Layout, mini_batches_of, policy_of
from reference_training import GROUP_SIZE, Recipe, make_groups
from torch import Tensor

from megatron_rlvr.rollout.sampler import requests_for
from megatron_rlvr.types import Prompt

RESPONSE = 16
MAX_SEQUENCE_TOKENS = 64
PROMPTS = 6


@dataclass
class Synced:
    """Results of one rank. Log-probabilities are {sequence number << 20 | position: log-probability}.

    Attributes:
        weights: Weights of the policy after its step, by Hugging Face names.
        sequences: {method: prompt and response of each sequence}.
        on_servers: {method: log-probabilities of the response tokens on the servers}.
        in_policy: {method: log-probabilities of the response tokens in the policy}.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    sequences: dict[str, list[tuple[list[int], list[int]]]] = field(default_factory=dict)
    on_servers: dict[str, dict[int, float]] = field(default_factory=dict)
    in_policy: dict[str, dict[int, float]] = field(default_factory=dict)


def sync_by(method: str, *, folder: Path, source: Path, pool: Any, ranks: Any, bucket_bytes: int) -> Any:
    """Return a weight sync of the given method."""
    from megatron_rlvr.engines.sglang.weight_sync.disk import DiskSync
    from megatron_rlvr.engines.sglang.weight_sync.distributed import DistributedSync
    from megatron_rlvr.engines.sglang.weight_sync.tensor import TensorSync

    if method == "disk":
        return DiskSync(folder, source, pool, ranks)
    return {"distributed": DistributedSync, "tensor": TensorSync}[method](pool, ranks, bucket_bytes)


def trained_and_synced(
    model: str, layout: Layout, urls: list[str], folder: str, methods: list[str], bucket_bytes: int
) -> Synced:
    """Train for a step, push the weights to servers by each method, and score the servers' responses."""
    found = Synced()
    with policy_of(model, layout, Recipe(warmup_steps=0, learning_rate=1e-2)) as policy:
        export = policy.export_weights()
        before = {name: tensor.clone() for name, tensor in export}
        _train(policy)
        found.weights = {name: tensor.clone() for name, tensor in export}
        assert any((before[name] - tensor).abs().max() > 1e-3 for name, tensor in found.weights.items())
        for version, method in enumerate(methods):
            groups, found.on_servers[method] = _sampled(policy, urls, method, Path(folder), version, bucket_bytes)
            found.sequences[method] = [(prompt, response) for prompt, responses, _ in groups for response in responses]
            batches = [m for mini in mini_batches_of(policy, groups, 10_000, 2) for m in mini.micro_batches]
            found.in_policy[method] = {
                token: logp
                for batch, logps in zip(batches, policy.score(batches).logp, strict=True)
                for token, logp in zip(batch.token_ids.tolist(), logps.tolist(), strict=True)
            }
    return found


def _train(policy: Any) -> None:
    import torch

    from megatron_rlvr.config import LossSettings
    from megatron_rlvr.startup.assembly import make_loss

    groups = make_groups(2, policy.hf_config["vocab_size"], seed=0)
    (mini,) = mini_batches_of(policy, groups, 10_000, len(groups))
    inputs = policy.score(mini.micro_batches).plain_inputs(mini.micro_batches)
    policy.start_step()
    masks = [torch.ones_like(part.old_logp, dtype=torch.bool) for part in inputs]
    metrics = policy.train_step(mini.micro_batches, masks, inputs, make_loss(LossSettings()), mini.response_tokens)
    assert metrics["skipped"] == 0


def _sampled(
    policy: Any, urls: list[str], method: str, folder: Path, version: int, bucket_bytes: int
) -> tuple[list[Any], dict[int, float]]:
    """Return groups that servers sampled with the policy's weights, on every rank, and their log-probabilities."""
    import torch.distributed as dist

    from megatron_rlvr.config import RolloutSettings
    from megatron_rlvr.engines.sglang.connect import connect
    from megatron_rlvr.engines.sglang.engine import SglangEngine

    settings = RolloutSettings(engine="sglang", servers=urls)
    pool = connect(settings, policy.ranks, policy.hf_config, max_sequence_tokens=MAX_SEQUENCE_TOKENS)
    sync = sync_by(
        method, folder=folder, source=policy.folder, pool=pool, ranks=policy.ranks, bucket_bytes=bucket_bytes
    )
    vocabulary = policy.hf_config["vocab_size"]
    engine = SglangEngine(
        pool, sync, stop_token_ids=(2,), vocab_size=vocabulary, max_sequence_tokens=MAX_SEQUENCE_TOKENS
    )
    try:
        engine.update_weights(policy.export_weights(), version)
        rng = np.random.default_rng(version)
        prompts = [
            Prompt(str(i), rng.integers(3, vocabulary, size=4 + i).astype(np.int32), "", "set") for i in range(PROMPTS)
        ]
        asked = [request for prompt in prompts for request in requests_for(prompt, GROUP_SIZE, 0, "test")]
        sampling = SimpleNamespace(temperature=1.0, top_p=1.0, max_response_tokens=RESPONSE)
        completions = list(engine.generate(asked if policy.ranks.is_main else [], sampling))
    finally:
        engine.close()
    shared: list[Any] = [sorted(completions, key=lambda c: (int(c.prompt_id), c.index))]
    dist.broadcast_object_list(shared, src=0)
    (completions,) = shared
    rewards = [1.0, -1.0] * (GROUP_SIZE // 2)
    groups = [
        (prompt.token_ids.tolist(), [c.token_ids.tolist() for c in completions if c.prompt_id == prompt.id], rewards)
        for prompt in prompts
    ]
    logprobs = {
        (number << 20) + position: logprob
        for number, completion in enumerate(completions)
        for position, logprob in enumerate(completion.logprobs.tolist())
    }
    return groups, logprobs
