"""Seconds and memory of the head (hidden states to log-probability and entropy, and back), beside what others use.

    OMP_NUM_THREADS=1 python benchmarks/head.py [--shape 4096,1024,32768] [--dtype float32] [--tensor 1] [--json FILE]

The loss is minus the sum of the log-probabilities of a random fifth of the rows (--fraction). Every method is first
held against float64 on a small input. Methods take turns, each call in a fresh process: seconds are process time of
one thread, the best of the rounds, because other work on the machine only ever adds to a time. Peak memory is what the
call, forward and backward, adds to the process with the inputs; "beyond" leaves out the two gradients it returns.
With --tensor 2 the vocabulary is shared by two ranks, and a figure is that of the worse one. A peer that is not
installed is named, and so is one that cannot run here. The bars are this project's own, set for float32; the exit
status is 0 whether they hold or not.
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
# Several of everyone's tiles and chunks except TRL's, of which no small input has more than one.
CHECK_SHAPE = (1200, 64, 6002)
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.5}
MEGABYTE = 2**20

# name of the bar, what is divided or looked up, limit
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
    parser.add_argument("--shape", type=_shape, action="append", help="S,H,V; may be repeated; default: two shapes")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tensor", type=int, choices=[1, 2], default=1, help="ranks that share the vocabulary")
    parser.add_argument("--rounds", type=int, default=1, help="the best of so many calls; 3 for figures to keep")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--fraction", type=float, default=0.2, help="of the rows that carry a gradient")
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args()


def _shape(text: str) -> tuple[int, ...]:
    numbers = tuple(int(number) for number in text.split(","))
    if len(numbers) != 3 or min(numbers) < 2 or numbers[2] % 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not S,H,V with an even V, as in 4096,1024,32768")
    return numbers


def run_shape(shape: tuple[int, int, int], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Figures of each method, the best of the rounds, or ``why_not``."""
    figures: dict[str, dict[str, Any]] = {}
    for _ in range(options.rounds):
        for name in options.methods:
            again = _worst(on_ranks(options.tensor, measure, name, shape, options.dtype, options.fraction))
            row = figures.setdefault(name, again)
            row |= {key: min(value, again[key]) for key, value in row.items() if isinstance(value, float)}
    for row in figures.values():
        if "seconds" in row and "seconds" in figures.get("a", {}):
            row["times_mode_a"] = row["seconds"] / figures["a"]["seconds"]
    return figures


def on_ranks(size: int, task: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``task`` on fresh processes that form one group, and what each returned; it gets the group as last argument."""
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
        dist.barrier()  # a rank that leaves before another has finished connecting would break its connection
        return answer
    finally:
        dist.destroy_process_group()


def measure(
    name: str, shape: tuple[int, int, int], dtype_name: str, fraction: float, group: dist.ProcessGroup
) -> dict[str, Any]:
    """Checks a method, which also makes libraries load what they need at first use, then times one call of it.

    Returns: label, errors, agrees; seconds, forward, backward; peak_mb, gradients_mb, beyond_mb where there is a
    backward. Or label and why_not.
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
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free but still ours would hide as much of the peak
    with peak_of_process() as peak:
        _, forward, backward = call(run, inputs)
    figures: dict[str, Any] = {"label": method.label, "errors": errors, "agrees": agrees}
    figures |= {"seconds": forward + backward, "forward": forward, "backward": backward}
    if method.backward:
        gradients = sum(x.grad.nbytes for x in (inputs.hidden, inputs.weight) if x.grad is not None) / MEGABYTE
        whole = peak[0] / MEGABYTE
        figures |= {"peak_mb": whole, "gradients_mb": gradients, "beyond_mb": whole - gradients}
    return figures


def call(run: Callable[[Inputs], Outcome], inputs: Inputs) -> tuple[Outcome, float, float]:
    """Forward and backward once, and the seconds of process time of each; gradients are left in ``.grad``."""
    dist.barrier(inputs.group)
    start = time.process_time()
    outcome = run(inputs)
    middle = time.process_time()
    if outcome.loss is not None:
        outcome.loss.backward()
    return outcome, middle - start, time.process_time() - middle


@contextlib.contextmanager
def peak_of_process() -> Iterator[list[int]]:
    """Yields a list that afterwards holds one number: the most bytes resident, beyond those resident before.

    Linux's high-water mark is set back first: ru_maxrss of a process would remember what importing torch took.
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


def _worst(of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The ranks' figures as one: the largest of each number, anything else as rank 0 has it."""
    merged: dict[str, Any] = {}
    for key, value in of_ranks[0].items():
        if isinstance(value, dict):
            merged[key] = _worst([figures[key] for figures in of_ranks])
        elif isinstance(value, float):
            merged[key] = max(figures[key] for figures in of_ranks)
        else:
            merged[key] = value
    return merged


def judge(methods: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The bars whose figures were measured, each with its value and whether it holds."""
    bars = []
    for name, (method, figure), below, limit in BARS:
        value = methods.get(method, {}).get(figure)
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
