"""Outcomes of rehearsed ranks, the planner's estimates for the same, and both as text and as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from megatron_rlvr.config import Settings, SettingsError
from megatron_rlvr.planner.devices import GIB, Device
from megatron_rlvr.planner.layouts import RELEASED_SERVER, RESERVE
from megatron_rlvr.planner.memory import ROTARY_LENGTHS, Memory, MicroBatches, stage_memory
from megatron_rlvr.planner.options import TrainingOptions
from megatron_rlvr.planner.shapes import ModelShape

_MOST_LINES = 12


@dataclass
class PhaseOutcome:
    """One phase of a rehearsed rank; memory in bytes.

    Attributes:
        name: Name of the phase.
        device, device_peak: GPU memory of tensors at its end, and at most.
        host, host_peak: Memory of tensors on the CPU at its end, and at most.
        operators: Number of operators.
        waits: [(what waits, file and line, whether within a transformer layer, times)], most frequent first.
        collectives: [(name, ranks, times, bytes)], most bytes first.
    """

    name: str
    device: int
    device_peak: int
    host: int
    host_peak: int
    operators: int
    waits: list[tuple[str, str, bool, int]]
    collectives: list[tuple[str, int, int, int]]


@dataclass
class Outcome:
    """Outcome of a rehearsed rank.

    Attributes:
        rank, stage: Number of the rank and of its pipeline stage.
        phases: The phases that it got through.
        tokens, rows, micro_batches: Tokens of a micro-batch, its tokens with a gradient, number of micro-batches.
        longest: Tokens of its longest sequence.
        saved: Bytes that this rank writes of a checkpoint.
        guesses: {what was guessed: times}
        failed: Name of the phase that failed, "" if none has.
        error: Its error in one line.
        invalid: Message about a setting that Megatron rejects; "" if there is none.
    """

    rank: int
    stage: int
    phases: list[PhaseOutcome] = field(default_factory=list)
    tokens: int = 0
    rows: int = 0
    micro_batches: int = 0
    longest: int = 0
    saved: int = 0
    guesses: dict[str, int] = field(default_factory=dict)
    failed: str = ""
    error: str = ""
    invalid: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Outcome":
        """Return the outcome that ``dataclasses.asdict`` has turned into ``values``."""
        return cls(**{**values, "phases": [PhaseOutcome(**phase) for phase in values["phases"]]})

    @property
    def train_peak(self) -> int:
        """Most bytes on the GPU in the training steps; 0 if there was none."""
        return max((phase.device_peak for phase in self.phases if phase.name.startswith("train")), default=0)

    @property
    def peak(self) -> int:
        """Most bytes on the GPU in any phase."""
        return max((phase.device_peak for phase in self.phases), default=0)


@dataclass(frozen=True)
class Summary:
    """A rehearsal of one rank of each pipeline stage.

    Attributes:
        settings: Settings of the run.
        config: config.json of the model as rehearsed.
        world: Number of ranks.
        device: Type of the GPUs.
        transformer_engine: True if layers were Transformer Engine's.
        outcomes: The ranks, by stage.
    """

    settings: Settings
    config: Mapping[str, Any]
    world: int
    device: Device
    transformer_engine: bool
    outcomes: tuple[Outcome, ...]

    @property
    def usable(self) -> float:
        """Bytes of a GPU that training may use: as the planner assumes."""
        shared = self.settings.rollout.engine == "sglang" and self.settings.rollout.colocated
        return self.device.memory * (1 - RESERVE) - (RELEASED_SERVER if shared else 0)

    @property
    def passed(self) -> bool:
        """True if every phase got through and fits."""
        return all(not outcome.failed and outcome.peak <= self.usable for outcome in self.outcomes)

    @cached_property
    def planned(self) -> tuple[Memory | None, ...]:
        """The planner's estimate for each stage, for the micro-batches of the rehearsal, all of one length.

        None where there is no estimate: for options that the planner does not know, and for a rank that has failed.
        """
        try:
            options = TrainingOptions.of(self.settings.model.dtype, self.settings.megatron, self.transformer_engine)
        except SettingsError:
            return (None,) * len(self.outcomes)
        found: list[Memory | None] = []
        for outcome in self.outcomes:
            if not outcome.train_peak:
                found.append(None)
                continue
            batches = MicroBatches(outcome.tokens, outcome.longest, outcome.rows, outcome.micro_batches)
            shape = ModelShape.of(self.config)
            memory = stage_memory(shape, self.settings.parallel, self.world, options, batches, outcome.stage)
            found.append(replace(memory, rotary=memory.rotary / ROTARY_LENGTHS))
        return tuple(found)


def as_json(summary: Summary) -> dict[str, Any]:
    """Return a rehearsal as numbers for a program, in bytes."""
    return {
        "passed": summary.passed,
        "usable": summary.usable,
        "ranks": [
            asdict(outcome)
            | {"peak": outcome.peak, "train_peak": outcome.train_peak, "planned_peak": memory.peak if memory else None}
            for outcome, memory in zip(summary.outcomes, summary.planned, strict=True)
        ],
    }


def as_text(summary: Summary) -> str:
    """Return a rehearsal as tables for people."""
    blocks = [
        _rank(summary, outcome, memory) for outcome, memory in zip(summary.outcomes, summary.planned, strict=True)
    ]
    return "\n\n".join([*blocks, _verdict(summary)])


def _rank(summary: Summary, outcome: Outcome, planned: Memory | None) -> str:
    stages = f", stage {outcome.stage + 1} of {len(summary.outcomes)}" if len(summary.outcomes) > 1 else ""
    lines = [f"rank {outcome.rank} of {summary.world}{stages}"]
    if outcome.tokens:
        lines[0] += (
            f": {outcome.micro_batches} micro-batches of {outcome.tokens:,} tokens, the longest sequence "
            f"{outcome.longest:,}; {outcome.rows:,} rows with a gradient in each"
        )
    lines.append(f"  {'phase':<10} GPU GiB    peak  host GiB    peak  operators   waits  in layers")
    for phase in outcome.phases:
        waits = sum(times for *_, times in phase.waits)
        inside = sum(times for _, _, in_layer, times in phase.waits if in_layer)
        lines.append(
            f"  {phase.name:<10} {phase.device / GIB:>7.2f} {phase.device_peak / GIB:>7.2f} {phase.host / GIB:>9.2f} "
            f"{phase.host_peak / GIB:>7.2f} {phase.operators:>10,} {waits:>7,} {inside:>10,}"
        )
    if outcome.failed:
        return "\n".join([*lines, f"  {outcome.failed}: failed with {outcome.error}"])
    plan = "no estimate"
    if planned is not None:
        plan = f"{planned.peak / GIB:.2f} ({planned.peak / outcome.train_peak - 1:+.1%})"
    lines.append(f"  peak of training {outcome.train_peak / GIB:.2f} GiB; rlvr plan: {plan}")
    written = f"  a checkpoint: {outcome.saved / GIB:.2f} GiB written by this rank, held in host memory until then"
    lines.append(written + (f"; rlvr plan: {planned.save / GIB:.2f}" if planned is not None else ""))
    last = next(phase for phase in reversed(outcome.phases) if phase.name.startswith("train"))
    lines += _listed(f"waits for the GPU in {last.name}", [
        f"{times:>7,}  {what:<17} {place}{'  (in a layer)' if in_layer else ''}"
        for what, place, in_layer, times in last.waits
    ])  # fmt: skip
    lines += _listed(f"collectives in {last.name}", [
        f"{times:>7,}  {name:<19} {ranks:>5} ranks {size / GIB:>9.3f} GiB"
        for name, ranks, times, size in last.collectives
    ])  # fmt: skip
    return "\n".join([*lines, *_listed("guesses", [f"{n:>7,}  {what}" for what, n in outcome.guesses.items()])])


def _listed(title: str, lines: list[str]) -> list[str]:
    if not lines:
        return [f"  {title}: none"]
    more = [f"    and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    return [f"  {title}", *(f"    {line}" for line in lines[:_MOST_LINES]), *more]


def _verdict(summary: Summary) -> str:
    failed = [outcome for outcome in summary.outcomes if outcome.failed]
    if failed:
        return f"failed: {failed[0].failed} of rank {failed[0].rank}; its traceback is on stderr"
    fullest = max(summary.outcomes, key=lambda outcome: outcome.peak)
    need = f"at most {fullest.peak / GIB:.1f} GiB of the {summary.usable / GIB:.1f} that training may use of a GPU"
    return f"{'fits' if summary.passed else 'does not fit'}: {need} ({summary.device.name})"
