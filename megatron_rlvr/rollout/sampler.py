"""Sampling of this rank's own requests; each completion is graded as it arrives, while others are being sampled."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar, cast

from megatron_rlvr.config import RewardSettings
from megatron_rlvr.data.tokenizer import Tokenizer
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.protocols import RolloutEngine, RolloutStream, Sampling, StreamingEngine
from megatron_rlvr.reward.graders import GraderPool, Verdict, grade
from megatron_rlvr.types import Completion, CompletionRequest, Grade, Prompt

Tag = TypeVar("Tag")
Generate = Callable[[Sequence[CompletionRequest], Any], Iterator[Completion]]
"""Yields completions for requests, in any order; `RolloutEngine.generate`."""


def request_seed(run_seed: int, occasion: str, prompt_id: str, index: int) -> int:
    """Return the seed of one completion's random stream, which does not depend on the rank that samples it.

    Args:
        run_seed: Seed of the run.
        occasion: Name that distinguishes the times at which a run samples the same prompt.
        prompt_id: Id of the prompt.
        index: Index of the completion in its group.
    """
    text = f"{run_seed}/{occasion}/{index}/{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def requests_for(prompt: Prompt, group_size: int, run_seed: int, occasion: str) -> list[CompletionRequest]:
    """Return the requests for all completions of a prompt."""
    return [CompletionRequest(prompt, i, request_seed(run_seed, occasion, prompt.id, i)) for i in range(group_size)]


class Sampler:
    """An engine, a tokenizer and graders, which together turn requests into graded completions.

    Args:
        engine: Samples the completions.
        tokenizer: Decodes them for the graders.
        graders: Processes that grade the decoded text.
        reward: Settings of the reward.
        leaders_only: True if the first rank of each data-parallel replica makes all of its requests, for an engine
            outside of the training processes; False if the ranks of a replica share them.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: Tokenizer,
        graders: GraderPool,
        reward: RewardSettings,
        *,
        leaders_only: bool = False,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self._graders = graders
        self._reward = reward
        self._leaders_only = leaders_only

    def share_of(self, requests: Sequence[CompletionRequest], ranks: Ranks) -> Sequence[CompletionRequest]:
        """Return this rank's share of the requests of its data-parallel replica."""
        if self._leaders_only:
            return requests if ranks.replica_rank == 0 else []
        return requests[ranks.replica_rank :: ranks.replica_size]

    def run(
        self,
        requests: Sequence[CompletionRequest],
        sampling: Sampling,
        *,
        overlong_penalty: bool = False,
        on_finished: Callable[[int], None] = lambda count: None,
        generate: Generate | None = None,
    ) -> list[tuple[Completion, Grade]]:
        """Return graded completions in the order of the requests, without those that ``generate`` has left out.

        Args:
            requests: Requests of this rank, no two with the same prompt id and index.
            sampling: Temperature, top_p and the cap on the response.
            overlong_penalty: Whether the soft overlong penalty enters the rewards.
            on_finished: Called with 1 for each completion that is sampled.
            generate: Samples completions; by default the engine.
        """
        prompts = {request.prompt.id: request.prompt for request in requests}
        grading = self.grading(sampling, overlong_penalty=overlong_penalty)
        for completion in (generate or self.engine.generate)(requests, sampling):
            prompt = prompts[completion.prompt_id]
            grading.submit(prompt, prompt, completion)
            on_finished(1)
        graded = {(prompt.id, c.index): (c, grade) for prompt, c, grade in grading.collect(wait=True)}
        keys = ((request.prompt.id, request.index) for request in requests)
        return [graded[key] for key in keys if key in graded]

    def open(self, sampling: Sampling) -> AbstractContextManager[RolloutStream]:
        """Open a stream of the engine, which must be a `StreamingEngine`."""
        return cast(StreamingEngine, self.engine).open(sampling)

    def grading(self, sampling: Sampling, *, overlong_penalty: bool) -> "Grading":
        """Return an empty `Grading` of completions that are sampled with these settings."""
        return Grading(self, sampling, overlong_penalty=overlong_penalty)

    def submit_to_graders(self, prompt: Prompt, completion: Completion) -> Future[Verdict]:
        """Queue a completion for the graders."""
        return self._graders.submit(prompt, self.tokenizer.decode(completion.token_ids.tolist()))

    def grade(self, completion: Completion, verdict: Verdict, sampling: Sampling, *, overlong_penalty: bool) -> Grade:
        """Return the grade that a verdict earns under the settings of the reward."""
        return grade(
            verdict,
            len(completion.token_ids),
            correct=self._reward.correct,
            incorrect=self._reward.incorrect,
            max_response_tokens=sampling.max_response_tokens,
            overlong_buffer=self._reward.overlong_buffer if overlong_penalty else 0,
        )


class Grading(Generic[Tag]):
    """Completions that graders work on while others are still being sampled; made by `Sampler.grading`.

    Example::

        grading = sampler.grading(settings, overlong_penalty=True)
        grading.submit("mine", prompt, completion)               # graders start on it at once
        for tag, completion, grade in grading.collect(): ...     # the completions whose grade is known
        for tag, completion, grade in grading.collect(wait=True): ...  # all the others
    """

    def __init__(self, sampler: Sampler, sampling: Sampling, *, overlong_penalty: bool) -> None:
        self._sampler = sampler
        self._sampling = sampling
        self._overlong_penalty = overlong_penalty
        self._pending: list[tuple[Tag, Completion, Future[Verdict]]] = []

    def submit(self, tag: Tag, prompt: Prompt, completion: Completion) -> None:
        """Send a completion to the graders; ``tag`` is returned with its grade."""
        self._pending.append((tag, completion, self._sampler.submit_to_graders(prompt, completion)))

    def collect(self, *, wait: bool = False) -> list[tuple[Tag, Completion, Grade]]:
        """Remove and return the completions whose grade is known; with ``wait``, all, waiting for each grade.

        The grader timeout bounds the wait.
        """
        graded, pending = [], []
        for tag, completion, verdict in self._pending:
            if wait or verdict.done():
                graded.append((tag, completion, self._grade(completion, verdict.result())))
            else:
                pending.append((tag, completion, verdict))
        self._pending = pending
        return graded

    def _grade(self, completion: Completion, verdict: Verdict) -> Grade:
        return self._sampler.grade(completion, verdict, self._sampling, overlong_penalty=self._overlong_penalty)
