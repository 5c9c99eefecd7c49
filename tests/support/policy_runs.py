"""Functions for the ranks of the policy tests: they train, score and export with the package itself, in one layout.

Megatron's groups are torn down at the end, so that all layouts share one set of processes.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from reference_training import Group, Recipe, Trace, make_groups
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rlvr.analysis.command.sources import Response

if TYPE_CHECKING:
    from megatron_rlvr.analysis.command.scoring import BinGradients

VOCAB = 150  # Megatron pads it to 256, or 512
GROUPS = make_groups(8, VOCAB, seed=0)
DIMENSIONS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
# Neither of these two is the default, so that they have to be read.
SHAPE = DIMENSIONS | {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}


@dataclass(frozen=True)
class Layout:
    """Layout of a run, token budget of its micro-batches, and its ``megatron:`` section."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    virtual_pipeline: int = 1
    context: int = 1
    expert: int = 1
    first_stage_layers: int | None = None
    budget: int = 100_000
    megatron: tuple[tuple[str, Any], ...] = ()

    @property
    def size(self) -> int:
        return self.tensor * self.context * self.pipeline * self.data


@dataclass(frozen=True)
class Run:
    """One training run of the package."""

    folder: str
    groups: list[Group]
    recipe: Recipe = field(default_factory=Recipe)
    layout: Layout = field(default_factory=Layout)
    dtype: Any = "float32"
    fuse_output_gradient: bool = False


@dataclass
class RankTrace(Trace):
    """Trace of one rank; the kept tokens are those of its own micro-batches."""

    data_rank: int = 0
    last_stage: bool = True
    micro_batches: list[list[list[int]]] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    fused: bool = False


def parallel_of(layout: Layout) -> Any:
    """The package's settings of a layout."""
    from megatron_rlvr.config import ParallelSettings

    names = ("tensor", "pipeline", "sequence", "virtual_pipeline", "context", "expert", "first_stage_layers")
    return ParallelSettings(**{name: getattr(layout, name) for name in names})


@contextlib.contextmanager
def policy_of(folder: str, layout: Layout, recipe: Recipe | None = None, dtype: Any = "float32") -> Iterator[Any]:
    """A policy in a world of its own, torn down at the end; without a recipe it only scores."""
    from megatron.core import parallel_state

    from megatron_rlvr.config import ModelSettings, OptimizerSettings
    from megatron_rlvr.distributed import process_group
    from megatron_rlvr.distributed.ranks import initialize_ranks
    from megatron_rlvr.policy.policy import Policy

    parallel = parallel_of(layout)
    optimizer = None
    if recipe is not None:
        optimizer = OptimizerSettings(
            warmup_steps=recipe.warmup_steps,
            weight_decay=recipe.weight_decay,
            clip_grad=recipe.clip_grad,
            beta1=recipe.betas[0],
            beta2=recipe.betas[1],
            eps=recipe.eps,
        )
        # Not validated: a test may need one that settings refuse.
        optimizer = optimizer.model_copy(update={"learning_rate": recipe.learning_rate})
    ranks = initialize_ranks(parallel, timeout_minutes=4)
    try:
        yield Policy(
            ModelSettings(path=folder, dtype=dtype),
            parallel,
            ranks,
            optimizer=optimizer,
            megatron=dict(layout.megatron),
            temperature=recipe.temperature if recipe else 1.0,
        )
    finally:
        parallel_state.destroy_model_parallel()
        process_group.shut_down()


@contextlib.contextmanager
def norms_built_into_linears() -> Iterator[None]:
    """Layers of the shape of Transformer Engine's, whose modules need a GPU: norms inside the linear layers."""
    from unittest import mock

    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    from megatron_rlvr.policy import build, layers

    class NormedColumnParallelLinear(ColumnParallelLinear):
        def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
            super().__init__(input_size, output_size, config=config, **options)
            norm = layers.RMSNorm(config, input_size, config.layernorm_epsilon)
            self.layer_norm_weight = norm.weight
            self.norm = [norm]  # in a list, so that its weight is this module's alone

        def forward(self, x: Tensor, **options: Any) -> Any:
            return super().forward(self.norm[0](x), **options)

    modules = replace(layers.layer_modules(), normed_column_linear=NormedColumnParallelLinear)
    with mock.patch.object(build, "layer_modules", return_value=modules):
        yield


