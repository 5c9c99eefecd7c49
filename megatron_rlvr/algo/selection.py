"""Selection of the response tokens that carry the policy gradient: the forking tokens, or one of the paper's ablations.

``keep`` top takes the fraction of highest entropy, bottom that of lowest, random a reproducible random set, all every
token. Tokens that are selected together share one threshold, over all data-parallel ranks. Source: arXiv 2506.01939.

Shapes: R response tokens of a micro-batch, n tokens of any list.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlvr.algo.quantile import global_top_fraction_mask, refuse_non_finite

Keep = Literal["top", "bottom", "random", "all"]


@dataclass(frozen=True)
class Selection:
    """Masks of a list of micro-batches, and statistics of the selection, the same on every rank.

    Attributes:
        masks: [R] bool for each micro-batch of this rank, True for selected tokens.
        total: Number of tokens to select from, over all ranks.
        kept: Number of selected tokens, over all ranks.
        threshold: Smallest entropy kept (largest, with keep bottom); None if there is no single threshold.
        entropy_kept: Sum of the selected tokens' entropies in nats, over all ranks.
        entropy_dropped: Sum of the other tokens' entropies in nats, over all ranks.
    """

    masks: list[Tensor]
    total: int
    kept: int
    threshold: float | None
    entropy_kept: float
    entropy_dropped: float


def select(
    entropies: Sequence[Tensor],
    token_ids: Sequence[Tensor],
    *,
    keep: Keep,
    fraction: float,
    per_micro_batch: bool,
    seed: int,
    group: dist.ProcessGroup | None,
) -> Selection:
    """Select ceil(fraction * total) tokens of a list of micro-batches on all ranks. A collective over ``group``.

    Args:
        entropies: [R] float32 nats for each micro-batch of this rank.
        token_ids: [R] int64 for each micro-batch, unique over the group; they break ties and drive random selection.
        keep: Which tokens to select.
        fraction: Share of the tokens to select, in (0, 1]; not used with keep all.
        per_micro_batch: Select the fraction of each micro-batch by itself instead of sharing one threshold.
        seed: Seed of random selection, the same on every rank.
        group: Data-parallel ranks; None for this rank alone.

    Raises: NonFiniteEntropyError on every rank if one of them holds an entropy that is not finite.
    """
    sizes = [len(entropy) for entropy in entropies]
    flat = torch.cat([*entropies]) if entropies else torch.empty(0)
    ids = torch.cat([*token_ids]) if token_ids else torch.empty(0, dtype=torch.int64)
    if keep in ("random", "all") or per_micro_batch:
        # No global threshold reads these entropies, which would refuse them: all ranks must still agree to stop.
        refuse_non_finite(flat, ids, group)
    threshold = None
    if keep == "all":
        mask = torch.ones_like(flat, dtype=torch.bool)
    elif per_micro_batch:
        masks = [
            micro_batch_mask(entropy, its_ids, keep=keep, fraction=fraction, seed=seed)
            for entropy, its_ids in zip(entropies, token_ids, strict=True)
        ]
        mask = torch.cat(masks) if masks else torch.empty(0, dtype=torch.bool)
    else:
        scores = selection_scores(flat, ids, keep=keep, seed=seed)
        mask, info = global_top_fraction_mask(scores, fraction, token_ids=ids, group=group)
        threshold = {"top": info.threshold, "bottom": -info.threshold}.get(keep)
    sums = torch.tensor(
        [mask.numel(), mask.sum(), flat[mask].double().sum(), flat[~mask].double().sum()],
        dtype=torch.float64,
        device=flat.device,
    )
    if group is not None:
        dist.all_reduce(sums, group=group)
    total, kept, entropy_kept, entropy_dropped = sums.tolist()
    return Selection(list(mask.split(sizes)), int(total), int(kept), threshold, entropy_kept, entropy_dropped)


def micro_batch_mask(entropy: Tensor, token_ids: Tensor, *, keep: Keep, fraction: float, seed: int) -> Tensor:
    """Select ceil(fraction * R) tokens of one micro-batch by itself.

    Args:
        entropy: [R] float32 nats.
        token_ids: [R] int64, unique.
        keep: Which tokens to select; not all.
        fraction: Share of the tokens to select, in (0, 1].
        seed: Seed of random selection.

    Returns: [R] bool.
    Raises: NonFiniteEntropyError for an entropy that is not finite (unless keep is random).
    """
    scores = selection_scores(entropy, token_ids, keep=keep, seed=seed)
    return global_top_fraction_mask(scores, fraction, token_ids=token_ids)[0]


def selection_scores(entropy: Tensor, token_ids: Tensor, *, keep: Keep, seed: int) -> Tensor:
    """Score by which the top fraction is taken: entropy, negative entropy, or noise that depends on the token id only.

    Args:
        entropy: [n] float32 nats.
        token_ids: [n] int64.
        keep: top, bottom or random.
        seed: Seed of the noise.

    Returns: [n] float32.
    """
    if keep == "random":
        return _noise(token_ids, seed)
    return entropy if keep == "top" else -entropy


def _noise(token_ids: Tensor, seed: int) -> Tensor:
    """[n] float32 in [0, 1): a mix of token id and seed by multiplications and shifts in wrapping int64."""
    offset = (seed * 0x9E3779B97F4A7C1 + 0x632BE59BD9B4E019) % 2**64
    x = token_ids + (offset - 2**64 if offset >= 2**63 else offset)
    for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    return (x & 0xFFFFFF).float() / 0x1000000
