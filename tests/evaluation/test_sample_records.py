"""Records on disk: what a reader sees while they are written, after a kill, and after damage."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rlvr.evaluation.folder import (
    check_folder,
    evaluation_folder,
    read_description,
    remove_later_evaluations,
    write_description,
)
from megatron_rlvr.evaluation.records import (
    Record,
    RecordsError,
    RecordWriter,
    by_problem,
    by_set,
    read_records,
    read_responses,
)

RECORD = Record("aime24/60", 0, 7, 12, "stop", "204", "204", True, 1.0, None, 0.25)
DESCRIPTION = {"target": {"path": "m"}, "prompts": {}, "sampling": {"seed": 0}, "reward": {}, "sets": {"aime24": {}}}


def records_of(count: int) -> list[Record]:
    return [replace(RECORD, index=index, seed=100 + index) for index in range(count)]


def write(folder: Path, rank: int, records: list[Record]) -> None:
    with RecordWriter(folder, rank) as writer:
        for record in records:
            writer.write(record, f"response {record.index}")


def test_every_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path):
    with RecordWriter(tmp_path, 3) as writer:
        for count, record in enumerate(records_of(3), start=1):
            writer.write(record, "line\nbreak and \u2028")
            assert read_records(tmp_path) == records_of(count)
    line = json.loads((tmp_path / "records" / "00003.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert line == {
        "problem": "aime24/60",
        "index": 0,
        "seed": 100,
        "tokens": 12,
        "finish_reason": "stop",
        "gold": "204",
        "answer": "204",
        "correct": True,
        "reward": 1.0,
        "failure": None,
        "seconds": 0.25,
        "response": "line\nbreak and \u2028",
    }


def test_responses_survive_as_they_are(tmp_path: Path):
    responses = ["", "a\u0000b", "\ud800 alone", "\U0001f600", '"quoted"\\n']
    with RecordWriter(tmp_path, 0) as writer:
        for record, response in zip(records_of(5), responses, strict=True):
            writer.write(record, response)
    assert [response for _, response in read_responses(tmp_path)] == responses


def test_an_incomplete_line_is_left_out_and_replaced_by_the_next_writer(tmp_path: Path):
    first, second, third = records_of(3)
    write(tmp_path, 0, [first, second])
    path = tmp_path / "records" / "00000.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert read_records(tmp_path) == [first]
    write(tmp_path, 0, [third])
    assert read_records(tmp_path) == [first, third]


def test_records_of_all_ranks_are_read_and_a_repeated_one_counts_once(tmp_path: Path):
    a, b, c = records_of(3)
    write(tmp_path, 0, [b, a])
    write(tmp_path, 1, [replace(a, correct=False), c])
    assert read_records(tmp_path) == [b, a, c]
    assert by_problem(read_records(tmp_path)) == {"aime24/60": [a, b, c]}
    assert by_set(read_records(tmp_path)) == {"aime24": [b, a, c]}
    assert read_records(tmp_path / "none") == []


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"problem": "a/1", "response": ""}', "null"])
def test_a_line_that_is_no_record_is_named(line: str, tmp_path: Path):
    write(tmp_path, 0, records_of(1))
    with (tmp_path / "records" / "00000.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RecordsError, match=r"00000\.jsonl, line 2: not a record of an evaluation; restore the file"):
        read_records(tmp_path)


def test_a_folder_belongs_to_one_evaluation(tmp_path: Path):
    out = tmp_path / "out"
    check_folder(out, DESCRIPTION)
    write_description(out, DESCRIPTION)
    check_folder(out, DESCRIPTION)
    assert read_description(out) == DESCRIPTION
    other = {**DESCRIPTION, "sampling": {"seed": 1}}
    with pytest.raises(RecordsError, match=r"another evaluation, with sampling\.seed=0, not 1; choose another folder"):
        check_folder(out, other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(RecordsError, match=r"holds thesis\.tex, and no evaluation; choose another folder"):
        check_folder(tmp_path / "mine", DESCRIPTION)
    with pytest.raises(RecordsError, match="not a folder"):
        check_folder(tmp_path / "mine" / "thesis.tex", DESCRIPTION)


def test_a_folder_that_is_no_evaluation_is_refused_with_a_remedy(tmp_path: Path):
    write_description(evaluation_folder(tmp_path, 20), DESCRIPTION)
    write_description(evaluation_folder(tmp_path, 40), DESCRIPTION)
    with pytest.raises(RecordsError, match=r"give one of the evaluations of this run, such as .*step_000040"):
        read_description(tmp_path)
    with pytest.raises(RecordsError, match="give a folder that rlvr evaluate has written"):
        read_description(tmp_path / "none")
    for content in ("{", "[]", '{"sets": {}}'):
        (tmp_path / "evaluation.json").write_text(content)
        with pytest.raises(RecordsError, match="restore it, or evaluate again"):
            read_description(tmp_path)


def test_evaluations_of_steps_that_a_resumed_run_takes_again_are_removed(tmp_path: Path):
    for step in (0, 5, 10, 1_000_000):
        write_description(evaluation_folder(tmp_path, step), DESCRIPTION)
    (tmp_path / "evaluations" / "step_notes").mkdir()
    remove_later_evaluations(tmp_path, 5)
    left = sorted(path.name for path in (tmp_path / "evaluations").iterdir())
    assert left == ["step_000000", "step_000005", "step_notes"]
