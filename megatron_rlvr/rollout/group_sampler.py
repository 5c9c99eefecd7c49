"""Group sampler: samples and grades groups for one step on one leader, in a thread of its own, until the batch is full.

Groups in progress from earlier steps come first. Then prompts are drawn one at a time from a counter that the leaders
of all data-parallel replicas share, so that the servers are kept busy with as many groups as the batch is still
expected to need. When enough groups are informative over all replicas, the remaining requests are aborted, and groups
in progress keep their graded completions and, with ``rollout.partial``, the tokens of unfinished ones, so that nothing
is sampled, graded or trained on twice. group_buffer.py draws the states of a group.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_rlvr.config import RolloutSettings
from megatron_rlvr.distributed.counters import Counters, Counts
from megatron_rlvr.protocols import RolloutStream
from megatron_rlvr.rollout.group_buffer import FinishedGroup, GroupInProgress, GroupState
from megatron_rlvr.rollout.informative_rate import InformativeRate
from megatron_rlvr.rollout.sampler import Grading, Sampler, requests_for
from megatron_rlvr.types import Completion, CompletionRequest, Group, Prompt

_POLL_SECONDS = 0.05
_JOIN_SECONDS = 0.2


@dataclass(frozen=True)
class StepDemand:
    """Groups that a step needs, the same on every leader.

    Attributes:
        missing: Number of informative groups that the batch still lacks.
        in_progress: Number of groups in progress from earlier steps, over all replicas.
        prompts: Prompts that may be drawn; the first claim gets the first.
        first_order: Place of the first of them in the order of drawing.
        rate: Estimate of the share of informative groups.
        leaders: Number of leaders that share the demand.
    """

    missing: int
    in_progress: int
    prompts: Sequence[Prompt]
    first_order: int
    rate: InformativeRate
    leaders: int


@dataclass
class SampledGroups:
    """Result of one group sampler.

    Attributes:
        finished: Finished groups, informative or not.
        in_progress: Groups to resume, in the order of drawing.
        failure: Exception that ended sampling early.
    """

    finished: list[FinishedGroup] = field(default_factory=list)
    in_progress: list[GroupInProgress] = field(default_factory=list)
    failure: Exception | None = None


class GroupSampler:
    """Samples groups in a thread, which starts at once; `wait` returns the result.

    Args:
        sampler: Sampler of a streaming engine.
        settings: Settings of the rollout.
        counters: Counters of this attempt, shared by all leaders.
        demand: Groups that the step needs.
        groups: Groups in progress to resume first; owned by the group sampler from now on.
        is_informative: Whether a group can be trained on.
        seed: Seed of the run.

    Attributes:
        sampled: Number of completions that have arrived so far; other threads may read it.
    """

    def __init__(
        self,
        sampler: Sampler,
        settings: RolloutSettings,
        counters: Counters,
        demand: StepDemand,
        groups: Sequence[GroupInProgress],
        *,
        is_informative: Callable[[Group], bool],
        seed: int,
    ) -> None:
        self.sampled = 0
        self._sampler = sampler
        self._settings = settings
        self._counters = counters
        self._demand = demand
        self._is_informative = is_informative
        self._seed = seed
        self._in_progress = {group.order: group for group in groups}
        # By the seed of a request, which distinguishes the completions of a prompt that was drawn twice.
        self._group_of: dict[int, GroupInProgress] = {}
        self._grading: Grading[GroupInProgress] = sampler.grading(settings, overlong_penalty=True)
        self._result = SampledGroups()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="group sampler", daemon=True)
        self._thread.start()

    def wait(self, poll: Callable[[], None]) -> SampledGroups:
        """Wait for the end and return the result; ``poll`` is called about five times a second meanwhile."""
        while self._thread.is_alive():
            self._thread.join(_JOIN_SECONDS)
            poll()
        return self._result

    def cancel(self) -> None:
        """Stop early, on all leaders, and wait for the end on this one; `wait` returns what was sampled."""
        self.request_stop()
        self._thread.join()

    def request_stop(self) -> None:
        """Stop early, on all leaders, without waiting for the end."""
        self._stop.set()

    # In the thread of the group sampler ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with self._sampler.open(self._settings) as stream:
                try:
                    self._sample(stream)
                finally:
                    self._abort(stream)
        except Exception as error:  # raised by the collector, on every rank
            self._result.failure = error
            self._counters.stop()
        if self._stop.is_set():
            self._counters.stop()
        for group in self._in_progress.values():
            group.interrupt()
        self._result.in_progress = sorted(self._in_progress.values(), key=lambda group: group.order)
        self._counters.leave()

    def _sample(self, stream: RolloutStream) -> None:
        if self._demand.missing:
            for group in self._in_progress.values():
                self._submit(stream, group)
        while not self._stop.is_set():
            counts = self._counters.counts()
            if counts.stopped or counts.informative >= self._demand.missing:
                return
            self._draw(stream, counts)
            if not self._in_progress:
                if counts.drawn >= len(self._demand.prompts):
                    return  # other leaders may still work on their groups
                self._stop.wait(_POLL_SECONDS)
                continue
            answer = stream.get(_POLL_SECONDS)
            while answer is not None:
                self._arrive(*answer)
                answer = stream.get(0)
            self._collect_grades()

    def _draw(self, stream: RolloutStream, counts: Counts) -> None:
        """Claim prompts while fewer groups are in progress, here and on all leaders, than the batch may need."""
        demand, drawn = self._demand, min(counts.drawn, len(self._demand.prompts))
        rate = demand.rate.plus(counts.informative, counts.finished)
        wanted = math.ceil(rate.groups_for(demand.missing - counts.informative) * self._settings.oversampling)
        room = wanted - (demand.in_progress + drawn - counts.finished)
        share = math.ceil(wanted / demand.leaders) - len(self._in_progress)
        for _ in range(min(room, share)):
            number = self._counters.claim()
            if number >= len(demand.prompts):
                return
            order = demand.first_order + number
            group = GroupInProgress(order, demand.prompts[number], self._settings.group_size)
            self._in_progress[order] = group
            self._submit(stream, group)

    def _submit(self, stream: RolloutStream, group: GroupInProgress) -> None:
        """Request the completions that a group lacks."""
        missing = group.request()
        every = requests_for(group.prompt, group.size, self._seed, f"train/{group.order}")
        requests = [every[index] for index in missing]
        self._group_of |= {request.seed: group for request in requests}
        stream.submit(requests, [group.partial.get(index) for index in missing])

    def _arrive(self, request: CompletionRequest, completion: Completion) -> None:
        """Send a completion to the graders."""
        group = self._group_of[request.seed]
        group.arrive(completion)
        self._grading.submit(group, group.prompt, completion)
        self.sampled += 1

    def _collect_grades(self, *, wait: bool = False) -> None:
        """Store the grades that are known, and report the groups that they finish."""
        for group, completion, grade in self._grading.collect(wait=wait):
            group.add_grade(completion, grade)
            if group.state is GroupState.FINISHED:
                finished = self._in_progress.pop(group.order).finish()
                self._result.finished.append(finished)
                self._counters.finish(self._is_informative(finished.group))

    def _abort(self, stream: RolloutStream) -> None:
        """Abort outstanding requests, then wait for all grades, which the grader timeout bounds, so nothing is lost."""
        for request, completion in stream.abort():
            if completion.finish_reason != "abort":
                self._arrive(request, completion)
            elif self._settings.partial and len(completion.token_ids):
                self._group_of[request.seed].partial[completion.index] = completion
        self._collect_grades(wait=True)
