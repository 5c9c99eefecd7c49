"""Groups of a collector in the form in which a checkpoint holds them: JSON-compatible data and NumPy arrays.

A prompt is saved by its id and a digest. When a run resumes, it is looked up in the run's prompt files, which are the
same ones. If the user has accepted other files, groups of prompts that have changed or are gone are discarded: their
completions answer, and their grades judge, something else.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_rlvr.rollout.group_buffer import FinishedGroup, GroupInProgress
from megatron_rlvr.rollout.informative_rate import InformativeRate
from megatron_rlvr.types import Completion, Grade, Group, Prompt

logger = logging.getLogger(__name__)


def saved_form(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `Collector.state` as nested dicts and lists of plain values and arrays."""
    finished: dict[int, FinishedGroup] = {id(group): group for group in (*state["ready"], *state["unreported"])}
    number = {key: place for place, key in enumerate(finished)}
    rate: InformativeRate = state["rate"]
    return {
        "cursor": state["cursor"],
        "so_far": state.get("so_far"),
        "rate": [float(rate.informative), float(rate.finished)],
        "finished": [_save_finished(group) for group in finished.values()],
        "ready": [number[id(group)] for group in state["ready"]],
        "unreported": [number[id(group)] for group in state["unreported"]],
        "in_progress": [_save_in_progress(group) for group in state["in_progress"]],
    }


def restored_form(saved: Mapping[str, Any], prompts: Iterable[Prompt]) -> dict[str, Any]:
    """Return the `Collector.state` of a `saved_form`.

    Args:
        saved: Saved form of this run or an earlier one.
        prompts: All prompts of the run.
    """
    digests = {each["prompt"]: each["digest"] for each in (*saved["finished"], *saved["in_progress"])}
    same = {prompt.id: prompt for prompt in prompts if prompt.id in digests and _digest(prompt) == digests[prompt.id]}
    if changed := len(digests.keys() - same.keys()):
        logger.warning("sampled groups of %d prompts are discarded, as the prompts have changed", changed)
    finished = [_restore_finished(each, same) if each["prompt"] in same else None for each in saved["finished"]]

    def those(numbers: Sequence[int]) -> list[FinishedGroup]:
        return [group for group in map(finished.__getitem__, numbers) if group is not None]

    return {
        "cursor": saved["cursor"],
        "so_far": saved.get("so_far"),
        "rate": InformativeRate(*saved["rate"]),
        "ready": those(saved["ready"]),
        "unreported": those(saved["unreported"]),
        "in_progress": [_restore_in_progress(each, same) for each in saved["in_progress"] if each["prompt"] in same],
    }


def _save_finished(finished: FinishedGroup) -> dict[str, Any]:
    group = finished.group
    return {
        "order": finished.order,
        **_save_prompt(group.prompt),
        "completions": [_save_completion(completion) for completion in group.completions],
        "grades": [_save_grade(grade) for grade in group.grades],
        "left_out": group.left_out,
    }


def _restore_finished(saved: Mapping[str, Any], prompts: Mapping[str, Prompt]) -> FinishedGroup:
    prompt = prompts[saved["prompt"]]
    completions = [_restore_completion(each, prompt) for each in saved["completions"]]
    grades = [_restore_grade(*each) for each in saved["grades"]]
    return FinishedGroup(saved["order"], Group(prompt, completions, grades, saved.get("left_out", 0)))


def _save_in_progress(group: GroupInProgress) -> dict[str, Any]:
    return {
        "order": group.order,
        **_save_prompt(group.prompt),
        "size": group.size,
        "graded": [[_save_completion(completion), _save_grade(grade)] for completion, grade in group.graded.values()],
        "partial": [_save_completion(completion) for completion in group.partial.values()],
    }


def _restore_in_progress(saved: Mapping[str, Any], prompts: Mapping[str, Prompt]) -> GroupInProgress:
    prompt = prompts[saved["prompt"]]
    graded = [(_restore_completion(each, prompt), _restore_grade(*grade)) for each, grade in saved["graded"]]
    partial = [_restore_completion(each, prompt) for each in saved["partial"]]
    return GroupInProgress(
        saved["order"],
        prompt,
        saved["size"],
        graded={completion.index: (completion, grade) for completion, grade in graded},
        partial={completion.index: completion for completion in partial},
    )


def _save_completion(completion: Completion) -> dict[str, Any]:
    return {
        "index": completion.index,
        "finish_reason": completion.finish_reason,
        "token_ids": completion.token_ids,
        "logprobs": completion.logprobs,
        "weight_versions": completion.weight_versions,
    }


def _restore_completion(saved: Mapping[str, Any], prompt: Prompt) -> Completion:
    return Completion(prompt_id=prompt.id, **saved)


def _save_grade(grade: Grade) -> list[Any]:
    answer = None if grade.answer is None else str(grade.answer)
    return [float(grade.score), bool(grade.correct), grade.failure, float(grade.penalty), dict(grade.parts), answer]


def _restore_grade(
    score: float,
    correct: bool,
    failure: str | None,
    penalty: float = 0.0,
    parts: Mapping[str, float] | None = None,
    answer: str | None = None,
) -> Grade:
    """Return a grade; those of earlier versions have no penalty, which was part of the score, no parts, no answer."""
    return Grade(score, correct, failure, answer, penalty, parts or {})


def _save_prompt(prompt: Prompt) -> dict[str, str]:
    return {"prompt": prompt.id, "digest": _digest(prompt)}


def _digest(prompt: Prompt) -> str:
    content = repr((prompt.answer, prompt.source, sorted(prompt.extra.items()))).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(prompt.token_ids.tobytes() + content, digest_size=16).hexdigest()
