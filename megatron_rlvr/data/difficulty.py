"""Prompts that a run draws less often, by how often the model has solved them: a curriculum without a schedule.

The pass rate of a prompt is the share of correct completions in its last finished group. In order:

    retired    pass rate > retire_above: not drawn again
    resting    pass rate < rest_below, in one of the last rest_steps training steps: not drawn until these are over
    new        no group of the prompt has finished yet
    active     all others

`DifficultyCursor` walks through the same sequence as `PromptCursor` and leaves out prompts that are retired or resting
when their turn comes; their next turn is in the next epoch. Weights of files apply to the turns. If the whole set has
fewer prompts than a call needs, prompts that would be left out follow, in the order of their turns.

No duplicates within a training step: prompts returned since the last `record` are left out as well. They come last, if
a step draws more than the set has.

Pass rates change only in `record`, once a training step and on every rank alike, so that what is drawn depends on
finished steps only. They are a part of the state: a resumed run draws what an uninterrupted one does.
"""

from collections.abc import Iterable
from typing import Any

from megatron_rlvr.data.cursor import PromptCursor
from megatron_rlvr.data.prompts import PromptSet
from megatron_rlvr.types import Prompt


class DifficultyCursor(PromptCursor):
    """Returns the prompts of a set without those that are retired or resting.

    Args:
        prompt_set, seed, shuffle, accept_changes: As for `PromptCursor`.
        retire_above: Pass rate above which a prompt is retired; None: none is.
        rest_below: Pass rate below which a prompt rests; None: none does.
        rest_steps: Number of training steps for which it rests.
    """

    def __init__(
        self,
        prompt_set: PromptSet,
        seed: int,
        shuffle: bool = True,
        *,
        accept_changes: bool = False,
        retire_above: float | None = None,
        rest_below: float | None = None,
        rest_steps: int = 0,
    ) -> None:
        super().__init__(prompt_set, seed, shuffle, accept_changes=accept_changes)
        self._retire_above = retire_above
        self._rest_below = rest_below
        self._rest_steps = rest_steps
        self._returned = 0
        self._step = 0
        self._in_step: set[str] = set()
        """Ids of the prompts returned since the last `record`."""
        self._last: dict[str, tuple[int, int, int]] = {}
        """{prompt id: (correct completions, completions, training step) of its last finished group}."""

    @property
    def drawn(self) -> int:
        """Number of prompts returned so far."""
        return self._returned

    @property
    def epoch(self) -> float:
        """Passes over the set so far, with the prompts that were left out."""
        return super().drawn / self.prompts

    def most_in_a_step(self, groups: int) -> int:
        left_out = sum(self._is_retired(each) or self._is_resting(each) for each in self._last)
        return min(self.prompts, max(self.prompts - left_out, groups))

    def take(self, n: int) -> list[Prompt]:
        """Return the next n prompts, with n distinct ids. Raises DataError if the set has fewer than n."""
        turns = n
        while True:
            upcoming = self._upcoming(turns)
            ranks = [self._rank(prompt) for prompt in upcoming]
            if turns == self.prompts or ranks.count(0) >= n:
                break
            turns = min(2 * turns, self.prompts)
        places = sorted(range(turns), key=ranks.__getitem__)[:n]  # stable: of equal ranks in the order of turns
        if all(ranks[place] == 0 for place in places):
            turns = places[-1] + 1 if places else 0
        super().take(turns)
        self._returned += n
        prompts = [upcoming[place] for place in places]
        self._in_step.update(prompt.id for prompt in prompts)
        return prompts

    def record(self, step: int, groups: Iterable[tuple[str, int, int]]) -> None:
        """Remember the pass rates of a training step.

        Args:
            step: Training step that has finished; prompts drawn from now on are for later steps.
            groups: (prompt id, correct completions, completions) of every group that finished, on every rank the same.
        """
        self._step = step
        self._in_step.clear()
        for prompt_id, correct, completions in groups:
            if completions:
                self._last[prompt_id] = (correct, completions, step)

    def metrics(self) -> dict[str, float]:
        """Return the numbers of prompts that are retired, resting, new and active, which add up to the set."""
        retired = sum(map(self._is_retired, self._last))
        resting = sum(not self._is_retired(each) and self._is_resting(each) for each in self._last)
        return {
            "data/prompts_retired": float(retired),
            "data/prompts_resting": float(resting),
            "data/prompts_new": float(self.prompts - len(self._last)),
            "data/prompts_active": float(len(self._last) - retired - resting),
        }

    def state(self) -> dict[str, Any]:
        """Return position and pass rates as JSON-compatible data."""
        difficulty = {
            "returned": self._returned,
            "step": self._step,
            "in_step": sorted(self._in_step),
            "last": {each: list(values) for each, values in self._last.items()},
        }
        return super().state() | {"difficulty": difficulty}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`, also from that of a `PromptCursor`, which has no pass rates. Raises: DataError."""
        super().restore(state)
        saved = state.get("difficulty", {"returned": super().drawn, "step": 0, "in_step": [], "last": {}})
        known = {prompt.id for prompt in self._set.prompts}
        self._returned, self._step, self._in_step = saved["returned"], saved["step"], set(saved["in_step"])
        self._last = {
            each: (correct, completions, step)
            for each, (correct, completions, step) in saved["last"].items()
            if each in known  # files may have changed, if that is accepted
        }

    def _upcoming(self, turns: int) -> list[Prompt]:
        """Return the prompts of the next turns, also those that are left out, without advancing."""
        before = super().state()
        prompts = super().take(turns)
        super().restore(before)
        return prompts

    def _rank(self, prompt: Prompt) -> int:
        """0 for a prompt that is drawn; 1 if it is retired or rests; 2 if this step has had it. The smallest first."""
        if prompt.id in self._in_step:
            return 2
        return int(self._is_retired(prompt.id) or self._is_resting(prompt.id))

    def _is_retired(self, prompt_id: str) -> bool:
        last = self._last.get(prompt_id)
        return last is not None and self._retire_above is not None and last[0] / last[1] > self._retire_above

    def _is_resting(self, prompt_id: str) -> bool:
        last = self._last.get(prompt_id)
        if last is None or self._rest_below is None:
            return False
        return last[0] / last[1] < self._rest_below and self._step - last[2] < self._rest_steps
