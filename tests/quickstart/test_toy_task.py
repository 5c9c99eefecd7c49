"""Tests of the quickstart's task from its text alone: problems are parsed and simulated here."""

import json
import random
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))

import toy_data
import toy_task
from toy_data import warm_up_stream, write_data
from toy_task import AUTHOR, FLAWLESS, Event, Fork, Problem, read_forks, sample_problem, write_trace
from toy_tokenizer import EOS_ID, PAD_ID, UNKNOWN, VOCABULARY, encode, write_tokenizer

SIGN = {"buys": 1, "finds": 1, "wins": 1, "loses": -1, "sells": -1, "gives": -1}
DAY = "(?:Monday|Tuesday|Wednesday|Thursday|Friday)"
EVENT = rf"{DAY} (?:{'|'.join(SIGN)}) \d+ (?:packs|singles)"
PROBLEM = re.compile(
    rf"(?P<name>[A-Z][a-z]+) has (?P<stock>some|\d+) (?P<item>[a-z]+) \. a pack has (?P<size>\d+) \. "
    rf"(?P<events>(?:{EVENT} \. )+)(?:how many now \?|now has (?P<shown>\d+) \. how many at first \?)"
)
STEP = (
    rf"(?:since|as|because) {EVENT} , (?P<undo>undo it , )?(?:times : \d+ \* \d+ = \d+ , )?"
    r"(?:add : \d+ \+ \d+|take : \d+ - \d+) = (?P<total>\d+) \. "
)
PLAIN_STEP = re.sub(r"\?P<\w+>", "?:", STEP)
DEAD_END = PLAIN_STEP.replace(r" = (?:\d+) \. ", r" , let us guess \. ")
TRACE = re.compile(
    rf"(?:let us guess \. |let us go (?:forward|back) , start with \d+ \. (?:{PLAIN_STEP}(?:wait , {PLAIN_STEP})?)*"
    rf"(?:(?:{PLAIN_STEP}wait , )?{DEAD_END})?)(?:so|thus|hence) the answer is \\boxed\{{ \d+ \}}"
)
SUM = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")


@pytest.fixture(autouse=True)
def no_test_samples_forever() -> Iterator[None]:
    """Limit the computing time of a test: code that rejects every drawn problem must fail the test, not hang it."""

    def stop(signum: int, frame: object) -> None:
        raise TimeoutError("the test computed for 60 s; check for a loop that rejects everything it draws")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 60)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


def parse(text: str) -> tuple[dict, list[tuple[str, str, int, str]]]:
    match = PROBLEM.fullmatch(text)
    assert match, text
    words = [event.split() for event in match["events"].strip(" .").split(" . ")]
    return match.groupdict(), [(day, verb, int(count), unit) for day, verb, count, unit in words]


def totals_from(start: int, events: list, size: int) -> list[int]:
    totals = [start]
    for _, verb, count, unit in events:
        totals.append(totals[-1] + SIGN[verb] * count * (size if unit == "packs" else 1))
    return totals


def draw(count: int, hard: bool = False, seed: int = 0) -> list[Problem]:
    rng = random.Random(seed)
    return [sample_problem(rng, hard) for _ in range(count)]


@pytest.mark.parametrize("hard", [False, True])
def test_the_text_satisfies_every_constraint_and_determines_the_answer(hard: bool):
    backwards = 0
    for problem in draw(4000, hard):
        stated, events = parse(problem.text)
        size = int(stated["size"])
        if stated["stock"] == "some":
            backwards += 1
            fitting = [start for start in range(60) if totals_from(start, events, size)[-1] == int(stated["shown"])]
            (start,) = fitting
            answer = start
        else:
            start = int(stated["stock"])
            answer = totals_from(start, events, size)[-1]
        assert problem.answer == answer
        assert 3 <= start <= 18
        assert size in (3, 4)
        assert all(0 <= total <= 25 for total in totals_from(start, events, size))
        days = [event[0] for event in events]
        assert len(set(days)) == len(days)
        assert len(events) in ((4,) if hard else (2, 3))
        assert sum(unit == "packs" for *_, unit in events) <= (2 if hard else 1)
        assert all(2 <= count <= 3 if unit == "packs" else 1 <= count <= 5 for _, _, count, unit in events)
    assert abs(backwards / 4000 - 0.5) < 0.03


