"""Tests of reading prompt files: every layout, and every kind of invalid file with the line that the error names."""

import json
import os
import pickle
import re
from decimal import Decimal

import numpy as np
import pytest

from megatron_rlvr.data.records import DataError, Record, read_records

CHAT = [{"role": "user", "content": "What is 1 + 1?"}]
ROW = {"prompt": "p", "answer": "1"}


def test_the_project_layout_keeps_other_columns_as_extra(write_rows):
    path = write_rows(
        "own.jsonl",
        [
            {"prompt": "What is 1 + 1?", "answer": " 2 ", "id": "a", "source": "sums", "level": 3},
            {"prompt": "And 2 + 2?", "answer": 4, "id": 7, "source": "sums", "level": None},
        ],
    )
    assert read_records(path) == [
        Record("What is 1 + 1?", "2", "own/a", "sums", {"level": 3}),
        Record("And 2 + 2?", "4", "own/7", "sums", {"level": None}),
    ]


def test_only_role_and_content_of_messages_are_read(write_rows):
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi?", "name": "bo"}]
    (record,) = read_records(write_rows("chat.json", [{"messages": messages, "answer": "1"}]))
    assert record.prompt == [{"role": "system", "content": ""}, {"role": "user", "content": "Hi?"}]


def test_the_dapo_layout_in_parquet_and_its_repeated_indices(write_rows):
    def row(index: str, gold: str) -> dict:
        return {
            "data_source": "math_dapo",
            "prompt": CHAT,
            "ability": "MATH",
            "reward_model": {"ground_truth": gold, "style": "rule"},
            "extra_info": {"index": index},
        }

    rows = [
        row("u", "1"),
        row("v", "2"),
        row("u", "1"),
        row("u#2", "3"),
        row("u", "1"),
        row("w#2", "4"),
        row("w", "4"),
        row("w", "4"),
    ]
    records = read_records(write_rows("dapo.parquet", rows))
    own_ids = ["u", "v", "u#2", "u#2#2", "u#3", "w#2", "w", "w#3"]
    assert [record.id for record in records] == [f"dapo/{own}" for own in own_ids]
    assert [record.answer for record in records] == list("12131444")
    assert {record.source for record in records} == {"math_dapo"}
    assert records[1].prompt == CHAT
    assert records[1].extra == {
        "ability": "MATH",
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "extra_info": {"index": "v"},
    }


def test_gsm8k_answers_are_the_text_after_the_last_mark(write_rows):
    solution = "She has 2 * 35,000 = <<2*35000=70000>>70,000.\n#### not this\n#### 70,000"
    records = read_records(
        write_rows(
            "gsm8k.jsonl",
            [{"question": "q", "answer": solution, "idx": 5}, {"question": "r", "answer": "#### -3", "idx": 6}],
        )
    )
    assert [(record.id, record.answer) for record in records] == [("gsm8k/5", "70000"), ("gsm8k/6", "-3")]
    assert records[0].extra == {}


def test_an_answer_without_mark_is_unchanged(write_rows):
    (record,) = read_records(write_rows("plain.jsonl", [{"question": "q", "answer": "(1,000, 2)"}]))
    assert record.answer == "(1,000, 2)"


def test_aime_and_amc_numbers_become_text(write_rows):
    answers = [204, 27.0, "033", 0.5, -0.0, 10**20, "\\frac{1}{2}"]
    rows = [{"id": 60 + i, "problem": f"p{i}", "question": "other", "answer": a} for i, a in enumerate(answers)]
    records = read_records(write_rows("aime.jsonl", rows))
    assert [record.answer for record in records] == ["204", "27", "033", "0.5", "0", str(10**20), "\\frac{1}{2}"]
    assert (records[0].id, records[0].prompt, records[0].extra) == ("aime/60", "p0", {"question": "other"})


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.parquet"])
def test_a_list_of_one_answer_is_that_answer(name, write_rows):
    rows = [{"prompt": f"p{i}", "answer": [answer]} for i, answer in enumerate(("7", "$x+1$"))]
    assert [record.answer for record in read_records(write_rows(name, rows))] == ["7", "$x+1$"]
    (record,) = read_records(write_rows("number.jsonl", [{"prompt": "p", "answer": [1e-5]}]))
    assert record.answer == "0.00001"


