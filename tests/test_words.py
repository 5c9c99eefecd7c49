"""The words of docs/glossary.md are the words of the package, of ``--help``, examples, tools and docs.

The table "Words that are not used here" is the list; docs/LOG.md, which quotes the past, is read as well.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from megatron_rlvr.config.loading import RENAMED

ROOT = Path(__file__).parents[1]
GLOSSARY = ROOT / "docs" / "glossary.md"
CODE = ("megatron_rlvr", "tools", "examples", "benchmarks")
PAGES = ("docs", "README.md", "CONTRIBUTING.md")
# Sentences that begin so need their neighbours to be understood.
OPENINGS = ("What", "Whether", "Those", "Nobody", "It", "Who", "Whoever", "See above")


@cache
def banned() -> dict[str, str]:
    """{word: the word to use instead}, from the glossary's last table."""
    section = GLOSSARY.read_text(encoding="utf-8").split("## Words that are not used here")[1]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", section, flags=re.MULTILINE)[1:]
    return {re.sub(r" \(.*\)", "", word): instead for words, instead in rows for word in words.split(", ")}


@cache
def pattern() -> re.Pattern[str]:
    """Matches any banned word, also as a part of an identifier such as ``_begun_here``."""
    words = sorted(banned(), key=len, reverse=True)
    return re.compile(
        "(?<![A-Za-z])(" + "|".join(word.replace(" ", r"[ _\n]+") for word in words) + ")(?![A-Za-z])", re.I
    )


def found_in(text: str) -> list[str]:
    """``line n: word; say instead`` for each banned word."""
    return [
        f"line {text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}; say {instead(match[0])}"
        for match in pattern().finditer(text)
    ]


def instead(found: str) -> str:
    spaced = {word.replace("_", " "): say for word, say in banned().items()}
    return spaced[re.sub(r"[ _\n]+", " ", found).lower()]


def files(*places: str) -> list[Path]:
    tracked = subprocess.run(["git", "ls-files", *places], cwd=ROOT, capture_output=True, text=True)
    names = tracked.stdout.split() if tracked.returncode == 0 else []
    if not names:  # an image of the project is no checkout
        names = [str(p.relative_to(ROOT)) for place in places for p in [ROOT / place, *(ROOT / place).rglob("*")]]
    suffixes = {".py", ".md", ".yaml", ".sh", ".sbatch"}
    return [ROOT / name for name in names if Path(name).suffix in suffixes and (ROOT / name).is_file()]


def test_the_list_of_words_is_read():
    assert len(banned()) > 30
    assert found_in("All groups that were begun earlier;\nnobody goes on.") == [
        "line 1: 'begun'; say started, in progress",
        "line 2: 'nobody'; say name the process, rank or user",
        "line 2: 'goes on'; say continues, resumes",
    ]
    assert [line.split(";")[0] for line in found_in("_begun_here = live_rows\n# live\n# rows")] == [
        "line 1: 'begun'",
        "line 1: 'live_rows'",
    ]
    assert found_in("beginning, goes one, wholesale numbers, a figure, useful") == []


@pytest.mark.parametrize("place", [*CODE, *PAGES])
def test_a_word_that_the_glossary_replaces_is_not_used(place):
    paths = files(place)
    assert paths
    wrong = {str(path.relative_to(ROOT)): found_in(text_of(path)) for path in paths}
    assert {name: found for name, found in wrong.items() if found} == {}


def text_of(path: Path) -> str:
    """The file without the two places that must name what is not used any more."""
    text = path.read_text(encoding="utf-8")
    if path == GLOSSARY:
        return text.split("## Words that are not used here")[0]
    if path.name == "loading.py":
        for old in RENAMED:
            text = text.replace(f'"{old}": ', "")
    return text


def test_the_help_uses_the_words():
    command = [sys.executable, "-m", "megatron_rlvr.train", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "--rollout.group_size" in text
    assert found_in(text) == []
    assert [line for line in re.findall(r"^        (.*)$", text, flags=re.MULTILINE) if opens_badly(line)] == []


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of the docstrings of modules, classes, functions, and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def opens_badly(text: str) -> bool:
    return re.match(rf"({'|'.join(OPENINGS)})\b", text.strip()) is not None


def test_no_docstring_begins_with_a_word_that_needs_its_neighbours():
    wrong, read = [], 0
    for path in files("megatron_rlvr"):
        if path.suffix == ".py":
            for line, text in docstrings(ast.parse(path.read_text(encoding="utf-8"))):
                read += 1
                if opens_badly(text):
                    wrong.append(f"{path.relative_to(ROOT)}, line {line}: {text.strip().splitlines()[0]}")
    assert wrong == []
    assert read > 500
