"""Resumable, endless iteration over a prompt set.

Choice of the file: the file with the smallest (drawn + 1) / weight is next; of equals, the first (D'Hondt's method).
This rule has no randomness, and after n draws every file has had at least its share of n, rounded down. With default
weights (the number of prompts) one pass over the set draws each prompt exactly once.

Choice of the prompt: epoch e of a file visits its prompts in an order drawn from (seed, file name, e), each exactly
once. The order is the argsort of Philox's raw output and not Generator.permutation, because NumPy guarantees the
former across its versions, and a run may be resumed with a newer version.

No duplicates within a call: across the end of an epoch, a prompt that the same call has already returned may be next
again. It is skipped, and is the first prompt of its file in the next call. Skipped prompts are part of the state, so a
resumed cursor returns the same prompts as an uninterrupted one. A file all of whose prompts have been returned is left
out for the rest of the call; a small file with a large weight therefore contributes all its prompts to each call.
"""

import hashlib
from typing import Any

import numpy as np

from megatron_rlvr.data.prompts import FilePrompts, PromptSet
from megatron_rlvr.data.rows import DataError
from megatron_rlvr.types import Prompt


class PromptCursor:
    """Returns the prompts of a set, epoch after epoch, in the order described in the module docstring.

    Args:
        prompt_set: Prompts to iterate over.
        seed: Seed of the shuffling, >= 0; the same seed and set give the same order.
        shuffle: False keeps the order of each file's rows in every epoch.
        accept_changes: True if files may have another number of prompts than in a restored state. Their numbers of
            drawn prompts are then kept, and are positions in the new order of the file.

    Raises:
        DataError: For a negative seed.
    """

    def __init__(self, prompt_set: PromptSet, seed: int, shuffle: bool = True, *, accept_changes: bool = False) -> None:
        if seed < 0:
            raise DataError(f"run.seed={seed}: negative; set 0 or more")
        self._set = prompt_set
        self._seed = seed
        self._shuffle = shuffle
        self._accept_changes = accept_changes
        self._cursors = [_FileCursor(file, seed, shuffle) for file in prompt_set.files]

    @property
    def prompts(self) -> int:
        """Number of prompts in the set, the most that one `take` can return."""
        return len(self._set)

    @property
    def drawn(self) -> int:
        """Number of prompts drawn so far, over all epochs."""
        return sum(cursor.drawn for cursor in self._cursors)

    @property
    def epoch(self) -> float:
        """Passes over the set so far: prompts drawn / prompts in the set."""
        return self.drawn / len(self._set)

    def most_in_a_step(self, groups: int) -> int:
        """Return how many prompts a step of ``groups`` groups may draw; more would repeat some of them."""
        return self.prompts

    def take(self, n: int) -> list[Prompt]:
        """Return the next n prompts, with n distinct ids. Raises DataError if the set has fewer than n."""
        if n > len(self._set):
            raise DataError(
                f"{n} prompts were requested at once, but the set has {len(self._set)}; "
                "request fewer or add prompt files"
            )
        returned: list[set[int]] = [set() for _ in self._cursors]
        taken = []
        for _ in range(n):
            _, number = min(
                ((cursor.drawn + 1) / cursor.file.weight, number)
                for number, cursor in enumerate(self._cursors)
                if len(returned[number]) < cursor.file.count
            )
            cursor = self._cursors[number]
            row = cursor.draw(returned[number])
            returned[number].add(row)
            taken.append(self._set.prompts[cursor.file.start + row])
        return taken

    def peek(self, n: int) -> list[Prompt]:
        """Return the next n prompts without advancing; their first k are the result of take(k) for any k <= n."""
        before = self.state()
        prompts = self.take(n)
        self.restore(before)
        return prompts

    def state(self) -> dict[str, Any]:
        """Return the position as JSON-compatible data: a few numbers per file, and the skipped rows (rarely any)."""
        return {
            "seed": self._seed,
            "shuffle": self._shuffle,
            "files": [
                {
                    "name": cursor.file.name,
                    "count": cursor.file.count,
                    "weight": cursor.file.weight,
                    "drawn": cursor.drawn,
                    "skipped": list(cursor.skipped),
                }
                for cursor in self._cursors
            ],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the position of ``state``, which `state` returned in this run or an earlier one.

        Raises:
            DataError: If the files, the seed or the shuffling differ, or without ``accept_changes`` the numbers of
                prompts or weights: some prompts would be drawn twice and others never. The cursor is unchanged.
        """
        current = self.state()
        for key, setting in (("seed", "run.seed"), ("shuffle", "data.shuffle")):
            if state[key] != current[key]:
                raise DataError(
                    f"{setting}={current[key]}: the checkpoint has {state[key]}; restore that value or start a new run"
                )
        saved_names, names = ([file["name"] for file in files] for files in (state["files"], current["files"]))
        if saved_names != names:
            raise DataError(
                f"data.train: the files are {', '.join(names)}, but {', '.join(saved_names)} in the checkpoint; "
                "restore the list or start a new run"
            )
        for saved, file in zip(state["files"], current["files"], strict=True):
            for key, quantity in (("count", "number of prompts"), ("weight", "weight")):
                if saved[key] != file[key] and not self._accept_changes:
                    raise DataError(
                        f"data.train: the {quantity} of {file['name']} is {file[key]}, but {saved[key]} in the "
                        "checkpoint; restore the file and its settings or start a new run"
                    )
        for cursor, saved in zip(self._cursors, state["files"], strict=True):
            cursor.restore(saved["drawn"], saved["skipped"] if saved["count"] == cursor.file.count else [])


class _FileCursor:
    """Position in one file: how many prompts were drawn, and which rows of the current epoch were skipped.

    The first drawn % count + len(skipped) entries of the epoch's order have been drawn or skipped.
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

    def draw(self, returned: set[int]) -> int:
        """Return the next row that is not in ``returned``, the rows of this call, which are not yet the whole file.

        The current epoch always has such a row. The rows drawn in this epoch and the rows not yet drawn make up the
        file. A row not yet drawn is in ``returned`` only if the epoch started in this call; then the rows drawn in the
        epoch are in ``returned`` too, and if all the others were, ``returned`` would be the whole file.
        """
        row = self._skipped_row(returned)
        if row is None:
            row = self._row_ahead(returned)
        self.drawn += 1
        if self.drawn % self.file.count == 0:
            self._order = self._order_of(self.drawn // self.file.count)
        return row

    def _skipped_row(self, returned: set[int]) -> int | None:
        for index, row in enumerate(self.skipped):
            if row not in returned:
                return self.skipped.pop(index)
        return None

    def _row_ahead(self, returned: set[int]) -> int:
        position = self.drawn % self.file.count + len(self.skipped)
        while (row := int(self._order[position])) in returned:
            self.skipped.append(row)
            position += 1
        return row

    def _order_of(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self.file.count)
        name = int.from_bytes(hashlib.sha256(self.file.name.encode()).digest()[:8], "little")
        bits = np.random.Philox(np.random.SeedSequence([self._seed, name, epoch]))
        return np.argsort(bits.random_raw(self.file.count), kind="stable")
