"""Sampling for one step by one leader, in a thread of its own, until the batch is full over all replicas.

Groups begun in earlier steps come first; then prompts are drawn, one at a time from a counter that all leaders share,
so that servers are kept busy with as many groups as the batch is expected to need still. When enough groups are
finished everywhere, the rest is aborted and kept: finished samples with their grades, and what unfinished ones have
got (`rollout.partial`), so that nothing is sampled, graded or trained twice.
"""

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from megatron_rlvr.config import RolloutSettings
from megatron_rlvr.distributed.counters import Counters, Counts
from megatron_rlvr.protocols import RolloutStream
from megatron_rlvr.reward.graders import Verdict
from megatron_rlvr.rollout.collector import MOST_OVERSAMPLING
from megatron_rlvr.rollout.group_buffer import BegunGroup, OrderedGroup
from megatron_rlvr.rollout.sampler import Sampler, requests_for
from megatron_rlvr.types import Completion, CompletionRequest, Prompt

_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Quota:
    """What a step needs, the same on every leader.

    Attributes:
        missing: informative groups that the batch still lacks.
        begun: groups that leaders have begun in earlier steps.
        prompts: what may be drawn; the first claim gets the first.
        first_order: place of the first of them in the order of drawing.
        informative, seen: groups lately seen, and those of them that could be trained on.
        leaders: how many share it.
    """

    missing: int
    begun: int
    prompts: Sequence[Prompt]
    first_order: int
    informative: float
    seen: float
    leaders: int


@dataclass
class Yield:
    """What a leader has when it stops.

    Attributes:
        settled: finished groups, whether they can be trained on or not.
        begun: groups that are to be gone on with.
        failure: what ended it before its time.
    """

    settled: list[OrderedGroup] = field(default_factory=list)
    begun: list[BegunGroup] = field(default_factory=list)
    failure: Exception | None = None


class Harvest:
    """See the module's header. It begins at once; `finish` waits for it.

    Args:
        sampler: of a streaming engine.
        begun: groups that this leader goes on with; they are this harvest's from now on.
        informative: whether a group can be trained on.
        seed: of the run.
    """

    def __init__(
        self,
        sampler: Sampler,
        settings: RolloutSettings,
        board: Counters,
        quota: Quota,
        begun: Sequence[BegunGroup],
        *,
        informative: Callable[[OrderedGroup], bool],
        overlong_buffer: int,
        seed: int,
    ) -> None:
        self._sampler = sampler
        self._settings = settings
        self._board = board
        self._quota = quota
        self._informative = informative
        self._overlong_buffer = overlong_buffer
        self._seed = seed
        self._open = {group.order: group for group in begun}
        # By seed, which tells apart the samples of a prompt that was drawn twice.
        self._order_of: dict[int, int] = {}
        self._grading: dict[tuple[int, int], tuple[Completion, Future[Verdict]]] = {}
        self._yield = Yield()
        self._cancelled = threading.Event()
        self.sampled = 0
        """Completions so far; read by other threads."""
        self._thread = threading.Thread(target=self._run, name="harvest", daemon=True)
        self._thread.start()

    def finish(self, look: Callable[[], None]) -> Yield:
        """Waits for the end, and calls ``look`` now and then meanwhile."""
        while self._thread.is_alive():
            self._thread.join(0.2)
            look()
        return self._yield

    def cancel(self) -> None:
        """Ends it early; what it has is in what `finish` returns."""
        self.stop_soon()
        self._thread.join()

    def stop_soon(self) -> None:
        """Like `cancel`, without waiting for the end; and nobody else goes on either."""
        self._cancelled.set()

    # In the harvest's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with self._sampler.open(self._settings) as stream:
                try:
                    self._sample(stream)
                finally:
                    self._put_by(stream)
        except Exception as error:
            self._yield.failure = error
            self._board.stop()
        if self._cancelled.is_set():
            self._board.stop()
        self._yield.begun = sorted(self._open.values(), key=lambda group: group.order)
        self._board.leave()

    def _sample(self, stream: RolloutStream) -> None:
        if self._quota.missing:
            for group in self._open.values():
                self._submit(stream, group)
        while not self._cancelled.is_set():
            counts = self._board.counts()
            if counts.stopped or counts.informative >= self._quota.missing:
                return
            self._draw(stream, counts)
            if not self._open:
                if counts.drawn >= len(self._quota.prompts):
                    return  # others may still work on theirs
                self._cancelled.wait(_LOOK_SECONDS)
                continue
            answer = stream.get(_LOOK_SECONDS)
            while answer is not None:
                self._take(*answer)
                answer = stream.get(0)
            self._settle()

    def _draw(self, stream: RolloutStream, counts: Counts) -> None:
        """Claims prompts while fewer groups are being sampled, here and everywhere, than the batch may need."""
        quota, drawn = self._quota, min(counts.drawn, len(self._quota.prompts))
        rate = max((quota.informative + counts.informative) / (quota.seen + counts.settled), 1 / MOST_OVERSAMPLING)
        wanted = math.ceil((quota.missing - counts.informative) / rate * self._settings.oversampling)
        room = wanted - (quota.begun + drawn - counts.settled)
        share = math.ceil(wanted / quota.leaders) - len(self._open)
        for _ in range(min(room, share)):
            number = self._board.claim()
            if number >= len(quota.prompts):
                return
            group = BegunGroup(quota.first_order + number, quota.prompts[number])
            self._open[group.order] = group
            self._submit(stream, group)

    def _submit(self, stream: RolloutStream, group: BegunGroup) -> None:
        """Asks for the samples that a group lacks."""
        requests = requests_for(group.prompt, self._settings.group_size, self._seed, f"train/{group.order}")
        missing = [request for request in requests if request.index not in group.graded]
        self._order_of |= {request.seed: group.order for request in missing}
        stream.submit(missing, [group.partial.get(request.index) for request in missing])

    def _take(self, request: CompletionRequest, completion: Completion) -> None:
        """A sample is complete: its grading begins."""
        order = self._order_of[request.seed]
        group = self._open[order]
        group.partial.pop(completion.index, None)
        self._grading[order, completion.index] = completion, self._sampler.judge(group.prompt, completion)
        self.sampled += 1

    def _settle(self, *, wait: bool = False) -> None:
        """Takes verdicts that have come, and groups that are finished with them."""
        ready = [key for key, (_, verdict) in self._grading.items() if wait or verdict.done()]
        for order, sample in ready:
            completion, verdict = self._grading.pop((order, sample))
            group = self._open[order]
            group.graded[sample] = (
                completion,
                self._sampler.grade(completion, verdict, self._settings, self._overlong_buffer),
            )
            if len(group.graded) == self._settings.group_size:
                finished = self._open.pop(order).finished()
                self._yield.settled.append(finished)
                self._board.settle(self._informative(finished))

    def _put_by(self, stream: RolloutStream) -> None:
        """Stops the servers, and keeps what there is: each verdict comes in bounded time, so all are waited for."""
        for request, completion in stream.abort():
            if completion.finish_reason != "abort":
                self._take(request, completion)
            elif self._settings.partial and len(completion.token_ids):
                self._open[self._order_of[request.seed]].partial[completion.index] = completion
        self._settle(wait=True)
