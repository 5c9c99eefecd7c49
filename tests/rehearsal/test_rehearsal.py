"""The verb `rlvr rehearse`: its errors, and rehearsals where torch is a CUDA build (no GPU is needed)."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from megatron_rlvr.checkpoint.size import BOX_BYTES
from megatron_rlvr.config import ParallelSettings
from megatron_rlvr.config.loading import load_settings
from megatron_rlvr.planner.devices import DEVICES
from megatron_rlvr.planner.shapes import ModelShape, rank_parameters
from megatron_rlvr.rehearsal import command
from megatron_rlvr.rehearsal.report import Outcome, PhaseOutcome, Summary, as_json, as_text
from megatron_rlvr.rehearsal.stage_parameters import parameters_of_stages

PUBLISHED = Path(__file__).parents[1] / "published"
RECIPES = sorted((tiny.CHECKOUT / "examples").glob("qwen3_*/*.yaml"))
MIXTURE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
PARALLEL_OF_8B = ParallelSettings(tensor=4, sequence=True)
WORLDS = {"qwen3_0_6b": 1, "qwen3_8b": 8, "qwen3_14b": 16, "qwen3_32b": 32}
"""Ranks that train a recipe of the folder."""
MOST_DIFFERENCE = 0.03
SMALL_BYTES = 2**16
"""Host memory of small tensors beside the state, such as step counts."""
ROTARY = "megatron/core/models/common/embeddings/rope_utils.py"
"""Where Megatron asks the GPU for the lengths of the sequences, without a fused rotary embedding."""

cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")


def shape_of(name: str, **changes: Any) -> dict[str, Any]:
    return json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8")) | changes


# Parameters of other stages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (shape_of("qwen3_8b"), {"tensor": 4}),
        (shape_of("qwen3_8b", tie_word_embeddings=True), {"tensor": 2, "pipeline": 4}),
        (shape_of("qwen3_32b"), {"tensor": 8, "pipeline": 4, "virtual_pipeline": 2}),
        (shape_of("qwen3_8b", **MIXTURE, num_hidden_layers=4), {"tensor": 2, "sequence": True, "expert": 8}),
        (shape_of("qwen3_8b", **MIXTURE, num_hidden_layers=8, decoder_sparse_step=2), {"pipeline": 2, "expert": 4}),
    ],
)
def test_stages_have_the_parameters_that_the_planner_counts(config: dict[str, Any], layout: dict[str, Any]):
    parallel = ParallelSettings(**layout)
    stages = parameters_of_stages(config, parallel, torch.bfloat16)
    counted = [rank_parameters(ModelShape.of(config), parallel, stage).total for stage in range(parallel.pipeline)]
    assert [sum(shape.numel() for shape, _ in stage.values()) for stage in stages] == counted


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--world", "0"], "argument --world: '0' is not an int above 0"),
        (["--world", "6"], "6 ranks do not divide into parallel.tensor=4; launch a multiple of 4"),
        (["--world", "8", "--model", "none"], "none holds no config.json; give the folder of a Hugging Face model"),
        (
            ["--world", "8", "--layers", "3", "--parallel.pipeline", "2"],
            "parallel.pipeline=2: does not divide the 3 layers; choose a divisor",
        ),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "config.json").write_text(json.dumps(shape_of("qwen3_8b")), encoding="utf-8")
    recipe = str(tiny.CHECKOUT / "examples" / "qwen3_8b" / "forking_20k.yaml")
    with pytest.raises(SystemExit) as stopped:
        command.main([recipe, "--model", str(tmp_path), *arguments], "rlvr rehearse")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA")
def test_a_torch_without_cuda_is_named_with_what_to_install(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text(json.dumps(shape_of("qwen3_8b")), encoding="utf-8")
    recipe = str(tiny.CHECKOUT / "examples" / "qwen3_8b" / "forking_20k.yaml")
    with pytest.raises(SystemExit) as stopped:
        command.main([recipe, "--model", str(tmp_path), "--world", "8"], "rlvr rehearse")
    assert stopped.value.code == 2
    assert "tools/install_rehearsal.sh FOLDER" in capsys.readouterr().err


# Outcomes ------------------------------------------------------------------------------------------------------------


def outcome_of(peak_gib: float, **fields: Any) -> Outcome:
    names = ("build", "train 1", "train 2", "save")
    phases = [PhaseOutcome(name, 1, int(peak_gib * 2**30), 1, 1, 1, [], []) for name in names]
    return Outcome(0, 0, phases, tokens=1024, rows=100, micro_batches=2, longest=1024, saved=1, **fields)


@pytest.mark.parametrize(
    ("outcome", "passed", "line"),
    [
        (outcome_of(71.0), True, "fits: at most 71.0 GiB of the 71.6 "),
        (outcome_of(72.0), False, "does not fit: at most 72.0 GiB of the 71.6 "),
        (outcome_of(1.0, failed="export", error="KeyError: 'x'"), False, "failed: export of rank 0"),
        (Outcome(0, 0, failed="start", error="its process ended with status 137"), False, "failed: start of rank 0"),
    ],
)
def test_a_rehearsal_fails_if_a_phase_does_or_the_peak_does_not_fit(outcome: Outcome, passed: bool, line: str):
    settings = load_settings(tiny.CHECKOUT / "examples" / "qwen3_32b" / "forking_20k.yaml", [])
    config = shape_of("qwen3_32b", num_hidden_layers=2)
    summary = Summary(settings, config, 32, DEVICES["h100"], transformer_engine=False, outcomes=(outcome,))
    text = as_text(summary)
    assert summary.passed is passed
    assert text.splitlines()[-1].startswith(line)
    assert outcome.error in text
    assert as_json(summary)["passed"] is passed


def test_this_file_is_collected_without_megatron():
    # Which would try to import Transformer Engine, whose Python raises where its libraries are missing.
    program = "import sys; sys.modules['megatron'] = None; import test_rehearsal"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, check=True)


def test_every_recipe_is_rehearsed_in_a_world_that_its_layout_divides():
    assert RECIPES
    for recipe in RECIPES:
        parallel = load_settings(recipe, []).parallel
        assert WORLDS[recipe.parent.name] % (parallel.tensor * parallel.pipeline * parallel.context) == 0, recipe


# Rehearsals ----------------------------------------------------------------------------------------------------------


def rehearse(
    recipe: Path, config: dict[str, Any], world: int, *flags: str, capsys: Any, folder: Path
) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    arguments = [str(recipe), "--model", str(folder), "--world", str(world), "--json", *flags]
    status = command.main(arguments, "rlvr rehearse")
    captured = capsys.readouterr()
    assert status == 0, captured.err[-4000:] or captured.out[-4000:]
    return json.loads(captured.out)


def check(result: dict[str, Any], waits_in_layers: tuple[str, ...] = (ROTARY,), *, reference: bool = False) -> None:
    """Every phase got through on every stage, the peak of training is the planner's, and layers do not wait.

    Args:
        waits_in_layers: Files in which a layer may make the CPU wait for the GPU.
        reference: True if the run has a reference model.
    """
    for rank in result["ranks"]:
        names = [phase["name"] for phase in rank["phases"]]
        assert names[:4] == ["ranks", "build", "weights", "optimizer"]
        assert names[4:] == ["reference"] * reference + ["score", "train 1", "train 2", "export", "save", "load"]
        assert abs(rank["planned_peak"] / rank["train_peak"] - 1) <= MOST_DIFFERENCE
        export, save, load = rank["phases"][-3:]
        assert 0 < save["host_peak"] - export["host"] <= 1.2 * rank["saved"]
        assert save["device_peak"] - export["device"] <= 2**30
        assert load["host_peak"] - save["host"] <= 2 * BOX_BYTES + SMALL_BYTES
        lines = {line for phase in rank["phases"][-6:-3] for _, line, in_layer, _ in phase["waits"] if in_layer}
        assert {line for line in lines if not line.startswith(waits_in_layers)} == set()


@cuda_build
@pytest.mark.soak
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipes_get_through_at_two_layers(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = recipe.parent.name
    check(rehearse(recipe, shape_of(model), WORLDS[model], "--layers", "2", capsys=capsys, folder=tmp_path))


@cuda_build
@pytest.mark.soak
@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("qwen3_8b", ()),
        ("qwen3_14b", ()),
        ("qwen3_32b", ()),
        ("qwen3_8b", ("--parallel.tensor", "2", "--parallel.context", "2")),
        ("qwen3_8b", ("--megatron.gradient_accumulation_fusion", "true")),
    ],
    ids=["8b", "14b", "32b", "context 2", "fused gradients"],
)
def test_transformer_engine_takes_our_arguments_and_no_layer_waits(
    model: str, flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = tiny.CHECKOUT / "examples" / model / "forking_20k.yaml"
    flags = ("--layers", "2", "--transformer-engine", *flags)
    result = rehearse(recipe, shape_of(model), WORLDS[model], *flags, capsys=capsys, folder=tmp_path)
    check(result, waits_in_layers=())


LAYOUTS = {
    "one rank": (1, ["--parallel.tensor", "1", "--parallel.sequence", "false"]),
    "context 2": (8, ["--parallel.tensor", "2", "--parallel.context", "2"]),
    "pipeline 2": (8, ["--parallel.tensor", "2", "--parallel.pipeline", "2"]),
    "pipeline 2 x 2": (8, ["--parallel.tensor", "2", "--parallel.pipeline", "2", "--parallel.virtual_pipeline", "2"]),
    "overlap": (8, ["--megatron.overlap_grad_reduce", "true"]),
}


@cuda_build
@pytest.mark.soak
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_get_through(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    world, flags = LAYOUTS[layout]
    recipe = tiny.CHECKOUT / "examples" / "qwen3_8b" / "forking_20k.yaml"
    layers = ["--layers", "4" if "pipeline" in layout else "2"]
    check(rehearse(recipe, shape_of("qwen3_8b"), world, *layers, *flags, capsys=capsys, folder=tmp_path))


@cuda_build
@pytest.mark.soak
def test_a_mixture_of_experts_gets_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = tiny.CHECKOUT / "examples" / "qwen3_8b" / "forking_20k.yaml"
    flags = ["--layers", "2", "--parallel.expert", "8", "--parallel.tensor", "2"]
    result = rehearse(recipe, shape_of("qwen3_8b", **MIXTURE), 8, *flags, capsys=capsys, folder=tmp_path)
    check(result, waits_in_layers=(ROTARY, "megatron/core/transformer/moe/"))
    assert any("topk" in guess for guess in result["ranks"][0]["guesses"])


@cuda_build
@pytest.mark.soak
def test_a_reference_is_loaded_and_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = tiny.CHECKOUT / "examples" / "qwen3_8b" / "forking_20k.yaml"
    flags = ["--layers", "2", "--loss.kl_coefficient", "0.001"]
    result = rehearse(recipe, shape_of("qwen3_8b"), 8, *flags, capsys=capsys, folder=tmp_path)
    check(result, reference=True)
    (rank,) = result["ranks"]
    optimizer, loaded = rank["phases"][3:5]
    parameters = rank_parameters(ModelShape.of(shape_of("qwen3_8b", num_hidden_layers=2)), PARALLEL_OF_8B, 0)
    assert loaded["device"] - optimizer["device"] == pytest.approx(2 * parameters.total, rel=0.001)


def test_a_layer_that_waits_is_found():
    phase = {"host": 0, "host_peak": 0, "device": 0, "device_peak": 0, "waits": []}
    names = ("ranks", "build", "weights", "optimizer", "score", "train 1", "train 2", "export", "save", "load")
    phases = [phase | {"name": name} for name in names]
    phases[8]["host_peak"] = 1
    rank = {"phases": phases, "planned_peak": 1.0, "train_peak": 1.0, "saved": 1}
    check({"ranks": [rank]})
    for line, in_layer, fails in (("x.py:1", False, False), (f"{ROTARY}:204", True, False), ("x.py:1", True, True)):
        phases[6]["waits"] = [("item", line, in_layer, 3)]
        with pytest.raises(AssertionError) if fails else contextlib.nullcontext():
            check({"ranks": [rank]})
