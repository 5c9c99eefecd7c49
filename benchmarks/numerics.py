"""Print the measured tables of docs/numerics.md.

    OMP_NUM_THREADS=1 python benchmarks/numerics.py [entropy] [mask] [ceiling] [threshold] [scope] [sums]

Without a name, print all of them (about two minutes of one core, most of it float64 logits at vocabulary 151,936). All
inputs are synthetic and seeded: tokens of a model that is mostly certain, with a fifth of forks.
"""

import argparse
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlvr.algo import tiles
from megatron_rlvr.algo.head import vocab_parallel_logp_entropy
from megatron_rlvr.algo.quantile import ceil_fraction, global_top_fraction_mask

VOCABULARY = 151_936
FRACTION = 0.2


# ---- entropy of given logits ----------------------------------------------------------------------------------------


def entropy_tables() -> None:
    rows = {
        "flat: normal, deviation 1": torch.randn(64, VOCABULARY),
        "fork: five candidates near the top": peaked_rows(torch.linspace(0, 2, 64), 24.0),
        "sure: gap 8 .. 12": peaked_rows(torch.linspace(8, 12, 64), 36.0),
        "certain: gap 14 .. 20": peaked_rows(torch.linspace(14, 20, 64), 44.0),
        "certain, all logits + 1000": peaked_rows(torch.linspace(14, 20, 64), 1044.0, 1000.0),
    }
    formulas: dict[str, Callable[[Tensor], Tensor]] = {
        "ln s - u/s, in tiles": in_tiles,
        "lse - E[z]": log_sum_exp_minus_mean,
        "-sum p ln p": minus_p_log_p,
    }
    print(row_of("rows", "entropy", *(f"{name}: largest error" for name in formulas), "lse - E[z] <= 0"))
    print(rule(len(formulas) + 3))
    for name, z in rows.items():
        truth = minus_p_log_p(z.double())
        errors = [f"{float((formula(z) - truth).abs().max()):.1e}" for formula in formulas.values()]
        span = f"{float(truth.min()):.1e} .. {float(truth.max()):.1e}"
        print(row_of(name, span, *errors, f"{int((log_sum_exp_minus_mean(z) <= 0).sum())} of {len(z)}"))

    z = torch.tensor([[2.0, 1.0, -math.inf, -math.inf]])
    answers = [f"{float(formula(z)):.6f}" for formula in formulas.values()]
    print(row_of("two columns of -inf", f"{float(minus_p_log_p(z[:, :2].double())):.6f}", *answers, ""))


def peaked_rows(gaps: Tensor, top: float, floor: float = 0.0) -> Tensor:
    """[gaps, V] logits: one at ``top``, four lower by at least the row's gap, the rest normal around ``floor``."""
    z = torch.randn(len(gaps), VOCABULARY).mul_(2.5).add_(floor)
    z[:, 0] = top
    z[:, 1:5] = (top - gaps).unsqueeze(1) - torch.rand(len(gaps), 4)
    return z


def in_tiles(z: Tensor, width: int = 2048) -> Tensor:
    stats = tiles.empty_statistics(len(z), z.dtype, z.device)
    for tile in z.split(width, dim=1):
        tiles.fold_statistics_(stats, tile.clone(), torch.full((len(z),), -1))
    _, total, weighted, _ = stats
    return total.log() - weighted / total


def log_sum_exp_minus_mean(z: Tensor) -> Tensor:
    maximum = z.amax(1, keepdim=True)
    exp = (z - maximum).exp()
    total = exp.sum(1, keepdim=True)
    return (maximum + total.log() - (exp / total * z).sum(1, keepdim=True)).squeeze(1)


def minus_p_log_p(z: Tensor) -> Tensor:
    log_p = z.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


# ---- effect of the precision of the logits on the mask --------------------------------------------------------------


