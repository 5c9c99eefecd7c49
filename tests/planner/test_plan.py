"""Tests of the planner against transformers' parameter counts, the real policy, a simulated server and hand results.

The policies are small, with the proportions of a large one, in bf16; layers are this project's own, the only ones that
run without a GPU. Bytes and operations may differ by 10 %; most of them are far closer.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from planning_runs import Layout, Measured, Ranks, head_peak, measured

from megatron_rlvr.algo.tile_shape import TILE_SHAPE
from megatron_rlvr.config import ParallelSettings, SettingsError
from megatron_rlvr.config.loading import validate
from megatron_rlvr.hf.families import transformer_fields
from megatron_rlvr.planner import report
from megatron_rlvr.planner.devices import DEVICES, GIB, Device
from megatron_rlvr.planner.layouts import Plan, PlanInputs, estimate, ranked_plans
from megatron_rlvr.planner.memory import MicroBatches, head_workspace, stage_memory
from megatron_rlvr.planner.options import TrainingOptions
from megatron_rlvr.planner.roofline import Efficiency, TrainingSetup, stage_flops, training_time
from megatron_rlvr.planner.servers import STEP_OVERHEAD, DecodingServer, rollout_plans
from megatron_rlvr.planner.shapes import ModelShape
from megatron_rlvr.planner.workload import ResponseLengths, Workload
from megatron_rlvr.startup import layout_checks

FOLDER = Path(__file__).parents[1] / "published"
PUBLISHED = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
EXPERTS = {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
MIXTURE = PUBLISHED["qwen3_8b"] | EXPERTS | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
UNEVEN = MIXTURE | {"num_hidden_layers": 46}
DENSE = tiny.model_config(
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    vocab_size=2048,
    max_position_embeddings=1024,
)
SPARSE = DENSE | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "moe_intermediate_size": 192,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
TIED = DENSE | {"tie_word_embeddings": True, "vocab_size": 8192}
LENGTHS = [700, 324]
FULL = (("recompute_granularity", "full"), ("recompute_method", "uniform"), ("recompute_num_layers", 1))
MLP = (("recompute_granularity", "selective"), ("recompute_modules", ["mlp"]))
DISTRIBUTED = (("use_distributed_optimizer", True),)


# Parameters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        *PUBLISHED.values(),
        tiny.model_config(tie_word_embeddings=True),
        tiny.model_config(model_type="llama", architectures=["LlamaForCausalLM"]),
        tiny.model_config(model_type="qwen2", architectures=["Qwen2ForCausalLM"]),
        MIXTURE | {"num_hidden_layers": 4, "decoder_sparse_step": 2},
    ],
    ids=[*PUBLISHED, "tied", "llama", "qwen2", "mixture"],
)
def test_the_parameter_count_equals_that_of_transformers(config):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert ModelShape.of(config).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_token_in_the_kv_cache_takes_two_vectors_per_layer_and_key_value_head():
    assert ModelShape.of(PUBLISHED["qwen3_8b"]).key_value_bytes(2) == 2 * 36 * 8 * 128 * 2 == 147_456


# The real policy -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Policy to measure: its layout, micro-batches and config.json."""

    layout: Layout
    micro_batches: int = 1
    config: Mapping[str, Any] = field(default_factory=lambda: DENSE)


CASES = {
    "one rank": Case(Layout()),
    "tied": Case(Layout(megatron=FULL), config=TIED),
    "recompute full": Case(Layout(megatron=FULL)),
    "recompute mlp": Case(Layout(megatron=MLP)),
    "tensor 2": Case(Layout(tensor=2, sequence=True)),
    "pipeline 2": Case(Layout(pipeline=2), micro_batches=4),
    "data 2": Case(Layout(data=2, megatron=DISTRIBUTED)),
    "expert 2": Case(Layout(data=2, expert=2, megatron=DISTRIBUTED), config=SPARSE),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def policies(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Measured]]:
    """{case: measurements of each rank}"""
    from transformers import AutoConfig, AutoModelForCausalLM

    parent, folders = tmp_path_factory.mktemp("planned"), {}
    for name, config in (("dense", DENSE), ("tied", TIED), ("sparse", SPARSE)):
        folders[id(config)] = str(parent / name)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(parent / name)
    return {
        name: ranks.run(
            measured,
            case.layout.size,
            folders[id(case.config)],
            case.layout,
            LENGTHS,
            case.micro_batches,
            timeout=200,
        )
        for name, case in CASES.items()
    }


