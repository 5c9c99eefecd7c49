"""Accuracy on held-out problems: the ranks sample a part of them each, everyone learns the result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_rlvr.config import EvaluateSettings
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.rollout.sampler import Sampler, requests_for
from megatron_rlvr.types import CompletionRequest, Prompt


@dataclass(frozen=True)
class EvaluationSampling:
    """The sampling of an evaluation, with the cap on responses of training."""

    temperature: float
    top_p: float
    max_response_tokens: int


class Evaluator:
    """Evaluates named problem sets with the engine's current weights.

    Accuracy is the mean over all samples of all problems (avg@k); pass@k counts the problems with any right sample.
    The random streams are the same each time, so that two evaluations differ by the weights alone.
    """

    def __init__(
        self,
        sampler: Sampler,
        ranks: Ranks,
        settings: EvaluateSettings,
        sets: dict[str, Sequence[Prompt]],
        *,
        max_response_tokens: int,
        seed: int,
    ) -> None:
        self._sampler = sampler
        self._ranks = ranks
        self._settings = settings
        self._sets = sets
        self._sampling = EvaluationSampling(settings.temperature, settings.top_p, max_response_tokens)
        self._seed = seed

    def __bool__(self) -> bool:
        return bool(self._sets)

    def run(self, on_finished: Callable[[int], None] = lambda count: None) -> dict[str, float]:
        """`eval/<set>/accuracy`, `eval/<set>/pass_at_<k>` and lengths; a collective over the world."""
        metrics: dict[str, float] = {}
        for name, prompts in self._sets.items():
            metrics |= {f"eval/{name}/{key}": value for key, value in self._one(prompts, on_finished).items()}
        return metrics

    def requests_of_this_rank(self) -> int:
        """How many completions `run` will sample on this rank."""
        return sum(len(self._requests(prompts)) for prompts in self._sets.values())

    def _requests(self, prompts: Sequence[Prompt]) -> Sequence[CompletionRequest]:
        """Those of this rank."""
        ranks, samples = self._ranks, self._settings.samples
        requests = [r for prompt in prompts for r in requests_for(prompt, samples, self._seed, "evaluate")]
        return self._sampler.part_of(requests[ranks.data_rank :: ranks.data_size], ranks)

    def _one(self, prompts: Sequence[Prompt], on_finished: Callable[[int], None]) -> dict[str, float]:
        samples = self._settings.samples
        graded = self._sampler.run(self._requests(prompts), self._sampling, on_finished=on_finished)
        verdicts = [(c.prompt_id, mark.correct, len(c.token_ids), c.finish_reason == "length") for c, mark in graded]
        parts: list[list[tuple[str, bool, int, bool]]] = [[] for _ in range(self._ranks.world_size)]
        dist.all_gather_object(parts, verdicts)
        everyone = [verdict for part in parts for verdict in part]
        return {
            "accuracy": sum(correct for _, correct, _, _ in everyone) / len(everyone),
            f"pass_at_{samples}": len({i for i, correct, _, _ in everyone if correct}) / len(prompts),
            "response_tokens_mean": sum(tokens for _, _, tokens, _ in everyone) / len(everyone),
            "truncated_fraction": sum(truncated for _, _, _, truncated in everyone) / len(everyone),
        }
