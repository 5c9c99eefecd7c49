"""Tests of the sampling of a token from logits, against cumulative sums of numpy in float64."""

import numpy as np
import torch

from megatron_rlvr.engines.embedded.sampling import sample_tokens


def inverted(weights, uniforms):
    """Return for each row of weights [B, V] the first token whose cumulative weight is above u times the total."""
    cumulative = weights.cumsum(-1)
    return [int(np.searchsorted(row, u * row[-1], side="right")) for row, u in zip(cumulative, uniforms, strict=True)]


def test_tokens_and_logprobs_are_those_of_float64_for_any_size_of_the_vocabulary():
    random = np.random.default_rng(0)
    for vocabulary in (1, 5, 256, 257, 1000, 5000):
        for temperature in (1.0, 0.3):
            logits = random.normal(0, 3, (200, vocabulary)).astype(np.float32)
            logits[:, random.random(vocabulary) < 0.3] = -np.inf
            logits[:, random.integers(vocabulary)] = 1.0
            uniforms = random.random(200)
            uniforms[:2] = 0.0, np.nextafter(1.0, 0.0)  # the ends of the interval, where weights are zero as well
            tokens, logprobs = sample_tokens(torch.from_numpy(logits), torch.from_numpy(uniforms), temperature, 1.0)
            scaled = logits.astype(np.float64) / temperature
            weights = np.exp(scaled - scaled.max(-1, keepdims=True))
            assert tokens.tolist() == inverted(weights, uniforms)
            expected = np.log((weights / weights.sum(-1, keepdims=True))[np.arange(200), tokens.numpy()])
            np.testing.assert_allclose(logprobs.numpy(), expected, rtol=0, atol=2e-6)


def test_top_p_samples_from_the_nucleus_of_a_vocabulary_of_several_blocks():
    random = np.random.default_rng(1)
    logits, uniforms = random.normal(0, 2, (100, 1000)).astype(np.float32), random.random(100)
    tokens, _ = sample_tokens(torch.from_numpy(logits), torch.from_numpy(uniforms), 1.0, 0.6)
    weights = np.exp(logits.astype(np.float64))
    ordered = -np.sort(-weights, -1)
    enough = (ordered.cumsum(-1) < 0.6 * ordered.sum(-1, keepdims=True)).sum(-1)
    least = ordered[np.arange(100), enough]
    assert tokens.tolist() == inverted(np.where(weights >= least[:, None], weights, 0), uniforms)


def test_a_row_samples_the_same_token_in_any_batch():
    random = torch.Generator().manual_seed(0)
    logits, uniforms = torch.randn(7, 3001, generator=random), torch.rand(7, generator=random, dtype=torch.float64)
    together, logprobs = sample_tokens(logits, uniforms, 0.7, 1.0)
    for row in range(7):
        alone, logprob = sample_tokens(logits[row : row + 1], uniforms[row : row + 1], 0.7, 1.0)
        assert int(alone) == int(together[row])
        torch.testing.assert_close(logprob, logprobs[row : row + 1], rtol=0, atol=1e-6)