def planned(name: str, rank: int, found: Measured) -> tuple[Any, ModelShape, TrainingOptions, MicroBatches]:
    """Return the estimated memory of a rank of a case, and the inputs of the estimate."""
    case = CASES[name]
    layout, shape = case.layout, ModelShape.of(case.config)
    sizes = ("tensor", "pipeline", "context", "expert", "sequence")
    parallel = ParallelSettings(**{size: getattr(layout, size) for size in sizes})
    megatron = dict(layout.megatron) | {"bias_activation_fusion": False}  # as on a CPU
    options = TrainingOptions.of("bfloat16", megatron, transformer_engine=False)
    batches = MicroBatches(sum(LENGTHS), max(LENGTHS), found.rows, case.micro_batches)
    stage = rank if layout.pipeline > 1 else 0
    return stage_memory(shape, parallel, layout.size, options, batches, stage), shape, options, batches


@pytest.mark.parametrize("name", CASES)
def test_weights_gradients_and_optimizer_equal_the_bytes_of_the_policy(name, policies):
    for rank, found in enumerate(policies[name]):
        memory, *_ = planned(name, rank, found)
        assert memory.weights == pytest.approx(found.weights, rel=0.01)
        assert memory.gradients == pytest.approx(found.gradients, rel=0.01)
        assert memory.optimizer == pytest.approx(found.optimizer, rel=0.01)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.layout.pipeline == 1])
def test_activations_equal_the_bytes_that_autograd_saves(name, policies):
    """The mean over the ranks is compared, because a router sends more tokens to some ranks than to others."""
    found = policies[name]
    memory, shape, _, batches = planned(name, 0, found[0])
    last_norm = (4 + 2 * 2) * shape.hidden * batches.tokens / CASES[name].layout.tensor
    assert memory.activations + last_norm == pytest.approx(np.mean([rank.saved for rank in found]), rel=0.05)


@pytest.mark.parametrize("name", CASES)
def test_the_peak_of_a_training_pass_equals_the_most_bytes_alive(name, policies):
    """With a pipeline, the peak includes all micro-batches that its schedule holds."""
    for rank, found in enumerate(policies[name]):
        memory, *_ = planned(name, rank, found)
        print(f"{name}, rank {rank}: {(memory.activations + memory.working) / found.peak:.3f}")
        assert memory.activations + memory.working == pytest.approx(found.peak, rel=0.1)


@pytest.mark.parametrize("name", ["one rank", "recompute full", "recompute mlp", "tensor 2"])
def test_operations_equal_those_that_torch_counts(name, policies):
    """Torch counts attention without its causal mask, that is twice."""
    for rank, found in enumerate(policies[name]):
        _, shape, options, batches = planned(name, rank, found)
        squares, responses = sum(n * n for n in LENGTHS), sum(n - 7 for n in LENGTHS)
        share = CASES[name].layout.tensor
        layers = list(range(shape.layers))
        linear = shape.linear_flops(layers, batches.tokens)
        score = {
            "products": (linear + shape.head_flops(responses)) / share,
            "attention": 2 * shape.attention_flops(shape.layers, squares) / share,
        }
        assert found.score == pytest.approx(score, rel=0.01)
        whole = stage_flops(shape, layers, batches.tokens, squares, options, backward=True)
        attention = (3.5 + (options.recompute == "full")) * shape.attention_flops(shape.layers, squares)
        train = {
            "products": (whole - attention + 4 * shape.head_flops(found.rows)) / share,
            "attention": 2 * attention / share,
        }
        assert found.train == pytest.approx(train, rel=0.01)


@pytest.mark.parametrize(
    ("rows", "tokens", "hidden", "vocab", "dtype"),
    [(820, 4096, 512, 16_384, "bfloat16"), (820, 4096, 512, 16_384, "float32"), (202, 1024, 256, 2048, "bfloat16")],
)
def test_the_heads_workspace_equals_the_most_bytes_alive(rows, tokens, hidden, vocab, dtype):
    element = 2 if dtype == "bfloat16" else 4
    tile = TILE_SHAPE["cpu"]
    planned = head_workspace(
        rows=rows, tokens=tokens, hidden=hidden, columns=vocab, weight_bytes=element, tile=tile, casts=element == 2
    )
    assert planned == pytest.approx(head_peak(rows, tokens, hidden, vocab, dtype), rel=0.1)


