"""Two temperatures by entropy on real servers, against transformers."""

import numpy as np
import torch
from real_servers import in_order, requests, sampling

from megatron_rlvr.engines.two_temperatures import TwoTemperatures


@torch.no_grad()
def logits_of(model, request, completion) -> torch.Tensor:
    prompt = request.prompt.token_ids
    tokens = torch.from_numpy(np.concatenate([prompt, completion.token_ids]).astype(np.int64))
    return model(input_ids=tokens[None]).logits[0, len(prompt) - 1 : -1].double()


def test_servers_sample_high_above_the_threshold_and_low_elsewhere(servers, engine_on, reference):
    urls = [server.url for server in servers]
    asked = requests(6, group_size=2)
    greedy = engine_on(urls, two_temperatures=TwoTemperatures(1.0, 0.0, 0.0))
    greedy.update_weights(iter(reference.state_dict().items()), version=0)
    likeliest = in_order(asked, greedy.generate(asked, sampling(16, temperature=1.0)))
    logits = [logits_of(reference, *pair) for pair in zip(asked, likeliest, strict=True)]
    for each, completion in zip(logits, likeliest, strict=True):
        assert completion.token_ids.tolist() == each.argmax(-1).tolist()
    entropies = torch.cat([torch.special.entr(each.softmax(-1)).sum(-1) for each in logits])
    two = TwoTemperatures(float(entropies.median()), 1.5, 0.4)
    engine = engine_on(urls, two_temperatures=two)
    engine.update_weights(iter(reference.state_dict().items()), version=0)
    used = set()
    for request, completion in zip(
        asked, in_order(asked, engine.generate(asked, sampling(16, temperature=1.0))), strict=True
    ):
        each = logits_of(reference, request, completion)
        above = torch.special.entr(each.softmax(-1)).sum(-1) > two.threshold
        temperature = torch.where(above, two.high, two.low)[:, None]
        tokens = torch.from_numpy(completion.token_ids.astype(np.int64))[:, None]
        expected = (each / temperature).log_softmax(-1).gather(-1, tokens)[:, 0].numpy()
        assert np.abs(completion.logprobs - expected).max() < 1e-3
        used |= set(above.tolist())
    assert used == {True, False}
