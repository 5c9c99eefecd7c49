"""Independent reference of the training step: transformers' model in float64, unpacked sequences, plain autograd.

Of the package, only the names of settings are used. Sequences are padded on the right, which causal attention
cannot see; log-probabilities and entropies are those of whole softmaxes; the optimizer is torch's own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

GROUP_SIZE = 4
Group = tuple[list[int], list[list[int]], list[float]]
"""A prompt, its responses and their rewards."""


@dataclass(frozen=True)
class Recipe:
    """Settings of a run, by the names of the package's settings."""

    steps: int = 5
    mini_batch_groups: int = 4
    temperature: float = 1.0
    keep: str = "top"
    fraction: float = 0.2
    scope: str = "mini_batch"
    entropy: str = "old"
    normalizer: str = "all_tokens"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 10.0
    entropy_coefficient: float = 0.0
    kl_coefficient: float = 0.0
    reference: str = ""
    learning_rate: float = 3e-3
    warmup_steps: int = 2
    weight_decay: float = 0.1
    clip_grad: float = 0.75
    betas: tuple[float, float] = (0.9, 0.95)
    # Large enough that an update does not amplify the last bit of a gradient that is nearly zero.
    eps: float = 1e-3


@dataclass
class Trace:
    """Trace of a run: one entry per mini-batch, and the weights at the end under Hugging Face names."""

    kept: list[list[int]] = field(default_factory=list)
    threshold: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    clip_fraction: list[float] = field(default_factory=list)
    skipped: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def make_groups(count: int, vocabulary: int, seed: int, longest: int = 40) -> list[Group]:
    """Prompts of 1 to 10 and responses of 1 to ``longest`` random tokens; every group is informative."""
    random = np.random.default_rng(seed)

    def tokens(most: int) -> list[int]:
        return random.integers(vocabulary, size=random.integers(1, most + 1)).tolist()

    return [
        (tokens(10), [tokens(longest) for _ in range(GROUP_SIZE)], [1.0, -1.0, *random.choice([-1.0, 1.0], 2).tolist()])
        for _ in range(count)
    ]


def load(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )


def token_scores(model: Any, sequences: Sequence[tuple[list[int], list[int]]], temperature: float) -> list[Tensor]:
    """For each (prompt, response) the log-probability and the entropy of every response token, [T, 2]."""
    whole = [prompt + response for prompt, response in sequences]
    padded = torch.zeros(len(whole), max(map(len, whole)), dtype=torch.int64)
    for i, ids in enumerate(whole):
        padded[i, : len(ids)] = torch.tensor(ids)
    log_p = torch.log_softmax(model(input_ids=padded, use_cache=False).logits / temperature, dim=-1)
    scores = []
    for i, (prompt, response) in enumerate(sequences):
        at = log_p[i, len(prompt) - 1 : len(prompt) - 1 + len(response)]
        logp = at[torch.arange(len(response)), torch.tensor(response)]
        scores.append(torch.stack([logp, -(at.exp() * at).sum(-1)], dim=1))
    return scores


