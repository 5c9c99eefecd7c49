"""Records what the tokens of a few responses of each step did: chooses them, gathers their values, writes the file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_rlvr.data.tokenizer import Tokenizer
from megatron_rlvr.distributed.collectives import gather, gather_on_first
from megatron_rlvr.recording.choice import Candidate, choose
from megatron_rlvr.recording.files import RecordedResponse, write_recorded
from megatron_rlvr.recording.token_texts import TokenTexts
from megatron_rlvr.recording.tokens import TokenRecorder, TokenValues
from megatron_rlvr.types import Completion, Grade, Group, Prompt

_LEAST = 2
"""Responses that are recorded of any step: a correct and an incorrect one, as a rule."""


@dataclass(frozen=True)
class _Sampled:
    """A chosen response as it was sampled and graded."""

    group: int
    prompt: Prompt
    completion: Completion
    grade: Grade


class RolloutRecorder:
    """Writes the recorded responses of a run, at most so many a step."""

    def __init__(
        self,
        folder: Path,
        count: int,
        tokenizer: Tokenizer,
        data_objects: dist.ProcessGroup,
        *,
        share: float = 1.0,
        is_main: bool,
    ) -> None:
        """Create a recorder.

        Args:
            folder: Run folder.
            count: Most responses of a step; 0 records none.
            tokenizer: Tokenizer of the responses.
            data_objects: Data-parallel ranks of this rank, by a back end that carries Python objects.
            share: Most responses of a step as a share of all that it trains on, if these are more than two.
            is_main: True on the rank that writes, which is the first of its data-parallel ranks.
        """
        self._folder, self._count, self._share, self._tokenizer = folder, count, share, tokenizer
        self._data_objects, self._is_main = data_objects, is_main
        self._texts: TokenTexts | None = None
        self._group_size = 0
        """That of the step."""

    def choose(self, groups: Sequence[tuple[int, Group]], group_size: int) -> TokenRecorder | None:
        """Choose responses of a step; None if none are recorded. A collective over the data-parallel ranks.

        Args:
            groups: (index in the batch of all ranks, group) for each group of this rank.
            group_size: `MiniBatch.group_size`, by which training sequences are numbered.
        """
        if not self._count:
            return None
        self._group_size = group_size
        here = [
            Candidate(
                number=order * self._group_size + i,
                group=order,
                correct=grade.correct,
                truncated=completion.finish_reason == "length",
                oldest_version=int(completion.weight_versions.min()),
            )
            for order, group in groups
            for i, (completion, grade) in enumerate(zip(group.completions, group.grades, strict=True))
        ]
        candidates = [c for part in gather(here, self._data_objects) for c in part]
        chosen = choose(candidates, min(self._count, max(_LEAST, int(self._share * len(candidates)))))
        return TokenRecorder(chosen) if chosen else None

    def write(self, step: int, groups: Sequence[tuple[int, Group]], tokens: TokenRecorder) -> None:
        """Write what the learner has taken of the chosen responses. A collective over the data-parallel ranks.

        Args:
            step: Number of the training step.
            groups: As for `choose`.
            tokens: The recorder that `choose` returned.
        """
        sampled = {
            order * self._group_size + i: _Sampled(order, group.prompt, group.completions[i], group.grades[i])
            for order, group in groups
            for i in range(len(group.completions))
            if order * self._group_size + i in tokens.numbers
        }
        parts = gather_on_first((sampled, tokens.values), self._data_objects)
        if not self._is_main:
            return
        known = {number: response for part, _ in parts for number, response in part.items()}
        values = {number: value for _, part in parts for number, value in part.items()}
        write_recorded(self._folder, step, [self._response(step, known[n], values[n]) for n in sorted(known)])

    def _response(self, step: int, sampled: _Sampled, values: TokenValues) -> RecordedResponse:
        if self._texts is None:
            self._texts = TokenTexts(self._tokenizer)
        completion, grade, prompt = sampled.completion, sampled.grade, sampled.prompt
        return RecordedResponse(
            step=step,
            group=sampled.group,
            index=completion.index,
            prompt_id=prompt.id,
            prompt="".join(self._texts(prompt.token_ids)),
            answer=prompt.answer,
            read_answer=grade.answer,
            correct=grade.correct,
            reward=grade.reward,
            advantage=values.advantage,
            failure=grade.failure,
            finish_reason=completion.finish_reason,
            prompt_ids=prompt.token_ids,
            token_ids=completion.token_ids,
            texts=self._texts(completion.token_ids),
            weight_versions=completion.weight_versions,
            rollout_logp=completion.logprobs.astype(np.float32),
            old_logp=values.old_logp,
            new_logp=values.new_logp,
            entropy=values.entropy,
            selected=values.selected,
            alternative_ids=values.alternative_ids,
            alternative_texts=[self._texts.one(int(i)) for i in values.alternative_ids.ravel()],
            alternative_logp=values.alternative_logp,
        )
