"""Pass rates of a training step, from all ranks to the cursor that draws the next prompts (`data.difficulty`)."""

from dataclasses import replace

from megatron_rlvr.data.cursor import PromptCursor
from megatron_rlvr.data.difficulty import DifficultyCursor
from megatron_rlvr.distributed.collectives import gather
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.rollout.collector import Rollout


def remember(cursor: PromptCursor, step: int, rollout: Rollout, ranks: Ranks) -> Rollout:
    """Record the groups of a step in the cursor; return the rollout with the numbers of prompts by difficulty.

    A collective over the world with a `DifficultyCursor`; with any other cursor nothing is done.
    """
    if not isinstance(cursor, DifficultyCursor):
        return rollout
    here = [(group.prompt.id, group.correct_count, len(group.grades)) for group in rollout.sampled]
    cursor.record(step, [each for part in gather(here, ranks.data_objects) for each in part])
    return replace(rollout, metrics=rollout.metrics | cursor.metrics())
