"""Log-probability and entropy of vocabulary-sharded logits, tile by tile: whole logits are never materialized.

With shifted logits d = z - max(z), where z = hidden @ weight^T / temperature:

    s = sum(exp d)    u = sum(exp(d) d)      log p_y = d_y - log s      H = log s - u / s

Shifting before multiplying keeps H accurate for peaked tokens, where log-sum-exp minus E[z] loses every digit. The
sums are folded tile by tile (`tiles`). Ranks that share the vocabulary exchange only these sums and merge them in rank
order, so all of them get the same bits.

The backward recomputes the tiles, but only for rows whose upstream gradient is not zero: tokens that are not selected,
have no advantage or are clipped cost nothing, and a value that overflowed in one of them cannot reach a gradient.

    dz = (g_logp (1[y] - p) - g_H p (log p + H)) / temperature      dhidden = dz W      dW = dz^T hidden

With q = sum exp(2 d) over all columns but y, in the same pass, the norm of a token's own gradient follows as a sum of
two non-negative terms. For a token that is almost certain its error is the spacing of fp32 near 1; that of the root of
1 - 2 p_y + sum p^2 would be the root of it.

    |d log p_y / dz| = |1[y] - p| = sqrt((1 - p_y)^2 + q / s^2)

Shapes: S rows of the whole sequence, n requested rows, H hidden size, V real vocabulary size.
docs/numerics.md derives these forms and measures their errors beside those of others.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlvr.algo import tiles
from megatron_rlvr.algo.tile_shape import tile_shape


def vocab_parallel_logp_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    rows: Tensor | None = None,
    entropy_grad: bool = False,
    gradient_accumulation_fusion: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, from hidden states and the output weight.

    A collective over ``tp_group``, forward and backward. The gradient of ``hidden`` is complete on every rank (this
    rank's shard under sequence parallel).

    Args:
        hidden: [S, H], the same on all ranks of ``tp_group``; under ``sequence_parallel`` this rank's [S / tp, H].
        weight: [V_padded / tp, H], this rank's rows of the output weight.
        targets: [S] int64 global token ids.
        tp_group: Ranks that share the vocabulary; None for this rank alone.
        sequence_parallel: Whether ``hidden`` is sharded along the sequence.
        valid_vocab: V; columns beyond it are padding and never count. None if all columns are real.
        temperature: Sampling temperature, which divides the logits.
        rows: [n] int64 in 0 .. S-1, the requested rows; None for all. Only these cost anything.
        entropy_grad: Whether the entropy is differentiated; if not, the second result is detached.
        gradient_accumulation_fusion: Add the gradient of ``weight`` to its ``main_grad`` (made by Megatron's
            data-parallel wrapper) at once; autograd then gets a placeholder, as from Megatron's own layers.

    Returns: (log-probability, entropy), each [n] in nats, fp32 (fp64 for fp64 inputs), bitwise equal on all ranks.
    """
    shard = _Shard.of(
        hidden, weight, tp_group, sequence_parallel, valid_vocab, temperature, gradient_accumulation_fusion
    )
    logp, entropy = _Head.apply(hidden, weight, targets, rows, shard)
    return logp, entropy if entropy_grad else entropy.detach()


