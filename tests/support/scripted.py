"""An engine that answers by a script, and ranks in a given layout, for tests of the code between engine and loss.

The script sees a request as the real engine does: its answer depends on the prompt and on the seed, so an answer that
changes with the layout means that a seed did. A response is [verdict, four words of the seed, filling]: the user's
reward function reads its first token, and the seed distinguishes it from every other response.
"""

import functools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from launcher import Ranks as World
from launcher import joined_process_group as launchers_process_group

from megatron_rlvr.types import Completion, CompletionRequest, FinishReason, Prompt

PATIENCE_SECONDS = 600.0

CORRECT, INCORRECT, HANG, CRASH, SHARE, NOTHING = 1, 0, 2, 3, 4, 5
"""First tokens, for the reward function below; SHARE stands for a reward of 0.25, NOTHING for no verdict."""

REWARD = """\
import time


def first_token(prompt, response):
    verdict = response.split()[0]
    if verdict == "2":
        time.sleep(600)
    if verdict == "3":
        raise KeyError("no such answer")
    if verdict == "5":
        return None
    return 0.25 if verdict == "4" else verdict == prompt.answer
"""

Script = Callable[[CompletionRequest], tuple[int, int, bool]]
"""Request -> (first token, length, whether it was truncated)."""


def by_accuracy(request: CompletionRequest) -> tuple[int, int, bool]:
    """Correct with the probability in ``prompt.extra``, by a random stream of the request's seed."""
    dice = random.Random(request.seed)
    verdict = CORRECT if dice.random() < request.prompt.extra["accuracy"] else INCORRECT
    return verdict, dice.randint(5, 20), dice.random() < 0.3


def by_verdicts(request: CompletionRequest) -> tuple[int, int, bool]:
    """The verdicts in ``prompt.extra``, by completion index; each response has index + 10 tokens."""
    return request.prompt.extra["verdicts"][request.index], request.index + 10, False


def prompts_of(accuracies: Sequence[float], name: str = "set") -> list[Prompt]:
    """A prompt for each accuracy; the gold answer is the first token of a correct response."""
    token_ids = np.arange(3, dtype=np.int32)
    return [
        Prompt(f"{name}/{i}", token_ids, str(CORRECT), name, {"accuracy": accuracy})
        for i, accuracy in enumerate(accuracies)
    ]


class ScriptedEngine:
    """Answers by a script, in random order; records its requests."""

    def __init__(self, script: Script = by_accuracy) -> None:
        self.script = script
        self.asked: list[tuple[CompletionRequest, Any]] = []
        self.calls: list[int] = []
        """Number of requests of each call."""

    def update_weights(self, named_tensors: Any, version: int) -> None:
        raise NotImplementedError

    def release_memory(self) -> None:
        raise NotImplementedError

    def generate(self, requests: Sequence[CompletionRequest], sampling: Any) -> Iterator[Completion]:
        self.calls.append(len(requests))
        self.asked += [(request, sampling) for request in requests]
        for request in random.Random(len(self.asked)).sample(list(requests), len(requests)):
            yield answer(request, self.script)


def answer(request: CompletionRequest, script: Script = by_accuracy) -> Completion:
    """The completion that the script gives."""
    verdict, length, truncated = script(request)
    words = [request.seed >> shift & 0xFFFF for shift in (0, 16, 32, 48)]
    token_ids = np.array([verdict, *words, *[9] * (length - 5)], dtype=np.int32)
    logprobs = np.zeros(len(token_ids), dtype=np.float32)
    reason: FinishReason = "length" if truncated else "stop"
    return Completion(request.prompt.id, request.index, token_ids, logprobs, reason, 0 * token_ids)


class PlainTokenizer:
    """Writes tokens as numbers."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def write_reward(folder: Path) -> Path:
    """Write the user's reward function, user_reward:first_token, to ``folder``."""
    (folder / "user_reward.py").write_text(REWARD, encoding="ascii")
    return folder


def start_graders(folder: Path, timeout_seconds: float = 60.0) -> Any:
    """Real grader processes that run the user's function; it hangs and raises on the verdicts HANG and CRASH."""
    from megatron_rlvr.reward.graders import GraderPool

    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return GraderPool("user_reward:first_token", workers=1, timeout_seconds=timeout_seconds)


@dataclass(frozen=True)
class Layout:
    """Ranks of each replica, in the order of the replicas."""

    replicas: tuple[tuple[int, ...], ...]

    @property
    def world_size(self) -> int:
        return sum(map(len, self.replicas))


LAYOUTS = (
    Layout(((0,),)),
    Layout(((0,), (1,))),
    Layout(((0, 1),)),
    Layout(((0,), (1,), (2,), (3,))),
    Layout(((0, 1), (2, 3))),
    Layout(((0, 2), (1, 3))),  # as with pipeline stages, which Megatron puts outermost
    Layout(((0, 1, 2, 3),)),
)


def ranks_of(layout: Layout) -> Any:
    """This rank's place in ``layout``. A collective over the world."""
    import torch.distributed as dist

    from megatron_rlvr.distributed.ranks import Ranks

    rank = dist.get_rank()
    place = {r: (d, i) for d, replica in enumerate(layout.replicas) for i, r in enumerate(replica)}
    data_rank, within = place[rank]
    across = [dist.new_group(list(ranks)) for ranks in zip(*layout.replicas, strict=True)]
    inside = [dist.new_group(list(ranks)) for ranks in layout.replicas]
    return Ranks(
        rank=rank,
        world_size=layout.world_size,
        tensor_rank=within,
        tensor_size=len(layout.replicas[0]),
        pipeline_rank=0,
        pipeline_size=1,
        context_rank=0,
        context_size=1,
        expert_rank=0,
        expert_size=1,
        data_rank=data_rank,
        data_size=len(layout.replicas),
        tensor_group=inside[data_rank],
        pipeline_group=inside[data_rank],
        context_group=inside[data_rank],
        expert_group=inside[data_rank],
        data_group=across[within],
        data_context_group=across[within],
        expert_data_group=across[within],
        data_objects=across[within],
        replica_objects=inside[data_rank],
    )


@functools.cache
def _world() -> World:
    return World()


def on_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """Results of ``function(*arguments)`` on each of ``size`` ranks; the processes are started once a session."""
    return _world().run(function, size, *arguments, timeout=PATIENCE_SECONDS)


def joined_process_group() -> AbstractContextManager[Any]:
    """The launcher's process group, with a timeout for ranks that still import Megatron on a busy machine."""
    return launchers_process_group(PATIENCE_SECONDS)
