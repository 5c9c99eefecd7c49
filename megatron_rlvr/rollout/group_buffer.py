"""Groups from the drawing of their prompt to the batch that trains on them, and the buffer that holds them.

A group is a prompt and its G = ``rollout.group_size`` completions. The capitals are its `GroupState`:

    prompt drawn
         |
         v   missing completions requested              last completion arrives
      WAITING -----------------------------> SAMPLING -------------------------> GRADING
       ^   ^                                    |                                   |
       |   |    step ends: requests aborted     |                last grade arrives |
       |   +------------------------------------+                                   v
       |                                                                        FINISHED
       |                                                                            |
       |                                                                            +--> dropped if all scores are
       |                                                                informative |    equal, and replaced by
       |       a token is older than rollout.max_staleness allows                   v    another prompt
       +------------------------------------------------------------------------- ready
                                                                                    |
                                                                                    v
                                      batch: the first batch.prompts ready groups in the order of drawing

Each completion is graded as it arrives, so a group that is SAMPLING has graded completions as well. An aborted group
keeps them and, with ``rollout.partial``, the tokens of unfinished ones, so that nothing is sampled or graded twice.
Ready groups that a full batch has no place for are carried over to the next step. A group with too old a token is
sampled from scratch.

Example of a group of two, interrupted between its completions::

    group = GroupInProgress(order=0, prompt=prompt, size=2)   # WAITING
    group.request()                                           # [0, 1]; SAMPLING
    group.arrive(first); group.add_grade(first, grade)        # SAMPLING: the other one is still outstanding
    group.interrupt()                                         # WAITING
    group.request()                                           # [1]; SAMPLING
    group.arrive(second)                                      # GRADING
    group.add_grade(second, grade)                            # FINISHED
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

from megatron_rlvr.config import RolloutSettings
from megatron_rlvr.distributed.collectives import gather, gather_on_first
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.rollout.informative_rate import InformativeRate
from megatron_rlvr.types import Completion, Grade, Group, Prompt


class GroupState(Enum):
    """State of a group in progress; the module's header has the transitions."""

    WAITING = "waiting"
    """Completions are missing and none is requested: the prompt is new, or an earlier step was interrupted."""
    SAMPLING = "sampling"
    """The engine is sampling at least one completion."""
    GRADING = "grading"
    """All completions have arrived, and at least one grade is outstanding."""
    FINISHED = "finished"
    """All completions are graded."""


@dataclass(frozen=True)
class FinishedGroup:
    """A finished group and its place in an order; every rank of one data-parallel replica holds it.

    Attributes:
        order: Place in the order in which the run draws prompts; in a batch, place in the batch.
        group: Prompt, completions and grades.
    """

    order: int
    group: Group

    @property
    def oldest_version(self) -> int:
        """Oldest version of the weights that sampled any token of the group."""
        return min(int(completion.weight_versions.min()) for completion in self.group.completions)