def mini_batches_of(
    policy: Any, groups: list[Group], budget: int, mini_batch_groups: int, estimator: str = "grpo"
) -> list[Any]:
    """This rank's mini-batches of groups that are assigned to the data-parallel ranks in turn."""
    from megatron_rlvr.batching.mini_batches import build_mini_batches
    from megatron_rlvr.types import Completion, Grade, Prompt
    from megatron_rlvr.types import Group as TypedGroup

    here = []
    for order, (prompt, responses, rewards) in enumerate(groups):
        if order % policy.ranks.data_size == policy.ranks.data_rank:
            completions = [
                Completion(
                    str(order),
                    i,
                    np.array(ids, np.int32),
                    np.zeros(len(ids), np.float32),
                    "stop",
                    np.zeros(len(ids), np.int32),
                )
                for i, ids in enumerate(responses)
            ]
            grades = [Grade(reward, reward > 0) for reward in rewards]
            here.append(
                (order, TypedGroup(Prompt(str(order), np.array(prompt, np.int32), "", ""), completions, grades))
            )
    return build_mini_batches(
        here,
        estimator=estimator,
        groups_per_mini_batch=mini_batch_groups,
        packing=policy.packing(budget),
        data_group=policy.ranks.data_objects,
    )


def settings_of(recipe: Recipe, **sections: Any) -> Any:
    """The package's settings with the values of the recipe; ``sections`` replace whole sections."""
    from megatron_rlvr.config import Settings

    selection = {"keep": recipe.keep, "fraction": recipe.fraction, "scope": recipe.scope, "entropy": recipe.entropy}
    names = ("clip_low", "clip_high", "dual_clip", "normalizer", "kl_coefficient")
    loss = {name: getattr(recipe, name) for name in names}
    if recipe.entropy_coefficient:  # always below the target, and as good as constant
        loss |= {"entropy_target": 100.0, "entropy_step": 1e-18, "entropy_max": 1.0}
    return Settings.model_validate(
        {
            "run": {"dir": "nowhere", "steps": recipe.steps},
            "model": {"path": "nowhere"},
            "data": {"train": "nowhere"},
            "selection": selection,
            "loss": loss,
            "rollout": {"max_logprob_gap": 1e6},
        }
        | sections
    )


def trained(run: Run) -> RankTrace:
    """Train with the learner; return this rank's trace."""
    from megatron_rlvr.config import ModelSettings
    from megatron_rlvr.learner import Learner
    from megatron_rlvr.policy.policy import Policy
    from megatron_rlvr.startup.assembly import make_loss

    settings = settings_of(run.recipe)
    with policy_of(run.folder, run.layout, run.recipe, run.dtype) as policy:
        trace = RankTrace(data_rank=policy.ranks.data_rank, last_stage=policy.ranks.last_stage)
        # Megatron's own linear layers read this field when they are built, and fusing theirs needs apex, so setting it
        # here affects the output layer only.
        policy._config.gradient_accumulation_fusion = run.fuse_output_gradient
        mini_batches = mini_batches_of(policy, run.groups, run.layout.budget, run.recipe.mini_batch_groups)
        reference = None
        if run.recipe.reference:
            other = ModelSettings(path=run.recipe.reference, dtype=run.dtype)
            reference = Policy(other, parallel_of(run.layout), policy.ranks, temperature=run.recipe.temperature)
        learner = Learner(settings, _recording(policy, trace), make_loss(settings.loss), reference)
        learner.entropy_coefficient = run.recipe.entropy_coefficient
        for step in range(1, run.recipe.steps + 1):
            policy.start_step()
            trace.learning_rate.append(policy.learning_rate)
            metrics = learner.learn(step, mini_batches, lambda phase: contextlib.nullcontext())
            trace.threshold.append(metrics.get("selection/threshold", 0.0))
        trace.weights = {name: tensor.clone() for name, tensor in policy.export_weights()}
        if policy.ranks.last_stage:
            trace.fused = policy.chunks[-1].module.output_weight.grad_added_to_main_grad
        return trace