def test_every_value_that_the_constraints_allow_occurs():
    problems = draw(4000)
    parsed = [parse(problem.text) for problem in problems]
    assert {problem.start for problem in problems} == set(range(3, 19))
    assert {stated["size"] for stated, _ in parsed} == {"3", "4"}
    assert {count for _, events in parsed for *_, count, unit in events if unit == "singles"} == {1, 2, 3, 4, 5}
    assert {count for _, events in parsed for *_, count, unit in events if unit == "packs"} == {2, 3}
    assert {len(events) for _, events in parsed} == {2, 3}
    assert max(sum(event[3] == "packs" for event in parse(p.text)[1]) for p in draw(200, hard=True)) == 2
    words = {word for problem in problems for word in problem.text.split()}
    assert len(words & set(toy_task.NAMES)) == 6
    assert len(words & set(toy_task.ITEMS)) == 6
    assert len(words & set(toy_task.DAYS)) == 5
    assert len(words & set(SIGN)) == 6


def test_the_author_is_correct_as_often_as_specified_and_within_the_length_cap():
    rng = random.Random(1)
    correct, solved, lengths = [], [], []
    for problem in draw(5000, seed=1):
        traces = [write_trace(rng, problem, AUTHOR) for _ in range(8)]
        hits = [trace.answer == problem.answer for trace in traces]
        correct += hits
        solved.append(any(hits))
        lengths += [len(encode(trace.text)) + 1 for trace in traces]
    assert abs(np.mean(correct) - 0.36) < 0.03
    assert abs(np.mean(solved) - 0.95) < 0.03
    assert np.mean(np.array(lengths) <= 110) >= 0.99


@pytest.mark.parametrize("hard", [False, True])
def test_a_flawless_trace_is_always_correct_and_never_waits(hard: bool):
    rng = random.Random(2)
    for problem in draw(2000, hard, seed=2):
        trace = write_trace(rng, problem, FLAWLESS)
        assert trace.answer == problem.answer
        assert "wait" not in trace.text
        assert all(fork.correct is not False for fork in read_forks(problem, trace.text))


@pytest.mark.parametrize("habits", [AUTHOR, FLAWLESS])
def test_traces_follow_the_grammar_and_their_arithmetic_is_correct(habits: toy_task.Habits):
    rng = random.Random(3)
    operate = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    for problem in draw(2000, seed=3) + draw(1000, hard=True, seed=3):
        trace = write_trace(rng, problem, habits)
        assert TRACE.fullmatch(trace.text), trace.text
        encode(trace.text)
        for left, sign, right, result in SUM.findall(trace.text):
            assert operate[sign](int(left), int(right)) == int(result)
        stated = [f"{day} {verb} {count} {unit}" for day, verb, count, unit in parse(problem.text)[1]]
        assert all(event in stated for event in re.findall(EVENT, trace.text))
        assert trace.text.endswith(rf"\boxed{{ {trace.answer} }}")
        for left, sign, right in re.findall(r"(\d+) ([-+]) (\d+) ,", trace.text):
            assert not 0 <= operate[sign](int(left), int(right)) <= 40
        if "guess" not in trace.text:
            assert int(list(re.finditer(STEP, trace.text))[-1]["total"]) == trace.answer


def test_each_step_starts_from_the_previous_total_and_a_redo_from_the_same_one():
    rng = random.Random(4)
    for problem in draw(2000, seed=4):
        text = write_trace(rng, problem, AUTHOR).text
        before = total = problem.given
        for wait, left, result in re.findall(r"(wait , )?\S+ \S+ \S+ \d+ \w+ , .*?: (\d+) [-+] \d+ = (\d+) \.", text):
            before = before if wait else total
            assert int(left) == before, text
            total = int(result)


