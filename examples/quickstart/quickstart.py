"""Quickstart: train a base model, improve it by reinforcement learning, and evaluate the export with transformers.

    python examples/quickstart/quickstart.py        (or: make quickstart)

All output is written to runs/quickstart. A second run reuses the base model.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from toy_data import write_data

from megatron_rlvr.analysis.report import REPORT, write_report

HERE = Path(__file__).resolve().parent
PROCESSES = 2
COMPLETIONS_PER_PROBLEM = 8
MAX_RESPONSE_TOKENS = 110
console = Console(highlight=False)


def torchrun(*arguments: str) -> None:
    """Run a program on PROCESSES ranks and exit if it fails.

    Each rank has one thread: more threads than cores wait for each other by spinning, which is ten times slower.
    """
    console.print(f"[bold]torchrun --nproc-per-node {PROCESSES} {' '.join(arguments)}[/bold]", soft_wrap=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES), *arguments]
    finished = subprocess.run(command, env=environment, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


def accuracy_of_export(folder: Path, problems: list[dict[str, Any]]) -> float:
    """Return the accuracy of a Hugging Face model, loaded and sampled by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_rlvr.reward.math import math_reward
    from megatron_rlvr.types import Prompt

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    correct = 0
    for start in range(0, len(problems), 50):
        part = problems[start : start + 50]
        inputs = tokenizer([problem["prompt"] for problem in part], return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        outputs = model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=COMPLETIONS_PER_PROBLEM,
            max_new_tokens=MAX_RESPONSE_TOKENS,
        )
        texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in enumerate(texts):
            number = i // COMPLETIONS_PER_PROBLEM
            problem = part[number]
            prompt = Prompt(problem["id"], inputs["input_ids"][number].numpy(), problem["answer"], "quickstart")
            correct += math_reward(prompt, text)
    return correct / (len(problems) * COMPLETIONS_PER_PROBLEM)


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    table = Table(title="quickstart")
    table.add_column("result", no_wrap=True)
    table.add_column("value", justify="right", overflow="fold")
    for name, value in (
        ("accuracy of the base model", f"{summary['accuracy_before']:.3f}"),
        ("accuracy after training", f"{summary['accuracy_after']:.3f}"),
        ("accuracy of the export in transformers", f"{summary['accuracy_reloaded']:.3f}"),
        ("training steps", str(summary["steps"])),
        ("total seconds", f"{summary['seconds']:.0f}"),
        ("exported model", summary["export"]),
        ("metrics of each step", str(folder / "metrics.jsonl")),
        ("the run to look at, in a browser", str(folder / REPORT)),
    ):
        table.add_row(name, value)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a base model, then improve it by reinforcement learning.")
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart"), help="folder for all output")
    parser.add_argument("--sequences", type=int, default=28_000, help="training sequences of the base model")
    parser.add_argument("--steps", type=int, default=40, help="reinforcement learning steps")
    parser.add_argument("--problems", type=int, default=150, help="held-out problems for evaluation")
    options = parser.parse_args()

    started = time.perf_counter()
    folder: Path = options.folder
    base, data = folder / "base_model", folder / "data"
    folder.mkdir(parents=True, exist_ok=True)
    write_data(data, held_out=options.problems)
    if (base / "model.safetensors").is_file():
        console.print(f"reusing the base model in {base}", soft_wrap=True)
    else:
        torchrun(str(HERE / "make_base.py"), str(base), "--sequences", str(options.sequences))
    torchrun(
        *("-m", "megatron_rlvr.train", str(HERE / "config.yaml")),
        *("--run.dir", str(folder), "--run.steps", str(options.steps), "--model.path", str(base)),
        *("--data.train", str(data / "train.jsonl"), "--evaluate.sets", str(data / "held_out.jsonl")),
    )
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    console.print("evaluating the exported model with transformers")
    lines = (data / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    summary["accuracy_reloaded"] = accuracy_of_export(Path(summary["export"]), [json.loads(line) for line in lines])
    summary["seconds"] = round(time.perf_counter() - started, 1)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    write_report([folder], folder / REPORT)
    print_summary(summary, folder)


if __name__ == "__main__":
    main()