# Time ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [2000, 8000, 10_240, 15_000])
def test_response_lengths_have_the_requested_mean(mean):
    """The moments are compared with those of random lengths drawn from the density by rejection sampling."""
    lengths = ResponseLengths(mean, 20_480)
    random = np.random.default_rng(0)
    drawn = random.uniform(0, 20_480, 4_000_000)
    density = np.exp(-lengths._rate * drawn / 20_480)
    kept = drawn[random.uniform(0, density.max(), len(drawn)) < density]
    assert kept.mean() == pytest.approx(mean, rel=0.01)
    assert lengths.mean_square == pytest.approx((kept**2).mean(), rel=0.01)
    assert lengths.survival(5000) == pytest.approx((kept > 5000).mean(), abs=0.01)


def work(**changes: Any) -> Workload:
    values: dict[str, Any] = {
        "prompts": 64,
        "group_size": 16,
        "mini_batch_prompts": 32,
        "mean_prompt": 256.0,
        "max_prompt": 2048,
        "responses": ResponseLengths(8000, 20_480),
        "micro_batch_tokens": 24_576,
        "fraction": 0.2,
        "old_entropies": True,
    }
    return Workload(**values | changes)


@pytest.mark.parametrize("inflight", [1024, 200, 50])
def test_a_rollout_takes_as_long_as_on_a_simulated_server(inflight):
    """The simulated server keeps its running batch as full as allowed, step by step, with random response lengths."""
    shape, device, efficiency = ModelShape.of(PUBLISHED["qwen3_8b"]), DEVICES["h200"], Efficiency()
    task = work(max_inflight=inflight)
    (rollout,) = rollout_plans(shape, device, efficiency, task, 8, device.memory, 8)
    assert rollout.running == inflight
    random = np.random.default_rng(0)
    ends = np.interp(random.uniform(0, 1, 1024), *_quantiles(task.responses))
    server, waiting, running, seconds = DecodingServer(shape, device, efficiency, 8), list(ends), np.zeros((0, 2)), 0.0
    stride = 16  # steps at a time
    while waiting or len(running):
        fresh = [waiting.pop() for _ in range(min(len(waiting), inflight - len(running)))]
        running = np.concatenate([running, [[0.0, end] for end in fresh]]) if fresh else running
        seconds += stride * server.step_seconds(len(running), 256 + running[:, 0].mean())
        running[:, 0] += stride
        running = running[running[:, 0] < running[:, 1]]
    assert rollout.saturated + rollout.tail == pytest.approx(seconds, rel=0.1)
    assert rollout.seconds > 20_480 * server.step_seconds(1, 256)


def _quantiles(lengths: ResponseLengths) -> tuple[list[float], list[float]]:
    """Return shares of the responses, and the lengths below which they are."""
    points = [lengths.cap * i / 1000 for i in range(1001)]
    return [1 - lengths.survival(point) for point in points], points


def test_a_decoding_step_is_limited_by_memory_or_by_operations():
    device = Device("a GPU", 80 * GIB, flops=1e15, bandwidth=1e12, link=1e11, network=1e10)
    shape = ModelShape.of(PUBLISHED["qwen3_8b"])
    server = DecodingServer(shape, device, Efficiency(mfu=0.5, bandwidth=0.5), 1)
    read = 2 * (shape.parameters - shape.vocab * shape.hidden)  # of the embedding, only single rows
    few = (read + 4 * 1000 * 147_456) / 0.5e12
    assert server.step_seconds(4, 1000) == pytest.approx(few + STEP_OVERHEAD, rel=0.001)
    many = 10_000 * (2 * shape.active_parameters + 4 * 36 * 4096 * 1) / 0.5e15
    assert server.step_seconds(10_000, 1) == pytest.approx(many + STEP_OVERHEAD, rel=0.001)


