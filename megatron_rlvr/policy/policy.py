"""The policy: a megatron-core model that scores responses, takes optimizer steps and exports its weights.

All methods are collectives over the whole world. Every rank passes the micro-batches of its own data-parallel replica;
their number is the same on all ranks. Results are the same on every rank of a replica.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_rlvr.algo.head import (
    vocab_parallel_gradient_norm,
    vocab_parallel_likeliest,
    vocab_parallel_logp_entropy,
)
from megatron_rlvr.algo.loss import LossInputs, SelectedTokens
from megatron_rlvr.batching.batch import MicroBatch, PolicyScores
from megatron_rlvr.batching.packing import Packing
from megatron_rlvr.config import ModelSettings, OptimizerSettings, ParallelSettings
from megatron_rlvr.distributed import accelerator
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.hf.families import padded_vocab_size
from megatron_rlvr.hf.files import read_config
from megatron_rlvr.policy.attention import packed_stream
from megatron_rlvr.policy.build import PolicyModel, build_chunks, build_optimizer
from megatron_rlvr.policy.context import ContextShard, context_shard
from megatron_rlvr.policy.gradient import Gradient
from megatron_rlvr.policy.weights import WeightMap, global_parameters
from megatron_rlvr.protocols import PolicyLoss

# Transformer Engine's FP8 matrix products need a multiple of this many tokens on a rank.
_FP8_ALIGNMENT = 16

MaskOfEntropy = Callable[[MicroBatch, Tensor], Tensor]
Head = Callable[..., tuple[Tensor, ...]]


class Policy:
    """A Hugging Face model, sharded in Megatron's layout.

    Args:
        model: model folder and precision.
        parallel: the layout, in which ``ranks`` were initialised.
        ranks: this rank's place and process groups.
        optimizer: settings of the optimizer; None for a frozen policy, which only scores.
        megatron: fields passed through to Megatron's own configs.
        temperature: sampling temperature; log-probabilities and entropies are of softmax(logits / temperature).
        seed: seed of Megatron's random states.
    """

    def __init__(
        self,
        model: ModelSettings,
        parallel: ParallelSettings,
        ranks: Ranks,
        *,
        optimizer: OptimizerSettings | None = None,
        megatron: Mapping[str, Any] | None = None,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.ranks = ranks
        self.hf_config = read_config(model.path)
        self.folder = Path(model.path)
        self._temperature = temperature
        self.chunks = build_chunks(
            model, parallel, megatron or {}, self.hf_config, ranks, seed, frozen=optimizer is None
        )
        self._config = get_model_config(self.chunks[0])
        vocab = padded_vocab_size(self.hf_config["vocab_size"], parallel.tensor)
        self._weights = WeightMap(self.hf_config, vocab, ranks)
        self._weights.load(global_parameters(self.chunks), model.path)
        if optimizer is not None:
            self.optimizer, self.schedule = build_optimizer(optimizer, model, megatron or {}, self.chunks)

    @property
    def device(self) -> torch.device:
        """Device of the scores."""
        return accelerator.device()

    def packing(self, tokens_per_micro_batch: int) -> Packing:
        """Rules by which sequences are packed into micro-batches of at most so many tokens in this layout."""
        context, tensor = self.ranks.context_size, self.ranks.tensor_size
        alignment = _FP8_ALIGNMENT if self._config.fp8 else 1
        return Packing(
            budget=tokens_per_micro_batch,
            pad_multiple=alignment * context * (tensor if self._config.sequence_parallel else 1),
            sequence_multiple=2 * context if context > 1 else 1,
            micro_batch_multiple=self.ranks.pipeline_size if len(self.chunks) > 1 else 1,
            quadratic=self._quadratic_cost,
        )

    @property
    def _quadratic_cost(self) -> float:
        """Cost of attention relative to the linear layers: a sequence of n tokens costs n + n^2 times this."""
        c = self._config
        query = c.num_attention_heads * c.kv_channels
        key_value = 2 * c.num_query_groups * c.kv_channels
        feed_forward = c.ffn_hidden_size
        if c.num_moe_experts is not None:
            moe_share = sum(c.moe_layer_freq) / c.num_layers
            feed_forward = moe_share * c.moe_router_topk * c.moe_ffn_hidden_size + (1 - moe_share) * c.ffn_hidden_size
        linear = c.hidden_size * (2 * query + key_value) + 3 * c.hidden_size * feed_forward
        return query / linear  # causal: n^2 / 2 scores, each 2 * query multiplications

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def start_step(self) -> None:
        """Advance the learning-rate schedule to the next training step."""
        self.schedule.step(increment=1)

    @torch.no_grad()
    def score(
        self,
        batches: Sequence[MicroBatch],
        *,
        gradient: bool = False,
        likeliest: int = 0,
        wanted: Sequence[Tensor] | None = None,
    ) -> PolicyScores:
        """Score every response token under the current weights.

        Args:
            batches: micro-batches of this data-parallel replica.
            gradient: whether to compute the norms of the tokens' logit gradients as well.
            likeliest: number of the likeliest tokens to return as well, at the wanted rows.
            wanted: for each micro-batch [R] bool on the CPU, rows for which the likeliest tokens are wanted. None on
                every rank for none.
        """
        head = vocab_parallel_gradient_norm if gradient else vocab_parallel_logp_entropy
        results = self._run(
            batches, partial(self._score_one, head=head, likeliest=likeliest, wanted=wanted), forward_only=True
        )
        sizes = [len(batch.rows) for batch in batches]
        values = self._from_last_stage([scores for scores, _ in results], 3 if gradient else 2, sizes)
        logp, entropy = values[:2]
        norms = values[2] if gradient else [torch.full_like(each, math.nan) for each in logp]
        if wanted is None:
            return PolicyScores(logp, entropy, norms)
        places = self._from_last_stage([top for _, top in results], 2 * likeliest, [int(rows.sum()) for rows in wanted])
        top = [torch.stack(rows, dim=1) for rows in zip(*places, strict=True)]
        return PolicyScores(logp, entropy, norms, [(t[:, :likeliest].long(), t[:, likeliest:]) for t in top])

    def _from_last_stage(self, results: Sequence[Tensor], height: int, sizes: Sequence[int]) -> list[list[Tensor]]:
        """Rows of what the last stage has computed, [height, size] for each micro-batch, on every stage."""
        flat = torch.empty(height, sum(sizes), device=accelerator.device())
        if self.ranks.last_stage:
            flat = torch.cat(list(results), dim=1)
        if self.ranks.pipeline_size > 1:
            source = dist.get_global_rank(self.ranks.pipeline_group, self.ranks.pipeline_size - 1)
            dist.broadcast(flat, src=source, group=self.ranks.pipeline_group)
        return [list(row.split(list(sizes))) for row in flat]

    def train_step(
        self,
        batches: Sequence[MicroBatch],
        masks: Sequence[Tensor] | MaskOfEntropy,
        inputs: Sequence[LossInputs],
        loss: PolicyLoss,
        count: int,
        *,
        entropy_coefficient: float = 0.0,
    ) -> dict[str, float]:
        """Take one optimizer step on a mini-batch: forward and backward over all micro-batches, clipping, Adam.

        Args:
            batches: micro-batches of this data-parallel replica.
            masks: for each micro-batch [R] bool, the selected tokens; or a function that selects them from the
                micro-batch and its current entropies (the head then runs over all response tokens).
            inputs: for each micro-batch the inputs of the loss for its R rows.
            loss: returns a sum over the selected tokens.
            count: divisor of that sum, counted over all ranks.
            entropy_coefficient: factor of the selected tokens' entropies, which are subtracted from the loss.

        Returns: metrics over all ranks: loss, grad_norm, skipped (1.0 if one of these is not finite; the weights are
        then unchanged), and the metrics of ``loss`` as means over the selected tokens.
        """
        metrics = self._backward(batches, masks, inputs, loss, count, entropy_coefficient)
        if not math.isfinite(metrics["loss"]):
            return metrics | {"grad_norm": math.nan, "skipped": 1.0}
        return metrics | self._update()

    def gradient(
        self,
        batches: Sequence[MicroBatch],
        masks: Sequence[Tensor],
        inputs: Sequence[LossInputs],
        loss: PolicyLoss,
        count: int,
    ) -> Gradient:
        """Return the gradient of the loss, valid until the next pass; the arguments are those of `train_step`."""
        self._backward(batches, masks, inputs, loss, count, 0.0)
        return Gradient.of(self.optimizer)

    def export_weights(self) -> Iterable[tuple[str, Tensor]]:
        """All weights as (Hugging Face name, whole tensor), gathered when the result is iterated.

        The result can be iterated repeatedly. Each iteration is a collective that every rank must exhaust.
        """
        return _Export(self._weights, self.chunks)

    # One pass through the pipeline ----------------------------------------------------------------------------------

    def _run(self, batches: Sequence[MicroBatch], loss_of: Callable[..., Any], forward_only: bool) -> list[Any]:
        """Run Megatron's pipeline schedule over micro-batches; returns the reports of ``loss_of`` on the last stage."""
        numbered = list(enumerate(batches))
        return get_forward_backward_func()(
            forward_step_func=partial(self._forward_one, loss_of=loss_of),
            data_iterator=[iter(numbered) for _ in self.chunks] if len(self.chunks) > 1 else iter(numbered),
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=max(len(batch.tokens) for batch in batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _backward(
        self,
        batches: Sequence[MicroBatch],
        masks: Sequence[Tensor] | MaskOfEntropy,
        inputs: Sequence[LossInputs],
        loss: PolicyLoss,
        count: int,
        entropy_coefficient: float,
    ) -> dict[str, float]:
        """Leave the gradient in the gradient buffers; return the metrics of the loss."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        one = partial(
            self._train_one,
            masks=masks,
            inputs=inputs,
            loss=loss,
            count=count,
            entropy_coefficient=entropy_coefficient,
        )
        return self._reduce(self._run(batches, one, forward_only=False))

    def _forward_one(
        self, data: Iterator[tuple[int, MicroBatch]], chunk: torch.nn.Module, loss_of: Callable[..., Any]
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        number, batch = next(data)
        shard = context_shard(
            batch.to(accelerator.device()), self.ranks.context_rank, self.ranks.context_size, self.ranks.context_group
        )
        hidden = chunk(
            input_ids=shard.part.tokens.unsqueeze(0),
            position_ids=None,
            attention_mask=None,
            packed_seq_params=packed_stream(shard.part),
        )
        return hidden, partial(loss_of, number=number, shard=shard, chunk=chunk)

    def _head(
        self, head: Head, hidden: Tensor, batch: MicroBatch, chunk: Any, rows: Tensor, **options: Any
    ) -> tuple[Tensor, ...]:
        model: PolicyModel = getattr(chunk, "module", chunk)
        return head(
            hidden.squeeze(1),
            model.output_weight,
            batch.targets,
            tp_group=self.ranks.tensor_group,
            sequence_parallel=self._config.sequence_parallel,
            valid_vocab=self.hf_config["vocab_size"],
            temperature=self._temperature,
            rows=rows,
            **options,
        )

    def _score_one(
        self,
        hidden: Tensor,
        number: int,
        shard: ContextShard,
        chunk: Any,
        head: Head,
        likeliest: int = 0,
        wanted: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        scores = shard.whole(torch.stack(self._head(head, hidden, shard.part, chunk, shard.part.rows)))
        top = None if wanted is None else self._likeliest(hidden, shard, chunk, likeliest, wanted[number])
        return hidden.new_zeros(()), torch.zeros((), dtype=torch.int), (scores, top)

    def _likeliest(self, hidden: Tensor, shard: ContextShard, chunk: Any, count: int, wanted: Tensor) -> Tensor:
        """[2 count, n] float32: token ids, which are below 2^24 and therefore exact, above their log-probabilities."""
        wanted = wanted.to(hidden.device)
        here = wanted[shard.held]
        model: PolicyModel = getattr(chunk, "module", chunk)
        ids, logp = vocab_parallel_likeliest(
            hidden.squeeze(1),
            model.output_weight,
            count,
            tp_group=self.ranks.tensor_group,
            sequence_parallel=self._config.sequence_parallel,
            valid_vocab=self.hf_config["vocab_size"],
            temperature=self._temperature,
            rows=shard.part.rows[here],
        )
        top = logp.new_zeros(2 * count, len(here))
        top[:, here] = torch.cat([ids, logp], dim=1).t().to(top.dtype)
        return shard.whole(top)[:, wanted]

    def _train_one(
        self,
        hidden: Tensor,
        number: int,
        shard: ContextShard,
        chunk: Any,
        masks: Sequence[Tensor] | MaskOfEntropy,
        inputs: Sequence[LossInputs],
        loss: PolicyLoss,
        count: int,
        entropy_coefficient: float,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        batch = shard.part
        head = partial(
            self._head,
            vocab_parallel_logp_entropy,
            entropy_grad=entropy_coefficient != 0,
            gradient_accumulation_fusion=self._config.gradient_accumulation_fusion,
        )
        if callable(masks):
            logp, entropy = head(hidden, batch, chunk, batch.rows)
            mask = masks(shard.batch, shard.whole(entropy.detach()))[shard.held]
            logp, entropy = logp[mask], entropy[mask]
        else:
            mask = masks[number].to(hidden.device)[shard.held]
            logp, entropy = head(hidden, batch, chunk, batch.rows[mask])
        tokens = SelectedTokens.of(
            inputs[number].to(hidden.device)[shard.held][mask],
            rollout_logp=batch.rollout_logp[mask],
            sequence=batch.sequence[mask],
            sequences=len(batch.lengths),
            context_group=shard.group,
        )
        total, metrics = loss(logp, tokens)
        if entropy_coefficient:
            total = total - entropy_coefficient * (entropy if tokens.scale is None else entropy * tokens.scale).sum()
        total = total / count
        metrics = metrics | {"loss": total.detach(), "selected": mask.sum()}
        return total, torch.zeros((), dtype=torch.int), metrics

    # After the pass -------------------------------------------------------------------------------------------------

    def _reduce(self, reports: list[dict[str, Tensor]]) -> dict[str, float]:
        """Sum metrics over micro-batches and data-parallel ranks; those of the loss become means per selected token."""
        metrics: dict[str, float] | None = None
        if self.ranks.last_stage:
            names = sorted(reports[0])
            sums = torch.stack([sum(r[name].double() for r in reports) for name in names])  # type: ignore[misc]
            dist.all_reduce(sums, group=self.ranks.data_context_group)
            metrics = dict(zip(names, sums.tolist(), strict=True))
            tokens = max(1.0, metrics.pop("selected"))
            metrics = {name: value if name == "loss" else value / tokens for name, value in metrics.items()}
        return self.ranks.from_last_stage(metrics)

    def _update(self) -> dict[str, float]:
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):
            return {"grad_norm": norm, "skipped": 1.0}
        self.optimizer.step()
        return {"grad_norm": norm, "skipped": 0.0}


class _Export:
    """Weights under Hugging Face names; each iteration gathers them again."""

    def __init__(self, weights: WeightMap, chunks: Sequence[torch.nn.Module]) -> None:
        self._weights = weights
        self._chunks = chunks

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._weights.export(global_parameters(self._chunks))
