"""The method on one page: one process, a transformers model, and the functions of `megatron_rlvr.algo` as they are.

    make quickstart                     once: makes the model and the problems that this script uses
    python examples/minimal.py          trains the same model for 40 steps on the CPU

A training step samples G responses to each prompt, grades them, and trains on the forking tokens: the fraction rho of
response tokens with the highest entropy. For token t of response i with advantage A_i the loss is (DAPO)

    L = -1/N  sum over i, t with H_t >= tau of  min(r A_i, clip(r, 1 - low, 1 + high) A_i),   r = p_new(t) / p_old(t)

where tau is the k-th largest entropy of the mini-batch, k = ceil(rho N), and N counts all of its response tokens.

The trainer does the same, and tests/multi_rank/test_minimal.py compares one step of both. Left out here: everything
that makes it fast, large or safe, such as parallelism, packing, servers, killable graders, surplus groups, checkpoints.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rlvr.algo.advantage import grpo_advantages
from megatron_rlvr.algo.head import vocab_parallel_logp_entropy
from megatron_rlvr.algo.loss import dapo_loss
from megatron_rlvr.algo.quantile import global_top_fraction_mask
from megatron_rlvr.reward.math import math_reward
from megatron_rlvr.types import Prompt

GROUP_SIZE = 8
PROMPTS_PER_STEP = 12
PROMPTS_PER_MINI_BATCH = 6
MAX_ROUNDS = 3
MAX_RESPONSE_TOKENS = 110
FRACTION = 0.2
CLIP_LOW, CLIP_HIGH, DUAL_CLIP = 0.2, 0.28, 10.0
LEARNING_RATE, BETAS, EPS, CLIP_GRAD = 5e-4, (0.9, 0.95), 1e-8, 1.0


@dataclass
class Response:
    """One sampled response with its advantage.

    Attributes:
        prompt_ids: [P] int64.
        response_ids: [T] int64, with the end token if there is one.
        advantage: A, the same for all of its tokens.
    """

    prompt_ids: Tensor
    response_ids: Tensor
    advantage: float


# Rollout ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt_ids: Tensor) -> list[Tensor]:
    """Sample G responses to one prompt from softmax(logits), each [T] up to and including the end token."""
    output = model.generate(
        input_ids=prompt_ids.repeat(GROUP_SIZE, 1),
        attention_mask=torch.ones(GROUP_SIZE, len(prompt_ids), dtype=torch.int64),
        max_new_tokens=MAX_RESPONSE_TOKENS,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    responses = []
    for row in output[:, len(prompt_ids) :]:
        ends = (row == tokenizer.eos_token_id).nonzero()
        responses.append(row[: int(ends[0]) + 1] if len(ends) else row)
    return responses


def collect(model: Any, tokenizer: Any, prompts: Iterator[Prompt]) -> tuple[list[list[Response]], float]:
    """Sample groups until enough are informative (dynamic sampling); return them, and the accuracy of all groups.

    A group whose rewards are all equal has no advantage, A = (R - mean) / std, and so no gradient.
    """
    groups: list[list[Response]] = []
    rewards_of_all = []
    for _ in range(MAX_ROUNDS * PROMPTS_PER_STEP):
        if len(groups) == PROMPTS_PER_STEP:
            break
        prompt = next(prompts)
        prompt_ids = torch.from_numpy(prompt.token_ids)
        responses = sample(model, tokenizer, prompt_ids)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
        rewards = np.array([float(math_reward(prompt, text)) for text in texts])
        rewards_of_all.append(rewards)
        if rewards.min() < rewards.max():
            pairs = zip(responses, grpo_advantages(rewards), strict=True)
            groups.append([Response(prompt_ids, ids, float(advantage)) for ids, advantage in pairs])
    return groups, float(np.mean(rewards_of_all))


# Training -----------------------------------------------------------------------------------------------------------


def score(model: Any, response: Response) -> tuple[Tensor, Tensor]:
    """Log-probability log p(y_t) and entropy H_t = -sum p log p of every response token, each [T] nats.

    The token at position t is predicted from position t - 1, so the rows start at the last token of the prompt.
    """
    ids = torch.cat([response.prompt_ids, response.response_ids])
    hidden = model.model(input_ids=ids[None, :-1]).last_hidden_state[0, len(response.prompt_ids) - 1 :]
    return vocab_parallel_logp_entropy(hidden, model.get_output_embeddings().weight, response.response_ids)


def train_step(
    model: Any, optimizer: torch.optim.Optimizer, groups: Sequence[Sequence[Response]], *, fraction: float = FRACTION
) -> list[dict[str, float]]:
    """Take one optimizer step per mini-batch; return the metrics of each.

    Scores are of the policy before the first of these steps: p_old, and the entropies that select the tokens.
    """
    with torch.no_grad():
        old = [[score(model, response) for response in group] for group in groups]
    reports = []
    for start in range(0, len(groups), PROMPTS_PER_MINI_BATCH):
        part = slice(start, start + PROMPTS_PER_MINI_BATCH)
        responses = [response for group in groups[part] for response in group]
        old_logp, entropy = zip(*[pair for group in old[part] for pair in group], strict=True)
        reports.append(train_mini_batch(model, optimizer, responses, old_logp, entropy, fraction))
    return reports


def train_mini_batch(
    model: Any,
    optimizer: torch.optim.Optimizer,
    responses: Sequence[Response],
    old_logp: Sequence[Tensor],
    entropy: Sequence[Tensor],
    fraction: float,
) -> dict[str, float]:
    """Select the forking tokens of the mini-batch and take one optimizer step on them."""
    tokens = sum(len(response.response_ids) for response in responses)  # N
    ids = torch.arange(tokens)  # break ties at the threshold
    mask, found = global_top_fraction_mask(torch.cat([*entropy]), fraction, token_ids=ids)
    masks = mask.split([len(h) for h in entropy])
    optimizer.zero_grad()
    total = 0.0
    for response, before, chosen in zip(responses, old_logp, masks, strict=True):
        logp = score(model, response)[0][chosen]
        advantages = torch.full_like(logp, response.advantage)
        losses = dapo_loss(
            logp, before[chosen], advantages, clip_low=CLIP_LOW, clip_high=CLIP_HIGH, dual_clip=DUAL_CLIP
        )
        loss = losses.loss.sum() / tokens
        loss.backward()
        total += loss.item()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD))
    optimizer.step()
    return {"loss": total, "grad_norm": norm, "threshold": found.threshold, "selected": found.kept}


# The run ------------------------------------------------------------------------------------------------------------


def read_prompts(path: Path, tokenizer: Any, seed: int) -> Iterator[Prompt]:
    """Yield the problems of a JSON lines file (prompt, answer) for ever, in a new order each epoch."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    random = np.random.default_rng(seed)
    while True:
        for i in random.permutation(len(rows)):
            ids = np.array(tokenizer(rows[i]["prompt"], add_special_tokens=False).input_ids)
            yield Prompt(str(i), ids, str(rows[i]["answer"]), path.stem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart/base_model"), help="Hugging Face folder")
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart/data/train.jsonl"), help="JSON lines")
    parser.add_argument("--steps", type=int, default=40, help="number of training steps (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling and order (default 0)")
    options = parser.parse_args()
    for path in (options.model, options.data):
        if not path.exists():
            parser.error(f"{path} does not exist; run `make quickstart` first, or name another")
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=0.0)
    prompts = read_prompts(options.data, tokenizer, options.seed)
    for step in range(1, options.steps + 1):
        groups, accuracy = collect(model, tokenizer, prompts)
        reports = train_step(model, optimizer, groups)
        threshold = np.mean([report["threshold"] for report in reports]) if reports else math.nan
        print(f"step {step:>3}  accuracy {accuracy:.3f}  groups {len(groups)}  threshold {threshold:.3f}", flush=True)


if __name__ == "__main__":
    main()
