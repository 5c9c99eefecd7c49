"""Sampling of a token from logits, by inverting the cumulative distribution at a given uniform number.

With weights w = exp((z - max) / T) in the order of the vocabulary and C their cumulative sums, a uniform number u picks
the first token k with C_k > u * C_V. Given the logits, the token depends on u alone, so a request with its own stream
of uniform numbers gets the same response in any batch.

The weights and their sums over blocks of the vocabulary are fp32, the sums over blocks float64, and sums up to a single
token are taken in one block only: float64 throughout took as long as a small model's forward. Rounding moves the
boundary between two tokens by about 1e-7 of the total, whatever the batch.
"""

import torch

_BLOCK = 256
"""Tokens of a block; near the root of a large vocabulary's size, so that neither of the two searches is long."""


def sample_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token per row.

    Args:
        logits: [B, V].
        uniforms: [B] float64 in [0, 1), one per row.
        temperature: Divisor of the logits; 0 takes the most likely token.
        top_p: Nucleus sampling: sample from the fewest most likely tokens whose probabilities reach this sum.

    Returns:
        [B] tokens, and [B] float32 log-probabilities (nats) under softmax(logits / temperature), without top_p.
    """
    divisor = temperature if temperature > 0 else 1.0
    maximum, tokens = logits.max(-1, keepdim=True)
    # Shifted before they are divided, so that those which matter are near 0, where rounding errors are small.
    weights = torch.sub(logits.float(), maximum).div_(divisor).exp_()
    block_sums = _blocks(weights).sum(-1)
    log_total = block_sums.double().sum(-1, keepdim=True).log()
    if temperature > 0:
        if top_p < 1:
            weights = _nucleus(weights, top_p)
            block_sums = _blocks(weights).sum(-1)
        tokens = _inverted(weights, block_sums, uniforms[:, None])
    shifted = (logits.gather(-1, tokens).double() - maximum.double()) / divisor
    return tokens[:, 0], (shifted - log_total)[:, 0].float()


def _blocks(weights: torch.Tensor) -> torch.Tensor:
    """Return weights [B, V] as [B, blocks, tokens of a block], with zeros at the end of the last block."""
    padding = -weights.shape[-1] % _BLOCK
    padded = torch.nn.functional.pad(weights, (0, padding)) if padding else weights
    return padded.unflatten(-1, (-1, _BLOCK))


def _inverted(weights: torch.Tensor, block_sums: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return for each row the first token whose cumulative weight is above u times the total, [B, 1]."""
    cumulative = block_sums.double().cumsum(-1)
    sought = uniforms * cumulative[:, -1:]
    # right=True finds the first entry *above* it, so that a block, and in it a token, of weight zero is never picked.
    block = torch.searchsorted(cumulative, sought, right=True)
    block.clamp_(max=cumulative.shape[-1] - 1)  # only NaN logits give an index past the end
    block_sum = block_sums.gather(-1, block).double()
    share = 1 - (cumulative.gather(-1, block) - sought) / block_sum
    columns = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(-1, columns.clamp(max=weights.shape[-1] - 1)).double()
    inside = inside.masked_fill(columns >= weights.shape[-1], 0).cumsum(-1)
    # The block's sum in float64 differs from that in fp32 by a rounding error: what is sought inside is a share of it.
    sought = share.clamp(0, 1 - 2**-52) * inside[:, -1:]
    tokens = block * _BLOCK + torch.searchsorted(inside, sought, right=True)
    return tokens.clamp_(max=weights.shape[-1] - 1)


def _nucleus(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return weights [B, V] with zeros outside the fewest largest ones that reach ``top_p`` of the sum."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    cumulative = ordered.cumsum(-1, dtype=torch.float64)
    ordered[cumulative - ordered >= top_p * cumulative[:, -1:]] = 0
    # Restore the order of the vocabulary: if two nearly equal tokens swap ranks, u must still pick the same token.
    return torch.zeros_like(weights).scatter_(-1, order, ordered)