def mask_table(tokens: int = 4096, width: int = 1024) -> None:
    hidden, weight = realistic_head(tokens, width)
    targets = torch.zeros(tokens, dtype=torch.int64)
    truth = torch.empty(tokens, dtype=torch.float64)
    found = {name: torch.empty(tokens) for name in ("bf16 logits, fp32 entropy", "bf16 logits, bf16 lse - E[z]")}
    weight_of_truth = weight.double().t().contiguous()
    for part in torch.arange(tokens).split(128):
        z = hidden[part].double() @ weight_of_truth
        truth[part] = minus_p_log_p(z)
        rounded = z.bfloat16()
        found["bf16 logits, fp32 entropy"][part] = in_tiles(rounded.float())
        found["bf16 logits, bf16 lse - E[z]"][part] = log_sum_exp_minus_mean(rounded).float()
    with torch.no_grad():
        head = vocab_parallel_logp_entropy(hidden, weight, targets)[1]
    order = truth.sort().values
    print(
        f"{tokens:,} tokens, vocabulary {VOCABULARY:,}: {float((truth < 0.01).double().mean()):.0%} of the entropies "
        f"below 0.01 nat, 80th percentile {float(order[-ceil_fraction(FRACTION, tokens)]):.2f}\n"
    )
    print(row_of("entropies from", "mean error", "largest error", "<= 0", "ties at threshold", "wrong in the mask"))
    print(rule(6))
    for name, entropy in {"the head: fp32 logits of bf16 inputs": head, **found}.items():
        error = (entropy.double() - truth).abs()
        wrong, ties = wrong_share(entropy, truth)
        cells = (f"{float(error.mean()):.1e}", f"{float(error.max()):.1e}", int((entropy <= 0).sum()), ties)
        print(row_of(name, *cells, f"{wrong:.1%}"))


