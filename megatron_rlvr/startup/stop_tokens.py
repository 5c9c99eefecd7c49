"""The tokens that end a response: the same in every engine, and each with the reason why it does.

A response ends where the model ends its turn. Its files say so in several places that need not agree: the chat template
in use, the eos of the tokenizer, and those of config.json and generation_config.json, which may be lists. All of them
count, and so do the tokens of `rollout.stop`.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlvr.config import Settings, SettingsError
from megatron_rlvr.config.yaml_format import shown
from megatron_rlvr.data.template import EndOfTurn
from megatron_rlvr.data.tokenizer import Tokenizer
from megatron_rlvr.hf.families import ModelError
from megatron_rlvr.input_files import read_json_object

logger = logging.getLogger(__name__)

_GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class StopToken:
    """Token that ends a response, and is its last token.

    Attributes:
        text: The token as text.
        reasons: Places that name it, in words.
    """

    id: int
    text: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.text!r} ({self.id}): {', '.join(self.reasons)}"


def find_stop_tokens(
    settings: Settings,
    hf_config: Mapping[str, Any],
    tokenizer: Tokenizer,
    turn: EndOfTurn | None,
    *,
    in_use: bool,
) -> tuple[StopToken, ...]:
    """Return the tokens that end a response, by ascending id.

    Args:
        hf_config: config.json of the model.
        turn: What the chat template writes after an answer.
        in_use: Whether the prompts are in the form of the chat template.

    Raises:
        ModelError: If an eos of the model is no token of its vocabulary.
        SettingsError: If an entry of `rollout.stop` is not one token.
    """
    reasons: dict[int, list[str]] = {}
    if in_use and turn is not None and turn.token_id is not None:
        reasons[turn.token_id] = ["the end of turn of the chat template"]
    reasons.setdefault(tokenizer.eos_token_id, []).append("eos of the tokenizer")
    generation = _generation_config(Path(settings.model.path))
    for file, token in _eos_tokens(Path(settings.model.path), hf_config, generation):
        reasons.setdefault(token, []).append(f"eos of {file}")
    for token in _stop_strings(generation, tokenizer):
        reasons.setdefault(token, []).append(f"stop_strings of {_GENERATION_CONFIG}")
    for entry in settings.rollout.stop:
        reasons.setdefault(_own_token(entry, tokenizer, hf_config["vocab_size"]), []).append("rollout.stop")
    known = range(tokenizer.vocab_size)  # the model's vocabulary may be padded
    return tuple(
        StopToken(token, tokenizer.token_text(token) if token in known else "", tuple(dict.fromkeys(why)))
        for token, why in sorted(reasons.items())
    )


def _generation_config(folder: Path) -> Mapping[str, Any]:
    path = folder / _GENERATION_CONFIG
    return read_json_object(path, ModelError, "copy the model's own, or remove it") if path.exists() else {}


def _stop_strings(generation: Mapping[str, Any], tokenizer: Tokenizer) -> Iterator[int]:
    """Yield the id of every stop string that is one token; a warning names the others, which end no response."""
    value = generation.get("stop_strings") or []
    for text in value if isinstance(value, list) else [value]:
        token = tokenizer.token_id(text) if isinstance(text, str) else None
        if token is not None:
            yield token
        else:
            logger.warning(
                "stop_strings of %s holds %s, which is not one token, and ends no response; rollout.stop takes tokens",
                *(_GENERATION_CONFIG, shown(text)),
            )


def _eos_tokens(folder: Path, hf_config: Mapping[str, Any], generation: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield (name of the file, id) of every eos of a model folder."""
    files = {"config.json": hf_config, _GENERATION_CONFIG: generation}
    for file, content in files.items():
        value = content.get("eos_token_id")
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if type(token) is not int or not 0 <= token < hf_config["vocab_size"]:
                raise ModelError(
                    f"eos_token_id {token!r} of {folder} is no token of its vocabulary of {hf_config['vocab_size']}; "
                    "correct config.json or generation_config.json"
                )
            yield file, token


def _own_token(entry: str | int, tokenizer: Tokenizer, vocab_size: int) -> int:
    """Return the id of an entry of `rollout.stop`."""
    if isinstance(entry, str):
        token = tokenizer.token_id(entry)
        if token is None:
            raise SettingsError(
                f"rollout.stop={shown(entry)}: not one token of the tokenizer; give the text or the id of one token"
            )
        return token
    if not 0 <= entry < vocab_size:
        raise SettingsError(
            f"rollout.stop={entry}: no token of the model's vocabulary of {vocab_size}; give the id of one"
        )
    return entry