NUMBERS = [
    ("0.00001", "0.00001"),
    ("1e-05", "0.00001"),
    ("1.38e-23", "0.0000000000000000000000138"),
    ("6.02e23", "602000000000000000000000"),
    ("1.0e6", "1000000"),
    ("27.0", "27"),
    ("-0.0", "0"),
    ("3.14159265358979323846", "3.14159265358979323846"),
    ("-0.1234567890123456789", "-0.1234567890123456789"),
    ("12345678901234567890123", "12345678901234567890123"),
    ("0.1", "0.1"),
]


@pytest.mark.parametrize(("literal", "digits"), NUMBERS)
def test_a_number_of_a_json_file_keeps_its_digits(literal, digits, tmp_path):
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "p", "answer": {literal}, "x": {literal}}}\n')
    (record,) = read_records(tmp_path / "a.jsonl")
    assert record.answer == digits
    extra = pickle.loads(pickle.dumps(record.extra))  # as it reaches a grader process
    assert extra["x"] == json.loads(literal)
    assert isinstance(extra["x"], float if set(literal) & set(".e") else int)


def test_a_number_of_a_parquet_file_keeps_the_digits_of_its_type(tmp_path):
    import pyarrow
    import pyarrow.parquet

    numbers = [0.1, 1e-05, 16777216.0, 2.5]
    columns = {
        "single": (pyarrow.array(numbers, pyarrow.float32()), ["0.1", "0.00001", "16777216", "2.5"]),
        "double": (pyarrow.array(numbers, pyarrow.float64()), ["0.1", "0.00001", "16777216", "2.5"]),
        "half": (pyarrow.array(np.array([0.1, 2.5, 3.0, 4.0], np.float16)), ["0.1", "2.5", "3", "4"]),
        "decimal": (
            pyarrow.array([Decimal("0.10"), Decimal("3.00"), Decimal("-1.25"), Decimal("0.00")]),
            ["0.10", "3", "-1.25", "0"],
        ),
    }
    table = {"prompt": [f"p{i}" for i in range(4)]} | {name: column for name, (column, _) in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    for name, (_, digits) in columns.items():
        assert [r.answer for r in read_records(tmp_path / "a.parquet", answer_key=name)] == digits, name


SOLVED = [*CHAT, {"role": "assistant", "content": "It is \\boxed{2}."}]


@pytest.mark.parametrize("messages", [SOLVED, [{"from": "human", "value": "What is 1 + 1?"}], [{"role": "user"}]])
def test_messages_that_cannot_be_read_name_the_column_beside_them(messages, write_rows):
    row = {"problem": "What is 1 + 1?", "messages": messages, "answer": "2"}
    path = write_rows("numina.jsonl", [row])
    with pytest.raises(DataError, match=r"numina\.jsonl, line 1: .*; set data\.prompt_key to problem, or "):
        read_records(path)
    with pytest.raises(DataError, match=r"; set evaluate\.sets\.1\.prompt_key to problem, or "):
        read_records(path, settings="evaluate.sets.1")
    (record,) = read_records(path, prompt_key="problem")
    assert (record.prompt, record.answer) == ("What is 1 + 1?", "2")


def test_messages_that_are_text_in_json_are_messages(write_rows):
    (record,) = read_records(write_rows("text.jsonl", [{"messages": json.dumps(CHAT), "answer": "2"}]))
    assert record.prompt == CHAT
    with pytest.raises(DataError, match=r"ends with an assistant message; set data\.prompt_key to problem, or"):
        read_records(write_rows("solved.jsonl", [{"messages": json.dumps(SOLVED), "problem": "1 + 1?", "answer": "2"}]))
    with pytest.raises(DataError, match="message 1 of messages has no role"):
        read_records(write_rows("sharegpt.jsonl", [{"messages": '[{"from": "human", "value": "?"}]', "answer": "2"}]))
    for text in ("[1, 2] is a list", "[{1}, {2}]", "[1, 2]", "[]", '[{"n": 1}]'):
        (record,) = read_records(write_rows("problem.jsonl", [{"prompt": text, "answer": "2"}]))
        assert record.prompt == text


def test_equal_values_of_a_file_are_one_object(write_rows):
    row = {"prompt": CHAT, "answer": "a long answer", "source": "a source", "level": {"of": [1, 2]}}
    first, second, other = read_records(write_rows("a.jsonl", [row, row, {**row, "level": 3}]))
    assert first.prompt is second.prompt is other.prompt
    assert first.answer is second.answer
    assert first.source is second.source
    assert first.extra is second.extra
    assert other.extra == {"level": 3}


def test_integer_ids_that_pandas_made_floats_are_integers(write_rows):
    records = read_records(write_rows("floats.parquet", [{"id": 1.0, **ROW}, {"id": 2.0, **ROW}]))
    assert [record.id for record in records] == ["floats/1", "floats/2"]


def test_a_byte_order_mark_crlf_and_blank_lines_change_nothing_but_line_numbers(tmp_path):
    path = tmp_path / "windows.jsonl"
    line = json.dumps({"prompt": "caf\u00e9 \u2028 x", "answer": "1"}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n   \r\n" + line)
    records = read_records(path)
    assert [record.id for record in records] == ["windows/1", "windows/4"]
    assert records[0].prompt == "caf\u00e9 \u2028 x"


def test_named_columns_override_the_ones_found_by_name(write_rows):
    row = {"prompt": "no", "answer": "no", "id": 1, "meta": {"text": "yes", "gold": 2.0, "key": "k"}}
    path = write_rows("named.jsonl", [row])
    (record,) = read_records(path, name="set", prompt_key="meta.text", answer_key="meta.gold", id_key="meta.key")
    assert (record.prompt, record.answer, record.id, record.source) == ("yes", "2", "set/k", "set")


BAD_SECOND_ROWS = [
    ({"prompt": "p"}, "no column answer among prompt"),
    ({"answer": "1"}, "no column prompt among answer"),
    ({"prompt": " \n", "answer": "1"}, "prompt is empty"),
    ({"prompt": 3, "answer": "1"}, "prompt is of type int"),
    ({"prompt": None, "answer": "1"}, "prompt is null"),
    ({"prompt": "\ud800", "answer": "1"}, "unpaired surrogate at character 1"),
    ({"prompt": [], "answer": "1"}, "prompt is empty"),
    ({"prompt": ["hi"], "answer": "1"}, "message 1 of prompt has no role"),
    ({"prompt": [CHAT[0], {"role": "user"}], "answer": "1"}, "message 2 of prompt has no content"),
    ({"prompt": [{"role": "user", "content": [{"text": "x"}]}], "answer": "1"}, "message 1 of prompt has no content"),
    ({"prompt": [{"role": "user", "content": " "}], "answer": "1"}, "prompt is empty"),
    ({"prompt": [CHAT[0], {"role": "assistant", "content": "2"}], "answer": "1"}, "ends with an assistant message"),
    ({"prompt": "p", "answer": None}, "answer is null"),
    ({"prompt": "p", "answer": ""}, "answer is empty"),
    ({"prompt": "p", "answer": float("nan")}, "answer is nan"),
    ({"prompt": "p", "answer": float("inf")}, "answer is inf"),
    ({"prompt": "p", "answer": True}, "answer is True"),
    ({"prompt": "p", "answer": [1, 2]}, "answer is of type list"),
    ({"prompt": "p", "answer": []}, "answer is of type list"),
    ({"prompt": "p", "answer": [None]}, "answer is null; write the answer as text or a number, set data.answer_key to"),
]


@pytest.mark.parametrize(("row", "message"), BAD_SECOND_ROWS)
def test_a_bad_row_is_named_by_its_line(write_rows, row, message):
    path = write_rows("bad.jsonl", [ROW, row])
    with pytest.raises(DataError, match="^" + re.escape(f"{path}, line 2: ") + ".*" + re.escape(message)):
        read_records(path)


def test_a_bad_id_or_source_is_named_by_its_line(write_rows):
    for column, good, bad in [
        ("id", 1, None),
        ("id", 1, 2.5),
        ("id", 1, True),
        ("source", "s", None),
        ("source", "s", 4),
    ]:
        path = write_rows("bad.jsonl", [{**ROW, column: good}, {**ROW, column: bad}])
        with pytest.raises(DataError, match=f"line 2: {column} is .*; write .* or remove the column"):
            read_records(path)


def test_a_bad_row_of_parquet_is_named_by_its_row(write_rows):
    path = write_rows("bad.parquet", [ROW, ROW, {"prompt": "p", "answer": None}])
    with pytest.raises(DataError, match=re.escape(f"{path}, row 3: answer is null")):
        read_records(path)


def test_a_missing_column_names_those_that_exist(write_rows):
    path = write_rows("odd.jsonl", [{"Problem": "p", "Answer": "1"}])
    with pytest.raises(DataError, match=r"line 1: no column prompt or .* Problem, Answer; set data\.prompt_key to"):
        read_records(path)
    with pytest.raises(DataError, match=r"no column reward_model.ground_truth or answer .*; set data\.answer_key to"):
        read_records(path, prompt_key="Problem")
    with pytest.raises(DataError, match=r"no column nope among Problem, Answer"):
        read_records(path, prompt_key="Problem", answer_key="Answer", id_key="nope")


def test_a_repeated_id_names_both_rows(write_rows):
    path = write_rows("twice.jsonl", [{**ROW, "id": 1}, {**ROW, "id": 2}, {**ROW, "id": "1"}])
    with pytest.raises(DataError, match="line 3: id '1' repeats that of line 1"):
        read_records(path)


def test_gsm8k_files_have_a_mark_in_every_row_or_in_none(write_rows):
    with_mark, without = {"question": "q", "answer": "so\n#### 1"}, {"question": "q", "answer": "so 1"}
    for rows, message in [([with_mark, without], "has no"), ([without, with_mark], "has a")]:
        with pytest.raises(DataError, match=f"line 2: answer {message} `####"):
            read_records(write_rows("gsm8k.jsonl", rows))
    with pytest.raises(DataError, match="line 1: answer has no text after `####`"):
        read_records(write_rows("gsm8k.jsonl", [{"question": "q", "answer": "so\n#### "}]))


def test_invalid_json_is_named_by_its_line(tmp_path):
    good = json.dumps(ROW).encode() + b"\n"
    cases = [
        (good + b"\n" + b'{"prompt": "p",}\n', r"line 3: not valid JSON \(.*column 16\)"),
        (good + b"[" * 100_000, "line 2: not valid JSON"),
        (good + b'{"answer": ' + b"9" * 5000 + b"}", "line 2: not valid JSON"),
        (good + b"[1]\n", "line 2: a JSON list, not an object"),
        (good + b'{"prompt": "\xff"}\n', "line 2: byte 13 is not valid UTF-8"),
    ]
    for content, message in cases:
        (tmp_path / "broken.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_records(tmp_path / "broken.jsonl")


def test_unreadable_files_are_errors_that_name_the_file(tmp_path, write_rows):
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    (tmp_path / "prompts.csv").write_text("prompt,answer\n")
    (tmp_path / "text.parquet").write_text("this is not parquet, though it is long enough to be one")
    truncated = write_rows("truncated.parquet", [ROW] * 100)
    os.truncate(truncated, truncated.stat().st_size // 2)
    cases = [
        ("nowhere.jsonl", "is not a file"),
        ("", "is not a file"),
        ("empty.jsonl", "has no rows"),
        ("prompts.csv", r"unknown extension '\.csv'"),
        ("text.parquet", "cannot be read as parquet"),
        ("truncated.parquet", "cannot be read as parquet"),
    ]
    for name, message in cases:
        with pytest.raises(DataError, match=message) as raised:
            read_records(tmp_path / name)
        assert str(tmp_path / name) in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_parquet_file_without_rows_is_an_error(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), tmp_path / "e.parquet")
    with pytest.raises(DataError, match="has no rows"):
        read_records(tmp_path / "e.parquet")
