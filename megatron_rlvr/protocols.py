"""Interfaces of the replaceable parts of the trainer (engine, reward, loss), and the errors that they raise."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from megatron_rlvr.errors import FaultError
from megatron_rlvr.types import Completion, CompletionRequest, Graded, Prompt

if TYPE_CHECKING:
    import torch

    from megatron_rlvr.algo.loss import SelectedTokens


class EngineError(FaultError):
    """The rollout engine cannot answer: no server is left, or a request failed on every server it was sent to."""


class WeightsMissingError(EngineError):
    """No server is usable, and a healthy one lacks only the current weights, which a weight sync would give it."""


class Sampling(Protocol):
    """Sampling parameters of an engine: the part of the settings that it needs."""

    @property
    def temperature(self) -> float:
        """Divisor of the logits; 0 for greedy sampling."""

    @property
    def top_p(self) -> float:
        """Probability mass of the nucleus that is sampled from; 1 for the whole distribution."""

    @property
    def max_response_tokens(self) -> int:
        """Length at which a response is truncated."""


class RolloutEngine(Protocol):
    """Engine that samples completions with the weights that it was last given."""

    def update_weights(self, named_tensors: "Iterable[tuple[str, torch.Tensor]]", version: int) -> None:
        """Load the whole model, by Hugging Face names. Tokens sampled from now on carry ``version``."""

    def release_memory(self) -> None:
        """Free as much memory for training as possible, until the next `update_weights`."""

    def generate(self, requests: Sequence[CompletionRequest], sampling: Sampling) -> Iterator[Completion]:
        """Yield one completion for each request, as soon as it is finished, in any order."""


class RolloutStream(Protocol):
    """Stream of requests to a streaming engine and of their completions; used by one thread."""

    def submit(self, requests: Sequence[CompletionRequest], resume_from: Sequence[Completion | None]) -> None:
        """Request completions.

        Args:
            requests: Requests to add.
            resume_from: For each request, the partial completion to continue, from an earlier stream; None to start
                from the prompt.
        """

    def get(self, timeout_seconds: float) -> tuple[CompletionRequest, Completion] | None:
        """Return the next finished completion, or None if there is none in time. Raises EngineError."""

    def abort(self) -> list[tuple[CompletionRequest, Completion]]:
        """Abort all requests.

        Returns: completions that are finished and were not taken by `get`, and those that are partial, with the finish
            reason "abort". A request may be missing, if nothing is known of it.
        """


class StreamingEngine(RolloutEngine, Protocol):
    """Engine that keeps sampling while more requests arrive and while its weights change."""

    def open(self, sampling: Sampling) -> AbstractContextManager[RolloutStream]:
        """Open a stream."""


RewardAndCorrect = tuple[float, bool] | tuple[float, bool, Mapping[str, float]]


class Reward(Protocol):
    """Reward function of a response. Runs in a grader process, which is killed when it takes too long.

    A bool means correct or incorrect; a float is the reward itself, and correct if it reaches `reward.correct`; a tuple
    (reward, correct) or (reward, correct, {name: number}) states both, and numbers for metrics; None leaves the
    completion out of its group. `types.Graded` has names for all of that, and for the answer that was read.
    """

    def __call__(self, prompt: Prompt, response: str) -> "bool | float | RewardAndCorrect | Graded | None": ...


class PolicyLoss(Protocol):
    """Loss over the selected tokens of a micro-batch, as a sum, which the global count divides later.

    A token whose advantage is zero must have no gradient, but for regularizers: without those, the learner drops such
    tokens from the training pass.
    """

    def __call__(
        self, logp: "torch.Tensor", tokens: "SelectedTokens"
    ) -> "tuple[torch.Tensor, dict[str, torch.Tensor]]":
        """Return the loss and its metrics.

        Args:
            logp: [N] float32 nats, log-probabilities of the selected tokens under the current policy.
            tokens: Other data of the same tokens.

        Returns: differentiable scalar sum of the loss, and {metric: scalar sum}.
        """
