"""A whole training step beside TRL's GRPOTrainer: seconds by phase, tokens per CPU second, memory; on one CPU core.

    OMP_NUM_THREADS=1 python benchmarks/step.py [--cases short medium long] [--rounds 3] [--json FILE]

Both arms train the same random Qwen3 in fp32 on the same prompts: sample a rollout, score it (log-probabilities under
the policy before the update), and take two optimizer steps, each on the top 20 % of one half's tokens by entropy, with
DAPO's loss, no KL term, and the same Adam. Ours is this package's engine, policy and learner. TRL's is GRPOTrainer with
top_entropy_quantile 0.2, sampling by transformers' generate; it is installed as benchmarks/requirements.txt says.

Each arm has a process of one thread, and they take turns step by step, so that other work on the machine meets both.
Seconds are process time, each number the least of the rounds, after one step to warm up. The phases of a step are
    generation   sampling the responses,
    scoring      the pass without gradient over them,
    training     selection, forward, backward and the optimizer,
    other        decoding, rewards, advantages, packing or padding; ours also pushes its weights to its engine.
Peak MB is the peak memory of a process; "before" is the peak before the first step, mostly libraries. The line below
each table reports whether both arms did the same work. The exit status is always 0.

Cases:
    short    16 prompts x 8 samples x 64 tokens, 4 layers of 128, vocabulary 512
    medium   4 x 8 x 512, the same model
    long     1 x 4 x 2,048, 4 layers of 256, vocabulary 32,768; takes minutes
    tiny     2 x 4 x 8, to check that the program runs
"""

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from step_arms.workload import CASES, FRACTION, UPDATES, Case, write_model

ARMS = {"trl": "trl_trainer", "ours": "ours"}
FOLDER = Path(__file__).parents[1] / "build" / "peers"
INSTALL = "pip install --no-deps --target build/peers -r benchmarks/requirements.txt"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
PHASES = ("generation", "scoring", "training", "other", "total")
# metric, its label, digits after the point
ROWS = (
    *((phase, f"{phase}, s", 3) for phase in PHASES),
    ("tokens_per_second", "tokens per CPU second", 0),
    ("peak_mb", "peak MB", 0),
    ("before_mb", "  before the first step", 0),
)


def main() -> None:
    options = parse_options()
    os.environ.update(ENVIRONMENT)  # the processes of the arms inherit it
    results = []
    for name in options.cases:
        print(f"\n{name}: {CASES[name]}", flush=True)
        arms = run_case(CASES[name], options.rounds)
        print_table(CASES[name], arms)
        results.append({"case": name, "arms": arms, "differences": differences(CASES[name], arms)})
    if options.json:
        about = {"processor": platform.processor() or platform.machine(), "rounds": options.rounds}
        Path(options.json).write_text(json.dumps({**about, "results": results}, indent=2) + "\n", encoding="utf-8")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["short", "medium"], metavar="CASE")
    parser.add_argument("--rounds", type=int, default=3, help="steps of each arm after the one to warm up")
    parser.add_argument("--json", help="write the metrics to this file")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} measures nothing; give 1 or more")
    return options


# Running -------------------------------------------------------------------------------------------------------------


def run_case(case: Case, rounds: int) -> dict[str, dict[str, Any]]:
    """Return for each arm the metrics of `summary`, or ``why_not``."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        maker = context.Process(target=write_model, args=(case, Path(folder)))
        maker.start()
        maker.join()
        pipes, processes = {}, []
        for arm in ARMS:
            pipes[arm], there = context.Pipe()
            processes.append(context.Process(target=serve, args=(arm, case, folder, rounds + 1, there), daemon=True))
            processes[-1].start()
            there.close()
        answers = {arm: [answer(pipe)] for arm, pipe in pipes.items()}
        for _ in range(rounds + 1):
            for arm, pipe in pipes.items():
                if "why_not" not in answers[arm][-1]:
                    answers[arm].append(answer(pipe, wake=True))
        for process in processes:
            process.join()
    return {arm: summary(*of_arm) for arm, of_arm in answers.items()}


def serve(arm: str, case: Case, folder: str, steps: int, pipe: Connection) -> None:
    """Body of an arm's process. ``FOLDER`` is searched last, so its packages shadow no others."""
    warnings.simplefilter("ignore")
    if arm != "ours":
        sys.path.append(str(FOLDER))
    try:
        module = importlib.import_module(f"step_arms.{ARMS[arm]}")
    except ImportError as error:
        if arm == "ours":
            raise
        pipe.send({"why_not": f"{error}; to install it: {INSTALL}"})
        return
    module.run(case, folder, steps, pipe)


