"""Part `threshold`: seconds and memory of the exact threshold on one GPU, beside other methods.

The methods are those of benchmarks/threshold.py in a world of one rank, so gathering costs the others next to nothing.
Entropies are exponentially distributed, of which a fifth is kept. The bandwidth counts one read of the entropies.
"""

import torch
import torch.distributed as dist
from gpu import join_alone, measure, percent, share_of_bandwidth
from rows import Rows, options_of
from threshold import METHODS, make_tokens

from megatron_rlvr.algo.quantile import ceil_fraction

COUNTS, SMALL = (10**6, 10**7, 10**8), (10**4,)
FRACTION = 0.2
CALLS = 5


def main() -> None:
    options = options_of(__doc__)
    rows = Rows(options.rows)
    join_alone(options.device)
    for count in SMALL if options.small else COUNTS:
        entropies, token_ids = (x.to(options.device) for x in make_tokens(0, count, 0.0))
        ours: float | None = None
        for name in METHODS:
            with rows.guarded(f"{name}, {count:,} entropies", peer=name != "ours"):
                seconds = one_method(rows, name, entropies, token_ids, ours)
                ours = seconds if name == "ours" else ours
        del entropies, token_ids
    dist.destroy_process_group()


def one_method(rows: Rows, name: str, entropies: torch.Tensor, token_ids: torch.Tensor, ours: float | None) -> float:
    """Measure a method and add its row; return its seconds."""
    method, count = METHODS[name], len(entropies)
    kept = int(method(entropies, token_ids, FRACTION)[0].sum())
    too_many = kept - ceil_fraction(FRACTION, count)
    measured = measure(entropies.device.type, lambda: method(entropies, token_ids, FRACTION), CALLS)
    share = share_of_bandwidth(entropies.nbytes, measured.seconds)
    memory = "" if measured.peak is None else f", {measured.peak / 2**30:.2f} GiB beyond the inputs"
    rows.add(
        f"{name}, {count:,} entropies",
        f"{1e3 * measured.seconds:.2f} ms{percent(share)}{memory}",
        beside=f"{measured.seconds / ours:.2f} x ours" if ours else "",
        note=f"keeps {too_many} too many" if too_many else "keeps the exact number",
        seconds=measured.seconds,
        share=share,
        peak=measured.peak,
        too_many=too_many,
    )
    if name == "ours" and too_many:
        raise ValueError(f"kept {kept} of {count}")
    return measured.seconds


if __name__ == "__main__":
    main()
