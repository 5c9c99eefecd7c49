"""Mask and gradients of one rollout batch, and eight steps of a run, in every layout beside those of one rank.

    python tests/support/invariance.py [--only TEXT] [--write-golden]

prints a table with one line per layout: whether the same tokens are selected; the largest relative difference of any
parameter's gradient (its norm over the norm of the gradient on one rank, fp32) and which parameter it is; and, for
eight training steps of the whole program, the largest relative difference of threshold, loss, gradient norm and reward
from `tests/golden/eight_steps.json`. The exit status is 1 if a line is out of tolerance. `--write-golden` writes that
file again from one rank: a change of it is a change of what the trainer computes, and must be explained in the commit.

Unsharded gradients are compared by their Hugging Face names, after Megatron's reduction and before clipping.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
from launcher import Ranks
from policy_runs import DIMENSIONS, GROUPS, Layout, mini_batches_of, parallel_of, policy_of, settings_of
from reference_training import Group, Recipe

GOLDEN = Path(__file__).parent.parent / "golden" / "eight_steps.json"
GRADIENT_TOLERANCE = 1e-5
GOLDEN_TOLERANCE = 1e-4
GOLDEN_STEPS = 8
GOLDEN_METRICS = ("selection/threshold", "train/loss", "train/grad_norm", "reward/mean")

RECIPE = Recipe(steps=1, mini_batch_groups=8)
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 2}

DISTRIBUTED = (("use_distributed_optimizer", True),)
RECOMPUTE = (("recompute_granularity", "full"), ("recompute_method", "uniform"), ("recompute_num_layers", 1))


# Sections of the settings that have every option of the method besides the paper's at least once.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "band of gradients": {
        "selection": {
            "keep": "band",
            "band": [0.3, 0.9],
            "signal": "gradient",
            "by_sign": True,
            "guard_probability": 0.003,
            "guard_quantile": 0.5,
        },
        "advantage": {"estimator": "batch", "entropy_bonus": 0.4},
        "loss": {
            "objective": "dppo",
            "rollout_correction": "mis",
            "correction_level": "sequence",
            "correction_veto": 0.93,
            "normalizer": "prompt_mean",
            "kl_coefficient": 0.1,
            "kl_estimator": "k3",
            "entropy_target": 10.0,
        },
    },
    "top covariances": {
        "selection": {
            "signal": "covariance",
            "scope": "rollout_batch",
            "fraction": 0.6,
            "fraction_end": 0.2,
            "fraction_steps": 3,
        },
        "loss": {
            "objective": "gspo",
            "rollout_correction": "mis",
            "correction_level": "geometric",
            "correction_cap": 1.01,
            "normalizer": "sequence_mean",
            "kl_coefficient": 0.2,
            "kl_estimator": "k2",
        },
    },
}


@dataclass(frozen=True)
class Line:
    """One layout of the table; ``padded`` gives every sequence the length of the longest."""

    name: str
    layout: Layout
    experts: bool = False
    padded: bool = False
    variant: str = ""


LINES = (
    Line("tensor 2", Layout(tensor=2)),
    Line("tensor 2, sequence", Layout(tensor=2, sequence=True)),
    Line("pipeline 2", Layout(pipeline=2, budget=90)),
    Line("pipeline 2, stages of 3 and 1 layers", Layout(pipeline=2, first_stage_layers=3, budget=90)),
    Line("pipeline 2, 2 virtual stages", Layout(pipeline=2, virtual_pipeline=2, budget=90)),
    Line("context 2", Layout(context=2, budget=150)),
    Line("data 2", Layout(data=2, budget=150)),
    Line("data 2, distributed optimizer", Layout(data=2, budget=150, megatron=DISTRIBUTED)),
    Line("tensor 2 x pipeline 2", Layout(tensor=2, pipeline=2, budget=150)),
    Line("tensor 2 x context 2", Layout(tensor=2, sequence=True, context=2, budget=150)),
    Line("data 2 x context 2", Layout(data=2, context=2, budget=150)),
    Line("full recompute", Layout(megatron=RECOMPUTE)),
    Line("selective recompute", Layout(megatron=(("recompute_granularity", "selective"),))),
    Line("micro-batches of 60 tokens", Layout(budget=60)),
    Line("micro-batches of 150 tokens", Layout(budget=150)),
    Line("micro-batches of 400 tokens", Layout(budget=400)),
    Line("padded to the longest", Layout(), padded=True),
    Line("experts, expert 2", Layout(data=2, expert=2, budget=150), experts=True),
    Line("experts, tensor 2, sequence, expert 2", Layout(tensor=2, sequence=True, expert=2, budget=150), experts=True),
)


VARIANT_LINES = tuple(
    replace(line, name=f"{line.name}: {variant}", variant=variant)
    for variant, names in {
        "band of gradients": (
            *("tensor 2, sequence", "pipeline 2", "data 2 x context 2", "micro-batches of 60 tokens"),
        ),
        "top covariances": ("tensor 2 x context 2", "data 2, distributed optimizer"),
    }.items()
    for line in LINES
    if line.name in names
)


@dataclass(frozen=True)
class Batch:
    """Result of one rank for the rollout batch."""

    kept: list[int]
    gradients: dict[str, torch.Tensor]


def on_rank(folder: str, groups: list[Group], line: Line) -> Batch:
    """Scores, selects and differentiates one rollout batch as one mini-batch; no optimizer step is taken."""
    from megatron_rlvr.config import ModelSettings
    from megatron_rlvr.learner import Learner
    from megatron_rlvr.policy.policy import Policy
    from megatron_rlvr.startup.assembly import make_loss

    settings = settings_of(RECIPE, **VARIANTS[line.variant])
    with policy_of(folder, line.layout, RECIPE) as policy:
        if line.padded:
            packing = policy.packing
            policy.packing = lambda budget: replace(packing(budget), sequence_multiple=64)
        kept: list[int] = []
        found: dict[str, torch.Tensor] = {}
        train_step = policy.train_step

        def recorded(batches: Any, masks: Any, *others: Any, **options: Any) -> dict[str, float]:
            for batch, mask in zip(batches, masks, strict=True):
                kept.extend(batch.token_ids[mask].tolist())
            return train_step(batches, masks, *others, **options)

        def keep_gradients() -> dict[str, float]:
            found.update(whole_gradients(policy))
            return {"grad_norm": 0.0, "skipped": 0.0}

        policy.train_step, policy._update = recorded, keep_gradients
        reference = None
        if settings.loss.kl_coefficient:
            other = ModelSettings(path=str(Path(folder).parent / "reference"), dtype="float32")
            reference = Policy(other, parallel_of(line.layout), policy.ranks)
            assert not any(p.requires_grad for chunk in reference.chunks for p in chunk.parameters())
        learner = Learner(settings, policy, make_loss(settings.loss), reference)
        learner.entropy_coefficient = 0.003
        mini_batches = mini_batches_of(policy, groups, line.layout.budget, len(groups), settings.advantage.estimator)
        if settings.loss.rollout_correction != "none":
            mini_batches = [with_mismatch(policy, mini) for mini in mini_batches]
        metrics = learner.learn(1, mini_batches, lambda phase: contextlib.nullcontext())
        if line.variant:  # every option decides something
            assert 0 < metrics["train/correction_clipped"] < 1
            assert metrics["train/reference_kl"] > 0
            assert metrics.get("selection/guarded", 1.0) > 0
            assert metrics.get("train/entropy_coefficient", 1.0) > 0
        mine = policy.ranks.last_stage and policy.ranks.tensor_rank == 0 and policy.ranks.context_rank == 0
        return Batch(kept if mine else [], found)


def with_mismatch(policy: Any, mini: Any) -> Any:
    """The mini-batch as an engine would have sampled it whose log-probabilities differ, by token, from the policy's."""
    changed = []
    for micro, logp in zip(mini.micro_batches, policy.score(mini.micro_batches).logp, strict=True):
        changed.append(replace(micro, rollout_logp=logp.cpu() + (micro.token_ids % 61 - 30) / 400))
    return replace(mini, micro_batches=changed)


