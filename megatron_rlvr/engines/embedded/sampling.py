"""Sampling of a token from logits, by inverting the cumulative distribution at a given uniform number, in float64.

With weights w = exp(z / T - max) in the order of the vocabulary and C their cumulative sums, a uniform number u picks
the first token k with C_k > u * C_V. Given the logits, the token depends on u alone, so a request with its own stream
of uniform numbers gets the same response in any batch; float64 keeps rounding of the sums from moving a token's
boundary when the batch is composed differently.
"""

import torch


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
    scaled = logits.double()
    if temperature > 0:
        scaled = scaled / temperature
    shifted = scaled - scaled.amax(-1, keepdim=True)
    weights = shifted.exp()
    log_total = weights.sum(-1, keepdim=True).log()
    if temperature > 0:
        if top_p < 1:
            weights = _nucleus(weights, top_p)
        cumulative = weights.cumsum(-1)
        # right=True finds the first entry *above* u * C_V, so that a token of weight zero is never picked.
        tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
        tokens = tokens.clamp_(max=logits.shape[-1] - 1)  # only NaN logits give an index past the end
    else:
        tokens = shifted.argmax(-1, keepdim=True)
    return tokens[:, 0], (shifted.gather(-1, tokens) - log_total)[:, 0].float()


def _nucleus(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return weights [B, V] with zeros outside the fewest largest ones that reach ``top_p`` of the sum."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    cumulative = ordered.cumsum(-1)
    ordered[cumulative - ordered >= top_p * cumulative[:, -1:]] = 0
    # Restore the order of the vocabulary: if two nearly equal tokens swap ranks, u must still pick the same token.
    return torch.zeros_like(weights).scatter_(-1, order, ordered)
