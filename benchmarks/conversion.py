"""Time and memory of converting a Hugging Face folder to a Megatron checkpoint and back, compared with mbridge.

    OMP_NUM_THREADS=1 python benchmarks/conversion.py [--cases 0.1B 0.6B] [--rounds 2] [--json FILE]

The models are random Qwen3 models in bfloat16, in safetensors files of 1 GB, converted on a CPU. Both programs convert
such a folder to a checkpoint in Megatron's format torch_dist, and that checkpoint back to a folder. "ours" is the code
of the two tools. mbridge fills a model in memory and yields a model's weights; as its users do, the checkpoint is
written and read by Megatron's dist_checkpointing. benchmarks/requirements.txt says how to install it. mbridge expects
Transformer Engine's layers, which need a GPU: here its configuration is used with Megatron's own layers, and the names
of two norms are added to its table.

Each conversion runs in its own process with one thread, and the programs alternate. Results are per GB of weights. "CPU
s" is process time including child processes, "s" is wall-clock time, both the minimum over the rounds. "peak MB" is the
peak memory of the process, "libraries" the peak before the conversion. The last lines say whether the final folder
holds the original weights, bit by bit. The exit status is always 0.

Cases: 0.1B (8 layers of 1,024, vocabulary 32,768), 0.6B and 1.7B (Qwen3's), tiny (for a quick check).
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "build" / "peers"
INSTALL = "pip install --no-deps --target build/peers -r benchmarks/requirements.txt"
# hidden size, feed-forward size, layers, query heads, vocabulary
CASES = {
    "tiny": (64, 128, 2, 4, 512),
    "0.1B": (1024, 3072, 8, 16, 32_768),
    "0.6B": (1024, 3072, 28, 16, 151_936),
    "1.7B": (2048, 6144, 28, 16, 151_936),
}
DIRECTIONS = ("to Megatron", "to Hugging Face")
ROWS = (
    ("cpu_seconds_per_gb", "CPU s per GB", 2),
    ("seconds_per_gb", "s per GB", 2),
    ("peak_mb", "peak MB", 0),
    ("libraries_mb", "  libraries", 0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["0.1B", "0.6B"], metavar="CASE")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", help="write the results to this file")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: must be at least 1")
    os.environ["OMP_NUM_THREADS"] = "1"  # the processes inherit it
    results = []
    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            results.append({"case": case, **run_case(case, Path(folder), options.rounds)})
        print_table(results[-1])
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


# Running -------------------------------------------------------------------------------------------------------------


def run_case(case: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Return sizes of the model, and for each program the results of both directions, or ``why_not``."""
    sizes = in_process(write_model, case, folder / "model")
    arms: dict[str, dict[str, Any]] = {arm: {direction: [] for direction in DIRECTIONS} for arm in ("ours", "mbridge")}
    for _ in range(rounds):
        for arm, row in arms.items():
            if "why_not" in row:
                continue
            for direction in DIRECTIONS:
                done = in_process(convert, arm, direction, folder)
                if "why_not" in done:
                    row["why_not"] = done["why_not"]
                    break
                row[direction].append(done)
            else:
                row["same"] = in_process(same_weights, folder / "model", folder / arm / "back")
            shutil.rmtree(folder / arm, ignore_errors=True)
    for row in arms.values():
        if "why_not" not in row:
            row |= {direction: summary(row[direction], sizes["gb"]) for direction in DIRECTIONS}
    return {**sizes, "arms": arms}


def summary(rounds: list[dict[str, float]], gb: float) -> dict[str, float]:
    least = {key: min(each[key] for each in rounds) for key in rounds[0]}
    return {
        "cpu_seconds_per_gb": least["cpu_seconds"] / gb,
        "seconds_per_gb": least["seconds"] / gb,
        "peak_mb": least["peak_mb"],
        "libraries_mb": least["libraries_mb"],
    }


