"""Record of what a run reads besides its settings and weights, and the check that a resumed run reads the same.

The record is part of each checkpoint's manifest, and so of its identity:

    clock                  the moment that a chat template sees which reads the clock
    tokenizer, template    digests of the tokenizer's files and of its chat template
    stop_token_ids         the tokens that end a response
    data.train/NAME        for each file: number of prompts, and digests of ids, problems, answers, other columns, and
    evaluate.sets/NAME     of the token ids that they have become

A resumed run with other problems would continue at a position that means nothing in them, and ranks that read unlike
copies of a file would train on unlike batches. With `run.accept_changed_inputs` a run resumes nevertheless, and its
next checkpoint has the new record.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from megatron_rlvr.checkpoint.store import Checkpoint
from megatron_rlvr.config import Settings, SettingsError, names_of
from megatron_rlvr.data.prompts import PromptSet
from megatron_rlvr.data.tokenizer import Tokenizer, tokenizer_digest

logger = logging.getLogger(__name__)

_CLOCK, _TOKENIZER, _TEMPLATE, _STOP, _COUNT = "clock", "tokenizer", "template", "stop_token_ids", "count"


def inputs_of(
    settings: Settings,
    tokenizer: Tokenizer,
    train: PromptSet,
    evaluation: Mapping[str, PromptSet],
    stop_token_ids: Sequence[int],
    now: datetime | None,
) -> dict[str, Any]:
    """Return the record of a run, as JSON-compatible data."""
    sets = {"data.train": train, **{f"evaluate.sets/{name}": prompts for name, prompts in evaluation.items()}}
    files = {
        key if key.startswith("evaluate") else f"{key}/{file.name}": {_COUNT: file.count, **file.digests}
        for key, prompts in sets.items()
        for file in prompts.files
    }
    clock = {} if now is None else {_CLOCK: now.isoformat()}
    template = hashlib.blake2b((tokenizer.chat_template or "").encode(), digest_size=16).hexdigest()
    tokens = {_TOKENIZER: tokenizer_digest(_tokenizer_of(settings)), _TEMPLATE: template, _STOP: list(stop_token_ids)}
    return {**clock, **tokens, **files}


def recorded_inputs(start: Checkpoint | None) -> dict[str, Any]:
    """Return the record of the checkpoint ``start``; empty for a fresh run."""
    return {} if start is None else start.inputs()


def recorded_clock(recorded: Mapping[str, Any]) -> datetime | None:
    """Return the moment that the chat template saw when the run started; None if it did not read the clock."""
    return datetime.fromisoformat(recorded[_CLOCK]) if _CLOCK in recorded else None


def check_inputs(settings: Settings, recorded: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Raise SettingsError if a resumed run reads anything else than its checkpoint records.

    With `run.accept_changed_inputs`, log the differences instead.
    """
    for difference in differences(settings, recorded, inputs):
        changed = f"{difference} since the checkpoint in run.dir={settings.run.dir} was saved"
        if not settings.run.accept_changed_inputs:
            raise SettingsError(
                f"{changed}; restore what was there, set run.accept_changed_inputs=true to train on what is there now, "
                "or start a new run in another folder"
            )
        logger.warning("%s; accepted by run.accept_changed_inputs=true", changed)


def differences(settings: Settings, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two records, each as `key=value: problem`; the clock is not compared."""
    return list(_differences(settings, before, now))


def _differences(settings: Settings, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    named = f"model.{'path' if settings.model.tokenizer is None else 'tokenizer'}={_tokenizer_of(settings)}"
    for part, words in ((_TOKENIZER, "tokenizer"), (_TEMPLATE, "chat template")):
        if before.get(part, now[part]) != now[part]:
            yield f"{named}: the {words} has changed"
    paths = {
        f"{key}/{name}": f"{key}={file.path}"
        for key, files in (("data.train", settings.data.train), ("evaluate.sets", settings.evaluate.sets))
        for file, name in zip(files, names_of(files), strict=True)
    }
    for key, file in paths.items():
        then, found = before.get(key, {}), now.get(key, {})
        # Only a user's own reward function reads other columns.
        ignored = {"other columns"} if settings.reward.function == "math" else set()
        parts = [part for part in then if part in found and then[part] != found[part] and part not in ignored]
        if _COUNT in parts:
            yield f"{file}: the number of prompts has changed from {then[_COUNT]} to {found[_COUNT]}"
        elif parts == ["prompts"]:
            yield f"{file}: the tokenizer or its chat template has changed, so that the problems become other prompts"
        elif parts:
            yield f"{file}: {' and '.join(part for part in parts if part != 'prompts')} have changed"
    if before.get(_STOP, now[_STOP]) != now[_STOP]:
        yield (
            f"model.path={settings.model.path}: the tokens that end a response have changed from {before[_STOP]} to "
            f"{now[_STOP]}"
        )


def _tokenizer_of(settings: Settings) -> str:
    return settings.model.tokenizer or settings.model.path
