"""The seams of the trainer: what can be replaced, in one or two verbs each."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from megatron_rlvr.errors import FaultError
from megatron_rlvr.types import Completion, CompletionRequest, Prompt

if TYPE_CHECKING:
    import torch

    from megatron_rlvr.algo.loss import SelectedTokens


class EngineError(FaultError):
    """The rollout engine cannot answer: no server is left, or a request failed on every server it was sent to."""


class WeightsMissingError(EngineError):
    """No server is usable, and a healthy one lacks only the current weights, which a weight sync would give it."""


class Sampling(Protocol):
    """How to sample: the part of the settings an engine needs."""

    @property
    def temperature(self) -> float:
        """The logits are divided by it; 0: greedy."""

    @property
    def top_p(self) -> float:
        """Share of the probability that may be sampled."""

    @property
    def max_response_tokens(self) -> int:
        """A response is cut at this length."""


class RolloutEngine(Protocol):
    """Samples completions with the weights it was last given."""

    def update_weights(self, named_tensors: "Iterable[tuple[str, torch.Tensor]]", version: int) -> None:
        """Takes over the whole model under Hugging Face names; completions carry ``version`` from now on."""

    def release_memory(self) -> None:
        """Leaves to training what memory it can, until the next `update_weights`."""

    def generate(self, requests: Sequence[CompletionRequest], sampling: Sampling) -> Iterator[Completion]:
        """Yields one completion a request, each as soon as it is finished, in any order."""


class RolloutStream(Protocol):
    """Requests go in, completions come out."""

    def submit(self, requests: Sequence[CompletionRequest], begun: Sequence[Completion | None]) -> None:
        """Asks for completions; ``begun`` has what earlier streams have got of each."""

    def get(self, timeout_seconds: float) -> tuple[CompletionRequest, Completion] | None:
        """The next that is complete, or None if none is in time."""

    def abort(self) -> list[tuple[CompletionRequest, Completion]]:
        """Ends all requests: what is complete and was not taken, and ("abort") what is known of the others."""


class StreamingEngine(RolloutEngine, Protocol):
    """An engine that goes on sampling while more requests arrive, and while its weights change."""

    def open(self, sampling: Sampling) -> AbstractContextManager[RolloutStream]:
        """A stream, which is used by one thread."""


class Reward(Protocol):
    """A verdict on a response. Runs in a grader process that is killed when it takes too long.

    A bool means right or wrong; a float is the reward itself, right where it is above zero.
    """

    def __call__(self, prompt: Prompt, response: str) -> bool | float: ...


class PolicyLoss(Protocol):
    """A loss over the selected tokens of a micro-batch, as a sum: the global count divides it later.

    A token whose advantage is zero must have no gradient: the learner leaves such tokens out of the training pass.
    """

    def __call__(
        self, logp: "torch.Tensor", tokens: "SelectedTokens"
    ) -> "tuple[torch.Tensor, dict[str, torch.Tensor]]":
        """(differentiable scalar sum, {metric: scalar sum}) from log-probabilities [N] and what else is known."""