@dataclass(eq=False)
class GroupInProgress:
    """A drawn prompt with the completions that have been sampled for it so far.

    Attributes:
        order: Place in the order in which the run draws prompts.
        prompt: Prompt that all completions answer.
        size: Number of completions of the finished group.
        graded: {index: completion and grade} of finished completions.
        partial: {index: completion} of aborted requests, from which sampling resumes.
        requested: Indices of completions that the engine is sampling.
        ungraded: Indices of completions that have arrived and whose grade is outstanding.
    """

    order: int
    prompt: Prompt
    size: int
    graded: dict[int, tuple[Completion, Grade]] = field(default_factory=dict)
    partial: dict[int, Completion] = field(default_factory=dict)
    requested: set[int] = field(default_factory=set)
    ungraded: set[int] = field(default_factory=set)

    @property
    def state(self) -> GroupState:
        """Current state, derived from the attributes."""
        if self.requested:
            return GroupState.SAMPLING
        if self.ungraded:
            return GroupState.GRADING
        return GroupState.FINISHED if len(self.graded) == self.size else GroupState.WAITING

    @property
    def oldest_version(self) -> int | None:
        """Oldest version of the weights that sampled any token so far; None if there is no token."""
        completions = [*(completion for completion, _ in self.graded.values()), *self.partial.values()]
        return min((int(c.weight_versions.min()) for c in completions if len(c.weight_versions)), default=None)

    def request(self) -> list[int]:
        """Mark all missing completions as requested; return their indices."""
        assert self.state is GroupState.WAITING, self.state
        missing = [index for index in range(self.size) if index not in self.graded]
        self.requested = set(missing)
        return missing

    def arrive(self, completion: Completion) -> None:
        """Note that a requested completion is complete; its grade is outstanding from now on."""
        self.requested.remove(completion.index)
        self.partial.pop(completion.index, None)
        self.ungraded.add(completion.index)

    def add_grade(self, completion: Completion, grade: Grade) -> None:
        """Store a completion that has arrived, with its grade."""
        self.ungraded.remove(completion.index)
        self.graded[completion.index] = completion, grade

    def interrupt(self) -> None:
        """Forget outstanding requests and, after a failure, outstanding grades: their completions are missing again."""
        self.requested.clear()
        self.ungraded.clear()

    def restart(self) -> None:
        """Discard all that was sampled."""
        assert self.state is GroupState.WAITING, self.state
        self.graded, self.partial = {}, {}

    def finish(self) -> FinishedGroup:
        """Return the finished group, with completions in the order of their indices and without those left out."""
        assert self.state is GroupState.FINISHED, self.state
        pairs = [self.graded[index] for index in range(self.size)]
        pairs = [pair for pair in pairs if not pair[1].left_out]
        group = Group(self.prompt, [c for c, _ in pairs], [grade for _, grade in pairs], self.size - len(pairs))
        return FinishedGroup(self.order, group)


_Ordered = TypeVar("_Ordered", FinishedGroup, GroupInProgress)


