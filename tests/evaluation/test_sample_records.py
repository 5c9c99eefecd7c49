"""Records on disk: what a reader sees while they are written, after a kill, and after damage."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_rlvr.evaluation.folder import (
    check_folder,
    evaluation_folder,
    holds,
    read_description,
    remove_later_evaluations,
    write_description,
)
from megatron_rlvr.evaluation.folder import records_of as folder_records
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
SET = {"path": "a.jsonl", "prompt_key": None, "answer_key": None, "id_key": None, "problems": 61}
DESCRIPTION = {
    "target": {"path": "m"},
    "prompts": {},
    "sampling": {"seed": 0, "group_size": 8},
    "reward": {"function": "math", "correct": 1.0, "incorrect": -1.0, "answer_after": None},
    "sets": {"aime24": SET},
}


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


GOOD_LINE = json.dumps(asdict(RECORD) | {"response": "r"})
WRONG_LINES = {
    "{": "not valid JSON",
    "[]": "no JSON object",
    "null": "no JSON object",
    '{"problem": "a/1", "response": ""}': "no finish_reason",
    "[" * 5000: "nested more than 100 deep",
    GOOD_LINE.replace('"seed": 7', '"seed": ' + "9" * 5000): "an integer of thousands of digits",
    GOOD_LINE.replace('"index": 0', '"index": true'): "index is of type bool",
    GOOD_LINE.replace('"index": 0', '"index": -1'): "index or tokens is out of range",
    GOOD_LINE.replace('"tokens": 12', '"tokens": "12"'): "tokens is of type str",
    GOOD_LINE.replace('"tokens": 12', '"tokens": 1' + "0" * 30): "index or tokens is out of range",
    GOOD_LINE.replace('"reward": 1.0', '"reward": NaN'): "reward or seconds is out of range",
    GOOD_LINE.replace('"correct": true', '"correct": 1'): "correct is of type int",
    GOOD_LINE.replace('"gold": "204"', '"gold": null'): "gold is of type NoneType",
    GOOD_LINE.replace('"index": 0', '"index": 0, "index": 1'): "key 'index' is given twice",
    GOOD_LINE.replace("aime24", "\xff"): "byte 14 is not valid UTF-8",
}


@pytest.mark.parametrize("line", WRONG_LINES)
def test_a_line_that_is_no_record_is_named(line: str, tmp_path: Path):
    write(tmp_path, 0, records_of(1))
    with (tmp_path / "records" / "00000.jsonl").open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    with pytest.raises(RecordsError, match=r"00000\.jsonl, line 2: not a record of an evaluation") as error:
        read_records(tmp_path)
    assert WRONG_LINES[line] in str(error.value)


def places(folder: Path) -> Iterator[Path]:
    """Paths at which no file is."""
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nothing")
    (folder / "folder").mkdir()
    yield from (folder / name for name in ("pipe", "loop", "folder", "dangling"))
    yield from (Path("/dev/full"), Path("/proc/self/mem"))


def test_records_and_descriptions_that_are_no_files_are_one_line(tmp_path: Path):
    for number, place in enumerate(places(tmp_path)):
        out = tmp_path / f"out{number}"
        (out / "records").mkdir(parents=True)
        (out / "records" / "00000.jsonl").symlink_to(place)
        (out / "evaluation.json").symlink_to(place)
        for read in (read_records, read_description, lambda folder: check_folder(folder, DESCRIPTION)):
            if place.name == "dangling" and read is read_records:
                continue  # as a file that another process removes
            with pytest.raises(RecordsError, match="cannot be read"):
                read(out)
    for place in [*places(tmp_path / "out0"), tmp_path / ("x" * 300), Path("a\0b"), Path("a/" * 3000)]:
        assert read_records(place) == []
        with pytest.raises(RecordsError):
            read_description(place)


def test_records_of_another_evaluation_among_those_of_this_one_are_named(tmp_path: Path):
    write_description(tmp_path, DESCRIPTION)
    with pytest.raises(RecordsError, match="has no records yet; run its evaluation"):
        folder_records(tmp_path, DESCRIPTION)
    write(tmp_path, 0, records_of(8))
    assert folder_records(tmp_path, DESCRIPTION) == records_of(8)
    for foreign in (replace(RECORD, index=8), replace(RECORD, problem="math500/1")):
        write(tmp_path, 1, [foreign])
        with pytest.raises(RecordsError, match=r"is none of evaluation\.json; remove the file that was added"):
            folder_records(tmp_path, DESCRIPTION)
        (tmp_path / "records" / "00001.jsonl").unlink()


def test_a_folder_belongs_to_one_evaluation(tmp_path: Path):
    out = tmp_path / "out"
    check_folder(out, DESCRIPTION)
    write_description(out, DESCRIPTION)
    check_folder(out, DESCRIPTION)
    assert read_description(out) == DESCRIPTION
    other = {**DESCRIPTION, "sampling": {"seed": 1, "group_size": 8}}
    with pytest.raises(RecordsError, match=r"another evaluation, with sampling\.seed=0, not 1; choose another folder"):
        check_folder(out, other)
    metrics = {**DESCRIPTION, "regrading": {"pass_at": [2], "opens_thinking": True}}
    check_folder(out, metrics)  # another summary of the same records
    assert holds(out, metrics)
    assert not holds(out, other)
    write_description(out, metrics)
    assert read_description(out) == metrics
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
    wrong = [
        *("{", "[]", '{"sets": {}}', "[" * 5000, json.dumps({**DESCRIPTION, "sets": {}})),
        *(json.dumps({**DESCRIPTION, "sets": {"a": {**SET, "problems": value}}}) for value in ("30", 0, 1.5, None)),
        json.dumps({**DESCRIPTION, "reward": {"function": 3, "answer_after": None}}),
        json.dumps(DESCRIPTION).replace("61", "9" * 5000),
        *(json.dumps({**DESCRIPTION, "regrading": {"pass_at": value}}) for value in (2, [], [0], ["2"])),
    ]
    for content in wrong:
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
