"""A policy with MoE layers, with and without expert parallelism, against transformers and plain autograd.

Routing is discontinuous: if two experts have nearly the same score, the last bit of fp32 decides. The seeds are chosen
such that in every pass of the reference the margin of that decision is wide, and the tests check that it is.
"""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from launcher import Ranks
from policy_runs import (
    DIMENSIONS,
    GROUPS,
    Layout,
    Run,
    assert_same_training,
    refused,
    saved,
    scored_and_exported,
    trained,
)
from reference_training import Recipe, load, token_scores, train
from safetensors.torch import load_file, save_file

SEQUENCES = [(prompt, response) for prompt, responses, _ in GROUPS for response in responses]
SHAPE = DIMENSIONS | {"moe_intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 2, "mlp_only_layers": [1]}
SEEDS = {"shares": 4, "softmax": 2}
# Of logits, whose values in fp32 and float64 differ by a few 1e-6 here.
MARGIN = 2e-5

ONE_RANK = Layout()
EXPERT = Layout(data=2, expert=2, budget=90)
SEQUENCE = Layout(tensor=2, sequence=True, budget=150)
SEQUENCE_EXPERT = Layout(tensor=2, sequence=True, expert=2, budget=150)
PIPELINE = Layout(pipeline=2, budget=90)
DATA = Layout(data=2, budget=90)
EVERY_LAYOUT = (
    ONE_RANK,
    Layout(budget=90),
    EXPERT,
    SEQUENCE,
    SEQUENCE_EXPERT,
    PIPELINE,
    DATA,
    Layout(context=2, expert=2, budget=150),
    Layout(pipeline=2, virtual_pipeline=2, budget=90),
    # Two replicas of every expert, each shared by ranks of both replicas of the rest.
    Layout(tensor=2, sequence=True, data=2, expert=2, budget=150),
    Layout(pipeline=2, data=2, expert=2, budget=90),
    replace(EXPERT, megatron=(("use_distributed_optimizer", True),)),
)
# Layouts of `make test`; `make soak` has the rest.
SOME_LAYOUTS = (ONE_RANK, EXPERT, SEQUENCE_EXPERT, EVERY_LAYOUT[10], EVERY_LAYOUT[11])
IN_LAYOUTS = pytest.mark.parametrize(
    ("name", "layouts"),
    [
        pytest.param("shares", SOME_LAYOUTS, id="shares"),
        pytest.param("softmax", (ONE_RANK, EXPERT), id="softmax"),
        pytest.param(
            "shares",
            tuple(layout for layout in EVERY_LAYOUT if layout not in SOME_LAYOUTS),
            id="shares, all others",
            marks=pytest.mark.soak,
        ),
    ],
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Random models: experts weighted by their share among the top-k, or by the softmax over all."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    made = {}
    for name, seed in SEEDS.items():
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, norm_topk_prob=name == "shares"))
        made[name] = str(tmp_path_factory.mktemp("models") / name)
        model.save_pretrained(made[name])
    return made


def on_disk(folder: str) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/model.safetensors")


