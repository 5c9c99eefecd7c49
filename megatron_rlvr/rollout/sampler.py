"""Sampling and grading of this rank's own requests: answers are graded while others are still being sampled."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import cast

from megatron_rlvr.config import RewardSettings
from megatron_rlvr.data.tokenizer import Tokenizer
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.protocols import RolloutEngine, RolloutStream, Sampling, StreamingEngine
from megatron_rlvr.reward.graders import GraderPool, Verdict, grade
from megatron_rlvr.types import Completion, CompletionRequest, Grade, Prompt


def request_seed(run_seed: int, occasion: str, prompt_id: str, sample: int) -> int:
    """Seed of one completion's random stream, from what it is and not from who samples it.

    ``occasion`` tells apart the times at which a run samples the same prompt.
    """
    text = f"{run_seed}/{occasion}/{sample}/{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def requests_for(prompt: Prompt, samples: int, run_seed: int, occasion: str) -> list[CompletionRequest]:
    """All samples of a prompt."""
    return [CompletionRequest(prompt, n, request_seed(run_seed, occasion, prompt.id, n)) for n in range(samples)]


class Sampler:
    """An engine, a tokenizer and graders, together: from requests to graded completions.

    With ``leaders_only`` the first rank of each replica asks for all of its samples, as suits an engine outside.
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
        self._leaders_only = leaders_only
        self.tokenizer = tokenizer
        self._graders = graders
        self._reward = reward

    def part_of(self, requests: Sequence[CompletionRequest], ranks: Ranks) -> Sequence[CompletionRequest]:
        """What this rank asks for of the requests of its replica."""
        if self._leaders_only:
            return requests if ranks.replica_rank == 0 else []
        return requests[ranks.replica_rank :: ranks.replica_size]

    def run(
        self,
        requests: Sequence[CompletionRequest],
        sampling: Sampling,
        *,
        overlong_buffer: int = 0,
        on_finished: Callable[[int], None] = lambda count: None,
    ) -> list[tuple[Completion, Grade]]:
        """Graded completions in the order of the requests.

        Args:
            requests: of this rank.
            sampling: temperature, top_p and the cap on the response.
            overlong_buffer: of the soft overlong penalty; 0 for none.
            on_finished: called with 1 for each completion that is sampled.
        """
        prompts = {r.prompt.id: r.prompt for r in requests}
        pending: dict[tuple[str, int], tuple[Completion, Future[Verdict]]] = {}
        for completion in self.engine.generate(requests, sampling):
            key = completion.prompt_id, completion.index
            pending[key] = completion, self.judge(prompts[completion.prompt_id], completion)
            on_finished(1)
        graded = []
        for request in requests:
            completion, verdict = pending[request.prompt.id, request.index]
            graded.append((completion, self.grade(completion, verdict, sampling, overlong_buffer)))
        return graded

    def open(self, sampling: Sampling) -> AbstractContextManager[RolloutStream]:
        """A stream of the engine, which must be one that streams."""
        return cast(StreamingEngine, self.engine).open(sampling)

    def judge(self, prompt: Prompt, completion: Completion) -> Future[Verdict]:
        """Hands a completion to the graders."""
        return self._graders.submit(prompt, self.tokenizer.decode(completion.token_ids.tolist()))

    def grade(
        self, completion: Completion, verdict: Future[Verdict], sampling: Sampling, overlong_buffer: int
    ) -> Grade:
        """What the graders' verdict, which is waited for, is worth."""
        return grade(
            verdict.result(),
            len(completion.token_ids),
            correct=self._reward.correct,
            wrong=self._reward.wrong,
            max_response_tokens=sampling.max_response_tokens,
            overlong_buffer=overlong_buffer,
        )