def in_process(function: Any, *arguments: Any) -> Any:
    """Return the result of a function that is called in a fresh process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return {"why_not": "it failed with the error above"}
    finally:
        process.join()


def _answer(pipe: Connection, function: Any, arguments: Any) -> None:
    warnings.simplefilter("ignore")  # warnings of megatron-core about missing GPU libraries
    pipe.send(function(*arguments))


def write_model(case: str, folder: Path) -> dict[str, float]:
    import torch

    from megatron_rlvr.hf.families import rows_of, tensor_shapes
    from megatron_rlvr.hf.weights import write_folder

    hidden, feed_forward, layers, heads, vocabulary = CASES[case]
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 128,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    source = folder.with_name("source")
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    named = [pair for (r,) in rows_of(config) for pair in zip(r.hugging_face, tensor_shapes(r, config), strict=True)]
    write_folder(folder, source, ((n, torch.randn(shape).bfloat16()) for n, shape in named), file_bytes=10**9)
    count = sum(torch.Size(shape).numel() for _, shape in named)
    return {"parameters": count, "gb": 2 * count / 1e9, "largest_mb": 2 * vocabulary * hidden / 2**20}


def same_weights(one: Path, other: Path) -> bool:
    import torch

    from megatron_rlvr.hf.weights import TensorReader

    first, second = TensorReader(one), TensorReader(other)
    return first.names() == second.names() and all(torch.equal(first.read(n), second.read(n)) for n in first.names())


def convert(arm: str, direction: str, folder: Path) -> dict[str, Any]:
    """Run one conversion in this process and return its results."""
    out = folder / arm
    try:
        work = (ours if arm == "ours" else mbridge)(direction, folder / "model", out)
        next(work)
    except ImportError as error:
        return {"why_not": f"{error}; to install it: {INSTALL}"}
    libraries, cpu, clock = peak_mb(), cpu_seconds(), time.perf_counter()
    next(work, None)
    return {
        "cpu_seconds": cpu_seconds() - cpu,
        "seconds": time.perf_counter() - clock,
        "peak_mb": peak_mb(),
        "libraries_mb": libraries,
    }


def cpu_seconds() -> float:
    """Return the CPU time of this process and its reaped children."""
    return sum(os.times()[:4])


def peak_mb() -> float:
    """Return the peak memory of this process; getrusage would include that of its parent."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert match
    return int(match[1]) / 1024


# Programs: they load their libraries, yield, then convert ------------------------------------------------------------


def ours(direction: str, model: Path, out: Path) -> Iterator[None]:
    from megatron_rlvr.convert.conversion import to_hugging_face, to_megatron

    yield
    if direction == "to Megatron":
        to_megatron(model, out / "checkpoint")
    else:
        to_hugging_face(out / "checkpoint", out / "back", file_bytes=10**9)


def mbridge(direction: str, model: Path, out: Path) -> Iterator[None]:
    """Convert with mbridge; ``FOLDER`` is last in the path, so that its packages shadow nothing."""
    sys.path.append(str(FOLDER))
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_rlvr.config import ParallelSettings
    from megatron_rlvr.distributed import process_group
    from megatron_rlvr.distributed.ranks import initialize_ranks

    initialize_ranks(ParallelSettings(), timeout_minutes=10)
    from mbridge import AutoBridge

    yield
    bridge = AutoBridge.from_pretrained(str(model))
    layer = "model.layers.{layer_number}."
    bridge._OTHER_MAPPING = {"input_layernorm.weight": [layer + "input_layernorm.weight"]}
    bridge._MLP_MAPPING = bridge._MLP_MAPPING | {
        "pre_mlp_layernorm.weight": [layer + "post_attention_layernorm.weight"]
    }
    bridge.set_extra_args(use_cpu_initialization=True, perform_initialization=False)
    gpt = GPTModel(
        bridge.config,
        get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm"),
        vocab_size=bridge.hf_config.vocab_size,
        max_sequence_length=bridge.hf_config.max_position_embeddings,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
    ).bfloat16()
    gpt.requires_grad_(False)
    checkpoint = out / "checkpoint"
    if direction == "to Megatron":
        bridge.load_weights([gpt], str(model), memory_efficient=True)
        checkpoint.mkdir(parents=True)
        dist_checkpointing.save({"model": gpt.sharded_state_dict()}, str(checkpoint))
    else:
        loaded = dist_checkpointing.load({"model": gpt.sharded_state_dict()}, str(checkpoint))
        gpt.load_state_dict(loaded["model"])
        bridge.safetensor_io = bridge._get_safetensor_io(str(model))
        bridge.save_weights([gpt], str(out / "back"))
    process_group.shut_down()


# Printing ------------------------------------------------------------------------------------------------------------


def print_table(result: dict[str, Any]) -> None:
    arms = result["arms"]
    print(
        f"\n{result['case']}: {result['parameters'] / 1e6:,.0f} million parameters, {result['gb']:.2f} GB, the largest "
        f"tensor {result['largest_mb']:,.0f} MB"
    )
    for direction in DIRECTIONS:
        print(f"{direction:<24}{'mbridge ' + peer_version():>16}{'ours':>10}{'mbridge / ours':>16}")
        for key, label, digits in ROWS:
            results = [arms[arm][direction][key] if "same" in arms[arm] else None for arm in ("mbridge", "ours")]
            cells = ["-" if value is None else f"{value:,.{digits}f}" for value in results]
            ratio = f"{results[0] / results[1]:.2f}" if None not in results and results[1] else ""
            print(f"{label:<24}{cells[0]:>16}{cells[1]:>10}{ratio:>16}", flush=True)
    for arm, row in arms.items():
        if "why_not" in row:
            print(f"{arm} did not run: {row['why_not']}")
        else:
            print(f"{arm}: {'the weights are unchanged' if row['same'] else 'the weights are NOT unchanged'}")


def peer_version() -> str:
    found = importlib.metadata.distributions(name="mbridge", path=[*sys.path, str(FOLDER)])
    return next((one.version for one in found), "")


if __name__ == "__main__":
    main()
