"""Requests to a pool of fake servers, and checks of their answers."""

import logging
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_server import VOCABULARY

from megatron_rlvr.rollout.sampler import requests_for
from megatron_rlvr.types import CompletionRequest, Prompt

LENGTH = 5


SAMPLING = SimpleNamespace(temperature=1.0, top_p=1.0, max_response_tokens=LENGTH)


CONFIG = {"vocab_size": VOCABULARY, "architectures": ["Qwen3ForCausalLM"]}


def requests(count: int) -> list[CompletionRequest]:
    prompts = [Prompt(f"set/{i}", np.array([1, i % VOCABULARY], dtype=np.int32), "", "set") for i in range(count)]
    return [request for prompt in prompts for request in requests_for(prompt, 1, 0, "test")]


def no_weights() -> Iterator[tuple[str, torch.Tensor]]:
    return iter({"weight": torch.zeros(1)}.items())


def check(asked: Sequence[CompletionRequest], completions: list[Any]) -> None:
    """Check that each request has its own answer, once."""
    assert sorted(c.prompt_id for c in completions) == sorted(r.prompt.id for r in asked)
    prompts = {r.prompt.id: int(r.prompt.token_ids[-1]) for r in asked}
    for completion in completions:
        last = prompts[completion.prompt_id]
        assert completion.token_ids.tolist() == [(last + i + 1) % VOCABULARY for i in range(LENGTH)]
        assert completion.logprobs.tolist() == [-0.25, -0.5, -0.75, -1.0, -1.25]
        assert (completion.finish_reason, completion.weight_versions.tolist()) == ("length", [1] * LENGTH)


def removals(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the logged removals from rotation."""
    return [
        r.getMessage()
        for r in caplog.records
        if r.levelno == logging.WARNING and "removed from rotation" in r.getMessage()
    ]
