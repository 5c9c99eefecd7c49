r"""Task of the quickstart: word problems whose chain of thought has forks, and an author who often errs at them.

    problem := NAME has (n | some) ITEM . a pack has s . { DAY VERB (k packs | n singles) . }
               (how many now ? | now has x . how many at first ?)
    trace   := let us go (forward | back) , start with x . { step [wait , step] } end  |  let us guess . end
    step    := (since | as | because) DAY VERB n UNIT , [undo it ,] [times : k * s = m ,]
               (add : x + m | take : x - m) (= y . | , let us guess . end)
    end     := (so | thus | hence) the answer is \boxed{ y }

The decisive forks are the plan, the operation, whether to multiply and whether to wait; the choice of a connective does
not matter. All other words follow from the words before them. The author errs at forks only, never in arithmetic: a
result outside 0..40 has no word, so the author gives up and guesses. A correct answer therefore requires correct
choices. A model that imitates the author knows the words but not the choices; reinforcement learning teaches those.

All text is drawn with the ``random.Random`` argument; toy_data.py makes files and training sequences from it.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Literal, NamedTuple

from toy_tokenizer import DAYS, END_CONNECTIVES, GAINS, ITEMS, LARGEST_NUMBER, LOSSES, NAMES, STEP_CONNECTIVES

LARGEST_TOTAL = 25
PACK_SIZES = (3, 4)


@dataclass(frozen=True, slots=True)
class Event:
    """Event of one day: ``count`` packs or singles, gained or lost according to the verb."""

    day: str
    verb: str
    count: int
    unit: Literal["packs", "singles"]

    @property
    def text(self) -> str:
        return f"{self.day} {self.verb} {self.count} {self.unit}"


@dataclass(frozen=True, slots=True)
class Problem:
    """Word problem: the text states ``given``, the question asks for ``answer``."""

    name: str
    item: str
    pack_size: int
    start: int
    events: tuple[Event, ...]
    backwards: bool

    @property
    def totals(self) -> list[int]:
        """Amounts at first and after each event, [events + 1]."""
        totals = [self.start]
        for event in self.events:
            amount = event.count * (self.pack_size if event.unit == "packs" else 1)
            totals.append(totals[-1] + (amount if event.verb in GAINS else -amount))
        return totals

    @property
    def given(self) -> int:
        return self.totals[-1] if self.backwards else self.start

    @property
    def answer(self) -> int:
        return self.start if self.backwards else self.totals[-1]

    @property
    def text(self) -> str:
        stock = "some" if self.backwards else self.start
        question = f"now has {self.given} . how many at first ?" if self.backwards else "how many now ?"
        events = " ".join(f"{event.text} ." for event in self.events)
        return f"{self.name} has {stock} {self.item} . a pack has {self.pack_size} . {events} {question}"

    @property
    def is_reserved(self) -> bool:
        """True if the problem is reserved for evaluation, decided by a hash, so that no list of problems is needed.

        The hash ignores the name and the item: the same sum about another person is the same problem.
        """
        sum_text = self.text.removeprefix(self.name).replace(self.item, "")
        return hashlib.sha256(sum_text.encode()).digest()[0] < 26  # one in ten


def sample_problem(rng: random.Random, hard: bool = False) -> Problem:
    """Draw a problem of 2 or 3 events, at most one of packs; if ``hard``, of 4 events, at most two of packs."""
    event_count = 4 if hard else rng.choice((2, 3))
    while True:
        pack_events = rng.sample(range(event_count), rng.randint(0, 2 if hard else 1))
        days = sorted(rng.sample(DAYS, event_count), key=DAYS.index)
        events = tuple(
            Event(day, rng.choice(GAINS + LOSSES), rng.randint(2, 3), "packs")
            if index in pack_events
            else Event(day, rng.choice(GAINS + LOSSES), rng.randint(1, 5), "singles")
            for index, day in enumerate(days)
        )
        problem = Problem(
            name=rng.choice(NAMES),
            item=rng.choice(ITEMS),
            pack_size=rng.choice(PACK_SIZES),
            start=rng.randint(3, 18),
            events=events,
            backwards=rng.random() < 0.5,
        )
        if all(0 <= total <= LARGEST_TOTAL for total in problem.totals):
            return problem


@dataclass(frozen=True, slots=True)
class Habits:
    """Probabilities of an author's choices: the correct one at each fork, a guess, and a wait after each step.

    Attributes:
        plan_forward, plan_back: Correct plan where the plan should be forward, or back.
        operation, operation_back: Correct operation when going forward, or back.
        times: Multiplication where it is needed.
        guess: A guess without any step.
        wait_after_incorrect, wait_after_correct: A wait after an incorrect step, or after a correct one.
        redo: Correct operation in the step after a wait.
    """

    plan_forward: float = 0.70
    plan_back: float = 0.50
    operation: float = 0.80
    operation_back: float = 0.75
    times: float = 0.65
    guess: float = 0.06
    wait_after_incorrect: float = 0.35
    wait_after_correct: float = 0.05
    redo: float = 0.95


AUTHOR = Habits()
FLAWLESS = Habits(
    plan_forward=1.0,
    plan_back=1.0,
    operation=1.0,
    operation_back=1.0,
    times=1.0,
    guess=0.0,
    wait_after_incorrect=1.0,
    wait_after_correct=0.0,
    redo=1.0,
)


@dataclass(frozen=True, slots=True)
class Trace:
    """Chain of thought and its final answer."""

    text: str
    answer: int


def write_trace(rng: random.Random, problem: Problem, habits: Habits) -> Trace:
    """Solve the problem as an author with these habits would, in the grammar of the module docstring.

    A step is correct if both its operation and its multiplication are; it is redone at most once. A failed redo has
    the incorrect operation. Operations are judged by the chosen plan, whether that is correct or not.
    """
    if rng.random() < habits.guess:
        return _give_up(rng, [])
    plan_is_correct = rng.random() < (habits.plan_back if problem.backwards else habits.plan_forward)
    back = problem.backwards == plan_is_correct
    operation_habit = habits.operation_back if back else habits.operation
    total = problem.given
    parts = [f"let us go {'back' if back else 'forward'} , start with {total} ."]
    for event in reversed(problem.events) if back else problem.events:
        operation_is_correct = rng.random() < operation_habit
        times_is_correct = event.unit == "singles" or rng.random() < habits.times
        text, after = _write_step(rng, problem, event, back, total, operation_is_correct, times_is_correct)
        parts.append(text)
        step_is_correct = operation_is_correct and times_is_correct
        wait = habits.wait_after_correct if step_is_correct else habits.wait_after_incorrect
        if after is not None and rng.random() < wait:
            text, after = _write_step(rng, problem, event, back, total, rng.random() < habits.redo, True)
            parts.append(f"wait , {text}")
        if after is None:
            return _give_up(rng, parts)
        total = after
    return _finish(rng, parts, total)


def _write_step(
    rng: random.Random,
    problem: Problem,
    event: Event,
    back: bool,
    total: int,
    operation_is_correct: bool,
    times_is_correct: bool,
) -> tuple[str, int | None]:
    """Return the words of a step and the total after it.

    A total outside 0..40 has no word: the step then stops before its result, and the returned total is None.
    """
    amount = event.count
    words = [f"{rng.choice(STEP_CONNECTIVES)} {event.text} ,"]
    if back:
        words.append("undo it ,")
    if event.unit == "packs" and times_is_correct:
        amount = event.count * problem.pack_size
        words.append(f"times : {event.count} * {problem.pack_size} = {amount} ,")
    adds = ((event.verb in GAINS) != back) == operation_is_correct
    after = total + amount if adds else total - amount
    words.append(f"add : {total} + {amount}" if adds else f"take : {total} - {amount}")
    if not 0 <= after <= LARGEST_NUMBER:
        return " ".join([*words, ","]), None
    return " ".join([*words, f"= {after} ."]), after


def _give_up(rng: random.Random, parts: list[str]) -> Trace:
    return _finish(rng, [*parts, "let us guess ."], rng.randint(0, LARGEST_TOTAL))


def _finish(rng: random.Random, parts: list[str], answer: int) -> Trace:
    end = rf"{rng.choice(END_CONNECTIVES)} the answer is \boxed{{ {answer} }}"
    return Trace(" ".join([*parts, end]), answer)


class Fork(NamedTuple):
    """Choice in a trace; ``position`` counts words from 0, ``correct`` is None if every choice is equally good."""

    kind: Literal["plan", "operation", "times", "wait", "connective"]
    position: int
    correct: bool | None


def read_forks(problem: Problem, trace_text: str) -> list[Fork]:
    """Return the forks of a trace, written by the author or a model, in order; other words are ignored.

    An operation is judged by the plan and the verb in the trace itself, a multiplication by its unit, a wait by the
    step before it. A missing multiplication is reported at the position of the operation that replaces it. A guess
    counts as a plan only at the start of the trace, not where the author gives up.
    """
    words = trace_text.split()
    forks: list[Fork] = []
    back, verb, unit, multiplied, step_is_correct = False, "", "", False, True
    for position, word in enumerate(words):
        if word in ("forward", "back", "guess") and position <= 3:
            back = word == "back"
            forks.append(Fork("plan", position, word == ("back" if problem.backwards else "forward")))
        elif word in STEP_CONNECTIVES + END_CONNECTIVES:
            forks.append(Fork("connective", position, None))
            verb, unit = (words[position + 1 : position + 5] + [""] * 4)[1:4:2]
            multiplied = False
        elif word == "times":
            multiplied = True
            forks.append(Fork("times", position, unit == "packs"))
        elif word in ("add", "take"):
            operation_is_correct = (word == "add") == ((verb in GAINS) != back)
            if unit == "packs" and not multiplied:
                forks.append(Fork("times", position, False))
            forks.append(Fork("operation", position, operation_is_correct))
            step_is_correct = operation_is_correct and multiplied == (unit == "packs")
        elif word == "wait":
            forks.append(Fork("wait", position, not step_is_correct))
    return forks
