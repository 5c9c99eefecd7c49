"""Groups on their way into a batch: begun, or finished and waiting for their step."""

from dataclasses import dataclass, field

from megatron_rlvr.types import Completion, Grade, Group, Prompt


@dataclass(frozen=True)
class OrderedGroup:
    """A group with its place in the order of drawing; held by all ranks of one replica."""

    order: int
    group: Group

    @property
    def oldest_version(self) -> int:
        """Of the weights that sampled any of its tokens."""
        return min(int(completion.weight_versions.min()) for completion in self.group.completions)


@dataclass
class BegunGroup:
    """A drawn prompt whose samples are not all there yet; held by the leader of one replica.

    Attributes:
        order: its place in the order of drawing.
        graded: {sample: what is finished}.
        partial: {sample: what an earlier step has got of a response that goes on}.
    """

    order: int
    prompt: Prompt
    graded: dict[int, tuple[Completion, Grade]] = field(default_factory=dict)
    partial: dict[int, Completion] = field(default_factory=dict)

    @property
    def oldest_version(self) -> int | None:
        """Of the weights that sampled any of its tokens; None where there is none."""
        completions = [*(completion for completion, _ in self.graded.values()), *self.partial.values()]
        return min((int(c.weight_versions.min()) for c in completions if len(c.weight_versions)), default=None)

    def finished(self) -> OrderedGroup:
        """The group, once all samples are graded."""
        pairs = [self.graded[sample] for sample in sorted(self.graded)]
        return OrderedGroup(self.order, Group(self.prompt, [c for c, _ in pairs], [grade for _, grade in pairs]))
