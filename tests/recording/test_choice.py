"""Choice of recorded responses: whole groups, every kind, the same for any order."""

import random

from megatron_rlvr.recording.choice import Candidate, choose


def candidates() -> list[Candidate]:
    """Five groups of four: of group 3 the second response is stale, of group 2 two are truncated."""
    return [
        Candidate(
            number=4 * group + i,
            group=group,
            correct=i % 2 == 0,
            truncated=group == 2 and i >= 2,
            oldest_version=5 if (group, i) == (3, 1) else 7,
        )
        for group in range(5)
        for i in range(4)
    ]


def test_after_one_of_each_kind_groups_are_chosen_whole_the_stalest_then_the_most_truncated_then_in_order():
    groups = [sorted({number // 4 for number in choose(candidates(), count)}) for count in (4, 8, 12, 16, 20, 99)]
    assert groups == [[2, 3], [2, 3], [0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert choose(candidates(), 8) == [8, 9, 10, 11, 12, 13, 14, 15]


def test_a_part_of_a_group_has_the_stalest_response_and_each_kind():
    assert choose(candidates(), 1) == [13]
    three = choose(candidates(), 3)
    assert 13 in three
    assert {number % 2 for number in three} == {0, 1}
    six = [number - 8 for number in choose(candidates(), 6) if number < 12]
    assert six[0] < 2 <= six[1]  # one that ended by itself, and a truncated one


def test_the_order_of_the_candidates_does_not_matter_and_none_is_chosen_of_none():
    shuffled = candidates()
    random.Random(1).shuffle(shuffled)
    assert all(choose(shuffled, count) == choose(candidates(), count) for count in range(20))
    assert choose([], 5) == []


def test_groups_with_both_correct_and_incorrect_responses_precede_others():
    # Group 0 is all correct, but has the stalest response as good as any.
    given = [
        Candidate(2 * g + i, g, correct=g < 2 or i == 0, truncated=False, oldest_version=1)
        for g in range(4)
        for i in (0, 1)
    ]
    assert [n // 2 for n in choose(given, 4)] == [0, 0, 2, 2]


def test_each_kind_has_one_although_one_group_would_fill_all_places():
    # Groups of 16: the stalest response is in group 0, whose responses all ended by themselves and are incorrect.
    given = [
        Candidate(
            number=16 * group + i,
            group=group,
            correct=group == 1 and i % 2 == 0,
            truncated=group == 2 and i == 9,
            oldest_version=3 if (group, i) == (0, 5) else 4,
        )
        for group in range(3)
        for i in range(16)
    ]
    for count in (4, 8, 16):
        chosen = choose(given, count)
        assert len(chosen) == count
        assert {5, 16 * 2 + 9} < set(chosen)
        assert {given[n].correct for n in chosen} == {True, False}
    assert sum(given[n].group == 0 for n in choose(given, 16)) >= 13
