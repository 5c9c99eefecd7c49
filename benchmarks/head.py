"""Seconds and memory of the head (hidden states to log-probability and entropy, and back), beside other methods.

    OMP_NUM_THREADS=1 python benchmarks/head.py [--shape 4096,1024,32768] [--dtype float32] [--tensor 1] [--json FILE]

The loss is minus the sum of the log-probabilities of a random fifth of the rows (--fraction). Every method is first
compared with float64 on a small input. Methods take turns, each call in a fresh process: seconds are process time of
one thread, the best of the rounds, because other work on the machine only ever adds to a time. Peak memory is the
memory that the call, forward and backward, adds to a process with the inputs; "beyond" excludes the two gradients that
it returns. With --tensor 2 the vocabulary is sharded over two ranks, and each metric is that of the worse rank. Peers
that are not installed, or cannot run here, are listed with the reason. The bars are this project's own, set for
float32; the exit status is 0 whether they are met or not.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import multiprocessing
import platform
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from head_methods import METHODS, Inputs, Outcome, largest_errors, make_inputs

DEFAULT_SHAPES = [(4096, 1024, 32768), (2048, 1024, 151936)]
# Large enough for several tiles or chunks of every method except TRL's, whose chunk exceeds any small input.
CHECK_SHAPE = (1200, 64, 6002)
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.5}
MEGABYTE = 2**20

# Name of the bar, its metric, the metric that divides it (None: nothing), limit.
BARS = (
    ("mode A / Megatron + entropy", ("a", "seconds"), ("megatron", "seconds"), 0.55),
    ("mode A / naive", ("a", "seconds"), ("naive", "seconds"), 0.52),
    ("mode B / mode A", ("b", "seconds"), ("a", "seconds"), 0.62),
    ("backward of selected / of all rows", ("a", "backward"), ("dense", "backward"), 0.28),
    ("forward / product alone", ("a", "forward"), ("product", "forward"), 1.3),
    ("MB of mode A beyond the gradients", ("a", "beyond_mb"), None, 64.0),
)


def main() -> None:
    options = parse_options()
    results = []
    for shape in options.shape or DEFAULT_SHAPES:
        print(f"\nS {shape[0]:,}  H {shape[1]:,}  V {shape[2]:,}  {options.dtype}  tensor {options.tensor}", flush=True)
        methods = run_shape(shape, options)
        bars = judge(methods)
        print_table(methods, bars)
        results.append({"shape": list(shape), "methods": methods, "bars": bars})
    if options.json:
        about = {"torch": torch.__version__, "processor": platform.processor() or platform.machine()}
        settings = {name: getattr(options, name) for name in ("dtype", "tensor", "rounds", "fraction")}
        Path(options.json).write_text(json.dumps({**about, **settings, "results": results}, indent=2), encoding="utf-8")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape",
        type=_shape,
        action="append",
        help="S,H,V (rows, hidden size, vocabulary); may be repeated; default: two shapes",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tensor", type=int, choices=[1, 2], default=1, help="ranks that share the vocabulary")
    parser.add_argument(
        "--rounds", type=int, default=1, help="number of calls, of which the best counts; use 3 for results to keep"
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--fraction", type=float, default=0.2, help="share of the rows that carry a gradient")
    parser.add_argument("--json", help="write the metrics to this file")
    return parser.parse_args()


def _shape(text: str) -> tuple[int, ...]:
    numbers = tuple(int(number) for number in text.split(","))
    if len(numbers) != 3 or min(numbers) < 2 or numbers[2] % 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not S,H,V with an even V; write it like 4096,1024,32768")
    return numbers


def run_shape(shape: tuple[int, int, int], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Metrics of each method, the best of the rounds, or ``why_not``."""
    metrics: dict[str, dict[str, Any]] = {}
    for _ in range(options.rounds):
        for name in options.methods:
            again = _worst(on_ranks(options.tensor, measure, name, shape, options.dtype, options.fraction))
            row = metrics.setdefault(name, again)
            row |= {key: min(value, again[key]) for key, value in row.items() if isinstance(value, float)}
    for row in metrics.values():
        if "seconds" in row and "seconds" in metrics.get("a", {}):
            row["times_mode_a"] = row["seconds"] / metrics["a"]["seconds"]
    return metrics


