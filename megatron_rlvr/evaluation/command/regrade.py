"""Grading the recorded responses of an evaluation again, with the same or another reward, without sampling."""

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rlvr.config import RewardSettings, Settings, SettingsError
from megatron_rlvr.config.loading import parse_flags, validate
from megatron_rlvr.data.records import RecordFile
from megatron_rlvr.evaluation.command.lease import lease_of
from megatron_rlvr.evaluation.command.results import publish
from megatron_rlvr.evaluation.folder import (
    REGRADING,
    Regrading,
    check_folder,
    read_description,
    records_of,
    write_description,
)
from megatron_rlvr.evaluation.majority import majorities, same_answers
from megatron_rlvr.evaluation.records import Record, RecordsError, RecordWriter, read_records, read_responses
from megatron_rlvr.evaluation.summary import summarize_sets
from megatron_rlvr.input_files import same_place
from megatron_rlvr.reward.final_answer import THINK_CLOSE
from megatron_rlvr.reward.graders import GraderPool, Verdict, grade
from megatron_rlvr.signals import Stopped
from megatron_rlvr.types import Prompt

_IN_FLIGHT = 64
_TEXT_AFTER, _FUNCTION = "answer_after", "function"


def regrade(source: Path, out: Path, flags: Sequence[str], *, as_json: bool) -> None:
    """Grade the responses recorded in ``source``, and write records and metrics to ``out``.

    Args:
        source: Folder of an evaluation.
        out: Folder to write, or to resume.
        flags: Flags ``--reward.KEY VALUE`` that win over the reward of the evaluation.
        as_json: Print JSON instead of a table.

    Raises:
        RlvrError: If there are no records, the sets have changed, or ``out`` holds something else.
        Stopped: After what was graded before a signal has been recorded and reported.
    """
    before = read_description(source)
    recorded = Regrading.model_validate(before.get(REGRADING, {}))
    settings, answer_after = _settings(before["reward"], recorded, flags, out)
    reward = settings.reward
    own = reward.model_dump(include={"function", "correct", "incorrect"}) | {_TEXT_AFTER: answer_after}
    description = {**before, "reward": own, "regraded_from": str(same_place(source))}
    if same_place(source) == same_place(out):
        raise RecordsError(f"--out {out}: holds the records to grade again; choose another folder")
    check_folder(out, description)
    verdicts = {record.key: record.correct for record in records_of(source, before)}
    prompts = _prompts(before["sets"])
    stopped = None
    graders = GraderPool(
        reward.function, workers=reward.workers, timeout_seconds=reward.timeout_seconds, answer_after=answer_after
    )
    with lease_of(settings.run), graders:
        check_folder(out, description)
        write_description(out, description)
        try:
            _grade(source, out, prompts, graders, reward)
        except Stopped as signal:
            stopped = signal
        records = read_records(out)
        summaries = summarize_sets(
            records,
            {name: each["problems"] for name, each in before["sets"].items()},
            group_size=before["sampling"]["group_size"],
            pass_at=recorded.pass_at,
            majority=majorities(records, same_answers(reward, graders, answer_after)),
            names_answers=reward.function == "math",
        )
        changed = sum(verdicts.get(record.key) != record.correct for record in records)
        found = {"verdicts": [f"{changed:,} of {len(records):,} have changed"]}
        publish(out, summaries, found, rate=None, as_json=as_json)
    if stopped is not None:
        raise stopped


def _grade(source: Path, out: Path, prompts: Mapping[str, Prompt], graders: GraderPool, reward: RewardSettings) -> None:
    """Grade and record what is not recorded yet; if it is interrupted, what the graders have is recorded first."""
    done = {record.key for record in read_records(out)}
    waiting: deque[tuple[Record, str, Future[Verdict]]] = deque()
    with RecordWriter(out, 0) as writer:

        def take() -> None:
            record, response, verdict = waiting.popleft()
            writer.write(_regraded(record, verdict.result(), reward), response)

        try:
            for record, response in read_responses(source):
                if record.key not in done:
                    waiting.append((record, response, graders.submit(_prompt_of(record, prompts), response)))
                while len(waiting) > _IN_FLIGHT:
                    take()
        finally:
            while waiting:
                take()


def _settings(
    before: Mapping[str, Any], recorded: Regrading, flags: Sequence[str], out: Path
) -> tuple[Settings, str | None]:
    """Return settings with the reward, and the text after which answers begin.

    That text is the recorded one, unless a flag sets it or the recorded function read no answers: `reward.answer_after`
    then decides, with auto by the recorded prompts. Raises SettingsError.

    Args:
        before: Section `reward` of the description.
        recorded: Section `regrading` of the description.
        flags: Flags ``--reward.KEY VALUE``.
        out: Folder to write.
    """
    given: dict[str, Any] = {}
    for key, value in parse_flags(list(flags)):
        section, _, name = key.partition(".")
        if section != "reward" or name not in RewardSettings.model_fields or name == "overlong_buffer":
            raise SettingsError(f"--{key}: no setting of a reward; --regrade reads --reward.function and its like only")
        given[name] = value
    run = {"dir": str(out), "steps": 1}
    reward = {key: value for key, value in before.items() if key != _TEXT_AFTER} | given
    settings = validate({"run": run, "model": {"path": "-"}, "data": {"train": ["-"]}, "reward": reward})
    after = settings.reward.answer_after
    if after == "none" or not _reads_answers(settings.reward):
        return settings, None
    if _TEXT_AFTER not in given and _reads_answers(settings.reward.model_copy(update={_FUNCTION: before[_FUNCTION]})):
        return settings, before[_TEXT_AFTER]
    if after != "auto":
        return settings, after
    if recorded.opens_thinking is None:
        raise SettingsError(
            f"reward.answer_after=auto: the evaluation does not record whether its prompts open a thinking section; "
            f"set it to none, or to the text that ends one, such as {THINK_CLOSE}"
        )
    return settings, THINK_CLOSE if recorded.opens_thinking else None


def _reads_answers(reward: RewardSettings) -> bool:
    return any(call.reads_answers for call in reward.functions.all)


def _prompts(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, Prompt]:
    """Return {id: problem} of all sets, without tokens."""
    found = {}
    for name, each in sets.items():
        keys = {key: each[key] for key in ("prompt_key", "answer_key", "id_key")}
        for row in RecordFile(each["path"], name=name, **keys, settings="evaluate.sets", options=each.get("options")):
            found[row.id] = Prompt(row.id, np.zeros(0, np.int32), row.answer, row.source, row.extra, row.question)
    return found


def _prompt_of(record: Record, prompts: Mapping[str, Prompt]) -> Prompt:
    prompt = prompts.get(record.problem)
    if prompt is None or prompt.answer != record.gold:
        raise RecordsError(
            f"{record.problem}: the set's file has changed since the evaluation, and does not have this problem with "
            "its gold answer; restore the file"
        )
    return prompt


def _regraded(record: Record, verdict: Verdict, reward: RewardSettings) -> Record:
    found = grade(
        verdict,
        record.tokens,
        correct=reward.correct,
        incorrect=reward.incorrect,
        max_response_tokens=record.tokens,
        overlong_buffer=0,
    )
    return replace(record, answer=found.answer, correct=found.correct, reward=found.reward, failure=found.failure)
