"""Problems that are in a training set and in a problem set to evaluate on: such an accuracy measures memory.

Three tests, of which the second finds all that the first finds, and the third all of these that have 13 words:

    exact        the same text
    normalized   the same after leaving out case, LaTeX spacing, punctuation, brackets and white space
    13 words     any 13 consecutive words, normalized in this way, are in both

Operators, signs and relations are no punctuation: they belong to the word that they stand before, so that 12 + 3 and
12 - 3 differ, and a formula has no more words than it has names and numbers.

Instructions that files put around each problem are left out first: those of DAPO and of the paper, and words with
which all problems of a file begin or end.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_rlvr.data.published import bare_problem
from megatron_rlvr.data.records import Record, RecordFile

WORDS = 13
"""Length of the overlap, as in GPT-3's and later studies of contamination."""

_FEWEST_FOR_A_FRAME = 8
_SPACING = re.compile(r"\\(?:[,;:!\s]|quad\b|qquad\b|left\b|right\b|displaystyle\b)|[$~]")
# The category of mathematical symbols (Sm) lacks those of ASCII that have other uses, too.
_OPERATORS = re.escape("-*/^_%" + "".join(c for c in map(chr, range(0x2C00)) if unicodedata.category(c) == "Sm"))
# A minus between letters or digits, without spaces, is a hyphen if one side is a word of three letters or more; several
# are a dash. Patterns begin with a literal, which searches find fast.
_HYPHEN = re.compile(r"-(?:(?<=[^\W_]-)(?=[^\W\d_]{3})|(?<=[^\W\d_]{3}-)(?=[^\W_])|-+)")
_BLANK = re.compile(r"_(?:\\?_)+")
_FACTORIAL = re.compile(r"!(?:(?<=[\d)\]}]!)(?<!\\[)\]]!)|(?<=\b\w!))")
_BETWEEN = re.compile(rf"[^\w{_OPERATORS}]+")
_NAME = r"(?:(?<=\\)[a-z]+|[^\W_]+)"
_WORD = re.compile(rf"[{_OPERATORS}][\W_]*{_NAME}?|{_NAME}")


@dataclass
class Overlap:
    """Problems of one set that are in the training files.

    Attributes:
        problems: Number of problems of the set.
        short: Number of them with fewer than 13 words, to which the last test does not apply.
        exact, normalized, words: {id of the problem: id of the first training problem that overlaps}, by test.
    """

    problems: int
    short: int = 0
    exact: dict[str, str] = field(default_factory=dict)
    normalized: dict[str, str] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)

    def found(self) -> dict[str, str]:
        """Return {id of the problem: id of a training problem} by any of the tests."""
        return self.words | self.normalized | self.exact


def find_overlap(train: Sequence[Path], sets: Sequence[Path]) -> dict[str, Overlap]:
    """Return {file of the set: its overlap with the training files}. Raises DataError.

    Memory is proportional to the sets; of the training files, only distinct problems are kept.
    """
    own = {str(path): list(_problems(path)) for path in sets}
    found = {name: Overlap(len(problems)) for name, problems in own.items()}
    by_text: dict[str, list[tuple[str, str]]] = {}
    by_words: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    by_run: dict[tuple[str, ...], set[tuple[str, str]]] = {}
    for name, problems in own.items():
        for problem, text in problems:
            words = words_of(text)
            by_text.setdefault(text, []).append((name, problem))
            by_words.setdefault(words, []).append((name, problem))
            found[name].short += len(words) < WORDS
            for run in _runs(words):
                by_run.setdefault(run, set()).add((name, problem))
    for path in train:
        for theirs, text in _problems(path):
            words = words_of(text)
            for name, problem in by_text.get(text, ()):
                found[name].exact.setdefault(problem, theirs)
            for name, problem in by_words.get(words, ()):
                found[name].normalized.setdefault(problem, theirs)
            for run in _runs(words):
                for name, problem in by_run.get(run, ()):
                    found[name].words.setdefault(problem, theirs)
    return found


def words_of(text: str) -> tuple[str, ...]:
    """Return the words and numbers of a text in lower case, each with the operators, signs and relations before it."""
    text = _SPACING.sub(" ", text).lower().replace("\N{MINUS SIGN}", "-")
    text = _FACTORIAL.sub(" factorial ", _BLANK.sub(" ", _HYPHEN.sub(" ", text)))
    return tuple(word if word.isalnum() else _BETWEEN.sub("", word) for word in _WORD.findall(text))


def describe(found: dict[str, Overlap], *, shown: int = 5) -> str:
    """Return a line for each set, and a line for each of the first problems that overlap."""
    lines = []
    for name, overlap in found.items():
        lines.append(
            f"{name}: {overlap.problems} problems; exact {len(overlap.exact)}, normalized {len(overlap.normalized)}, "
            f"{WORDS} words {len(overlap.words)}"
            + (f" ({overlap.short} problems are shorter than that)" if overlap.short else "")
        )
        pairs = list(overlap.found().items())
        lines += [f"  {problem} is in {theirs}" for problem, theirs in pairs[:shown]]
        if len(pairs) > shown:
            lines.append(f"  and {len(pairs) - shown} more (--json lists all)")
    return "\n".join(lines)


def as_json(found: dict[str, Overlap]) -> str:
    """Return everything that was found as JSON."""
    content = {
        name: {
            "problems": overlap.problems,
            "shorter_than_13_words": overlap.short,
            "exact": overlap.exact,
            "normalized": overlap.normalized,
            "13_words": overlap.words,
        }
        for name, overlap in found.items()
    }
    return json.dumps(content, indent=1, ensure_ascii=False)


def _problems(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (id, text without a frame) of each distinct problem of a file, in order."""
    texts: dict[str, str] = {}
    for record in RecordFile(path):
        texts.setdefault(bare_problem(_text(record)).strip(), record.id)
    before, after = _frame(texts)
    for text, problem in texts.items():
        yield problem, text[before : len(text) - after].strip()


def _text(record: Record) -> str:
    return record.prompt if isinstance(record.prompt, str) else record.prompt[-1]["content"]


def _frame(texts: Iterable[str]) -> tuple[int, int]:
    """Return the numbers of characters with which all texts begin and end, up to a line break; 0 for few texts."""
    several = list(texts)
    if len(several) < _FEWEST_FOR_A_FRAME:
        return 0, 0
    before = _common(several)
    after = _common([text[::-1] for text in several])
    return several[0].rfind("\n", 0, before) + 1, several[0][::-1].rfind("\n", 0, after) + 1


def _common(texts: Sequence[str]) -> int:
    """Return the number of characters with which all texts begin."""
    low, high = min(texts), max(texts)
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


def _runs(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    return (words[i : i + WORDS] for i in range(len(words) - WORDS + 1))