def whole_gradients(policy: Any) -> dict[str, torch.Tensor]:
    """{Hugging Face name: gradient} of every parameter, on every rank."""
    from megatron_rlvr.policy.weights import global_parameters

    for chunk in policy.chunks:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            if buffer.ddp_config.use_distributed_optimizer:
                for bucket in buffer.buckets:  # each rank has reduced its own part
                    mine = bucket.grad_data.chunk(buffer.data_parallel_world_size)[
                        dist.get_rank(buffer.data_parallel_group)
                    ]
                    dist.all_gather_into_tensor(bucket.grad_data, mine.clone(), group=buffer.data_parallel_group)
    parameters: dict[str, Any] = global_parameters(policy.chunks)
    gradients = {name: parameter.main_grad for name, parameter in parameters.items()}
    return {name: tensor.clone() for name, tensor in policy._weights.export(gradients)}


def relative_difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest relative difference of the gradients of all parameters, and the name of that parameter."""
    assert found.keys() == wanted.keys()
    return max((float((found[n] - g).norm() / g.norm()), n) for n, g in wanted.items())


def write_models(folder: Path) -> dict[bool, str]:
    """Random models with dense layers (False) and with MoE layers (True)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**DIMENSIONS)).save_pretrained(folder / "dense")
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**DIMENSIONS, **EXPERTS)).save_pretrained(folder / "experts")
    Qwen3ForCausalLM(Qwen3Config(**DIMENSIONS)).save_pretrained(folder / "reference")
    return {False: str(folder / "dense"), True: str(folder / "experts")}