@contextlib.contextmanager
def wide_margins() -> Iterator[None]:
    """Check that every router that runs in the block prefers the last of its top-k experts clearly to the next one."""
    margins: list[float] = []

    def look(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if type(module).__name__ == "Qwen3MoeTopKRouter":
            best = output[0].detach().topk(SHAPE["num_experts_per_tok"] + 1).values
            margins.append(float((best[:, -2] - best[:, -1]).min()))

    handle = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()
    assert min(margins) > MARGIN


def with_experts_apart(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by their names in checkpoints, in which experts are separate; transformers fuses them in memory."""
    apart = {}
    for name, tensor in weights.items():
        prefix, _, kind = name.rpartition(".experts.")
        if kind == "gate_up_proj":
            for expert, (gate, up) in enumerate(t.chunk(2) for t in tensor):
                apart[f"{prefix}.experts.{expert}.gate_proj.weight"] = gate
                apart[f"{prefix}.experts.{expert}.up_proj.weight"] = up
        elif kind == "down_proj":
            apart |= {f"{prefix}.experts.{expert}.down_proj.weight": down for expert, down in enumerate(tensor)}
        else:
            apart[name] = tensor
    return apart


@IN_LAYOUTS
def test_scores_are_those_of_transformers_and_the_export_is_the_input_bit_by_bit(ranks: Ranks, folders, name, layouts):
    temperature = 0.8
    with torch.no_grad(), wide_margins():
        by_sequence = token_scores(load(folders[name]), SEQUENCES, temperature)
    expected = {(n << 20) + t: pair.tolist() for n, pairs in enumerate(by_sequence) for t, pair in enumerate(pairs)}
    weights = on_disk(folders[name])
    for layout in layouts:
        found = ranks.run(scored_and_exported, layout.size, folders[name], GROUPS, layout, temperature)
        scores = {token: pair for by_token, _ in found for token, pair in by_token.items()}
        assert scores.keys() == expected.keys()
        difference = torch.tensor([scores[t] for t in expected]) - torch.tensor(list(expected.values()))
        assert difference.abs().max() < 1e-4, layout
        for _, exported in found:
            assert list(exported) == list(found[0][1]), "the same order on every rank"
            assert exported.keys() == weights.keys()
            assert all(torch.equal(exported[name], weights[name]) for name in weights), layout


@pytest.mark.parametrize("layout", [EXPERT, SEQUENCE_EXPERT, PIPELINE])
def test_a_bfloat16_export_is_the_input_rounded(ranks: Ranks, folders, layout):
    found = ranks.run(scored_and_exported, layout.size, folders["shares"], GROUPS, layout, 1.0, "bfloat16")
    for _, exported in found:
        for name, tensor in on_disk(folders["shares"]).items():
            assert torch.equal(exported[name], tensor.bfloat16()), name


@IN_LAYOUTS
def test_five_training_steps_are_those_of_plain_autograd_in_every_layout(ranks: Ranks, folders, name, layouts):
    """Gradient norms included, though each expert's gradient is on one rank and all others' are on several."""
    recipe = Recipe()
    with wide_margins():
        wanted = train(folders[name], GROUPS, recipe)
    wanted = replace(wanted, weights=with_experts_apart(wanted.weights))
    before = on_disk(folders[name])
    for part in ("experts.5.up_proj", "experts.0.down_proj", "mlp.gate.", "mlp.gate_proj"):
        moved = max(float((w - before[n]).abs().max()) for n, w in wanted.weights.items() if part in n)
        assert moved > 2e-3, f"{part} was trained"
    assert max(wanted.clip_fraction) > 0.1
    assert min(wanted.grad_norm) < recipe.clip_grad < max(wanted.grad_norm)
    for layout in layouts:
        assert_same_training(
            ranks.run(trained, layout.size, Run(folders[name], GROUPS, recipe, layout)), wanted, layout
        )


@pytest.mark.parametrize("layout", [ONE_RANK, EXPERT, SEQUENCE_EXPERT])
def test_bfloat16_training_stays_near_that_of_plain_autograd(ranks: Ranks, folders, layout):
    """Tolerances are wide, because rounding routes some tokens to other experts."""
    recipe = Recipe(steps=2)
    wanted = train(folders["shares"], GROUPS, recipe)
    weights = with_experts_apart(wanted.weights)
    for trace in ranks.run(trained, layout.size, Run(folders["shares"], GROUPS, recipe, layout, "bfloat16")):
        assert trace.loss == pytest.approx(wanted.loss, abs=0.02)
        assert trace.grad_norm[0] == pytest.approx(wanted.grad_norm[0], rel=0.05)
        assert trace.skipped == [0] * 4
        for name, weight in weights.items():
            assert trace.weights[name].dtype == torch.bfloat16
            assert (trace.weights[name] - weight).abs().max() < 0.02, name


@pytest.mark.parametrize("layout", [EXPERT, Layout(pipeline=2, data=2, expert=2)])
def test_a_saved_folder_is_the_one_it_came_from(ranks: Ranks, folders, layout, tmp_path):
    ranks.run(saved, layout.size, folders["shares"], layout, str(tmp_path / "saved"))
    weights, exported = on_disk(folders["shares"]), on_disk(str(tmp_path / "saved"))
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weights[name]) for name in weights)


def test_experts_that_do_not_fit_their_configuration_are_refused_by_name(ranks: Ranks, folders, tmp_path):
    weights = on_disk(folders["shares"])
    prefix = "model.layers.2.mlp."
    up, router = prefix + "experts.3.up_proj.weight", prefix + "gate.weight"
    broken = {
        f"lacks {up}": {n: t for n, t in weights.items() if n != up},
        "experts.6.up_proj.weight, which": weights | {prefix + "experts.6.up_proj.weight": torch.zeros(20, 32)},
        f"{up} [20, 31]": weights | {up: torch.zeros(20, 31)},
        f"{router} [5, 32] does not fit": weights | {router: torch.zeros(5, 32)},
        "holds model.layers.1.mlp.gate.weight": weights | {"model.layers.1.mlp.gate.weight": torch.zeros(6, 32)},
    }
    for number, (message, tensors) in enumerate(broken.items()):
        folder = tmp_path / str(number)
        shutil.copytree(folders["shares"], folder)
        save_file(tensors, folder / "model.safetensors")
        (error,) = ranks.run(refused, 1, str(folder))
        assert message in error
