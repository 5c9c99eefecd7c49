"""Decoding with two temperatures: one where the entropy of a token exceeds a threshold, another one elsewhere.

    H_t = entropy of softmax(z_t)            T_t = high if H_t > threshold else low
    the token is sampled from softmax(z_t / T_t), at temperature 0 the likeliest token

as in "Beyond the 80/20 rule" (Wang et al., 2025, section 3). An engine samples from the returned logits at temperature
1. SGLang servers, on which the project is not installed, get this file as text: it imports torch only.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TwoTemperatures:
    """Temperatures of an evaluation.

    Attributes:
        threshold: Entropy in nats, at temperature 1, above which a token is sampled at the high temperature.
        high: Temperature above the threshold; 0 takes the likeliest token.
        low: Temperature elsewhere.
    """

    threshold: float
    high: float
    low: float

    def __call__(self, logits: Tensor) -> Tensor:
        """Return logits [B, V] to be sampled from at temperature 1, of the dtype of ``logits`` [B, V]."""
        rows = [torch.full_like(logits[:, :1], value) for value in (self.threshold, self.high, self.low)]
        return with_two_temperatures(logits, *rows)


def with_two_temperatures(logits: Tensor, threshold: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Return log-probabilities [B, V] divided by the temperature of their row; the three values are [B, 1]."""
    log_p = logits.log_softmax(-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1, keepdim=True)
    temperature = torch.where(entropy > threshold, high, low)
    others = torch.ones_like(log_p, dtype=torch.bool).scatter_(-1, log_p.argmax(-1, keepdim=True), value=False)
    greedy = log_p.masked_fill(others, -torch.inf)
    return torch.where(temperature == 0, greedy, log_p / temperature.clamp(min=torch.finfo(log_p.dtype).tiny))


class ServerProcessor:
    """Custom logit processor of SGLang: logits [B, V], and for each row the values of `TwoTemperatures`."""

    def __call__(self, logits: Tensor, custom_param_list: list[dict[str, Any]]) -> Tensor:
        rows = [logits.new_tensor([[p[name]] for p in custom_param_list]) for name in ("threshold", "high", "low")]
        return with_two_temperatures(logits, *rows)