class GroupBuffer:
    """Groups of this data-parallel replica that are in progress or ready for a batch, owned by a collector.

    Every rank of a replica holds the same finished groups. All ranks call the methods marked as collectives.

    Args:
        ranks: Place of this rank; collectives run over ``data_objects``, one rank of each replica.
        settings: Settings of the rollout; ``dynamic_sampling`` and ``max_staleness`` are read.
        groups_per_batch: Number of groups in the batch of a training step, over all replicas.
        leaders_only: True if only the first rank of a replica samples; the others then hold no group in progress.

    Attributes:
        in_progress: Groups that are WAITING, in the order of drawing. While a group sampler works on groups, they are
            not in the buffer.
        ready: Finished, informative groups that no batch has taken.
        total_ready: Number of ready groups over all replicas.
        rate: Estimate of the share of informative groups, the same on every rank.
    """

    def __init__(
        self, ranks: Ranks, settings: RolloutSettings, groups_per_batch: int, *, leaders_only: bool = False
    ) -> None:
        self.groups_per_batch = groups_per_batch
        self.in_progress: list[GroupInProgress] = []
        self.ready: list[FinishedGroup] = []
        self.total_ready = 0
        self.rate = InformativeRate()
        self._ranks = ranks
        self._settings = settings
        self._holds_in_progress = ranks.replica_rank == 0 or not leaders_only
        self._unreported: list[FinishedGroup] = []

    @property
    def missing(self) -> int:
        """Number of ready groups that the next batch still lacks, over all replicas."""
        return max(0, self.groups_per_batch - self.total_ready)

    def is_informative(self, group: Group) -> bool:
        """Return whether a group is trained on: any group of at least two is, if dynamic sampling is off."""
        return group.informative or (len(group.grades) > 1 and not self._settings.dynamic_sampling)

    def count(self, here: int) -> int:
        """Return the sum of ``here`` over all replicas. A collective."""
        return sum(gather(here, self._ranks.data_objects))

    def add(self, finished: Sequence[FinishedGroup]) -> tuple[int, int]:
        """Add finished groups of this replica; those that are not informative stay only for the metrics. A collective.

        Returns: number of added groups and of informative ones among them, over all replicas.
        """
        informative = [finished_group for finished_group in finished if self.is_informative(finished_group.group)]
        self._unreported += finished
        self.ready += informative
        counts = gather((len(finished), len(informative)), self._ranks.data_objects)
        total, total_informative = (sum(column) for column in zip(*counts, strict=True))
        self.total_ready += total_informative
        return total, total_informative

    def take_in_progress(self) -> list[GroupInProgress]:
        """Remove and return all groups in progress, for a sampler to work on."""
        taken, self.in_progress = self.in_progress, []
        return taken

    def take_unreported(self) -> list[Group]:
        """Remove and return this replica's groups, informative or not, that no step's metrics have counted yet."""
        taken, self._unreported = self._unreported, []
        return [finished.group for finished in taken]

    def restart_stale(self, step: int) -> None:
        """Restart groups with a token that is too old for training step ``step``. A collective.

        The weights before step ``step`` have version ``step - 1``; a token may be ``rollout.max_staleness`` older.
        """
        oldest = step - 1 - self._settings.max_staleness
        stale = [finished for finished in self.ready if finished.oldest_version < oldest]
        self.ready = [finished for finished in self.ready if finished.oldest_version >= oldest]
        self.total_ready = self.count(len(self.ready))
        for group in self.in_progress:
            if group.oldest_version is not None and group.oldest_version < oldest:
                group.restart()
        if self._holds_in_progress:
            self.in_progress += [
                GroupInProgress(f.order, f.group.prompt, len(f.group.completions) + f.group.left_out) for f in stale
            ]
            self.in_progress.sort(key=lambda group: group.order)

    def split_off_batch(self) -> list[FinishedGroup]:
        """Remove and return this replica's part of the batch, with orders from 0 over all replicas. A collective."""
        ready = sorted(self.ready, key=lambda finished: finished.order)
        parts = gather([finished.order for finished in ready], self._ranks.data_objects)
        everywhere = sorted(order for part in parts for order in part)
        place = {order: i for i, order in enumerate(everywhere)}
        size = self.groups_per_batch
        self.ready = [finished for finished in ready if place[finished.order] >= size]
        self.total_ready = max(0, len(everywhere) - size)
        return [FinishedGroup(place[f.order], f.group) for f in ready if place[f.order] < size]

    def state(self) -> dict[str, Any]:
        """Return the content of all replicas' buffers, complete on the main rank only. A collective."""
        assert all(group.state is GroupState.WAITING for group in self.in_progress)
        mine = self.ready, self.in_progress, self._unreported
        # Leaders hold all there is. The main rank is a leader, and its data_objects group has the other leaders.
        parts = gather_on_first(mine, self._ranks.data_objects) if self._ranks.replica_rank == 0 else []
        return {
            "rate": self.rate,
            "ready": sorted((g for ready, _, _ in parts for g in ready), key=lambda g: g.order),
            "in_progress": sorted((g for _, in_progress, _ in parts for g in in_progress), key=lambda g: g.order),
            "unreported": [g for _, _, unreported in parts for g in unreported],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Replace the content by a `state`, distributed over the replicas of this layout by order of drawing."""
        self.rate = state["rate"]
        self.ready = self._own(state["ready"])
        self.total_ready = len(state["ready"])
        self.in_progress = self._own(state["in_progress"]) if self._holds_in_progress else []
        self._unreported = self._own(state["unreported"])

    def _own(self, groups: Sequence[_Ordered]) -> list[_Ordered]:
        """Return the groups that belong to this replica."""
        return [group for group in groups if group.order % self._ranks.data_size == self._ranks.data_rank]
