"""Problems that reasoning-gym generates, as rows of a prompt file.

    data.train: [{path: "reasoning_gym:chain_sum", size: 5000, seed: 1, min_terms: 2}]

``size`` and ``seed`` are those of reasoning-gym, as are all other options of the data set. The same options give the
same problems. The source of a row is the path, by which its reward function knows the scorer.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_rlvr.data.rows import DataError
from megatron_rlvr.reward_spec import GYM_PREFIX

MAX_SIZE = 10**6
_DEFAULT_SIZE = 500


def gym_rows(path: str, options: Mapping[str, Any]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield ("problem", number from 1, row) of a data set of reasoning-gym.

    Args:
        path: "reasoning_gym:NAME".
        options: Options of the data set.

    Raises:
        DataError: reasoning-gym is not installed, or the name or an option cannot be used.
    """
    size = options.get("size", _DEFAULT_SIZE)
    if type(size) is not int or not 1 <= size <= MAX_SIZE:
        raise DataError(f"{path}: size={size!r:.60} is not an int from 1 to {MAX_SIZE}; correct it")
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(
            f"{path}: the package reasoning-gym cannot be imported ({error}); pip install reasoning-gym"
        ) from None
    name = path.removeprefix(GYM_PREFIX)
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        remedy = f"did you mean {GYM_PREFIX}{near[0]}?" if near else "its documentation lists them"
        raise DataError(f"{path}: reasoning-gym has no data set of this name; {remedy}")
    try:
        problems = reasoning_gym.create_dataset(name, **{"seed": 0, **options, "size": size})
    except Exception as error:  # its data sets check their options by assert and otherwise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(f"{path}: options {dict(options)!r:.200} cannot be used ({reason}); correct them") from error
    for number in range(size):
        entry = problems[number]
        answer = entry["answer"]
        row = {"question": entry["question"], "source": path, "metadata": entry["metadata"]}
        row["answer"] = answer if isinstance(answer, str) and answer.strip() else repr(answer)
        if row["answer"] != answer:
            row["raw_answer"] = answer
        yield "problem", number + 1, row