def _recording(policy: Any, trace: RankTrace) -> Any:
    """The policy, with every mini-batch that it trains on recorded in ``trace``."""
    train_step = policy.train_step

    def recorded(batches: Any, masks: Any, *others: Any, **options: Any) -> dict[str, float]:
        kept: list[int] = []

        def note(batch: Any, mask: Tensor) -> Tensor:
            kept.extend(batch.token_ids[mask].tolist())
            return mask

        if callable(masks):
            metrics = train_step(batches, lambda batch, h: note(batch, masks(batch, h)), *others, **options)
        else:
            for batch, mask in zip(batches, masks, strict=True):
                note(batch, mask)
            metrics = train_step(batches, masks, *others, **options)
        trace.kept.append(kept)
        trace.micro_batches.append([sorted(set((b.token_ids >> 20).tolist())) for b in batches])
        for name in ("loss", "grad_norm", "clip_fraction", "skipped"):
            getattr(trace, name).append(metrics[name])
        return metrics

    policy.train_step = recorded
    return policy


def scored_and_exported(
    folder: str,
    groups: list[Group],
    layout: Layout,
    temperature: float,
    dtype: Any = "float32",
    built_in_norms: bool = False,
) -> tuple[dict[int, tuple[float, float]], dict[str, Tensor]]:
    """{token id: (log-probability, entropy)} of this rank's micro-batches, and the exported weights."""
    recipe = replace(Recipe(), temperature=temperature)
    layers = norms_built_into_linears() if built_in_norms else contextlib.nullcontext()
    with layers, policy_of(folder, layout, recipe, dtype) as policy:
        batches = [m for mini in mini_batches_of(policy, groups, layout.budget, 4) for m in mini.micro_batches]
        scores = policy.score(batches)
        by_token = {
            token: (logp, entropy)
            for batch, *values in zip(batches, scores.logp, scores.entropy, strict=True)
            for token, logp, entropy in zip(batch.token_ids.tolist(), *(v.tolist() for v in values), strict=True)
        }
        return by_token, {name: tensor.clone() for name, tensor in policy.export_weights()}


def likeliest(folder: str, groups: list[Group], layout: Layout) -> dict[int, tuple[list[int], list[float]]]:
    """{token id: (ids, log-probabilities) of the five likeliest tokens} for every third token of this rank's."""
    with policy_of(folder, layout, Recipe()) as policy:
        batches = [m for mini in mini_batches_of(policy, groups, layout.budget, 4) for m in mini.micro_batches]
        wanted = [batch.token_ids % 3 == 0 for batch in batches]
        scores = policy.score(batches, likeliest=5, wanted=wanted)
        return {
            token: (ids.tolist(), logp.tolist())
            for batch, rows, top in zip(batches, wanted, scores.likeliest, strict=True)
            for token, ids, logp in zip(batch.token_ids[rows].tolist(), *top, strict=True)
        }


def analysed(groups: list[Group]) -> list[Response]:
    """Responses as analyses read them; the advantage of completion i of a group is i / 2 - 0.4."""
    return [
        Response(np.array(prompt, np.int32), np.array(ids, np.int32), advantage=0.5 * i - 0.4)
        for prompt, responses, _ in groups
        for i, ids in enumerate(responses)
    ]


def entropies_by_analysis(folder: str, groups: list[Group], layout: Layout) -> list[list[float]]:
    """Entropies of the tokens of every response, as the analyses compute them, in blocks of a few responses."""
    from megatron_rlvr.analysis.command import scoring

    with policy_of(folder, layout) as policy, pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "_BLOCK", 100)
        return [entropy.tolist() for entropy in scoring.entropies(policy, analysed(groups), layout.budget)]


