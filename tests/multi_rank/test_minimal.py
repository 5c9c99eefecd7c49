"""The readable page examples/minimal.py takes the same step as the trainer."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny
import torch
from launcher import Ranks
from policy_runs import SHAPE, Run, trained
from reference_training import Recipe, make_groups

PAGE = tiny.CHECKOUT / "examples" / "minimal.py"
GROUPS = make_groups(12, 150, seed=5)


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal", PAGE)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    sys.modules["minimal"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def test_the_page_is_short():
    assert len(PAGE.read_text(encoding="utf-8").splitlines()) <= 250


def test_a_step_of_the_page_is_a_step_of_the_trainer(ranks: Ranks, page: ModuleType, tmp_path: Path):
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(3)
    Qwen3ForCausalLM(Qwen3Config(**SHAPE)).save_pretrained(tmp_path)
    recipe = Recipe(
        steps=1,
        mini_batch_groups=page.PROMPTS_PER_MINI_BATCH,
        learning_rate=page.LEARNING_RATE,
        warmup_steps=0,
        weight_decay=0.0,
        clip_grad=page.CLIP_GRAD,
        betas=page.BETAS,
        clip_low=page.CLIP_LOW,
        clip_high=page.CLIP_HIGH,
        dual_clip=page.DUAL_CLIP,
        fraction=page.FRACTION,
    )
    (trainer,) = ranks.run(trained, 1, Run(str(tmp_path), GROUPS, recipe))

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=page.LEARNING_RATE, betas=page.BETAS, eps=recipe.eps, weight_decay=0.0
    )
    groups = [
        [
            page.Response(torch.tensor(prompt), torch.tensor(ids), float(advantage))
            for ids, advantage in zip(responses, page.grpo_advantages(np.array(rewards)), strict=True)
        ]
        for prompt, responses, rewards in GROUPS
    ]
    reports = page.train_step(model, optimizer, groups)

    assert [report["selected"] for report in reports] == list(map(len, trainer.kept))
    assert [report["loss"] for report in reports] == pytest.approx(trainer.loss, rel=1e-4, abs=1e-6)
    assert [report["grad_norm"] for report in reports] == pytest.approx(trainer.grad_norm, rel=1e-4)
    start = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for name, weight in trainer.weights.items():
        found = model.state_dict()[name]
        assert (found - weight).abs().max() < 1e-6, name
        assert (found - start[name]).abs().max() > 1e-5, f"{name} has not been trained"
