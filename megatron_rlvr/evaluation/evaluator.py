"""Accuracy on held-out problems: each rank samples a share of the completions, and every rank receives the metrics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_rlvr.config import EvaluateSettings
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.rollout.sampler import Sampler, requests_for
from megatron_rlvr.types import CompletionRequest, Prompt


@dataclass(frozen=True)
class EvaluationSampling:
    """Sampling parameters of an evaluation; responses are truncated at the same length as in training."""

    temperature: float
    top_p: float
    max_response_tokens: int


class Evaluator:
    """Evaluates named problem sets with the engine's current weights.

    Accuracy is the mean over all completions of all problems (avg@k); pass@k is the share of problems with at least one
    correct completion. The random streams are the same in each evaluation, so that two of them differ by the weights
    alone.

    Args:
        sampler: Sampler of this rank.
        ranks: Place of this rank.
        settings: Settings of the evaluation.
        sets: {name: problems}; may be empty, and the evaluator is then false.
        max_response_tokens: Length at which a response is truncated.
        seed: Seed of the run.
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
        """Evaluate all sets. A collective over the world.

        Args:
            on_finished: Called with 1 for each completion that this rank has sampled.

        Returns: for each set, `eval/<set>/` followed by accuracy, pass_at_<k>, response_tokens_mean and
            truncated_fraction; the same on every rank.
        """
        metrics: dict[str, float] = {}
        for name, prompts in self._sets.items():
            metrics |= {f"eval/{name}/{key}": value for key, value in self._metrics(prompts, on_finished).items()}
        return metrics

    def requests_of_this_rank(self) -> int:
        """Return the number of completions that `run` will sample on this rank."""
        return sum(len(self._requests(prompts)) for prompts in self._sets.values())

    def _requests(self, prompts: Sequence[Prompt]) -> Sequence[CompletionRequest]:
        """Return the requests of this rank."""
        ranks, size = self._ranks, self._settings.group_size
        requests = [r for prompt in prompts for r in requests_for(prompt, size, self._seed, "evaluate")]
        return self._sampler.share_of(requests[ranks.data_rank :: ranks.data_size], ranks)

    def _metrics(self, prompts: Sequence[Prompt], on_finished: Callable[[int], None]) -> dict[str, float]:
        """Evaluate one set. A collective over the world."""
        graded = self._sampler.run(self._requests(prompts), self._sampling, on_finished=on_finished)
        mine = [(c.prompt_id, grade.correct, len(c.token_ids), c.finish_reason == "length") for c, grade in graded]
        parts: list[list[tuple[str, bool, int, bool]]] = [[] for _ in range(self._ranks.world_size)]
        dist.all_gather_object(parts, mine)
        all_ranks = [completion for part in parts for completion in part]
        solved = {prompt_id for prompt_id, correct, _, _ in all_ranks if correct}
        return {
            "accuracy": sum(correct for _, correct, _, _ in all_ranks) / len(all_ranks),
            f"pass_at_{self._settings.group_size}": len(solved) / len(prompts),
            "response_tokens_mean": sum(tokens for _, _, tokens, _ in all_ranks) / len(all_ranks),
            "truncated_fraction": sum(truncated for _, _, _, truncated in all_ranks) / len(all_ranks),
        }
