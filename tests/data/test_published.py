"""Published sets in their layouts, and the report of what was expected and found."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from megatron_rlvr.data import command
from megatron_rlvr.data.published import SETS
from megatron_rlvr.data.records import read_records

OLYMPIAD = {
    "context": None,
    "subject": "Math",
    "language": "English",
    "modality": "Text-only",
    "question_type": "Open-ended",
    "error": None,
}


def data(*arguments: str | Path) -> int:
    return command.main(list(map(str, arguments)), "rlvr data")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def olympiad(number: int, answers: list[str], **changes: Any) -> dict[str, Any]:
    return {**OLYMPIAD, "id": number, "question": f"Question {number}?", "final_answer": answers, **changes}


def test_olympiadbench_keeps_the_text_only_english_mathematics(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [
        olympiad(1, ["$2$"]),
        olympiad(2, ["$(1,2)$", "$(2,1)$"], context="Given $x$."),
        olympiad(3, ["3"], subject="Physics"),
        olympiad(4, ["3"], language="Chinese"),
        olympiad(5, ["3"], modality="Multimodal"),
        olympiad(6, ["3"], question_type="Theorem proof"),
    ]
    source, out = tiny.write_rows(tmp_path / "OE.parquet", rows), tmp_path / "out" / "olympiad.jsonl"
    assert data("prepare", "olympiadbench", source, "--out", out) == 0
    assert capsys.readouterr().out == (
        f"{out}: 2 problems from 6 rows, 0 repeated rows omitted, 4 rows of other subsets left out; expected 674 "
        "problems, found 2; not the published file, or not all of it\n"
    )
    assert [(row["prompt"], row["answer"]) for row in rows_of(out)] == [
        ("Question 1?", "2"),
        ("Given $x$.\nQuestion 2?", "(1,2), (2,1)"),
    ]


LAYOUTS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "MathArena": ("aime26", [{"problem_idx": i, "answer": i * i, "problem": f"Square {i}?"} for i in range(30)]),
    "MATH-500": (
        "math500",
        [
            {
                "problem": f"P{i}",
                "solution": "no",
                "answer": f"\\frac{{{i}}}{{7}}",
                "subject": "a",
                "level": 5,
                "unique_id": f"test/{i}.json",
            }
            for i in range(500)
        ],
    ),
    "math-ai": ("amc23", [{"id": i, "question": f"Q{i}", "answer": str(i), "url": "u"} for i in range(40)]),
    "only a solution": ("minerva", [{"problem": f"M{i}", "solution": f"So \\boxed{{{i}}}."} for i in range(272)]),
    "HMMT 2026": (
        "hmmt-feb-2026",
        [{"problem_idx": i, "answer": "\\sqrt2", "problem_type": ["Algebra"], "problem": f"H{i}"} for i in range(33)],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_complete_published_file_is_found_complete(
    layout: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    name, rows = LAYOUTS[layout]
    source, out = tiny.write_rows(tmp_path / f"test.{suffix}", rows), tmp_path / f"{name}.jsonl"
    assert data("prepare", name, source, "--out", out) == 0
    count = SETS[name].problems
    assert count == len(rows)
    assert capsys.readouterr().out == (
        f"{out}: {count} problems from {count} rows, 0 repeated rows omitted; expected {count} problems, "
        f"found {count}\n"
    )
    records = read_records(out)
    assert [record.prompt for record in records] == [row.get("problem", row.get("question")) for row in rows]
    assert [record.answer for record in records] == [str(row.get("answer", row.get("solution"))) for row in rows]
    assert len({record.id for record in records}) == count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "aime99", "a.jsonl", "--out", "o"], "argument SET: invalid choice: 'aime99'"),
        (["prepare", "aime24", "none.jsonl", "--out", "o.jsonl"], "none.jsonl is not a file; check the path"),
        (
            ["prepare", "aime24", "a.jsonl", "--out", "o.jsonl", "--frame", "x"],
            "--frame='x': no {problem} in it; write",
        ),
        (
            ["prepare", "olympiadbench", "a.jsonl", "--out", "o.jsonl"],
            "a.jsonl, line 1: no text in question or no list",
        ),
        (["overlap", "a.jsonl", "--sets", "empty.jsonl"], "empty.jsonl has no rows; give a file with at least one"),
    ],
)
def test_wrong_input_is_one_line_and_status_2_and_writes_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    tiny.write_rows(Path("a.jsonl"), [{"problem": "p", "answer": "1"}])
    Path("empty.jsonl").touch()
    with pytest.raises(SystemExit) as exit_:
        data(*arguments)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("o*"))