def answer(pipe: Connection, wake: bool = False) -> dict[str, Any]:
    """Receive an arm's next message; ``wake`` starts the step that it reports."""
    try:
        if wake:
            pipe.send(None)
        return pipe.recv()
    except (EOFError, OSError):
        return {"why_not": "it failed with the error above"}


def summary(setup: dict[str, Any], *steps: dict[str, Any]) -> dict[str, Any]:
    """Return an arm's metrics: the least seconds of all steps but the first, other metrics of the last step.

    ``first`` is the step that warmed up, and the only one whose weights are the same in both arms.
    """
    last = steps[-1] if steps else setup
    if "why_not" in last:
        return last
    least = {phase: min(step[phase] for step in steps[1:]) for phase in PHASES}
    return {**setup, **last, **least, "tokens_per_second": last["tokens"] / least["total"], "first": steps[0]}


# Judging and printing ------------------------------------------------------------------------------------------------


def differences(case: Case, arms: dict[str, dict[str, Any]]) -> list[str]:
    """Return a sentence for each respect in which an arm's work is not that of the case."""
    tokens = case.prompts * case.samples * case.response
    found = []
    for arm, row in arms.items():
        if "why_not" in row:
            continue
        if row["tokens"] != tokens:
            found.append(f"{arm} sampled {row['tokens']:,} tokens")
        if row["updates"] != UPDATES:
            found.append(f"{arm} took {row['updates']:.0f} optimizer steps")
        # TRL keeps all ties at its threshold, and all responses to a prompt begin with the same entropy.
        if abs(row["selected"] - FRACTION * tokens) > UPDATES * case.samples:
            found.append(f"{arm} selected {row['selected']:,.0f} tokens")
    entropies = [row["first"]["entropy"] for row in arms.values() if "why_not" not in row]
    if entropies and max(entropies) > 1.02 * min(entropies):
        found.append(f"mean entropies of the first rollouts are {', '.join(f'{e:.3f}' for e in entropies)} nats")
    return found


def print_table(case: Case, arms: dict[str, dict[str, Any]]) -> None:
    trl, ours = arms["trl"], arms["ours"]
    print(f"{'':<26}{'TRL ' + trl.get('version', ''):>12}{'ours':>10}{'TRL / ours':>12}")
    for key, label, digits in ROWS:
        cells = [f"{row[key]:,.{digits}f}" if key in row else "-" for row in (trl, ours)]
        ratio = f"{trl[key] / ours[key]:.2f}" if key in trl and key in ours else ""
        print(f"{label:<26}{cells[0]:>12}{cells[1]:>10}{ratio:>12}")
    absent = {arm: row["why_not"] for arm, row in arms.items() if "why_not" in row}
    for arm, why_not in absent.items():
        print(f"{arm} did not run: {why_not}")
    found = differences(case, arms)
    if found:
        print(f"NOT the work that was asked for: {'; '.join(found)}")
    elif not absent:
        print(
            f"the same work: {ours['tokens']:,} tokens sampled, {UPDATES} optimizer steps, "
            f"{trl['selected']:,.0f} and {ours['selected']:,.0f} tokens with a gradient"
        )


if __name__ == "__main__":
    main()