def train(
    folder: str, groups: list[Group], recipe: Recipe, micro_batches: list[list[list[int]]] | None = None
) -> Trace:
    """Train on the same groups in all steps. ``micro_batches``: sequences of each, for scope micro_batch."""
    model = load(folder)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=recipe.betas,
        eps=recipe.eps,
    )
    numbers = range(len(groups) * GROUP_SIZE)
    sequences = [(groups[n // GROUP_SIZE][0], groups[n // GROUP_SIZE][1][n % GROUP_SIZE]) for n in numbers]
    advantages = [a for _, _, rewards in groups for a in (np.array(rewards) - np.mean(rewards)) / np.std(rewards)]
    size = recipe.mini_batch_groups * GROUP_SIZE
    with torch.no_grad():
        reference = token_scores(load(recipe.reference), sequences, recipe.temperature) if recipe.reference else None
    trace = Trace()
    for step in range(recipe.steps):
        with torch.no_grad():
            old = token_scores(model, sequences, recipe.temperature)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / max(1, recipe.warmup_steps))
        for start in range(0, len(sequences), size):
            mini = list(numbers[start : start + size])
            now = dict(zip(mini, token_scores(model, [sequences[n] for n in mini], recipe.temperature), strict=True))
            parts = [list(numbers)] if recipe.scope == "rollout_batch" else [mini]
            if recipe.scope == "micro_batch":
                assert micro_batches is not None
                parts = micro_batches[len(trace.loss)]
            entropy_of = now if recipe.entropy == "current" else dict(enumerate(old))
            kept, threshold = _kept(parts, {n: pair[:, 1].detach() for n, pair in entropy_of.items()}, recipe)
            kept = [(n, t) for n, t in kept if n in now]
            terms = [_token_loss(now[n][t, 0], old[n][t, 0], advantages[n], recipe) for n, t in kept]
            losses = [
                term - recipe.entropy_coefficient * now[n][t, 1] for (term, _), (n, t) in zip(terms, kept, strict=True)
            ]
            if reference is not None:
                d = [reference[n][t, 0] - now[n][t, 0] for n, t in kept]
                losses = [a + recipe.kl_coefficient * (b.exp() - b - 1) for a, b in zip(losses, d, strict=True)]
            loss = _mean(losses, kept, {n: len(scores) for n, scores in now.items()}, recipe.normalizer)
            optimizer.zero_grad()
            loss.backward()
            trace.kept.append(sorted((n << 20) + t for n, t in kept))
            trace.threshold.append(threshold)
            trace.loss.append(loss.item())
            trace.clip_fraction.append(sum(clipped for _, clipped in terms) / len(terms))
            trace.grad_norm.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)))
            trace.skipped.append(0.0 if math.isfinite(trace.grad_norm[-1]) else 1.0)
            if not trace.skipped[-1]:
                optimizer.step()
    trace.weights = {name: p.detach() for name, p in model.named_parameters()}
    return trace


def _mean(losses: list[Tensor], kept: list[tuple[int, int]], lengths: dict[int, int], normalizer: str) -> Tensor:
    """The losses of the kept (sequence, position) over tokens, or averaged by sequence or by prompt."""
    if normalizer in ("all_tokens", "selected_tokens"):
        return torch.stack(losses).sum() / (len(kept) if normalizer == "selected_tokens" else sum(lengths.values()))
    size = 1 if normalizer == "sequence_mean" else GROUP_SIZE
    means = []
    for first in range(min(lengths), max(lengths) + 1, size):
        own = [loss for loss, (n, _) in zip(losses, kept, strict=True) if first <= n < first + size]
        means.append(sum(own, torch.zeros(())) / sum(lengths[n] for n in range(first, first + size)))
    return torch.stack(means).mean()


def _kept(parts: list[list[int]], entropy: dict[int, Tensor], recipe: Recipe) -> tuple[list[tuple[int, int]], float]:
    """(sequence, position) of each part's tokens of highest entropy, and the last part's lowest such entropy."""
    kept: list[tuple[int, int]] = []
    threshold = math.nan
    for part in parts:
        ranked = sorted((-float(h), n, t) for n in part for t, h in enumerate(entropy[n]))
        chosen = ranked[: math.ceil(round(recipe.fraction * len(ranked), 9))]
        kept += [(n, t) for _, n, t in chosen]
        threshold = -chosen[-1][0]
    return kept, threshold


def _token_loss(logp: Tensor, old: Tensor, advantage: float, recipe: Recipe) -> tuple[Tensor, bool]:
    ratio = (logp - old).exp()
    clipped = ratio.clamp(1 - recipe.clip_low, 1 + recipe.clip_high)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    is_clipped = bool(objective < ratio * advantage)
    if advantage < 0 and objective < recipe.dual_clip * advantage:
        objective = torch.zeros_like(ratio) + recipe.dual_clip * advantage
    return -objective, is_clipped
