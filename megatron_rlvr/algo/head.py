"""Log-probability and entropy of vocabulary-sharded logits, in tiles: the logits of a whole sequence never exist.

With shifted logits d = z - max(z), where z = hidden @ weight^T / temperature:

    Z = sum(exp d)      log p_y = d_y - log Z      H = log Z - sum(exp(d) d) / Z

Shifting before multiplying keeps H accurate for peaked tokens, where log-sum-exp minus E[z] loses every digit. The
three sums are folded tile by tile: when the running maximum rises, what was summed so far is rescaled. Ranks that
share the vocabulary exchange only these sums, and merge them in rank order, so all of them get the same bits.

The backward recomputes the tiles, for rows whose upstream gradient is not zero only:

    dz = g_logp (1[y] - p) - g_H p (log p + H)

Shapes: S rows of the whole sequence, n rows asked for, H hidden size, V real vocabulary, v this rank's columns of it.
Source of the formulas: arithmetic; of the method: docs/numerics.md.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# A tile of logits has at most this many elements (32 MiB in fp32), so that it stays in cache.
_TILE_ELEMENTS = 8 * 2**20
_TILE_COLUMNS = 8192


@dataclass(frozen=True)
class _Shard:
    """What every tile needs to know; ``first`` is the global id of this rank's first column."""

    group: dist.ProcessGroup | None
    first: int
    columns: int
    temperature: float
    dtype: torch.dtype

    def row_tiles(self, rows: int) -> list[slice]:
        height = max(1, _TILE_ELEMENTS // max(1, min(self.columns, _TILE_COLUMNS)))
        return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]

    def column_tiles(self) -> list[slice]:
        return [slice(c, min(c + _TILE_COLUMNS, self.columns)) for c in range(0, self.columns, _TILE_COLUMNS)]

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        z = hidden.to(self.dtype) @ weight.to(self.dtype).t()
        return z if self.temperature == 1.0 else z.div_(self.temperature)


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
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, from hidden states and the output weight.

    Args:
        hidden: [S, H], the same on all ranks of ``tp_group``; under ``sequence_parallel`` this rank's [S / tp, H].
        weight: [V_padded / tp, H], this rank's rows of the output weight.
        targets: [S] int64 global token ids.
        tp_group: ranks that share the vocabulary; None for this rank alone.
        sequence_parallel: whether ``hidden`` is sharded along the sequence.
        valid_vocab: real size of the vocabulary; columns beyond it are padding and never count. None: all are real.
        temperature: the logits are divided by it (the temperature of sampling).
        rows: [n] int64, the rows wanted, in 0 .. S-1; None for all. Only these cost anything.
        entropy_grad: whether the entropy is differentiated; without it the second result is detached.

    Returns: (log-probability, entropy), each [n] in nats, fp32 (fp64 for fp64 inputs), bitwise equal on all ranks.
    The gradient of ``hidden`` is complete on every rank (this rank's shard under sequence parallel).
    """
    logp, entropy = _Head.apply(
        hidden, weight, targets, rows, tp_group, sequence_parallel, valid_vocab, float(temperature)
    )
    return logp, entropy if entropy_grad else entropy.detach()


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        rows: Tensor | None,
        group: dist.ProcessGroup | None,
        sequence_parallel: bool,
        valid_vocab: int | None,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        first = rank * weight.shape[0]
        real = valid_vocab if valid_vocab is not None else weight.shape[0] * size
        columns = min(max(real - first, 0), weight.shape[0])
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        shard = _Shard(group if size > 1 else None, first, columns, temperature, dtype)

        hidden_n = _take_rows(hidden, rows, shard.group if sequence_parallel else None)
        targets_n = targets if rows is None else targets[rows]
        maximum, total, weighted, target_logit = _statistics(hidden_n, weight, targets_n, shard)
        log_total = total.log()
        logp = target_logit - maximum - log_total
        entropy = log_total - weighted / total
        ctx.save_for_backward(hidden, weight, targets_n, rows, maximum + log_total, entropy)
        ctx.shard, ctx.sequence_parallel = shard, sequence_parallel and size > 1
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, targets_n, rows, log_sum_exp, entropy = ctx.saved_tensors
        shard: _Shard = ctx.shard
        grad_logp, grad_entropy = grads
        live = ((grad_logp != 0) | (grad_entropy != 0)).nonzero().squeeze(1)  # NaN != 0, so it is not lost
        wanted = live if rows is None else rows[live]
        hidden_n = _take_rows(hidden, wanted, shard.group if ctx.sequence_parallel else None)
        grad_hidden_n, grad_weight = _gradients(
            hidden_n,
            weight,
            targets_n[live],
            log_sum_exp[live],
            entropy[live],
            grad_logp[live],
            grad_entropy[live],
            shard,
        )
        grad_hidden = torch.zeros_like(hidden)
        if shard.group is not None:
            dist.all_reduce(grad_hidden_n, group=shard.group)
        if ctx.sequence_parallel:
            start = dist.get_rank(shard.group) * hidden.shape[0]
            mine = (wanted >= start) & (wanted < start + hidden.shape[0])
            wanted, grad_hidden_n = wanted[mine] - start, grad_hidden_n[mine]
        grad_hidden.index_add_(0, wanted, grad_hidden_n.to(hidden.dtype))
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _take_rows(hidden: Tensor, rows: Tensor | None, group: dist.ProcessGroup | None) -> Tensor:
    """The wanted rows of the whole sequence, gathered first where the sequence is sharded over ``group``."""
    if group is not None:
        gathered = hidden.new_empty(hidden.shape[0] * dist.get_world_size(group), hidden.shape[1])
        dist.all_gather_into_tensor(gathered, hidden.contiguous(), group=group)
        hidden = gathered
    return hidden if rows is None else hidden[rows]


def _statistics(hidden_n: Tensor, weight: Tensor, targets_n: Tensor, shard: _Shard) -> tuple[Tensor, ...]:
    """Maximum, sum of exp(d), sum of exp(d) d and the target's logit, each [n], over all columns of all ranks."""
    stats = torch.empty(4, hidden_n.shape[0], dtype=shard.dtype, device=hidden_n.device)
    for tile in shard.row_tiles(hidden_n.shape[0]):
        stats[:, tile] = _tile_statistics(hidden_n[tile], weight, targets_n[tile], shard)
    if shard.group is None:
        return tuple(stats)
    parts = [torch.empty_like(stats) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(parts, stats, group=shard.group)
    merged = parts[0]
    for part in parts[1:]:
        merged = _merge(merged, part)
    return tuple(merged)


def _tile_statistics(hidden: Tensor, weight: Tensor, targets: Tensor, shard: _Shard) -> Tensor:
    merged: Tensor | None = None
    for columns in shard.column_tiles():
        z = shard.logits(hidden, weight[columns])
        local = targets - (shard.first + columns.start)
        owned = (local >= 0) & (local < z.shape[1])
        target_logit = z.gather(1, local.clamp(0, z.shape[1] - 1).unsqueeze(1)).squeeze(1)
        target_logit = torch.where(owned, target_logit, torch.zeros_like(target_logit))
        # A row of -inf only (a tile of forbidden tokens) must not turn into NaN.
        maximum = z.amax(1).clamp_min(torch.finfo(z.dtype).min)
        d = z.sub_(maximum.unsqueeze(1))
        exp = d.exp()
        weighted = exp.mul(d.clamp_min_(-1e30)).sum(1)  # 0 * -inf would be NaN; exp(-1e30) is 0
        tile = torch.stack((maximum, exp.sum(1), weighted, target_logit))
        merged = tile if merged is None else _merge(merged, tile)
    return merged if merged is not None else _nothing(hidden.shape[0], shard.dtype, hidden.device)


def _nothing(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The statistics of no column at all (a rank whose columns are all padding)."""
    stats = torch.zeros(4, rows, dtype=dtype, device=device)
    stats[0] = torch.finfo(dtype).min
    return stats


def _merge(a: Tensor, b: Tensor) -> Tensor:
    """Statistics of the union of two sets of columns: both are moved to the larger maximum, then added."""
    maximum = torch.maximum(a[0], b[0])
    total, weighted = torch.zeros_like(maximum), torch.zeros_like(maximum)
    for part in (a, b):
        shift = (part[0] - maximum).clamp_min_(-1e30)
        scale = shift.exp()
        total += part[1] * scale
        weighted += (part[2] + part[1] * shift) * scale
    return torch.stack((maximum, total, weighted, a[3] + b[3]))


def _gradients(
    hidden_n: Tensor,
    weight: Tensor,
    targets_n: Tensor,
    log_sum_exp: Tensor,
    entropy: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor,
    shard: _Shard,
) -> tuple[Tensor, Tensor]:
    """This rank's part of d hidden [n, H] in the working precision, and d weight in the weight's own."""
    grad_hidden = torch.zeros(hidden_n.shape, dtype=shard.dtype, device=hidden_n.device)
    grad_weight = torch.zeros_like(weight)
    with_entropy = bool((grad_entropy != 0).any())
    for columns in shard.column_tiles():
        grad_tile = torch.zeros(weight[columns].shape, dtype=shard.dtype, device=weight.device)
        for tile in shard.row_tiles(hidden_n.shape[0]):
            log_p = shard.logits(hidden_n[tile], weight[columns]).sub_(log_sum_exp[tile].unsqueeze(1))
            p = log_p.exp()
            if with_entropy:
                log_p = log_p.clamp_min_(-1e30).add_(entropy[tile].unsqueeze(1)).mul_(grad_entropy[tile].unsqueeze(1))
                dz = p.mul_(log_p.add_(grad_logp[tile].unsqueeze(1))).neg_()
            else:
                dz = p.mul_(-grad_logp[tile].unsqueeze(1))
            local = targets_n[tile] - (shard.first + columns.start)
            owned = ((local >= 0) & (local < dz.shape[1])).nonzero().squeeze(1)
            dz[owned, local[owned]] += grad_logp[tile][owned]
            if shard.temperature != 1.0:
                dz.div_(shard.temperature)
            grad_hidden[tile] += dz @ weight[columns].to(shard.dtype)
            grad_tile += dz.t() @ hidden_n[tile].to(shard.dtype)
        grad_weight[columns] = grad_tile.to(weight.dtype)
    return grad_hidden, grad_weight
