"""Measures a real policy: bytes of its tensors, bytes that autograd saves, operations. Run on ranks by test_plan.py."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from launcher import Ranks as Ranks
from policy_runs import Layout as Layout
from policy_runs import policy_of
from reference_training import Recipe
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


@dataclass
class Measured:
    """Measurements of one training step on one rank, in bytes and operations.

    Attributes:
        weights: Bytes of the model's weights.
        gradients: Bytes of the gradient buffers.
        optimizer: Bytes of the optimizer's state.
        saved: Bytes saved by autograd from the start of the forward pass to the loss, without weights.
        peak: Most bytes alive at once during the training pass, beyond those before it.
        rows: Number of selected rows of a micro-batch.
        score: {"products", "attention": operations} of the scoring pass.
        train: {"products", "attention": operations} of the training pass.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    saved: int = 0
    peak: int = 0
    rows: int = 0
    score: dict[str, float] = field(default_factory=dict)
    train: dict[str, float] = field(default_factory=dict)


def measured(folder: str, layout: Layout, lengths: list[int], micro_batches: int) -> Measured:
    """Run a step in bf16 on identical micro-batches of sequences of these lengths."""
    with policy_of(folder, layout, Recipe(), "bfloat16") as policy:
        batch = policy.packing(sum(lengths)).pack(_samples(lengths, policy.hf_config["vocab_size"]))
        batches = [batch] * micro_batches
        policy.start_step()
        with _counter() as counter:
            scores = policy.score(batches)
        found = Measured(score=_flops(counter))
        mask = scores.entropy[0] >= scores.entropy[0].quantile(0.8)
        step = batches, [mask] * micro_batches, scores.plain_inputs(batches)
        saved, loss = _Saved(policy), _Loss()
        loss.before_return = saved.stop
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor), _counter() as counter:
            policy.train_step(*step, loss, len(mask))
        found.saved, found.rows, found.train = saved.bytes, int(mask.sum()), _flops(counter)
        with Alive() as alive:
            policy.train_step(*step, _Loss(), len(mask))
        found.peak = alive.peak
        found.weights = _bytes(policy_parameters(policy))
        found.gradients = _bytes(
            buffer.grad_data for chunk in policy.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        )
        found.optimizer = _bytes(_optimizer_tensors(policy)) - found.weights
        return found


def head_peak(rows: int, tokens: int, hidden: int, vocab: int, dtype: str) -> int:
    """Return the peak bytes of the head's forward and backward pass on one rank, including gradients."""
    from megatron_rlvr.algo.head import vocab_parallel_logp_entropy

    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, dtype=getattr(torch, dtype)).requires_grad_()
    weight = (torch.randn(vocab, hidden) / hidden**0.5).to(states.dtype).requires_grad_()
    targets = torch.randint(vocab, (tokens,))
    chosen = torch.randperm(tokens)[:rows].sort().values
    with Alive() as alive:
        logp, _ = vocab_parallel_logp_entropy(states, weight, targets, rows=chosen)
        (-logp.sum()).backward()
    return alive.peak


class Alive(TorchDispatchMode):
    """Records the peak of the bytes alive at once, of the storages that operations created."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_storage(value)._cdata for value in _tensors([args, kwargs or {}])}
        result = func(*args, **(kwargs or {}))
        for value in _tensors(result):
            storage = _storage(value)
            if storage._cdata not in before and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self._now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self._now)
        return result

    def _freed(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


class _Saved:
    """Counts the bytes of the storages that autograd saves, each once, until `stop` is called."""

    def __init__(self, policy: Any) -> None:
        self.bytes = 0
        self._on = True
        self._seen = {_storage(p).data_ptr() for p in policy_parameters(policy)}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if self._on and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def stop(self) -> None:
        self._on = False


class _Loss:
    """Minus the log-probabilities of the selected tokens; a ratio would change neither memory nor operations."""

    before_return: Any = None

    def __call__(self, logp: Tensor, tokens: Any) -> tuple[Tensor, dict[str, Tensor]]:
        total = -(logp * tokens.advantages).sum()
        if self.before_return is not None:
            self.before_return()
        return total, {}


def policy_parameters(policy: Any) -> list[Tensor]:
    return [parameter for chunk in policy.chunks for parameter in chunk.parameters()]


def _optimizer_tensors(policy: Any) -> Iterator[Tensor]:
    """Yield the weights that the optimizer updates, fp32 or the model's own, and its moments."""
    yield from policy_parameters(policy)
    for optimizer in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        inner = optimizer.optimizer
        for group in inner.param_groups:
            yield from group["params"]
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.numel() > 1)


def _bytes(tensors: Any) -> int:
    return sum({_storage(t).data_ptr(): _storage(t).nbytes() for t in tensors}.values())


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _samples(lengths: list[int], vocab: int, prompt: int = 8) -> list[Any]:
    from megatron_rlvr.batching.batch import TrainingSequence

    random = np.random.default_rng(0)
    samples = []
    for number, length in enumerate(lengths):
        ids = random.integers(vocab, size=length + 1).astype(np.int32)
        tokens = length + 1 - prompt
        zeros = np.zeros(tokens, np.float32)
        samples.append(TrainingSequence(number, ids[:prompt], ids[prompt:], zeros, 1.0, zeros.astype(np.int32)))
    return samples


def _counter() -> FlopCounterMode:
    """Return torch's counter, extended by the CPU's attention and by products that add in place."""

    def attention(query: Any, key: Any, value: Any, *unused: Any, out_shape: Any = None, **more: Any) -> int:
        batch, heads, queries, size = query
        return 2 * 2 * batch * heads * queries * key[2] * size

    def attention_backward(grad: Any, query: Any, key: Any, *unused: Any, out_shape: Any = None, **more: Any) -> int:
        batch, heads, queries, size = query
        return 5 * 2 * batch * heads * queries * key[2] * size

    def added(out: Any, a: Any, b: Any, *unused: Any, out_shape: Any = None, **more: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
            aten.addmm_: added,
        },
    )


def _flops(counter: FlopCounterMode) -> dict[str, float]:
    """Return the operations of products, and those of attention without its causal mask."""
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for operation, count in counts.items() if "attention" in str(operation))
    return {"products": float(sum(counts.values()) - attention), "attention": float(attention)}
