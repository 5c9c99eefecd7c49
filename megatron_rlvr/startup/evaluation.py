"""Inputs of an evaluation: settings with the files that they name, and the description of what its metrics depend on.

A run evaluates as a part of training; `rlvr evaluate` reads the same sections of the settings for a model that it is
given. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_rlvr.config import EvaluationFileSettings, Settings, SettingsError, names_of
from megatron_rlvr.data.prompts import PromptSet
from megatron_rlvr.data.template import PromptTemplate
from megatron_rlvr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_rlvr.engines.sglang.api_key import key_of
from megatron_rlvr.evaluation.folder import REGRADING
from megatron_rlvr.hf.files import read_config
from megatron_rlvr.reward_spec import GYM_PREFIX, FunctionSetting
from megatron_rlvr.startup.layout_checks import check_lengths
from megatron_rlvr.startup.resolve import (
    Resolved,
    check_config,
    evaluation_sets,
    find_answer_after,
    holds_turns,
    opens_thinking,
)
from megatron_rlvr.startup.stop_tokens import StopToken, find_stop_tokens


@dataclass(frozen=True)
class ResolvedEvaluation:
    """Settings of an evaluation with the content of the files that they name; see `startup.resolve.Resolved`.

    Attributes:
        settings: Settings; `model.path` has the configuration and the tokenizer.
        evaluation: {name of the set: its prompts}.
    """

    settings: Settings
    hf_config: Mapping[str, Any]
    tokenizer: Tokenizer
    stop_tokens: tuple[StopToken, ...]
    answer_after: str | None
    evaluation: Mapping[str, PromptSet]
    now: datetime | None

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids of `stop_tokens`."""
        return tuple(token.id for token in self.stop_tokens)


def resolve_evaluation(settings: Settings, clock: datetime | None, *, show_progress: bool) -> ResolvedEvaluation:
    """Read and check the model folder without its weights, the tokenizer and the problem sets.

    Args:
        clock: Moment that a chat template sees which reads the clock; None for the clock itself.

    Raises:
        InputError: One sentence.
    """
    hf_config = read_config(settings.model.path)
    check_config(settings.model.path, hf_config)
    check_lengths(settings, hf_config)
    key_of(settings.rollout)
    tokenizer = load_tokenizer(settings.model.tokenizer or settings.model.path)
    if tokenizer.vocab_size > hf_config["vocab_size"]:
        raise SettingsError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than vocab_size {hf_config['vocab_size']} of "
            f"{settings.model.path}; set model.tokenizer to the model's own"
        )
    template = PromptTemplate(tokenizer, settings.data.template, variables=settings.data.template_kwargs)
    now = (clock or datetime.now()) if template.reads_clock else None
    sets = evaluation_sets(settings, tokenizer, now, show_progress=show_progress)
    first = next(iter(sets.values()))
    turn = template.end_of_turn()
    stop = find_stop_tokens(
        settings, hf_config, tokenizer, turn, in_use=template.chat or any(holds_turns(s, turn) for s in sets.values())
    )
    after = find_answer_after(settings.reward, tokenizer, first)
    return ResolvedEvaluation(settings, hf_config, tokenizer, stop, after, sets, now)


def describe_evaluation(resolved: Resolved | ResolvedEvaluation) -> dict[str, Any]:
    """Return the description of an evaluation (`evaluation/folder.py`), in which the target is the model's path."""
    s, sets = resolved.settings, list(resolved.evaluation.values())
    prompts = s.data.model_dump(include={"template", "template_kwargs", "system", "suffix", "max_prompt_tokens"})
    clock = {} if resolved.now is None else {"clock": resolved.now.isoformat()}
    return {
        "target": {"path": str(Path(s.model.path).resolve()), "dtype": s.model.dtype},
        "prompts": {**prompts, "tokenizer": s.model.tokenizer, **clock},
        "sampling": {
            **s.evaluate.model_dump(include={"group_size", "temperature", "top_p"}),
            "max_response_tokens": s.rollout.max_response_tokens,
            "stop_token_ids": list(resolved.stop_token_ids),
            "seed": s.run.seed,
            "engine": s.rollout.engine,
        },
        "reward": {
            **s.reward.model_dump(include={"function", "correct", "incorrect"}),
            "answer_after": resolved.answer_after,
        },
        "sets": {
            name: _describe_set(file, resolved.evaluation[name], s.reward.function)
            for file, name in zip(s.evaluate.sets, names_of(s.evaluate.sets), strict=True)
        },
        REGRADING: {
            "pass_at": s.evaluate.pass_at,
            "opens_thinking": bool(sets) and opens_thinking(resolved.tokenizer, sets[0]),
        },
    }


def _describe_set(file: EvaluationFileSettings, prompts: PromptSet, reward: FunctionSetting) -> dict[str, Any]:
    (read,) = prompts.files
    unread = {"other columns"} if reward == "math" else set()  # only a user's own function reads them
    return {
        "path": file.path if file.path.startswith(GYM_PREFIX) else str(Path(file.path).resolve()),
        **({"options": file.options} if file.options else {}),
        **file.model_dump(include={"prompt_key", "answer_key", "id_key"}),
        "problems": len(prompts),
        "too_long": read.dropped_too_long,
        "digests": {part: digest for part, digest in read.digests.items() if part not in unread},
    }
