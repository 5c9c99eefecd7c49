"""Responses that are analysed: those that a run has recorded, those of an evaluation, or those of a file."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rlvr.analysis.runs import read_runs
from megatron_rlvr.data.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from megatron_rlvr.errors import InputError
from megatron_rlvr.hf.files import read_config
from megatron_rlvr.input_files import BadFileError, decode, is_file, parse_json, read_lines
from megatron_rlvr.recording.files import read_recorded, recorded_files
from megatron_rlvr.recording.token_texts import INCOMPLETE, TokenTexts

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class SourceError(InputError):
    """Responses that cannot be read, or lack what an analysis needs."""


@dataclass(frozen=True)
class Response:
    """A response of T tokens.

    Attributes:
        prompt_ids: [P] int32.
        token_ids: [T] int32, T >= 1.
        step: Training step that it was sampled in; None if it is not of a run.
        entropy: [T] float32 nats, as recorded; None if they are not known.
        advantage: Advantage of every token; None if it is not known.
    """

    prompt_ids: np.ndarray
    token_ids: np.ndarray
    step: int | None = None
    entropy: np.ndarray | None = None
    advantage: float | None = None


@dataclass(frozen=True)
class Source:
    """Responses of one origin.

    Attributes:
        responses: The responses.
        temperature: Temperature that they were sampled at, of whose distributions entropies are.
        text_of: Text of a token id.
        notes: {name: number} that a reader of the results should know.
    """

    responses: list[Response]
    temperature: float
    text_of: Callable[[int], str]
    notes: dict[str, int] = field(default_factory=dict)

    @cached_property
    def tokens(self) -> int:
        """Number of tokens of all responses."""
        return sum(len(response.token_ids) for response in self.responses)


def read_source(path: Path, model: Path | None, count: int | None) -> Source:
    """Read responses.

    Args:
        path: Folder of a run with recorded responses, folder of an evaluation, or a file of lines
            {"prompt": text, "response": text, "advantage": number if known}.
        model: Hugging Face folder whose tokenizer encodes texts; None if no model scores the responses.
        count: Number of responses, spread evenly over all; None for all.

    Raises: SourceError, RecordingError, RecordsError, SettingsError, DataError if they cannot be read.
    """
    from megatron_rlvr.evaluation.folder import DESCRIPTION

    if recorded_files(path):
        source = _of_run(path, needs_temperature=model is not None)
    elif model is None and (is_file(path) or is_file(path / DESCRIPTION)):
        raise SourceError(f"{path}: responses without recorded entropies; give --model, which scores them")
    elif is_file(path / DESCRIPTION):
        assert model is not None
        source = _of_evaluation(path, model)
    elif is_file(path):
        assert model is not None
        source = _of_file(path, load_tokenizer(model))
    else:
        raise SourceError(
            f"{path} has no recorded responses (rollouts/step_N.parquet) and is no evaluation (evaluation.json) or "
            "file of responses; set log.rollouts above 0, or give another"
        )
    responses = [response for response in source.responses if len(response.token_ids)]
    if not responses:
        raise SourceError(f"{path}: no response has a token; give another folder or file")
    if count is not None and count < len(responses):
        responses = [responses[i * len(responses) // count] for i in range(count)]
    return Source(responses, source.temperature, source.text_of, source.notes)


def check_tokens(source: Source, models: Sequence[Path]) -> None:
    """Raise SourceError if the token ids of the responses mean other texts to a model, or nothing.

    A model whose folder has no tokenizer is only known by the size of its vocabulary.
    """
    prompts = np.unique(np.concatenate([response.prompt_ids for response in source.responses]))
    ids = np.unique(np.concatenate([response.token_ids for response in source.responses]))
    last = max(int(ids[-1]), *prompts[-1:].tolist())
    for model in dict.fromkeys(models):
        vocabulary = read_config(model).get("vocab_size")
        if type(vocabulary) is int and last >= vocabulary:
            raise SourceError(
                f"{model}: the responses have the token id {last}, and its vocabulary is of {vocabulary} tokens; give "
                "a model with the tokenizer that they were sampled with"
            )
        try:
            texts = TokenTexts(load_tokenizer(model))
        except TokenizerError:
            continue
        for token in ids.tolist():
            here, there = source.text_of(token), texts.one(token)
            # A part of a character has the text that its neighbours give it.
            if here and INCOMPLETE not in here + there and here != there:
                raise SourceError(
                    f"{model}: token {token} of the responses is {here[:20]!r}, and {there[:20]!r} in its tokenizer; "
                    "give a model with the tokenizer that they were sampled with"
                )


def _of_run(run: Path, *, needs_temperature: bool) -> Source:
    texts: dict[int, str] = {}
    responses = []
    for recorded in read_recorded(run):
        ids, first = np.unique(recorded.token_ids, return_index=True)
        for token, place in zip(ids.tolist(), first.tolist(), strict=True):
            texts.setdefault(token, recorded.texts[place])
        responses.append(
            Response(recorded.prompt_ids, recorded.token_ids, recorded.step, recorded.entropy, recorded.advantage)
        )
    settings = read_runs([run])[0].settings
    if settings is None and needs_temperature:
        raise SourceError(f"{run}/config.yaml cannot be read, which has rollout.temperature; restore the file")
    return Source(responses, 1.0 if settings is None else settings.rollout.temperature, texts.__getitem__)


def _of_evaluation(folder: Path, model: Path) -> Source:
    from megatron_rlvr.algo.advantage import group_advantages
    from megatron_rlvr.config.loading import validate
    from megatron_rlvr.evaluation.folder import read_description, records_of
    from megatron_rlvr.evaluation.records import by_problem, read_responses
    from megatron_rlvr.startup.resolve import evaluation_sets

    description = read_description(folder)
    records = records_of(folder, description)
    prompts, sampling = dict(description["prompts"]), description["sampling"]
    clock, tokenizer_path = prompts.pop("clock", None), prompts.pop("tokenizer", None)
    keys = ("path", "prompt_key", "answer_key", "id_key", "options")
    sets = [
        {"name": name} | {key: each[key] for key in keys if each.get(key) is not None}
        for name, each in description["sets"].items()
    ]
    settings = validate(
        {
            "run": {"dir": str(folder), "steps": 1},
            "model": {"path": str(model), "tokenizer": tokenizer_path},
            "data": {"train": ["-"], **prompts},
            "evaluate": {"sets": sets},
        }
    )
    tokenizer = load_tokenizer(settings.model.tokenizer or model)
    now = None if clock is None else datetime.fromisoformat(clock)
    problems = {
        prompt.id: prompt
        for prompt_set in evaluation_sets(settings, tokenizer, now, show_progress=False).values()
        for prompt in prompt_set.prompts
    }
    advantages = {
        record.key: float(advantage)
        for group in by_problem(records).values()
        for record, advantage in zip(
            group, group_advantages(np.array([record.reward for record in group]), "grpo"), strict=True
        )
    }
    responses, others = [], 0
    for record, text in read_responses(folder):
        prompt = problems.get(record.problem)
        if prompt is None or prompt.answer != record.gold:
            raise SourceError(f"{folder}: {record.problem} is not in the file of its set any more; restore the file")
        ids = np.array(tokenizer.encode(text), dtype=np.int32)
        others += len(ids) != record.tokens - (not record.truncated)  # the stop token is not in the text
        responses.append(Response(prompt.token_ids, ids, advantage=advantages[record.key]))
    plain = "two_temperatures" in sampling or not sampling["temperature"]
    return Source(
        responses,
        1.0 if plain else float(sampling["temperature"]),
        TokenTexts(tokenizer).one,
        {"responses whose text has another number of tokens than was sampled": others},
    )


def _of_file(path: Path, tokenizer: Tokenizer) -> Source:
    responses = []
    try:
        for number, line in read_lines(path):
            row = parse_json(decode(line)) if line.strip() else None
            if row is None:
                continue
            if problem := _problem(row):
                raise BadFileError(problem, number)
            prompt, response = (np.array(tokenizer.encode(row[key]), dtype=np.int32) for key in ("prompt", "response"))
            if not len(prompt):
                raise BadFileError("an empty prompt", number)
            responses.append(Response(prompt, response, advantage=row.get("advantage")))
    except BadFileError as error:
        where = f"{path}, line {error.line}" if error.line else str(path)
        raise SourceError(
            f'{where}: {error}; each line is {{"prompt": TEXT, "response": TEXT, "advantage": NUMBER if known}}'
        ) from None
    return Source(responses, 1.0, TokenTexts(tokenizer).one)


def _problem(row: Any) -> str | None:
    if not isinstance(row, dict):
        return "no JSON object"
    if "problem" in row and "prompt" not in row:
        return "a record of an evaluation, which has no prompt; give the folder of the evaluation"
    if not all(isinstance(row.get(key), str) for key in ("prompt", "response")):
        return "no text as prompt or response"
    if any(_LONE_SURROGATE.search(row[key]) for key in ("prompt", "response")):
        return "half of a character (a surrogate) in its prompt or response"
    advantage = row.get("advantage")
    if advantage is not None and not (type(advantage) in (int, float) and abs(advantage) < 1e30):
        return "an advantage that is no number"
    return None


def blocks_of(responses: Sequence[Response], tokens: int) -> Iterator[list[int]]:
    """Yield indices of responses that together have about so many tokens, prompts included."""
    block: list[int] = []
    size = 0
    for number, response in enumerate(responses):
        block.append(number)
        size += len(response.prompt_ids) + len(response.token_ids)
        if size >= tokens:
            yield block
            block, size = [], 0
    if block:
        yield block
