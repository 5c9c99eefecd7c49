"""From logits to a token, by inverting the distribution function at a given uniform, in float64.

With weights w = exp(z / T - max) in the order of the vocabulary and C their running sums, a uniform u picks the first
token k with C_k > u * C_V. Given the logits, the uniform alone decides, so a request that brings its own stream of
uniforms is answered alike whatever it is sampled together with; float64 keeps the rounding of the sums from moving a
token's boundary when a batch is cut otherwise.
"""

import torch


def sample_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens at which the distribution functions pass the uniforms.

    Args:
        logits: [B, V].
        uniforms: [B] float64 in [0, 1), one a row.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: keeps the fewest likeliest tokens that together reach this probability.

    Returns: [B] tokens, and [B] float32 log-probabilities under softmax(logits / temperature) without top_p.
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
        # The first entry *above* the threshold: a token of weight zero has no such entry of its own.
        tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
        tokens = tokens.clamp_(max=logits.shape[-1] - 1)  # past the end only where logits are NaN
    else:
        tokens = shifted.argmax(-1, keepdim=True)
    return tokens[:, 0], (shifted.gather(-1, tokens) - log_total)[:, 0].float()


def _nucleus(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """[B, V] weights, zero outside the fewest largest that reach ``top_p`` of the sum."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    cumulative = ordered.cumsum(-1)
    ordered[cumulative - ordered >= top_p * cumulative[:, -1:]] = 0
    # Back in the order of the vocabulary: two nearly equal tokens that swap ranks must not swap what a uniform picks.
    return torch.zeros_like(weights).scatter_(-1, order, ordered)