def gradient_table(lines: tuple[Line, ...], ranks: Ranks, folder: Path) -> Iterator[tuple[Line, bool, float, str]]:
    """(line, same tokens selected, largest relative difference of a gradient, its parameter) of each layout."""
    models = write_models(folder)
    alone = {
        (experts, variant): ranks.run(
            on_rank, 1, models[experts], GROUPS, Line("", Layout(), experts, variant=variant)
        )[0]
        for experts, variant in {(line.experts, line.variant): None for line in lines}
    }
    for line in lines:
        one = alone[line.experts, line.variant]
        batches = ranks.run(on_rank, line.layout.size, models[line.experts], GROUPS, line)
        kept = sorted(token for batch in batches for token in batch.kept)
        worst = max(relative_difference(batch.gradients, one.gradients) for batch in batches)
        yield line, kept == sorted(one.kept), *worst


# Eight steps of the whole program -----------------------------------------------------------------------------------


def eight_steps(line: Line, folder: Path) -> dict[str, list[float]]:
    """The golden metrics of a run of the program in a layout."""
    model = folder / ("golden_experts" if line.experts else "golden")
    if not model.exists():
        tiny.write_model(model, experts=line.experts, num_hidden_layers=4)
    (folder / "rewards.py").write_text(tiny.REWARDS, encoding="utf-8")
    layout = line.layout
    names = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "sequence")
    values = tiny.settings_for(
        model,
        tiny.write_gsm8k(folder / "problems.jsonl"),
        folder / "run",
        run={"steps": GOLDEN_STEPS, "export": False, "overwrite": True},
        parallel={name: getattr(layout, name) for name in names},
        batch={"tokens_per_micro_batch": 2048 if layout.budget > 1000 else 4 * layout.budget},
        reward={"function": "rewards:even"},
        optimizer={"learning_rate": 1e-3},
        megatron=dict(layout.megatron),
    )
    config = tiny.write_settings(folder / "golden.yaml", values)
    done = tiny.run_train(config, cwd=folder, ranks=layout.size, search=[folder])
    if done.returncode:
        raise RuntimeError(f"{line.name}: {done.stderr[-2000:]}")
    steps = [json.loads(text) for text in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {name: [step[name] for step in steps] for name in GOLDEN_METRICS}


def golden_difference(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> float:
    """Largest difference of any metric at any step, relative to the metric's largest value."""
    assert all(len(found[name]) == len(wanted[name]) == GOLDEN_STEPS for name in GOLDEN_METRICS)
    return max(
        abs(a - b) / max(map(abs, wanted[name]))
        for name in GOLDEN_METRICS
        for a, b in zip(found[name], wanted[name], strict=True)
    )


def golden() -> dict[bool, dict[str, list[float]]]:
    stored = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return {False: stored["dense"], True: stored["experts"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="lines whose name holds this text")
    parser.add_argument("--write-golden", action="store_true", help="write the golden file again, from one rank")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.write_golden:
            metrics = {key: eight_steps(Line(key, Layout(), key == "experts"), folder) for key in ("dense", "experts")}
            GOLDEN.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        lines = tuple(line for line in LINES if options.only in line.name)
        ranks = Ranks()
        failed = 0
        print(f"{'layout':<40}{'same tokens':>12}{'gradient':>10}{'8 steps':>10}   largest gradient difference in")
        try:
            for line, same, difference, parameter in gradient_table(lines, ranks, folder):
                steps = golden_difference(eight_steps(line, folder), golden()[line.experts])
                good = same and difference <= GRADIENT_TOLERANCE and steps <= GOLDEN_TOLERANCE
                failed += not good
                note = parameter if good else f"{parameter}   OUT OF TOLERANCE"
                print(f"{line.name:<40}{'yes' if same else 'NO':>12}{difference:>10.1e}{steps:>10.1e}   {note}")
        finally:
            ranks.stop()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
