"""What a training step has to do: how many responses, how long, in which micro-batches.

Nobody knows the lengths of responses beforehand. Given their mean m and their cap M they are taken to have the density
that says nothing else (the one of greatest entropy on 0 .. M): proportional to e^(-rate x), a long tail where m is far
below M. Everything that depends on lengths uses this one assumption.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from megatron_rlvr.config import ParallelSettings, Settings
from megatron_rlvr.planner.memory import MicroBatches

# Where the user does not say: shares of the caps.
MEAN_RESPONSE_SHARE = 0.4
MEAN_PROMPT_SHARE = 0.125
_POINTS = 100


@dataclass(frozen=True)
class Lengths:
    """Tokens of responses: their mean and their cap."""

    mean: float
    cap: int

    @cached_property
    def _rate(self) -> float:
        """Of the density, times the cap: the u with 1/u - 1/(e^u - 1) = mean / cap."""
        low, high = -700.0, 700.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if _mean_share(middle) > self.mean / self.cap else (low, middle)
        return low

    def survival(self, tokens: float) -> float:
        """Share of the responses that are longer."""
        u, share = self._rate, min(max(tokens / self.cap, 0.0), 1.0)
        if abs(u) < 1e-6:
            return 1.0 - share
        return math.expm1(-u * (1 - share)) / math.expm1(-u) * math.exp(-u * share)

    @property
    def points(self) -> list[tuple[float, float]]:
        """(tokens, how many tokens it stands for): where a sum over all lengths looks."""
        width = self.cap / _POINTS
        return [((i + 0.5) * width, width) for i in range(_POINTS)]

    @cached_property
    def mean_square(self) -> float:
        return sum(2 * x * self.survival(x) * width for x, width in self.points)


@dataclass(frozen=True)
class Workload:
    """One training step.

    Attributes:
        prompts, samples: groups that are trained on, and responses of each.
        mini_batch_prompts: groups an optimizer step.
        prompt, prompt_cap: tokens of a prompt, on average and at most.
        responses: their lengths.
        budget: `batch.tokens_per_micro_batch`.
        fraction: of the response tokens that have a gradient.
        old_entropies: whether the mask is known before the training pass.
        informative: share of the sampled groups that are trained on (dynamic sampling replaces the others).
        inflight: requests that a server gets at once, at most; None: as many as its cache holds.
        overlap: whether the next batch is sampled while this one trains.
    """

    prompts: int
    samples: int
    mini_batch_prompts: int
    prompt: float
    prompt_cap: int
    responses: Lengths
    budget: int
    fraction: float
    old_entropies: bool
    informative: float = 1.0
    inflight: int | None = None
    overlap: bool = False

    @classmethod
    def of(
        cls, settings: Settings, mean_response: float, mean_prompt: float, informative: float, inflight: int | None
    ) -> "Workload":
        """From a run's settings and what they cannot say."""
        selection = settings.selection
        return cls(
            prompts=settings.batch.prompts,
            samples=settings.rollout.group_size,
            mini_batch_prompts=settings.batch.mini_batch_prompts,
            prompt=mean_prompt,
            prompt_cap=settings.data.max_prompt_tokens,
            responses=Lengths(mean_response, settings.rollout.max_response_tokens),
            budget=settings.batch.tokens_per_micro_batch,
            fraction=selection.fraction,
            old_entropies=selection.entropy == "old",
            informative=informative,
            inflight=inflight,
            overlap=settings.rollout.overlap == "one_step",
        )

    @property
    def sequence(self) -> float:
        """Tokens of a sequence on average."""
        return self.prompt + self.responses.mean

    @property
    def sequence_square(self) -> float:
        """Mean of the square of a sequence's length."""
        return self.prompt**2 + 2 * self.prompt * self.responses.mean + self.responses.mean_square

    @property
    def longest(self) -> int:
        return self.prompt_cap + self.responses.cap

    @property
    def trained(self) -> int:
        """Responses that are trained on in a step."""
        return self.prompts * self.samples

    @property
    def mini_batches(self) -> int:
        return self.prompts // self.mini_batch_prompts

    def sequences(self, replicas: int) -> float:
        """Sequences of one optimizer step on the replica with the most."""
        return max(1.0, self.mini_batch_prompts * self.samples / replicas)

    def micro_batches(self, parallel: ParallelSettings, replicas: int) -> MicroBatches:
        """How an optimizer step's share of a replica is cut; the longest micro-batch is full, or one long sequence."""
        sequences = self.sequences(replicas)
        number = math.ceil(sequences * self.sequence / max(self.budget, self.sequence) - 1e-9)
        if parallel.virtual_pipeline > 1:
            number += -number % parallel.pipeline
        tokens = max(self.budget, self.longest)
        # As if all of it were responses, and as many selected as elsewhere.
        return MicroBatches(tokens=tokens, longest=self.longest, rows=round(self.fraction * tokens), number=number)


def _mean_share(u: float) -> float:
    """Mean of the density e^(-u x) on 0 .. 1."""
    if abs(u) < 1e-4:
        return 0.5 - u / 12
    return 1 / u - (1 / math.expm1(u) if u < 700 else 0.0)