@torch.no_grad()
def vocab_parallel_likeliest(
    hidden: Tensor,
    weight: Tensor,
    count: int,
    *,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Likeliest tokens of each requested row, from hidden states and the output weight, without gradient.

    A collective over ``tp_group``. Equally likely tokens are in the order of their ids; of those that compete for the
    last place, any may be left out.

    Args:
        count: Number of tokens, k; at most the vocabulary has.
        hidden, weight, tp_group, sequence_parallel, valid_vocab, temperature, rows: As for
            `vocab_parallel_logp_entropy`.

    Returns: (token ids [n, k] int64, log-probabilities [n, k] in nats, highest first), bitwise equal on all ranks.
    """
    shard = _Shard.of(hidden, weight, tp_group, sequence_parallel, valid_vocab, temperature, fuse=False)
    hidden_n = _gather(hidden, rows, shard)
    stats = tiles.empty_statistics(len(hidden_n), shard.dtype, hidden_n.device)
    logits, ids = tiles.empty_likeliest(len(hidden_n), count, shard.dtype, hidden_n.device)
    kernels, no_targets = _kernels(hidden_n.device), torch.full((len(hidden_n),), -1, device=hidden_n.device)
    for tile, first, z in _logit_tiles(hidden_n, weight, shard):
        tiles.fold_likeliest_(logits[tile], ids[tile], z, first)
        kernels.fold_statistics_(stats[:, tile], z, no_targets[tile])
    if shard.group is not None:
        logits = torch.cat(_from_all_ranks(logits, shard.group), dim=1)
        ids = torch.cat(_from_all_ranks(ids, shard.group), dim=1)
    maximum, total, *_ = _merged(stats, shard)
    logits, ids = tiles.sorted_likeliest(logits, ids, count)
    return ids, logits - (maximum + total.log()).unsqueeze(1)


@torch.no_grad()
def vocab_parallel_gradient_norm(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `vocab_parallel_logp_entropy`, without gradient, and the norm of the target's own logit gradient.

    The gradient is that of the target's log-probability by the logits that the temperature has divided: 1[y] - p.

    Returns: (log-probability in nats, entropy in nats, norm in 0 .. sqrt 2), each [n].
    """
    shard = _Shard.of(hidden, weight, tp_group, sequence_parallel, valid_vocab, temperature, fuse=False)
    targets_n = targets if rows is None else targets[rows]
    logp, entropy, _, stats = _scores(_gather(hidden, rows, shard), weight, targets_n, shard, squares=True)
    return logp, entropy, (torch.expm1(logp).square() + stats[4] / stats[1].square()).sqrt()


@dataclass(frozen=True)
class _Shard:
    """This rank's shard of the vocabulary and the arithmetic on it.

    Attributes:
        group: Ranks that share the vocabulary; None if this rank has all of it.
        sequence_parallel: Whether hidden states are sharded along the sequence.
        first: Global token id of this rank's column 0.
        columns: Number of this rank's real columns, padding excluded.
        scale: Factor of the logits, 1 / temperature.
        dtype: Working precision, fp32 or fp64.
        fuse: Whether the gradient of the weight is added to its ``main_grad``.
    """

    group: dist.ProcessGroup | None
    sequence_parallel: bool
    first: int
    columns: int
    scale: float
    dtype: torch.dtype
    fuse: bool

    @staticmethod
    def of(
        hidden: Tensor,
        weight: Tensor,
        tp_group: dist.ProcessGroup | None,
        sequence_parallel: bool,
        valid_vocab: int | None,
        temperature: float,
        fuse: bool,
    ) -> "_Shard":
        """Return this rank's shard; see `vocab_parallel_logp_entropy` for the arguments."""
        rank, size = (dist.get_rank(tp_group), dist.get_world_size(tp_group)) if tp_group is not None else (0, 1)
        real = valid_vocab if valid_vocab is not None else weight.shape[0] * size
        return _Shard(
            group=tp_group if size > 1 else None,
            sequence_parallel=sequence_parallel and size > 1,
            first=rank * weight.shape[0],
            columns=min(max(real - rank * weight.shape[0], 0), weight.shape[0]),
            scale=1.0 / temperature,
            dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32,
            fuse=fuse,
        )

    def column_tiles(self, device: torch.device) -> Iterator[slice]:
        width = tile_shape(device.type)[1]
        return (slice(start, min(start + width, self.columns)) for start in range(0, self.columns, width))

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        z = self.product(hidden, weight.t())
        return z if self.scale == 1.0 else z.mul_(self.scale)

    def operand(self, x: Tensor) -> Tensor:
        """Cast a factor of a product to the working precision on a CPU; a GPU accumulates bf16 in fp32 by itself."""
        return x if x.device.type != "cpu" else x.to(self.dtype)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b if a.dtype == self.dtype else torch.mm(a, b, out_dtype=self.dtype)

    def add_product_(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        if a.dtype == out.dtype:
            out.addmm_(a, b)
        else:
            torch.addmm(out, a, b, out_dtype=self.dtype, out=out)


def _row_tiles(rows: int, device: torch.device) -> Iterator[slice]:
    height = tile_shape(device.type)[0]
    return (slice(start, min(start + height, rows)) for start in range(0, rows, height))


def _logit_tiles(hidden_n: Tensor, weight: Tensor, shard: _Shard) -> Iterator[tuple[slice, int, Tensor]]:
    """Yield (rows, global token id of column 0, logits of these rows and columns, which may be overwritten)."""
    for columns in shard.column_tiles(hidden_n.device):
        weight_tile = shard.operand(weight[columns])
        for tile in _row_tiles(len(hidden_n), hidden_n.device):
            yield tile, shard.first + columns.start, shard.logits(shard.operand(hidden_n[tile]), weight_tile)


def _kernels(device: torch.device) -> Any:
    """Module with the arithmetic of a tile: Triton's kernels on a device that has them, else plain torch."""
    if device.type == "cpu" or importlib.util.find_spec("triton") is None:
        return tiles
    return importlib.import_module("megatron_rlvr.algo.tiles_triton")


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, shard: _Shard
    ) -> tuple[Tensor, Tensor]:
        targets_n = targets if rows is None else targets[rows]
        logp, entropy, log_sum_exp, _ = _scores(_gather(hidden, rows, shard), weight, targets_n, shard)
        ctx.save_for_backward(hidden, weight, targets_n, rows, log_sum_exp, entropy)
        ctx.shard = shard
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, targets_n, rows, log_sum_exp, entropy = ctx.saved_tensors
        shard: _Shard = ctx.shard
        grad_logp, grad_entropy = grads
        active = ((grad_logp != 0) | (grad_entropy != 0)).nonzero().squeeze(1)  # NaN != 0, so it is not lost
        grad_weight = _WeightGradient(weight, shard)
        if not len(active):  # alike on all ranks of the group, whose upstream gradients are equal
            return torch.zeros_like(hidden), grad_weight.result(), None, None, None
        requested = active if rows is None else rows[active]
        grad_hidden_n = _gradients(
            _gather(hidden, requested, shard),
            weight,
            targets_n[active],
            (log_sum_exp[active], entropy[active], grad_logp[active] * shard.scale, grad_entropy[active] * shard.scale),
            grad_weight,
            shard,
        )
        return _scatter(grad_hidden_n, requested, hidden, shard), grad_weight.result(), None, None, None


def _scores(
    hidden_n: Tensor, weight: Tensor, targets_n: Tensor, shard: _Shard, *, squares: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log-probability, entropy and log-sum-exp, each [n], and the statistics that they follow from."""
    stats = _statistics(hidden_n, weight, targets_n, shard, squares)
    maximum, total, weighted, target_logit = stats[:4]
    log_total = total.log()
    return target_logit - maximum - log_total, log_total - weighted / total, maximum + log_total, stats


def _statistics(hidden_n: Tensor, weight: Tensor, targets_n: Tensor, shard: _Shard, squares: bool) -> Tensor:
    """Return maximum, s, u and the target's logit, and with ``squares`` q, each [n], over all columns of all ranks."""
    stats = tiles.empty_statistics(len(hidden_n), shard.dtype, hidden_n.device, squares=squares)
    kernels = _kernels(hidden_n.device)
    for tile, first, z in _logit_tiles(hidden_n, weight, shard):
        kernels.fold_statistics_(stats[:, tile], z, targets_n[tile] - first)
    return _merged(stats, shard)


def _merged(stats: Tensor, shard: _Shard) -> Tensor:
    """Merge the statistics [4, n] or [5, n] of the ranks that share the vocabulary."""
    return stats if shard.group is None else tiles.merge_statistics(_from_all_ranks(stats, shard.group))


def _from_all_ranks(values: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Return every rank's ``values`` (at least 2 dimensions, the same shape on all ranks), in rank order."""
    size = dist.get_world_size(group)
    parts = values.new_empty(size * len(values), *values.shape[1:])
    dist.all_gather_into_tensor(parts, values.contiguous(), group=group)
    return parts.chunk(size) if len(values) else (values,) * size


def _gradients(
    hidden_n: Tensor,
    weight: Tensor,
    targets_n: Tensor,
    row_vectors: tuple[Tensor, Tensor, Tensor, Tensor],
    grad_weight: "_WeightGradient",
    shard: _Shard,
) -> Tensor:
    """Return this rank's part of dhidden, [n, H] in the working precision; add that of dW to ``grad_weight``.

    Args:
        hidden_n: [n, H].
        weight: This rank's rows of the output weight.
        targets_n: [n] int64 global token ids.
        row_vectors: log_sum_exp, entropy, grad_logp and grad_entropy, each [n].
        grad_weight: Destination of dW.
        shard: This rank's shard of the vocabulary.
    """
    grad_hidden = torch.zeros(hidden_n.shape, dtype=shard.dtype, device=hidden_n.device)
    with_entropy = bool((row_vectors[3] != 0).any())
    kernels = _kernels(hidden_n.device)
    for columns in shard.column_tiles(hidden_n.device):
        weight_tile = shard.operand(weight[columns])
        with grad_weight.tile(columns) as grad_weight_tile:
            for tile in _row_tiles(len(hidden_n), hidden_n.device):
                hidden_tile = shard.operand(hidden_n[tile])
                log_sum_exp, entropy, grad_logp, grad_entropy = (vector[tile] for vector in row_vectors)
                dz = kernels.logits_gradient_(
                    shard.logits(hidden_tile, weight_tile),
                    targets_n[tile] - (shard.first + columns.start),
                    log_sum_exp,
                    entropy,
                    grad_logp,
                    grad_entropy if with_entropy else None,
                    hidden_tile.dtype,
                )
                shard.add_product_(grad_hidden[tile], dz, weight_tile)
                shard.add_product_(grad_weight_tile, dz.t(), hidden_tile)
    return grad_hidden


class _WeightGradient:
    """Destination of dW: a new tensor, or the weight's ``main_grad`` if fused."""

    def __init__(self, weight: Tensor, shard: _Shard) -> None:
        self._weight, self._shard = weight, shard
        self._out: Tensor = weight.main_grad if shard.fuse else torch.zeros_like(weight)  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def tile(self, columns: slice) -> Iterator[Tensor]:
        """Yield the rows of dW that belong to ``columns``, in the working precision, to be added to."""
        out = self._out[columns]
        if out.dtype == self._shard.dtype:
            yield out
        else:
            sums = torch.zeros_like(out, dtype=self._shard.dtype)
            yield sums
            out.copy_(sums.add_(out) if self._shard.fuse else sums)

    def result(self) -> Tensor:
        """Return the gradient for autograd.

        If fused, that is a placeholder, which Megatron's hook discards. If the weight is also the embedding of this
        stage (``zero_out_wgrad``), autograd adds both gradients, so the placeholder must be zero.
        """
        if not self._shard.fuse:
            return self._out
        self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        zero = getattr(self._weight, "zero_out_wgrad", False)
        return torch.zeros_like(self._weight) if zero else torch.empty_like(self._weight)


def _gather(hidden: Tensor, rows: Tensor | None, shard: _Shard) -> Tensor:
    """Return the requested rows, [n, H]; of a sharded sequence only these are communicated."""
    if not shard.sequence_parallel:
        return hidden if rows is None else hidden[rows]
    size = dist.get_world_size(shard.group)
    if rows is None:
        everything = hidden.new_empty(size * hidden.shape[0], hidden.shape[1])
        dist.all_gather_into_tensor(everything, hidden.contiguous(), group=shard.group)
        return everything
    places = _row_places(rows, hidden.shape[0], shard)
    sent = hidden.new_zeros(places.rows_per_rank, hidden.shape[1])
    sent[: len(places.local_rows)] = hidden[places.local_rows]
    received = hidden.new_empty(size * places.rows_per_rank, hidden.shape[1])
    dist.all_gather_into_tensor(received, sent, group=shard.group)
    return received[places.index]


def _scatter(grad_n: Tensor, rows: Tensor, hidden: Tensor, shard: _Shard) -> Tensor:
    """Return dhidden of this rank's part of the sequence, from every rank's part of the requested rows [n, H]."""
    grad_hidden = torch.zeros_like(hidden)
    if shard.sequence_parallel:
        places = _row_places(rows, hidden.shape[0], shard)
        parts = grad_n.new_zeros(dist.get_world_size(shard.group) * places.rows_per_rank, hidden.shape[1])
        parts[places.index] = grad_n
        received = grad_n.new_empty(places.rows_per_rank, hidden.shape[1])
        dist.reduce_scatter_tensor(received, parts, group=shard.group)
        rows, grad_n = places.local_rows, received[: len(places.local_rows)]
    elif shard.group is not None:
        dist.all_reduce(grad_n, group=shard.group)
    return grad_hidden.index_add_(0, rows, grad_n.to(hidden.dtype))


@dataclass(frozen=True)
class _RowPlaces:
    """Places of the requested rows in a communication buffer that is padded to the same number of rows on every rank.

    Attributes:
        rows_per_rank: Most requested rows on any rank, at least 1.
        index: [n], place of each requested row in the buffer of all ranks.
        local_rows: Requested rows of this rank, counted from its first, in the order of their places.
    """

    rows_per_rank: int
    index: Tensor
    local_rows: Tensor


def _row_places(rows: Tensor, local_length: int, shard: _Shard) -> _RowPlaces:
    rank, size = dist.get_rank(shard.group), dist.get_world_size(shard.group)
    owner = rows // local_length
    owned_by = owner.unsqueeze(1) == torch.arange(size, device=rows.device)
    rows_per_rank = max(1, int(owned_by.sum(0).max()))
    place = owned_by.cumsum(0).gather(1, owner.unsqueeze(1)).squeeze(1) - 1
    return _RowPlaces(rows_per_rank, owner * rows_per_rank + place, rows[owner == rank] - rank * local_length)
