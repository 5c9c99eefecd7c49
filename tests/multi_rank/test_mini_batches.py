"""Mini-batches consist of the same sequences on whichever ranks the groups were sampled."""

import numpy as np
import pytest
from launcher import Ranks, joined_process_group

from megatron_rlvr.batching.mini_batches import build_mini_batches, exchange
from megatron_rlvr.batching.packing import Packing
from megatron_rlvr.types import Completion, Grade, Group, Prompt

GROUP_SIZE, BUDGET = 4, 150


def groups_of(count: int) -> list[tuple[int, Group]]:
    """Groups with prompts of 1 to 9 and responses of 1 to 70 tokens; every third is correct, some rewards shaped."""
    random = np.random.default_rng(0)
    groups = []
    for order in range(count):
        prompt = Prompt(f"p{order}", random.integers(1000, size=random.integers(1, 10)).astype(np.int32), "", "test")
        completions, grades = [], []
        for index in range(GROUP_SIZE):
            length = int(random.integers(1, 71))
            tokens = random.integers(1000, size=length).astype(np.int32)
            logprobs = -random.random(length).astype(np.float32)
            completions.append(Completion(prompt.id, index, tokens, logprobs, "stop", np.zeros(len(tokens), np.int32)))
            correct = (order + index) % 3 == 0
            grades.append(Grade(1.0 if correct else -1.0 - 0.25 * (index == 3), correct))
        groups.append((order, Group(prompt, completions, grades)))
    return groups


def sharded(groups, how: str, size: int) -> list[list]:
    """The groups of each rank, in reverse order."""
    owner = {"in turn": lambda i: i % size, "all on the last": lambda i: size - 1, "backwards": lambda i: -i % size}[
        how
    ]
    return [[group for i, group in enumerate(groups) if owner(i) == rank][::-1] for rank in range(size)]


def build(shards: list[list], per_mini_batch: int, multiples: tuple[int, int, int], estimator: str = "dr_grpo") -> list:
    """For each mini-batch of this rank: sizes over all ranks, and the contents of each micro-batch."""
    with joined_process_group() as group:
        mini_batches = build_mini_batches(
            shards[group.rank()],
            estimator=estimator,
            groups_per_mini_batch=per_mini_batch,
            packing=Packing(BUDGET, *multiples, quadratic=0.01),
            data_group=group,
        )
        for mini in mini_batches:
            check_tokens_around(mini, dict(group for shard in shards for group in shard))
        return [(mini.response_tokens, mini.sequences, [read(m) for m in mini.micro_batches]) for mini in mini_batches]


