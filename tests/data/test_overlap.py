"""Problems in training and evaluation: what is found, what is not, and against a brute-force search."""

import json
import random
from pathlib import Path

import pytest
import tiny

from megatron_rlvr.data import command
from megatron_rlvr.data.overlap import WORDS, find_overlap, words_of
from megatron_rlvr.data.published import FRAMES

LONG = "There are twelve red marbles and nine blue marbles in a bag and Ann draws three of them. How many ways?"
VOCABULARY = [f"word{i}" for i in range(40)]


def write(path: Path, problems: list[str], frame: str = "{problem}") -> Path:
    rows = [{"id": i, "prompt": frame.replace("{problem}", p), "answer": "1"} for i, p in enumerate(problems)]
    return tiny.write_rows(path, rows)


def fillers(count: int) -> list[str]:
    return [f"Filler number {i}: what is {i} + {i * i}?" for i in range(count)]


def test_each_test_finds_its_kind_of_copy(tmp_path: Path):
    train = write(tmp_path / "train.jsonl", [*fillers(9), "What is $1+1$?", "Find $x$ if $2x=4$.", LONG])
    held_out = [
        "What is $1+1$?",
        "find x,\\, if \\left 2x = 4 \\right",
        "Yesterday " + LONG.removesuffix("How many ways?") + "What is the probability of that?",
        "Something else entirely, of which no thirteen words in a row are in any training problem at all.",
    ]
    sets = write(tmp_path / "test.jsonl", held_out)
    (found,) = find_overlap([train], [sets]).values()
    assert found.problems == 4
    assert found.exact == {"test/0": "train/9"}
    assert found.normalized == {"test/0": "train/9", "test/1": "train/10"}
    assert found.words == {"test/2": "train/11"}
    assert found.found().keys() == {"test/0", "test/1", "test/2"}
    assert found.short == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Compute 12 + 3.", "Compute 12 - 3."),
        ("Compute -5 + 2.", "Compute 5 + 2."),
        ("Compute $a \\cdot b/c$.", "Compute $a \\cdot b c$."),
        ("Find x_2 if x < 5.", "Find x^2 if x < 5."),
        ("Find x if x < 5.", "Find x if x > 5."),
        ("Find x if x = 5.", "Find x if x ≠ 5."),
        ("Find x if x ≤ 5.", "Find x if x ≥ 5."),
        ("Find 2(3 - x).", "Find 2 - (3x)."),
        ("Find |x|.", "Find x."),
        ("Find 5!", "Find 5"),
        ("Find 5\\% of 7.", "Find 5 of 7."),
    ],
)
def test_problems_that_differ_by_an_operator_a_sign_or_a_relation_are_different(one: str, other: str, tmp_path: Path):
    sentence = "In this long sentence of more than thirteen words, nothing but the formula differs: {}"
    for frame in ("{}", sentence.replace("more than", "at least")):  # alone, and as the last of 13 words
        train = write(tmp_path / "train.jsonl", [frame.format(one)])
        sets = write(tmp_path / "test.jsonl", [frame.format(other), frame.format(one)])
        (found,) = find_overlap([train], [sets]).values()
        assert found.normalized == found.exact == {"test/1": "train/0"}
    number = len(words_of(one)) - len(words_of(other))
    assert abs(number) <= 1, "an operator is no word of its own, so that 13 words are 13 words in formulas, too"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Find $x-3$, where $x\\ge2$.", "find x - 3 where $ x \\ge 2 $"),
        ("Find \\(2 + 3\\)!", "Find $2+3$."),
        ("Well, a three-digit number -- on the x-axis!", "well a three digit number on the x axis"),
        ("The value is ____ (in \\_\\_\\_ units).", "The value is in units"),
        ("Find 2 \N{MINUS SIGN} 3.", "Find 2 - 3."),
    ],
)
def test_spacing_punctuation_hyphens_and_dashes_do_not_count(one: str, other: str):
    assert words_of(one) == words_of(other)


def test_thirteen_words_with_their_operators_are_an_overlap_and_with_others_are_not(tmp_path: Path):
    train = "Let a + b - c = d be a sum of real numbers with d < e and so on."
    copies = ["We " + train, "We " + train.replace("d be", "g be"), "We " + train.replace("<", ">").replace("+", "-")]
    sets = write(tmp_path / "test.jsonl", copies)
    (found,) = find_overlap([write(tmp_path / "train.jsonl", [train])], [sets]).values()
    assert len(words_of(train)) == 17
    assert found.words == {"test/0": "train/0"}


@pytest.mark.parametrize(
    "frame", [FRAMES["paper"], "Q: think hard about this one, with all of your mind and heart.\n{problem}\nThe end."]
)
def test_instructions_around_every_problem_are_no_overlap(frame: str, tmp_path: Path):
    train = write(tmp_path / "train.jsonl", [*fillers(9), LONG], frame)
    sets = write(tmp_path / "test.jsonl", [*(f"Other {i}?" for i in range(9)), LONG], frame)
    bare = write(tmp_path / "bare.jsonl", [*(f"Other {i}?" for i in range(9)), LONG])
    for found in find_overlap([train], [sets, bare]).values():
        assert len(found.exact) == len(found.normalized) == len(found.words) == 1


def test_the_search_equals_brute_force(tmp_path: Path):
    draw = random.Random(0)
    texts = [" ".join(draw.choices(VOCABULARY[:6], k=draw.randint(5, 40))) for _ in range(120)]
    train, held_out = texts[:80], texts[80:] + texts[:2]
    (found,) = find_overlap([write(tmp_path / "a.jsonl", train)], [write(tmp_path / "b.jsonl", held_out)]).values()
    padded = [f" {text} " for text in train]
    expected = set()
    for i, text in enumerate(held_out):
        words = words_of(text)
        runs = [" ".join(words[n : n + WORDS]) for n in range(len(words) - WORDS + 1)]
        if any(f" {run} " in other for run in runs for other in padded):
            expected.add(f"b/{i}")
    assert found.words.keys() == expected
    assert 0 < len(expected) < len(held_out)


def test_chats_are_read_and_the_report_names_the_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train = tiny.write_verl(tmp_path / "train.parquet")
    sets = tiny.write_aime(tmp_path / "test.jsonl")
    assert command.main(["overlap", str(train), "--sets", str(sets)], "rlvr data") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{sets}: 20 problems; exact 20, normalized 20, 13 words ")
    assert "  test/60 is in train/row-0\n" in text
    assert text.endswith("and 15 more (--json lists all)\n")
    assert command.main(["overlap", str(train), "--sets", str(sets), "--json"], "rlvr data") == 0
    assert len(json.loads(capsys.readouterr().out)[str(sets)]["exact"]) == 20