PROBLEM_BY_HAND = Problem(
    "Ann", "pens", 3, 10, (Event("Monday", "buys", 2, "packs"), Event("Friday", "sells", 4, "singles")), True
)


def test_the_forks_of_traces_equal_those_read_by_hand():
    assert PROBLEM_BY_HAND.text == (
        "Ann has some pens . a pack has 3 . Monday buys 2 packs . Friday sells 4 singles . "
        "now has 12 . how many at first ?"
    )
    text = (
        "let us go back , start with 12 . since Friday sells 4 singles , undo it , take : 12 - 4 = 8 . "
        "wait , as Friday sells 4 singles , undo it , add : 12 + 4 = 16 . "
        r"because Monday buys 2 packs , undo it , take : 16 - 2 = 14 . so the answer is \boxed{ 14 }"
    )
    expected = [
        ("plan", "back", True),
        ("connective", "since", None),
        ("operation", "take", False),
        ("wait", "wait", True),
        ("connective", "as", None),
        ("operation", "add", True),
        ("connective", "because", None),
        ("times", "take", False),
        ("operation", "take", True),
        ("connective", "so", None),
    ]
    words = text.split()
    forks = read_forks(PROBLEM_BY_HAND, text)
    assert [(fork.kind, words[fork.position], fork.correct) for fork in forks] == expected
    assert [fork.position for fork in forks] == sorted(fork.position for fork in forks)

    text = (
        "let us go forward , start with 12 . as Monday buys 2 packs , times : 2 * 3 = 6 , add : 12 + 6 = 18 . "
        r"wait , because Friday sells 4 singles , take : 12 - 40 , let us guess . hence the answer is \boxed{ 3 }"
    )
    assert [(fork.kind, fork.correct) for fork in read_forks(PROBLEM_BY_HAND, text)] == [
        ("plan", False),
        ("connective", None),
        ("times", True),
        ("operation", True),
        ("wait", False),
        ("connective", None),
        ("operation", True),
        ("connective", None),
    ]
    text = "let us go forward , start with 12 . as Monday buys 2 packs , add : 12 + 2 = 14 . wait , "
    assert read_forks(PROBLEM_BY_HAND, text)[-1] == Fork("wait", len(text.split()) - 2, True)
    assert read_forks(PROBLEM_BY_HAND, r"let us guess . so the answer is \boxed{ 3 }")[0] == Fork("plan", 2, False)


@pytest.mark.parametrize("text", ["", "since", "add add wait = as Monday", "times : so } since Friday sells"])
def test_words_in_any_order_can_be_read_for_forks(text: str):
    assert all(0 <= fork.position < len(text.split()) for fork in read_forks(PROBLEM_BY_HAND, text))


def test_the_forks_read_from_traces_have_the_frequencies_of_the_author_s_habits():
    rng = random.Random(5)
    correct: dict[str, list[bool]] = {}
    waited: dict[bool, list[bool]] = {True: [], False: []}
    for problem in draw(6000, seed=5):
        text = write_trace(rng, problem, AUTHOR).text
        guessed = text.startswith("let us guess")
        correct.setdefault("guess", []).append(guessed)
        if guessed:
            continue
        plan, *forks = read_forks(problem, text)
        correct.setdefault(f"plan {problem.backwards}", []).append(bool(plan.correct))
        order = "back" if " go back " in text else "forward"
        step: list[Fork] = []
        redo = False
        for fork, after in pairwise(forks):
            if fork.kind in ("times", "operation") and not redo:
                kind = "times" if fork.kind == "times" else f"operation {order}"
                correct.setdefault(kind, []).append(bool(fork.correct))
                step.append(fork)
            dead_end = " , let us guess" in text and not any(later.position > after.position for later in forks)
            if fork.kind == "operation":
                if not redo and not dead_end:
                    waited[all(fork.correct for fork in step)].append(after.kind == "wait")
                redo = after.kind == "wait"
                step = []
    expected = {
        "plan False": 0.70,
        "plan True": 0.50,
        "guess": 0.06,
        "operation forward": 0.80,
        "operation back": 0.75,
        "times": 0.65,
    }
    assert {kind: np.mean(correct[kind]) for kind in expected} == pytest.approx(expected, abs=0.03)
    assert np.mean(waited[False]) == pytest.approx(0.35, abs=0.03)
    assert np.mean(waited[True]) == pytest.approx(0.05, abs=0.01)