def realistic_head(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """bf16 hidden states and output weight whose logits look like a reasoning model's.

    Rows of the weight are almost orthogonal, so a hidden state made of five of them has five high logits, and the rest
    of the vocabulary is noise. Over half of the tokens are certain, a quarter are forks, the others in between.
    """
    weight = torch.randn(VOCABULARY, width).mul_(width**-0.5).bfloat16()
    kind = torch.rand(tokens)
    gap = torch.where(kind < 0.55, 8 + 8 * torch.rand(tokens), 3 + 5 * torch.rand(tokens))
    gap = torch.where(kind > 0.70, 2.5 * torch.rand(tokens), gap)
    top = 30 + 10 * torch.rand(tokens)
    candidates = torch.randint(VOCABULARY, (tokens, 5))
    logits = top.unsqueeze(1) - torch.cat([torch.zeros(tokens, 1), gap.unsqueeze(1) + 3 * torch.rand(tokens, 4)], 1)
    return torch.einsum("tc,tcw->tw", logits, weight[candidates].float()).bfloat16(), weight


def wrong_share(entropy: Tensor, truth: Tensor) -> tuple[float, int]:
    """Share of the kept tokens that are not in the true top fraction, and the number of ties at the threshold."""
    ids = torch.arange(len(truth))
    mask, info = global_top_fraction_mask(entropy.float(), FRACTION, token_ids=ids)
    kept = truth.argsort(descending=True, stable=True)[: info.kept]
    return 1 - float(mask[kept].double().mean()), info.ties


# ---- the threshold --------------------------------------------------------------------------------------------------


def ceiling_table() -> None:
    print(row_of("fraction", "N up to 100,000 where ceil(fraction * N) in floats is one too many", "the first"))
    print(rule(3))
    for fraction in (0.2, 0.07, 0.14, 0.28, 0.55):
        exact = Fraction(str(fraction))
        wrong = [n for n in range(1, 100_001) if math.ceil(fraction * n) == math.ceil(exact * n) + 1]
        assert all(ceil_fraction(fraction, n) == math.ceil(exact * n) for n in wrong)
        print(row_of(fraction, f"{len(wrong):,}", wrong[0] if wrong else "-"))


def threshold_table(tokens: int = 4_000_000) -> None:
    head = ("values", "wanted", "kept", "kept by >= torch.quantile", "ties", "all-reduces", "KB a rank", "seconds")
    print(f"{tokens:,} values on each of two ranks\n\n{row_of(*head)}\n{rule(len(head))}")
    for name in ("distinct", "rounded to bf16", "95 % zero"):
        with (
            tempfile.TemporaryDirectory() as folder,
            ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool,
        ):
            store = Path(folder, "store").as_uri()
            ranks = [pool.submit(threshold_on_rank, rank, store, name, tokens) for rank in range(2)]
            print(row_of(name, f"{-(-2 * tokens // 5):,}", *[future.result() for future in ranks].pop()))


def threshold_on_rank(rank: int, store: str, name: str, tokens: int) -> tuple[str, ...]:
    """Cells of the table after the wanted count; the same on both ranks but for the process time."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        torch.manual_seed(rank)
        values = make_entropies(tokens, 0.39, 1.0)
        if name == "95 % zero":
            values *= torch.rand(tokens) > 0.95
        elif name == "rounded to bf16":
            values = values.bfloat16().float()
        ids = torch.randperm(tokens) * 2 + rank
        start = time.process_time()
        mask, info = global_top_fraction_mask(values, FRACTION, token_ids=ids, group=dist.group.WORLD)
        seconds = time.process_time() - start
        everything = [torch.empty_like(values) for _ in range(2)]
        dist.all_gather(everything, values)
        by_quantile = int((values >= torch.cat(everything).quantile(1 - FRACTION)).sum())
        kept = torch.tensor([int(mask.sum()), by_quantile])
        dist.all_reduce(kept)
        sent = f"{info.bytes_sent / 1000:.0f}"
        return (*(f"{n:,}" for n in kept.tolist()), f"{info.ties:,}", str(info.collectives), sent, f"{seconds:.2f}")
    finally:
        dist.destroy_process_group()


# ---- tokens that share a threshold, and means of means --------------------------------------------------------------


def make_entropies(tokens: int, forks: float, level: float) -> Tensor:
    """[tokens] fp32 entropies: a share ``forks`` with a mean of ``level`` nat, the rest small over six magnitudes."""
    small = 10 ** (-7 + 6 * torch.rand(tokens))
    fork = level * torch.empty(tokens).exponential_(1.0)
    return torch.where(torch.rand(tokens) < forks, fork, small)


def make_sequences(count: int = 512) -> list[Tensor]:
    """Entropies of the sequences of a mini-batch, which differ in length, share of forks and level of forks."""
    lengths = torch.empty(count).log_normal_(7.5, 0.6).clamp(200, 8000).int().tolist()
    shares = torch.distributions.Beta(7.8, 12.2).sample((count,)).tolist()
    levels = torch.empty(count).log_normal_(0.0, 0.35).tolist()
    return [make_entropies(*each) for each in zip(lengths, shares, levels, strict=True)]


def scope_table() -> None:
    sequences = make_sequences()
    everything = torch.cat(sequences)
    truth, info = global_top_fraction_mask(everything, FRACTION, token_ids=torch.arange(len(everything)))
    print(f"{len(sequences)} sequences, {len(everything):,} tokens, threshold {info.threshold:.3f} nat\n")
    print(row_of("sequences that share a threshold", "share of the true set that is kept"))
    print(rule(2))
    for size in (1, 4, 8, 32, 128, len(sequences)):
        parts = [torch.cat(sequences[start : start + size]) for start in range(0, len(sequences), size)]
        masks = [global_top_fraction_mask(part, FRACTION, token_ids=torch.arange(len(part)))[0] for part in parts]
        print(row_of(size, f"{float(torch.cat(masks)[truth].double().mean()):.3f}"))


def sums_table() -> None:
    sequences = make_sequences()
    everything = torch.cat(sequences)
    truth, _ = global_top_fraction_mask(everything, FRACTION, token_ids=torch.arange(len(everything)))
    kept = torch.tensor([int(mask.sum()) for mask in truth.split([len(sequence) for sequence in sequences])])
    print(row_of("micro-batches", "selected tokens in each", "weight of a token, relative to sum / global count"))
    print(rule(3))
    for size in (64, 8, 1):
        counts = kept.view(-1, size).sum(1).double()
        weights = counts.mean() / counts
        name = f"{len(counts)} of {size} sequences"
        span = f"{int(counts.min())} .. {int(counts.max())}"
        print(row_of(name, span, f"{float(weights.min()):.2f} .. {float(weights.max()):.2f}"))


# ---- printing -------------------------------------------------------------------------------------------------------


def row_of(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def rule(columns: int) -> str:
    return "|" + "---|" * columns


TABLES: dict[str, Callable[[], None]] = {
    "entropy": entropy_tables,
    "mask": mask_table,
    "ceiling": ceiling_table,
    "threshold": threshold_table,
    "scope": scope_table,
    "sums": sums_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"one or more of {', '.join(TABLES)}; default: all")
    names = parser.parse_args().tables or list(TABLES)
    for name in names:
        if name not in TABLES:
            parser.error(f"unknown table {name!r}; choose from {', '.join(TABLES)}")
    torch.set_num_threads(1)
    for name in names:
        torch.manual_seed(0)
        print(f"\n{name}\n")
        TABLES[name]()


if __name__ == "__main__":
    main()
