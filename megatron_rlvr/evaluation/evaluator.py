"""Evaluation on problem sets: each rank samples a share of the completions, grades and records them.

The same code evaluates during training and for `rlvr evaluate`. The random streams are the same in each evaluation, so
that two of them differ by the weights alone.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

from megatron_rlvr.config import EvaluateSettings
from megatron_rlvr.distributed.collectives import gather
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.evaluation.majority import SameAnswer, majorities, same_by_text
from megatron_rlvr.evaluation.records import (
    Key,
    Record,
    RecordsError,
    RecordWriter,
    by_problem,
    read_records,
    record_of,
)
from megatron_rlvr.evaluation.summary import SetSummary, summarize_sets
from megatron_rlvr.rollout.sampler import Grading, Sampler, requests_for
from megatron_rlvr.types import Completion, CompletionRequest, Prompt

Generate = Callable[[Sequence[CompletionRequest], "EvaluationSampling"], Iterator[Completion]]
"""Yields one completion for each request, in any order."""

_OCCASION = "evaluate"


@dataclass(frozen=True)
class EvaluationSampling:
    """Sampling parameters of an evaluation."""

    temperature: float
    top_p: float
    max_response_tokens: int


def share_of(ranks: Ranks, *, leaders_only: bool) -> slice:
    """Return this rank's share of a sequence of requests, as a slice; empty on ranks that make none.

    Args:
        leaders_only: True if the leader of each data-parallel replica makes all requests of the replica.
    """
    if leaders_only:
        return slice(ranks.data_rank, None, ranks.data_size) if ranks.replica_rank == 0 else slice(0, 0)
    return slice(ranks.data_rank + ranks.data_size * ranks.replica_rank, None, ranks.data_size * ranks.replica_size)


class Evaluator:
    """Evaluates named problem sets with the engine's current weights.

    Args:
        sampler: Sampler of this rank.
        settings: Settings of the evaluation.
        sets: {name: problems}; may be empty, and the evaluator is then false.
        share: This rank's share of the requests.
        same: Compares answers for maj@k.
        max_response_tokens: Length at which a response is truncated.
        seed: Seed of the run.
        generate: Samples completions; by default the sampler's engine, as a collective if the engine's is one.
    """

    def __init__(
        self,
        sampler: Sampler,
        settings: EvaluateSettings,
        sets: Mapping[str, Sequence[Prompt]],
        *,
        share: slice,
        same: SameAnswer,
        max_response_tokens: int,
        seed: int,
        generate: Generate | None = None,
    ) -> None:
        self._sampler = sampler
        self._settings = settings
        self._sets = sets
        self._share = share
        self._same = same
        self._sampling = EvaluationSampling(settings.temperature, settings.top_p, max_response_tokens)
        self._generate = generate or sampler.engine.generate
        requests = (requests_for(p, settings.group_size, seed, _OCCASION) for own in sets.values() for p in own)
        self._requests = {(r.prompt.id, r.index): r for group in requests for r in group}

    def __bool__(self) -> bool:
        return bool(self._sets)

    @property
    def size(self) -> int:
        """Number of completions of one evaluation, over all ranks."""
        return len(self._requests)

    def share_size(self, recorded: int = 0) -> int:
        """Return the number of completions that this rank samples if so many are recorded already."""
        return len(range(len(self._requests) - recorded)[self._share])

    def recorded(self, folder: Path) -> list[Record]:
        """Return the records that a folder holds already, the same on every rank. A collective over the world.

        Raises:
            RecordsError: On every rank, if they cannot be read or belong to another evaluation.
        """
        gather(None, _world())  # a rank may still be writing what it had sampled when another one failed
        found: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                found = [self.recorded_alone(folder)]
            except RecordsError as error:
                found = [error]
        dist.broadcast_object_list(found, src=0)
        if isinstance(found[0], RecordsError):
            raise found[0]
        return found[0]

    def recorded_alone(self, folder: Path) -> list[Record]:
        """Return `recorded`, read by this rank alone."""
        return [self._checked(record) for record in read_records(folder)]

    def run(
        self, folder: Path, recorded: Sequence[Record] = (), on_finished: Callable[[int], None] = lambda tokens: None
    ) -> list[Record]:
        """Sample, grade and record all completions that are not recorded yet. A collective over the world.

        If it is interrupted, what has been sampled is graded and recorded first.

        Args:
            folder: Folder of the evaluation.
            recorded: Result of `recorded`.
            on_finished: Called with the number of response tokens of each completion that this rank has sampled.

        Returns: the records of all ranks, earlier ones included, in the order of the problems.
        """
        new = self.sample(folder, recorded, on_finished)
        every = {record.key: record for part in (recorded, *gather(new, _world())) for record in part}
        return [every[key] for key in self._requests]

    def sample(self, folder: Path, recorded: Sequence[Record], on_finished: Callable[[int], None]) -> list[Record]:
        """Return the new records of this rank; see `run`."""
        known = {record.key for record in recorded}
        requests = [request for key, request in self._requests.items() if key not in known][self._share]
        if not requests and self._share == slice(0, 0):
            return self._record([], None, on_finished)
        with RecordWriter(folder, dist.get_rank()) as writer:
            return self._record(requests, writer, on_finished)

    def summaries(self, records: Sequence[Record]) -> dict[str, SetSummary]:
        """Return {name: metrics} of the sets, the same on every rank. A collective over the world."""
        problems = list(by_problem(records).values())[dist.get_rank() :: dist.get_world_size()]
        mine = majorities([record for own in problems for record in own], self._same)
        return self._summarize(records, {p: v for part in gather(mine, _world()) for p, v in part.items()})

    def own_summaries(self, records: Sequence[Record]) -> dict[str, SetSummary]:
        """Return `summaries`, computed by this rank alone."""
        return self._summarize(records, majorities(records, self._same))

    def _summarize(self, records: Sequence[Record], majority: Mapping[str, float]) -> dict[str, SetSummary]:
        return summarize_sets(
            records,
            {name: len(prompts) for name, prompts in self._sets.items()},
            group_size=self._settings.group_size,
            pass_at=self._settings.pass_at,
            majority=majority,
            names_answers=self._same is not same_by_text,
        )

    def _checked(self, record: Record) -> Record:
        """Return a record of this evaluation. Raises RecordsError for one of another."""
        request = self._requests.get(record.key)
        if request is None or request.seed != record.seed or request.prompt.answer != record.gold:
            raise RecordsError(
                f"completion {record.index} of {record.problem} is recorded and does not belong to this evaluation; "
                "choose another --out"
            )
        return record

    def _record(
        self, requests: Sequence[CompletionRequest], writer: RecordWriter | None, on_finished: Callable[[int], None]
    ) -> list[Record]:
        start = time.monotonic()
        grading: Grading[tuple[CompletionRequest, float]]
        grading = self._sampler.grading(self._sampling, overlong_penalty=False)
        records: list[Record] = []

        def take(*, wait: bool) -> None:
            for (request, seconds), completion, grade in grading.collect(wait=wait):
                assert writer is not None
                records.append(record_of(request, completion, grade, seconds))
                writer.write(records[-1], self._sampler.tokenizer.decode(completion.token_ids.tolist()))

        try:
            for completion in self._generate(requests, self._sampling):
                key: Key = (completion.prompt_id, completion.index)
                request = self._requests[key]
                grading.submit((request, time.monotonic() - start), request.prompt, completion)
                on_finished(len(completion.token_ids))
                take(wait=False)
        finally:
            take(wait=True)
        return records


def _world() -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, dist.group.WORLD)