def test_the_drills_have_correct_sums_and_copy_the_events_of_the_problem():
    rng = random.Random(6)
    event_counts = set()
    operate = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    for _ in range(300):
        prompt, response = toy_data.arithmetic_drill(rng)
        sums = SUM.findall(response)
        assert prompt == " ".join(f"{left} {sign} {right} ." for left, sign, right, _ in sums)
        assert all(operate[sign](int(left), int(right)) == int(result) for left, sign, right, result in sums)
        prompt, response = toy_data.copy_drill(rng)
        text, order = prompt.rsplit(" ", 2)[:2]
        stated = re.findall(EVENT, text)
        assert re.findall(EVENT, response) == (stated if order == "forward" else stated[::-1])
        event_counts.add(len(stated))
    assert event_counts == {2, 3, 4}


def test_the_vocabulary_is_111_words_and_each_is_used():
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 111
    rng = random.Random(7)
    texts = [text for problem in draw(3000) for text in (problem.text, write_trace(rng, problem, AUTHOR).text)]
    used = {word for text in texts for word in text.split()}
    assert set(VOCABULARY) - used <= {"<pad>", "<eos>", "<unk>", *map(str, range(41))}
    assert used <= set(VOCABULARY)


@pytest.fixture(scope="module")
def folder_with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_the_tokenizer_folder_round_trips_every_text(folder_with_tokenizer: Path, beside_a_model: bool):
    from transformers import AutoTokenizer

    if beside_a_model:  # as in a model's folder: its model type must not select another tokenizer
        (folder_with_tokenizer / "config.json").write_text('{"model_type": "qwen3"}')
    tokenizer = AutoTokenizer.from_pretrained(folder_with_tokenizer)
    assert len(tokenizer) == 111
    assert tokenizer.chat_template is None
    assert tokenizer.eos_token_id == EOS_ID
    assert tokenizer.pad_token_id == PAD_ID
    assert tokenizer.convert_ids_to_tokens(list(range(111))) == list(VOCABULARY)
    assert tokenizer("elephants")["input_ids"] == [VOCABULARY.index(UNKNOWN)]
    rng = random.Random(8)
    for problem in draw(500, seed=8) + draw(100, hard=True, seed=8):
        for text in (problem.text, write_trace(rng, problem, AUTHOR).text):
            ids = tokenizer(text)["input_ids"]
            assert ids == encode(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode([*ids, EOS_ID], skip_special_tokens=True) == text


def test_a_math_grader_reads_the_boxed_answer():
    from math_verify import parse as read
    from math_verify import verify

    for answer in range(41):
        box = rf"hence the answer is \boxed{{ {answer} }}"
        assert verify(read(f"${answer}$"), read(box))
        assert not verify(read(f"${answer + 1}$"), read(box))


def words_of(ids: np.ndarray) -> str:
    return " ".join(VOCABULARY[token_id] for token_id in ids)


def test_the_warm_up_has_its_stages_and_proportions():
    kinds: list[Counter] = [Counter(), Counter()]
    for index, (prompt_ids, response_ids) in enumerate(warm_up_stream(0, 6000)):
        assert prompt_ids.dtype == response_ids.dtype == np.int32
        assert response_ids[-1] == EOS_ID
        prompt, response = words_of(prompt_ids), words_of(response_ids[:-1])
        stage = int(index >= 3900)
        kind = "trace" if TRACE.fullmatch(response) else "copy" if prompt[-1] == ":" else "arithmetic"
        kinds[stage][kind] += 1
        if kind == "trace" and not stage:
            assert "guess" not in response
            assert "wait" not in response
    shares = [{kind: count / counts.total() for kind, count in counts.items()} for counts in kinds]
    assert shares[0] == pytest.approx({"trace": 0.50, "copy": 0.15, "arithmetic": 0.35}, abs=0.03)
    assert shares[1] == pytest.approx({"trace": 0.87, "copy": 0.05, "arithmetic": 0.08}, abs=0.03)


def test_no_problem_reserved_for_evaluation_is_trained_on_even_about_another_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Only 60 sums, about any person: sets that are not separated on purpose are certain to overlap.
    pool = draw(60, seed=9)

    def sample_from_pool(rng: random.Random, hard: bool = False) -> Problem:
        return replace(rng.choice(pool), name=rng.choice(toy_task.NAMES), item=rng.choice(toy_task.ITEMS))

    monkeypatch.setattr(toy_data, "sample_problem", sample_from_pool)
    paths = write_data(tmp_path, train=300, held_out=40, hard=40)
    sums = {
        source: {without_name_and_item(json.loads(line)["prompt"]) for line in path.read_text().splitlines()}
        for source, path in paths.items()
    }
    evaluation = sums["held_out"] | sums["hard"]
    warm_up = {
        without_name_and_item(prompt.removesuffix(" forward :").removesuffix(" back :"))
        for prompt in (words_of(prompt_ids) for prompt_ids, _ in warm_up_stream(0, 2000))
        if PROBLEM.match(prompt)
    }
    assert len(sums["train"] | evaluation) == len(warm_up | evaluation) == 60
    assert not evaluation & (sums["train"] | warm_up)


def without_name_and_item(text: str) -> str:
    words = text.split()
    return " ".join(words[1:3] + words[4:])


def test_the_warm_up_depends_on_the_seed_only():
    def stream(seed: int) -> list[tuple[list[int], list[int]]]:
        return [(prompt.tolist(), response.tolist()) for prompt, response in islice(warm_up_stream(seed, 60), 60)]

    assert stream(3) == stream(3)
    assert stream(3) != stream(4)


def test_data_files_have_valid_rows_and_depend_on_the_seed_only(tmp_path: Path):
    first = write_data(tmp_path / "first", train=300, held_out=40, hard=30, seed=1)
    again = write_data(tmp_path / "again", train=300, held_out=40, hard=30, seed=1)
    other = write_data(tmp_path / "other", train=300, held_out=40, hard=30, seed=2)
    prompts, ids = [], []
    for source, count in (("train", 300), ("held_out", 40), ("hard", 30)):
        assert first[source] == tmp_path / "first" / f"{source}.jsonl"
        assert first[source].read_bytes() == again[source].read_bytes() != other[source].read_bytes()
        rows = [json.loads(line) for line in first[source].read_text().splitlines()]
        assert len(rows) == count
        for row in rows:
            assert set(row) == {"id", "prompt", "answer", "source"}
            assert row["source"] == source
            stated, events = parse(row["prompt"])
            start = int(row["answer"]) if stated["shown"] else int(stated["stock"])
            end = totals_from(start, events, int(stated["size"]))[-1]
            assert end == int(stated["shown"] or row["answer"])
            assert (len(events) == 4) == (source == "hard")
            ids.append(row["id"])
            prompts.append(row["prompt"])
    assert len(set(prompts)) == len(set(ids)) == 370


def test_a_problem_drawn_twice_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pool = draw(60, seed=9)
    monkeypatch.setattr(toy_data, "sample_problem", lambda rng, hard=False: rng.choice(pool))
    open_count = sum(not problem.is_reserved for problem in pool)
    paths = write_data(tmp_path, train=open_count, held_out=60 - open_count - 1, hard=1)
    lines = [json.loads(line)["prompt"] for path in paths.values() for line in path.read_text().splitlines()]
    assert sorted(lines) == sorted(problem.text for problem in pool)