def check_tokens_around(mini, groups: dict[int, Group]) -> None:
    """Each row's sequence has the response tokens of its completion, and its prompt those of the group."""
    assert mini.prompts * GROUP_SIZE == mini.sequences
    for micro in mini.micro_batches:
        numbers = [token >> 20 for token in micro.token_ids.tolist()]
        own = [len(groups[n // GROUP_SIZE].completions[n % GROUP_SIZE].token_ids) for n in numbers]
        all_of_prompt = [sum(len(c.token_ids) for c in groups[n // GROUP_SIZE].completions) for n in numbers]
        assert mini.tokens_around(micro, 1).tolist() == own
        assert mini.tokens_around(micro, GROUP_SIZE).tolist() == all_of_prompt


def read(micro) -> tuple[list[int], dict]:
    """Return (padded lengths, {sequence number: (prompt and response, log-probabilities, advantage)})."""
    sequences = {}
    lengths = np.diff(micro.cu_seqlens).tolist()
    assert len(micro.tokens) == sum(lengths)
    for i, start in enumerate(micro.cu_seqlens[:-1].tolist()):
        mine = micro.sequence == i
        if mine.any():
            stop = micro.rows[mine][-1].item() + 1  # padding follows
            whole = [micro.tokens[start].item(), *micro.targets[start:stop].tolist()]
            (advantage,) = set(micro.advantages[mine].tolist())
            number = micro.token_ids[mine][0].item() >> 20
            sequences[number] = (whole, micro.rollout_logp[mine].tolist(), advantage)
    return lengths, sequences


def expected_sequences(groups) -> dict:
    sequences = {}
    for order, group in groups:
        mean = sum(grade.reward for grade in group.grades) / GROUP_SIZE
        for i, (completion, grade) in enumerate(zip(group.completions, group.grades, strict=True)):
            whole = [*group.prompt.token_ids.tolist(), *completion.token_ids.tolist()]
            sequences[order * GROUP_SIZE + i] = (whole, completion.logprobs.tolist(), np.float32(grade.reward - mean))
    return sequences


@pytest.mark.parametrize("size", [1, 2, 3])
def test_mini_batches_do_not_depend_on_the_ranks_that_sampled_the_groups(ranks: Ranks, size):
    cases = ((13, 4, (4, 1, 1)), (6, 3, (1, 1, 2)), (6, 6, (8, 6, 3)), (2, 8, (1, 4, 1)), (1, 1, (4, 1, 1)))
    for count, per_mini_batch, multiples in cases:
        pad_multiple, sequence_multiple, micro_batch_multiple = multiples
        groups = groups_of(count)
        expected = expected_sequences(groups)
        response_tokens = [sum(len(c.token_ids) for c in group.completions) for _, group in groups]
        for how in ("in turn", "all on the last", "backwards"):
            by_rank = ranks.run(build, size, sharded(groups, how, size), per_mini_batch, multiples)
            starts = range(0, count, per_mini_batch)
            assert {len(mini_batches) for mini_batches in by_rank} == {len(starts)}
            for start, *parts in zip(starts, *by_rank, strict=True):
                stop = min(start + per_mini_batch, count)
                assert {tokens for tokens, _, _ in parts} == {sum(response_tokens[start:stop])}
                assert {total for _, total, _ in parts} == {(stop - start) * GROUP_SIZE}
                assert len({len(micro_batches) for _, _, micro_batches in parts}) == 1, "as many on every rank"
                assert len(parts[0][2]) % micro_batch_multiple == 0
                micro_batches = [micro for _, _, micros in parts for micro in micros]
                found = [number for _, sequences in micro_batches for number in sequences]
                assert sorted(found) == list(range(start * GROUP_SIZE, stop * GROUP_SIZE))
                for lengths, sequences in micro_batches:
                    assert sum(lengths) % pad_multiple == 0
                    assert all(length % sequence_multiple == 0 for length in lengths)
                    assert sum(lengths) <= BUDGET
                    for number, content in sequences.items():
                        assert content == expected[number]


def test_advantages_are_divided_by_the_deviation_of_the_whole_step_on_any_ranks(ranks: Ranks):
    groups = groups_of(7)
    advantages = {number: float(a) for number, (_, _, a) in expected_sequences(groups).items()}
    deviation = np.std(list(advantages.values()))
    found = []
    for how, size in (("in turn", 1), ("in turn", 2), ("all on the last", 3)):
        by_rank = ranks.run(build, size, sharded(groups, how, size), 3, (1, 1, 1), "batch")
        micros = [micro for parts in by_rank for _, _, micros in parts for micro in micros]
        found.append({number: a for _, sequences in micros for number, (_, _, a) in sequences.items()})
    assert found[0] == found[1] == found[2], "the same bits"
    assert found[0] == pytest.approx({n: a / deviation for n, a in advantages.items()}, rel=3e-6)


def test_without_groups_there_are_no_mini_batches(ranks: Ranks):
    assert ranks.run(build, 2, [[], []], 4, (1, 1, 1)) == [[], []]


def exchanged() -> list:
    with joined_process_group() as group:
        here, size = group.rank(), group.size()
        return exchange([{"from": here, "to": r, "array": np.arange(here * 30_000 + r)} for r in range(size)], group)


def test_every_rank_receives_what_the_others_sent_it_in_rank_order(ranks: Ranks):
    for size in (1, 2, 4):
        for rank, received in enumerate(ranks.run(exchanged, size)):
            assert [(item["from"], item["to"]) for item in received] == [(r, rank) for r in range(size)]
            assert [len(item["array"]) for item in received] == [r * 30_000 + rank for r in range(size)]