def gradients_by_analysis(folder: str, groups: list[Group], layout: Layout, bins: int) -> "BinGradients":
    """Norm of the policy gradient, and norms and shares of bins: token number n of all is in bin n mod ``bins``."""
    from megatron_rlvr.analysis.command import scoring

    given = analysed(groups)
    bin_of = np.arange(sum(len(response.token_ids) for response in given)) % bins
    with policy_of(folder, layout, Recipe()) as policy:
        return scoring.gradients_by_bin(policy, given, bin_of, bins, layout.budget)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation made, in forward and backward."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, list | tuple) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def largest_tensors(folder: str, groups: list[Group], layout: Layout) -> dict[str, int]:
    """Elements of the largest tensor of a score pass, and of a training pass by old and by current entropies."""
    from megatron_rlvr.config import LossSettings
    from megatron_rlvr.startup.assembly import make_loss

    found = {}
    with policy_of(folder, layout, Recipe()) as policy:
        (mini,) = mini_batches_of(policy, groups, layout.budget, len(groups))
        (batch,) = mini.micro_batches
        policy.start_step()
        with LargestTensor() as found["score"]:
            scores = policy.score([batch])
        mask = scores.entropy[0] >= scores.entropy[0].quantile(0.8)
        loss = make_loss(LossSettings())
        for name, masks in (("old", [mask]), ("current", lambda batch, entropy: entropy >= entropy.quantile(0.8))):
            with LargestTensor() as found[name]:
                policy.train_step([batch], masks, scores.plain_inputs([batch]), loss, mini.response_tokens)
    return {name: watch.elements for name, watch in found.items()}


def memory_of_a_weight_sync(folder: str, layout: Layout, bucket_bytes: int) -> tuple[int, int, int]:
    """Bytes that gathering all weights into buckets took at once; of the largest weight; and of all together."""
    from planning_runs import Alive

    from megatron_rlvr.engines.sglang.weight_sync.buckets import buckets

    largest = total = 0
    with policy_of(folder, layout) as policy, Alive() as alive:
        for bucket in buckets(policy.export_weights(), bucket_bytes, torch.device("cpu")):
            sizes = [math.prod(s) * d.itemsize for s, d in zip(bucket.shapes, bucket.dtypes, strict=True)]
            largest, total = max(largest, *sizes), total + bucket.bytes
            assert bucket.bytes <= max(bucket_bytes, largest)
    return alive.peak, largest, total


def refused(folder: str) -> str:
    """Message of the error with which a policy cannot be built from a folder."""
    from megatron_rlvr.hf.families import ModelError

    try:
        with policy_of(folder, Layout()):
            return "nothing"
    except ModelError as error:
        return str(error)


def saved(folder: str, layout: Layout, target: str) -> None:
    """Export the policy as a Hugging Face folder, by all ranks."""
    from megatron_rlvr.checkpoint.megatron.policy import export_policy

    with policy_of(folder, layout) as policy:
        export_policy(policy, Path(target))


def assert_same_training(traces: list[RankTrace], wanted: Trace, layout: Layout) -> None:
    """Check that every rank has the reference's selection, loss, gradient norms and weights, to a few units of fp32."""
    assert kept_over(traces) == wanted.kept, layout
    for trace in traces:
        assert trace.loss == pytest.approx(wanted.loss, rel=1e-5, abs=1e-6, nan_ok=True), layout
        assert trace.grad_norm == pytest.approx(wanted.grad_norm, rel=2e-5, nan_ok=True), layout
        assert trace.clip_fraction == pytest.approx(wanted.clip_fraction, abs=1e-6), layout
        assert trace.skipped == wanted.skipped, layout
        assert trace.weights.keys() == wanted.weights.keys()
        for name, weight in wanted.weights.items():
            assert (trace.weights[name] - weight).abs().max() < 5e-6, (layout, name)


def kept_over(traces: list[RankTrace]) -> list[list[int]]:
    """For each mini-batch the tokens that were trained on, each by exactly one replica."""
    replicas = {trace.data_rank: trace for trace in traces if trace.last_stage}
    kept = [[t for part in parts for t in part] for parts in zip(*(r.kept for r in replicas.values()), strict=True)]
    assert all(len(tokens) == len(set(tokens)) for tokens in kept)
    return [sorted(tokens) for tokens in kept]