def setup(parallel: ParallelSettings, ranks: int, config: str = "qwen3_8b") -> TrainingSetup:
    device = Device("a GPU", 80 * GIB, flops=1e15, bandwidth=1e12, link=1e30, network=1e30)
    return TrainingSetup(
        ModelShape.of(PUBLISHED[config]), device, Efficiency(0.5, 1.0), parallel, ranks, TrainingOptions()
    )


def test_one_gpu_takes_the_operations_divided_by_the_achieved_flops():
    task = work(responses=ResponseLengths(10_240, 20_480))
    found = training_time(setup(ParallelSettings(), 1), task)
    tokens, rows = 1024 * (256 + 10_240), 1024 * 10_240
    squares = 1024 * (256**2 + 2 * 256 * 10_240 + 20_480**2 / 3)  # lengths are uniform where the mean is half the cap
    weights = 36 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 12_288)
    head = 2 * 4096 * 151_936
    forward = 2 * weights * tokens + 2 * 36 * 4096 * squares
    assert found.score == pytest.approx((forward + head * rows) / 0.5e15, rel=0.001)
    backward = 6 * weights * tokens + 7 * 36 * 4096 * squares + 0.2 * 4 * head * rows
    update = 2 * (30 + 3 * 4) * 8.19e9 / 1e12  # two optimizer steps, limited by memory
    assert found.train == pytest.approx(backward / 0.5e15 + update, rel=0.001)
    assert sum(found.parts.values()) == pytest.approx(found.score + found.train)


def test_a_pipeline_with_few_micro_batches_has_a_bubble():
    """Four stages with 4 micro-batches: 4 of the 7 time steps of a pass do work; with 3 virtual stages, 4 of 5."""
    task = work(prompts=32, micro_batch_tokens=10**7, max_prompt=1, mean_prompt=1.0)
    for virtual_stages, time_steps in ((1, 7), (3, 5)):
        parallel = ParallelSettings(pipeline=4, virtual_pipeline=virtual_stages)
        four = replace(task, micro_batch_tokens=math.ceil(512 * task.mean_sequence / 4))
        found = training_time(setup(parallel, 4), four)
        update = found.parts["reduction"] + found.parts["optimizer"]
        share = found.parts["waiting"] / (found.score + found.train - update)
        assert share == pytest.approx(1 - 4 / time_steps, rel=0.01)


def test_tensor_parallelism_communicates_what_each_layer_gathers_and_scatters():
    """Scoring does two gathers and two scatters per layer of seven eighths of the tokens' hidden states, in bf16."""
    task = work()
    linked = replace(setup(ParallelSettings(tensor=8, sequence=True), 8))
    linked = replace(linked, device=replace(linked.device, link=1e11))
    tokens = 1024 * task.mean_sequence
    scored = 36 * 4 * 2 * 4096 * tokens * 7 / 8 / 1e11
    trained = 36 * 10 * 2 * 4096 * tokens * 7 / 8 / 1e11  # backward the same, and inputs gathered twice more
    assert training_time(linked, task).parts["tensor"] == pytest.approx(scored + trained, rel=0.001)


# Layouts and the program ---------------------------------------------------------------------------------------------


def plan_inputs(config: dict[str, Any], gpus: int, gpu: str = "h100", **changes: Any) -> PlanInputs:
    settings = validate(
        {
            "run": {"dir": "plan", "steps": 1},
            "model": {"path": "plan"},
            "data": {"train": "plan.jsonl"},
            "rollout": {"engine": "sglang", "servers": ["http://plan:1"], "colocated": True},
            "sync": {"method": "disk"},
        }
    )
    task = Workload.of(settings, mean_response=8000, mean_prompt=256, informative_share=1.0, max_inflight=None)
    values: dict[str, Any] = {
        "settings": settings,
        "shape": ModelShape.of(config),
        "work": task,
        "device": DEVICES[gpu],
        "efficiency": Efficiency(),
        "gpus": gpus,
    }
    return PlanInputs(**values | changes)


