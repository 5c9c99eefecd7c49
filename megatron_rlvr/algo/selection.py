"""Which response tokens carry the policy gradient: the forking tokens, or one of the paper's ablations.

``keep`` top takes the fraction with the highest entropy, bottom the lowest, random an arbitrary but reproducible set,
all everything. ``scope`` says which tokens share a threshold, over all data-parallel ranks. Source: arXiv 2506.01939.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlvr.algo.quantile import Wire, global_top_fraction_mask, refuse_non_finite
from megatron_rlvr.config import SelectionSettings


@dataclass(frozen=True)
class Selection:
    """Masks of a list of micro-batches, and the metrics that describe them, the same on every rank.

    Attributes:
        masks: [R] bool for each micro-batch.
        total: response tokens of the scope, over all ranks.
        kept: selected ones.
        threshold: smallest entropy kept (largest, for bottom); None where entropies did not decide, or not once.
        entropy_kept: sum of the entropies of selected tokens, over all ranks.
        entropy_dropped: of the others.
    """

    masks: list[Tensor]
    total: int
    kept: int
    threshold: float | None
    entropy_kept: float
    entropy_dropped: float


def select(
    settings: SelectionSettings,
    entropies: Sequence[Tensor],
    token_ids: Sequence[Tensor],
    *,
    seed: int,
    group: dist.ProcessGroup | None,
) -> Selection:
    """Selects tokens of a list of micro-batches, one threshold for all of them, or one each with scope micro_batch.

    Args:
        settings: what to keep.
        entropies: [R] float32 nats for each micro-batch of this rank.
        token_ids: [R] int64 for each, unique over the group.
        seed: of random selection; the same on every rank.
        group: the data-parallel ranks.

    Raises: NonFiniteEntropyError on every rank if one of them holds an entropy that is not finite.
    """
    sizes = [len(entropy) for entropy in entropies]
    flat = torch.cat([*entropies]) if entropies else torch.empty(0)
    ids = torch.cat([*token_ids]) if token_ids else torch.empty(0, dtype=torch.int64)
    if settings.keep in ("random", "all") or settings.scope == "micro_batch":
        # Entropies that no global threshold will look at: all ranks must still agree to stop.
        refuse_non_finite(flat, ids, Wire(group))
    if settings.keep == "all":
        mask, threshold = torch.ones_like(flat, dtype=torch.bool), None
    elif settings.scope == "micro_batch":
        masks = [micro_batch_mask(settings, e, i, seed=seed) for e, i in zip(entropies, token_ids, strict=True)]
        mask, threshold = (torch.cat(masks) if masks else torch.empty(0, dtype=torch.bool)), None
    else:
        scores = selection_scores(settings, flat, ids, seed)
        mask, info = global_top_fraction_mask(scores, settings.fraction, token_ids=ids, group=group)
        threshold = {"top": info.threshold, "bottom": -info.threshold}.get(settings.keep)
    sums = torch.tensor(
        [mask.numel(), mask.sum(), flat[mask].double().sum(), flat[~mask].double().sum()],
        dtype=torch.float64,
        device=flat.device,
    )
    if group is not None:
        dist.all_reduce(sums, group=group)
    total, kept, entropy_kept, entropy_dropped = sums.tolist()
    return Selection(list(mask.split(sizes)), int(total), int(kept), threshold, entropy_kept, entropy_dropped)


def micro_batch_mask(settings: SelectionSettings, entropy: Tensor, token_ids: Tensor, *, seed: int) -> Tensor:
    """[R] bool for one micro-batch on its own."""
    scores = selection_scores(settings, entropy, token_ids, seed)
    return global_top_fraction_mask(scores, settings.fraction, token_ids=token_ids)[0]


def selection_scores(settings: SelectionSettings, entropy: Tensor, token_ids: Tensor, seed: int) -> Tensor:
    """What the top fraction is taken of: the entropy, its negative, or noise that depends on the token id only."""
    if settings.keep == "random":
        return _noise(token_ids, seed)
    return entropy if settings.keep == "top" else -entropy


def _noise(token_ids: Tensor, seed: int) -> Tensor:
    """[n] float32 in [0, 1): a mix of token id and seed by multiplications and shifts in wrapping int64."""
    offset = (seed * 0x9E3779B97F4A7C1 + 0x632BE59BD9B4E019) % 2**64
    x = token_ids + (offset - 2**64 if offset >= 2**63 else offset)
    for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    return (x & 0xFFFFFF).float() / 0x1000000
