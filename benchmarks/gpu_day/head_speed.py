"""Part `head`: seconds, memory and share of the peak of the output layer's head, beside other methods.

20,480 rows of width 5,120 and an eighth of Qwen3's vocabulary, in bf16: a rank of a 32B model under tensor parallel 8.
The loss is over a random fifth of the rows. Each method is first compared with float64 on small inputs. Peers that are
not installed (benchmarks/requirements.txt) or fail are rows with the reason.

The share of the peak counts the products that a method has to compute: one for the logits of each row, and three for
each row that has a gradient (the logits again, and the gradients of hidden state and weight), two where the logits of
the forward pass were kept.
"""

import torch
import torch.distributed as dist
from gpu import join_alone, measure, percent, share_of_peak
from head_methods import METHODS, Inputs, Method, largest_errors, make_inputs
from rows import Rows, options_of

SHAPE, SMALL = (20_480, 5_120, 151_936 // 8), (64, 32, 128)
CHECK, SMALL_CHECK = (1200, 64, 6002), (64, 32, 128)
FRACTION = 0.2
TOLERANCE = 0.5  # of bf16, as in benchmarks/head.py
CALLS = 5
# Products of [S, H] and [H, V] that a method computes; the others keep logits, and compute both gradients of all rows.
PRODUCTS = {"a": 1 + 3 * FRACTION, "b": 4 * FRACTION, "dense": 4.0, "product": 1.0}
KEPT_LOGITS = 3.0
FOR_A_TRIAL = ("a", "b", "naive")


def main() -> None:
    options = options_of(__doc__)
    rows = Rows(options.rows)
    join_alone(options.device)
    group = dist.group.WORLD
    small, shape = (SMALL_CHECK, SMALL) if options.small else (CHECK, SHAPE)
    check, inputs = (
        make_inputs(size, torch.bfloat16, FRACTION, group, device=options.device) for size in (small, shape)
    )
    ours: float | None = None
    for name in FOR_A_TRIAL if options.small else METHODS:
        with rows.guarded(METHODS[name].label, METHODS[name].peer):
            seconds = one_method(rows, name, check, inputs, ours)
            ours = seconds if name == "a" else ours
    dist.destroy_process_group()


def one_method(rows: Rows, name: str, check: Inputs, inputs: Inputs, ours: float | None) -> float:
    """Check and measure a method and add its row; return its seconds."""
    method = METHODS[name]
    run = method.load()
    outcome = run(check)
    if outcome.loss is not None:
        outcome.loss.backward()
    error = max(largest_errors(method, outcome, check).values(), default=0.0)
    _forget_gradients(check)

    def call() -> None:
        result = run(inputs)
        if result.loss is not None:
            result.loss.backward()
        _forget_gradients(inputs)

    measured = measure(inputs.hidden.device.type, call, CALLS)
    share = share_of_peak(_operations(name, inputs), measured.seconds)
    memory = "" if measured.peak is None else f", {measured.peak / 2**30:.2f} GiB beyond the inputs"
    rows.add(
        method.label,
        f"{1e3 * measured.seconds:.1f} ms{percent(share)}{memory}",
        beside=f"{measured.seconds / ours:.2f} x mode A" if ours else "",
        note=_note(method, error),
        seconds=measured.seconds,
        share=share,
        peak=measured.peak,
        error=error,
    )
    if error > TOLERANCE:
        raise ValueError(f"differs from float64 by {error:.2g}")
    return measured.seconds


def _forget_gradients(inputs: Inputs) -> None:
    inputs.hidden.grad = inputs.weight.grad = None


def _operations(name: str, inputs: Inputs) -> float:
    rows, width = inputs.hidden.shape
    return 2.0 * rows * width * len(inputs.weight) * PRODUCTS.get(name, KEPT_LOGITS)


def _note(method: Method, error: float) -> str:
    compared = f"largest error against float64 {error:.1g}" if method.backward else ""
    return "; ".join(filter(None, (compared, method.note)))


if __name__ == "__main__":
    main()