@pytest.mark.parametrize(
    ("config", "gpus"),
    [("qwen3_8b", 8), ("qwen3_14b", 32), ("qwen3_32b", 64), ("qwen3_32b", 24), ("mixture", 32), ("uneven", 32)],
)
def test_proposed_layouts_are_accepted_when_they_are_pasted(config, gpus):
    """The settings, the trainer's layout checks and the policy's check of Megatron's fields accept them."""
    from megatron_rlvr.policy.build import check_passthrough

    asked = plan_inputs(PUBLISHED.get(config, UNEVEN if config == "uneven" else MIXTURE), gpus)
    plans = [plan for plan in ranked_plans(asked) if plan.fits]
    assert plans
    if config == "uneven":
        ends = {
            (p.virtual_pipeline, p.first_stage_layers, p.last_stage_layers)
            for p in (plan.parallel for plan in plans)
            if p.pipeline == 4
        }
        assert ends == {(1, 11, 11), (2, 12, 10)}
    fields = transformer_fields(asked.shape.config)
    for plan in plans:
        values = asked.settings.model_dump() | yaml.safe_load(report.settings_yaml(plan))
        settings = validate(values)
        layout_checks.check_layout(settings, fields, gpus)
        layout_checks.check_experts(settings, fields, gpus)
        check_passthrough(settings.megatron, settings.model, settings.parallel, asked.shape.config)
        assert settings.parallel.replica * plan.data == gpus
        assert plan.memory.peak < asked.usable < asked.device.memory


def test_layouts_are_ranked_by_time_and_then_by_free_memory():
    plans = [plan for plan in ranked_plans(plan_inputs(PUBLISHED["qwen3_8b"], 8)) if plan.fits]
    fastest = min(plan.seconds for plan in plans)
    assert plans[0].seconds < 1.03 * fastest
    assert plans[0].headroom == max(plan.headroom for plan in plans if plan.seconds < 1.02 * fastest)
    for before, after in pairwise(plans):
        assert after.seconds > before.seconds / 1.03
    assert len({plan.parallel.model_dump_json() for plan in plans}) == len(plans)


def test_a_reference_takes_the_memory_of_its_weights_and_the_time_of_another_forward_pass():
    alone_setup = setup(ParallelSettings(pipeline=4), 16)
    both_setup = replace(alone_setup, options=TrainingOptions(reference=True))
    times = [training_time(each, work()) for each in (alone_setup, both_setup)]
    assert times[1].score == 2 * times[0].score
    assert times[1].train == times[0].train
    for time in times:
        assert sum(time.parts.values()) == pytest.approx(time.score + time.train)
    asked = plan_inputs(PUBLISHED["qwen3_32b"], 64)
    alone = estimate(asked, ParallelSettings(tensor=8), TrainingOptions()).memory
    both = estimate(asked, ParallelSettings(tensor=8), TrainingOptions(reference=True)).memory
    assert both.weights == 2 * alone.weights
    assert both.peak == alone.peak + alone.weights
    with_kl = replace(asked, settings=validate(asked.settings.model_dump() | {"loss": {"kl_coefficient": 0.1}}))
    assert with_kl.options({}) == replace(asked.options({}), reference=True)


def test_memory_shrinks_in_proportion_to_what_a_layout_shards():
    asked = plan_inputs(PUBLISHED["qwen3_32b"], 64)

    def parts(**sizes: Any) -> Plan:
        return estimate(asked, ParallelSettings(**sizes), TrainingOptions())

    whole, tensor = parts(), parts(tensor=8, sequence=True)
    assert tensor.memory.weights == pytest.approx(whole.memory.weights / 8, rel=0.01)
    assert tensor.memory.optimizer == pytest.approx(whole.memory.optimizer, rel=0.01), (
        "sharded over 64 ranks either way"
    )
    assert parts(context=4).memory.activations == pytest.approx(whole.memory.activations / 4)
    assert parts(pipeline=4).memory.gradients < whole.memory.gradients / 3


@pytest.mark.parametrize(
    "options",
    [
        TrainingOptions(),
        TrainingOptions(distributed_optimizer=False, gradient_bytes=2, fused_activation=True, fused_gradient=True),
        TrainingOptions(recompute="full", unit_layers=2),
        TrainingOptions(recompute="full", block_layers=3),
        TrainingOptions(recompute="selective", recompute_modules=("mlp", "moe")),
    ],
)
def test_pasted_megatron_fields_are_read_back(options):
    assert TrainingOptions.of("bfloat16", options.megatron, transformer_engine=True) == options
    assert report.unmodeled_fields(options.megatron) == ""