def on_ranks(size: int, task: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run ``task(*arguments, group)`` in ``size`` new processes that form one group; return the results by rank."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(size, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        store = Path(folder, "store").as_uri()
        return [f.result() for f in [pool.submit(_join, rank, size, store, task, *arguments) for rank in range(size)]]


def _join(rank: int, size: int, store: str, task: Callable[..., Any], *arguments: Any) -> Any:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    try:
        answer = task(*arguments, dist.group.WORLD)
        dist.barrier()  # a rank that exits before another has finished connecting would break its connection
        return answer
    finally:
        dist.destroy_process_group()


def measure(
    name: str, shape: tuple[int, int, int], dtype_name: str, fraction: float, group: dist.ProcessGroup
) -> dict[str, Any]:
    """Check a method, so that libraries also load what they need at first use, then measure one call of it.

    Returns: label, errors, agrees; seconds, forward, backward; peak_mb, gradients_mb, beyond_mb if there is a
    backward. Or label and why_not, if it cannot run.
    """
    method, dtype = METHODS[name], getattr(torch, dtype_name)
    if dist.get_world_size(group) > 1 and not method.tensor_parallel:
        return {"label": method.label, "why_not": "it has no tensor-parallel form"}
    small = make_inputs(CHECK_SHAPE, dtype, fraction, group)
    try:
        run = method.load()
        outcome, _, _ = call(run, small)
    except Exception as error:
        if not method.peer:
            raise
        return {"label": method.label, "why_not": f"{type(error).__name__}: {error}".splitlines()[0]}
    errors = largest_errors(method, outcome, small)
    agrees = max(errors.values(), default=0.0) <= TOLERANCE[dtype]
    del small, outcome

    inputs = make_inputs(shape, dtype, fraction, group)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(
        0
    )  # memory that is free but not returned to the system would hide as much of the peak
    with peak_of_process() as peak:
        _, forward, backward = call(run, inputs)
    metrics: dict[str, Any] = {"label": method.label, "errors": errors, "agrees": agrees}
    metrics |= {"seconds": forward + backward, "forward": forward, "backward": backward}
    if method.backward:
        gradients = sum(x.grad.nbytes for x in (inputs.hidden, inputs.weight) if x.grad is not None) / MEGABYTE
        whole = peak[0] / MEGABYTE
        metrics |= {"peak_mb": whole, "gradients_mb": gradients, "beyond_mb": whole - gradients}
    return metrics


def call(run: Callable[[Inputs], Outcome], inputs: Inputs) -> tuple[Outcome, float, float]:
    """Run forward and backward once; return the outcome and the seconds of process time of each.

    Gradients are accumulated in ``.grad``.
    """
    dist.barrier(inputs.group)
    start = time.process_time()
    outcome = run(inputs)
    middle = time.process_time()
    if outcome.loss is not None:
        outcome.loss.backward()
    return outcome, middle - start, time.process_time() - middle


@contextlib.contextmanager
def peak_of_process() -> Iterator[list[int]]:
    """Yield a list that on exit gets one number: the most bytes resident, minus those resident before.

    Linux's high-water mark is reset first, since ru_maxrss of a process would include the import of torch.
    """
    Path("/proc/self/clear_refs").write_text("5")
    peak: list[int] = []
    before = _resident("VmRSS")
    yield peak
    peak.append(_resident("VmHWM") - before)


def _resident(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def _worst(by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the metrics of ranks: the largest of each float, any other value from rank 0."""
    merged: dict[str, Any] = {}
    for key, value in by_rank[0].items():
        if isinstance(value, dict):
            merged[key] = _worst([metrics[key] for metrics in by_rank])
        elif isinstance(value, float):
            merged[key] = max(metrics[key] for metrics in by_rank)
        else:
            merged[key] = value
    return merged


def judge(methods: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Bars whose metrics were measured, each with its value and whether it is met."""
    bars = []
    for name, (method, metric), below, limit in BARS:
        value = methods.get(method, {}).get(metric)
        divisor = 1.0 if below is None else methods.get(below[0], {}).get(below[1])
        if value is not None and divisor is not None:
            bars.append({"name": name, "value": value / divisor, "limit": limit, "holds": value / divisor <= limit})
    return bars


def print_table(methods: dict[str, dict[str, Any]], bars: list[dict[str, Any]]) -> None:
    head = ("", "seconds", "x mode A", "forward", "backward", "peak MB", "beyond", "largest error")
    print("{:<36}{:>9}{:>10}{:>9}{:>10}{:>9}{:>9}{:>15}".format(*head))
    for name, row in methods.items():
        note = f"  ({METHODS[name].note})" if METHODS[name].note else ""
        if "why_not" in row:
            print(f"{row['label']:<36}did not run: {row['why_not']}{note}")
            continue
        line = f"{row['label']:<36}{row['seconds']:>9.2f}{_cell(row, 'times_mode_a', 2):>10}"
        line += f"{row['forward']:>9.2f}{row['backward']:>10.2f}"
        line += f"{_cell(row, 'peak_mb', 0):>9}{_cell(row, 'beyond_mb', 0):>9}"
        line += f"{max(row['errors'].values()):>15.1e}" if row["errors"] else " " * 15
        print(line + ("" if row["agrees"] else "  WRONG") + note)
    gradients = {round(row["gradients_mb"]) for row in methods.values() if "gradients_mb" in row}
    if gradients:
        print(f"gradients of hidden and weight: {', '.join(map(str, sorted(gradients)))} MB, in every peak")
    for bar in bars:
        print(f"{bar['name']:<36}{bar['value']:>9.2f}  bar {bar['limit']:g}  {'pass' if bar['holds'] else 'MISS'}")


def _cell(row: dict[str, Any], key: str, digits: int) -> str:
    return f"{row[key]:.{digits}f}" if key in row else ""


if __name__ == "__main__":
    main()
