"""A resumable walk over a prompt set that never ends.

Which file comes next: the one with the smallest (drawn + 1) / weight, the first of equals (D'Hondt's rule for seats).
There is no randomness in it, and after n draws no file has had less than its share of n rounded down. With default
weights (the number of prompts) one pass over the set draws each prompt exactly once.

Which prompt of the file: epoch e of a file goes through it in an order drawn from (seed, file's name, e). Each epoch
gives every prompt exactly once. The order is the argsort of Philox's raw output, and not Generator.permutation, since
NumPy keeps the former fixed over its versions: a run may be resumed with a newer one.

No prompt twice in one call. Across the end of an epoch a prompt may come up again that the same call has given
already. It is skipped, and given before anything else of the file in the next call. Skipped prompts are part of the
state, so a resumed walk gives what the uninterrupted one would have. A file that has given all it has sits out the
rest of the call, so a weight that asks for more of a small file than its size gets all of it in each call.
"""

import hashlib
from typing import Any

import numpy as np

from megatron_rlvr.data.prompts import FilePrompts, PromptSet
from megatron_rlvr.data.rows import DataError
from megatron_rlvr.types import Prompt


class PromptCursor:
    """Gives the prompts of a set, epoch after epoch; see the module's header for the order.

    Args:
        prompt_set: what to walk over.
        seed: >= 0; the same seed and set give the same walk.
        shuffle: False keeps the order of each file's rows, in every epoch.
    """

    def __init__(self, prompt_set: PromptSet, seed: int, shuffle: bool = True) -> None:
        if seed < 0:
            raise DataError(f"seed {seed} is below 0; choose one from 0 on")
        self._set = prompt_set
        self._seed = seed
        self._shuffle = shuffle
        self._walks = [_FileWalk(file, seed, shuffle) for file in prompt_set.files]

    @property
    def prompts(self) -> int:
        """Prompts in the set, the most that one `take` can give."""
        return len(self._set)

    @property
    def epoch(self) -> float:
        """Passes over the set so far: prompts given / prompts in the set."""
        return sum(walk.drawn for walk in self._walks) / len(self._set)

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts, n distinct ids. Raises DataError if the set has fewer."""
        if n > len(self._set):
            raise DataError(
                f"{n} prompts asked for at once, but the set has {len(self._set)}; ask for fewer or add prompt files"
            )
        given: list[set[int]] = [set() for _ in self._walks]
        taken = []
        for _ in range(n):
            _, number = min(
                ((walk.drawn + 1) / walk.file.weight, number)
                for number, walk in enumerate(self._walks)
                if len(given[number]) < walk.file.count
            )
            walk = self._walks[number]
            row = walk.draw(given[number])
            given[number].add(row)
            taken.append(self._set.prompts[walk.file.start + row])
        return taken

    def peek(self, n: int) -> list[Prompt]:
        """What `take` would give: the first k of them are what take(k) gives."""
        before = self.state()
        prompts = self.take(n)
        self.restore(before)
        return prompts

    def state(self) -> dict[str, Any]:
        """Where the walk stands, as JSON holds it: a few numbers a file, and the rows skipped (rarely any)."""
        return {
            "seed": self._seed,
            "shuffle": self._shuffle,
            "files": [
                {
                    "name": walk.file.name,
                    "count": walk.file.count,
                    "weight": walk.file.weight,
                    "drawn": walk.drawn,
                    "skipped": list(walk.skipped),
                }
                for walk in self._walks
            ],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues the walk that ``state`` was taken from.

        Raises: DataError if the files, their numbers of prompts, their weights, the seed or the shuffling differ, in
            which case some prompts would be seen twice and others never; the cursor is then as it was.
        """
        current = self.state()
        for key in ("seed", "shuffle"):
            if state[key] != current[key]:
                raise DataError(
                    f"{key} was {state[key]} at the checkpoint and is {current[key]} now; "
                    "set it back or start a new run"
                )
        then, now = ([file["name"] for file in files] for files in (state["files"], current["files"]))
        if then != now:
            raise DataError(
                f"the prompt files were {', '.join(then)} at the checkpoint and are {', '.join(now)} now; "
                "set data.train back or start a new run"
            )
        for before, after in zip(state["files"], current["files"], strict=True):
            for key, what in (("count", "prompts"), ("weight", "as its weight")):
                if before[key] != after[key]:
                    raise DataError(
                        f"{before['name']} had {before[key]} {what} at the checkpoint and has {after[key]} now; "
                        "restore the file and its settings or start a new run"
                    )
        for walk, file in zip(self._walks, state["files"], strict=True):
            walk.restore(file["drawn"], file["skipped"])


class _FileWalk:
    """The walk over one file: how many prompts were drawn, and which of this epoch's were skipped.

    The epoch's order up to position drawn % count + len(skipped) has been walked over.
    """

    def __init__(self, file: FilePrompts, seed: int, shuffle: bool) -> None:
        self.file = file
        self._seed = seed
        self._shuffle = shuffle
        self.restore(0, [])

    def restore(self, drawn: int, skipped: list[int]) -> None:
        self.drawn = drawn
        self.skipped = list(skipped)
        self._order = self._order_of(drawn // self.file.count)

    def draw(self, given: set[int]) -> int:
        """The next row that is not in ``given``, the rows of this call, of which there are fewer than the file has.

        Such a row is left in the current epoch. Rows given earlier in this epoch and rows still to come make up the
        file, and a row still to come is in ``given`` only if the epoch began in this call; then the rows given in the
        epoch are in ``given`` too, and if all others were, ``given`` would be the whole file.
        """
        row = self._skipped_row(given)
        if row is None:
            row = self._row_ahead(given)
        self.drawn += 1
        if self.drawn % self.file.count == 0:
            self._order = self._order_of(self.drawn // self.file.count)
        return row

    def _skipped_row(self, given: set[int]) -> int | None:
        for place, row in enumerate(self.skipped):
            if row not in given:
                return self.skipped.pop(place)
        return None

    def _row_ahead(self, given: set[int]) -> int:
        position = self.drawn % self.file.count + len(self.skipped)
        while (row := int(self._order[position])) in given:
            self.skipped.append(row)
            position += 1
        return row

    def _order_of(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self.file.count)
        name = int.from_bytes(hashlib.sha256(self.file.name.encode()).digest()[:8], "little")
        bits = np.random.Philox(np.random.SeedSequence([self._seed, name, epoch]))
        return np.argsort(bits.random_raw(self.file.count), kind="stable")