def test_megatron_fields_that_the_estimates_ignore_are_named():
    assert report.unmodeled_fields({"fp8": "hybrid"}) == "ignored by the estimates: megatron.fp8"
    with pytest.raises(SettingsError, match="no estimate for 'layernorm'; use only core_attn, mlp, moe"):
        TrainingOptions.of("bfloat16", {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}, True)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(tiny.CHECKOUT / "tools" / "plan.py"), *words]
    return subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, timeout=60, check=False)


def published(name: str) -> str:
    return str(FOLDER / f"{name}.json")


def test_a_misfit_says_how_much_memory_is_missing_where_and_what_helps():
    done = run("--model", published("qwen3_32b"), "--gpus", "8", "--gpu", "a100")
    assert done.returncode == 1
    assert "no layout fits; the closest is" in done.stdout
    said = done.stdout[done.stdout.index("training needs") :]
    assert "GiB and may use 69.0 of one A100 80GB" in said
    assert "the largest part is optimizer" in said
    assert "what helps: more GPUs" in said


def test_a_run_is_planned_from_its_settings(tmp_path):
    """Its own layout is the first one, unchanged, and printed as JSON."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED["qwen3_8b"]))
    values = {
        "run": {"dir": "runs/plan", "steps": 1},
        "model": {"path": str(folder)},
        "parallel": {"tensor": 4, "sequence": True},
        "data": {"train": "problems.jsonl"},
        "rollout": {"engine": "sglang", "servers": ["http://a:1", "http://b:1"]},
        "megatron": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    config = tiny.write_settings(tmp_path / "run.yaml", values)
    done = run(str(config), "--gpus", "16", "--gpu", "h100", "--server-gpus", "8", "--json", "--top", "2")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    best = found["best"]
    assert {key: best["parallel"][key] for key in ("tensor", "data")} == {"tensor": 4, "data": 2}
    assert best["megatron"] == values["megatron"], "without the distributed optimizer, which the settings do not name"
    assert best["servers"]["number"] == 2
    assert best["servers"]["running"] == 64, "rollout.max_inflight"
    # 8.19 billion parameters, a quarter of them, at 12 bytes each for the optimizer.
    assert best["memory"]["optimizer"] == pytest.approx(8.19e9 / 4 * 12, rel=0.01)
    assert len(found["ranked"]) == 2
    assert done.stdout.isascii()


def test_the_tables_explain_every_part_in_words():
    done = run("--model", published("qwen3_8b"), "--gpus", "8", "--gpu", "h100", "--layout", "tensor=8", "--top", "1")
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("weights", "gradients", "optimizer", "activations", "rotary", "working", "cache", "rollout", "sync"):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"  {part} ")]
        assert len(line.split(maxsplit=2)[2]) > 10, "words"
    assert "parallel: {tensor: 8, sequence: true}" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpus", "8", "--gpu", "h100"), "no model is given; give CONFIG.yaml, or --model DIR"),
        (("--model", "MODEL", "--gpus", "8", "--gpu", "h900"), "invalid choice: 'h900'"),
        (("--model", "nowhere", "--gpus", "8", "--gpu", "h100"), "nowhere holds no config.json"),
        (("--model", "MODEL", "--gpus", "9", "--gpu", "h100", "--layout", "tensor=3"), "choose a divisor"),
        (("--model", "MODEL", "--gpus", "8", "--gpu", "h100", "--layout", "tensr=2"), "unknown key parallel.tensr"),
        (("--model", "MODEL", "--gpus", "8", "--gpu", "h100", "--server-gpus", "8"), "leaves none"),
        (("--model", "MODEL", "--gpus", "8", "--gpu", "h100", "--server-tensor", "3"), "does not divide the 8 GPUs"),
        (("--model", "MODEL", "--gpus", "8", "--gpu", "h100", "--response-tokens", "90000"), "exceed the model's"),
        (("--model", "MODEL", "--gpus", "8", "--gpu", "h100", "--mean-response-tokens", "90000"), "above the maximum"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(words, said):
    done = run(*(published("qwen3_8b") if word == "MODEL" else word for word in words))
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_says_how_accurate_the_estimates_are():
    done = run("--help")
    assert done.returncode == 0
    assert "How much is known" in done.stdout
    assert "--mean-response-tokens" in done.stdout
