"""Work of one training step: how many completions, how long, in which micro-batches.

The lengths of completions are not known beforehand. Given their mean m and their cap M, they are assumed to have the
distribution of greatest entropy on 0 .. M with that mean: a density proportional to e^(-rate x), with a long tail where
m is far below M. Everything that depends on lengths uses this one assumption.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from megatron_rlvr.config import ParallelSettings, Settings
from megatron_rlvr.planner.memory import MicroBatches

# Default means of the lengths, as shares of their caps.
MEAN_RESPONSE_SHARE = 0.4
MEAN_PROMPT_SHARE = 0.125
_POINTS = 100


@dataclass(frozen=True)
class ResponseLengths:
    """Distribution of the lengths of responses, in tokens.

    Attributes:
        mean: Mean length.
        cap: Maximum length.
    """

    mean: float
    cap: int

    @cached_property
    def _rate(self) -> float:
        """Rate of the density times the cap: the u with 1/u - 1/(e^u - 1) = mean / cap, by bisection."""
        low, high = -700.0, 700.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if _mean_share(middle) > self.mean / self.cap else (low, middle)
        return low

    def survival(self, tokens: float) -> float:
        """Return the share of the responses that are longer than ``tokens``."""
        u, share = self._rate, min(max(tokens / self.cap, 0.0), 1.0)
        if abs(u) < 1e-6:
            return 1.0 - share
        return math.expm1(-u * (1 - share)) / math.expm1(-u) * math.exp(-u * share)

    @property
    def points(self) -> list[tuple[float, float]]:
        """[(length, width)] of the intervals by which a sum over all lengths is approximated."""
        width = self.cap / _POINTS
        return [((i + 0.5) * width, width) for i in range(_POINTS)]

    @cached_property
    def mean_square(self) -> float:
        """Mean of the squared length."""
        return sum(2 * x * self.survival(x) * width for x, width in self.points)


@dataclass(frozen=True)
class Workload:
    """Work of one training step.

    Attributes:
        prompts: Number of groups trained on.
        group_size: Completions of each group.
        mini_batch_prompts: Groups of one optimizer step.
        mean_prompt: Mean number of tokens of a prompt.
        max_prompt: Maximum number of tokens of a prompt.
        responses: Lengths of the responses.
        micro_batch_tokens: Value of `batch.tokens_per_micro_batch`.
        fraction: Share of the response tokens with a gradient.
        old_entropies: True if the mask is known before the training pass (`selection.entropy: old`).
        informative_share: Share of the sampled groups that are trained on (dynamic sampling replaces the others).
        max_inflight: Maximum concurrent requests of a server; None for as many as its KV cache holds.
        overlap: True if the next batch is sampled while this one is trained on.
    """

    prompts: int
    group_size: int
    mini_batch_prompts: int
    mean_prompt: float
    max_prompt: int
    responses: ResponseLengths
    micro_batch_tokens: int
    fraction: float
    old_entropies: bool
    informative_share: float = 1.0
    max_inflight: int | None = None
    overlap: bool = False

    @classmethod
    def of(
        cls,
        settings: Settings,
        mean_response: float,
        mean_prompt: float,
        informative_share: float,
        max_inflight: int | None,
    ) -> "Workload":
        """Build the workload from a run's settings and the four values that settings do not contain."""
        selection = settings.selection
        return cls(
            prompts=settings.batch.prompts,
            group_size=settings.rollout.group_size,
            mini_batch_prompts=settings.batch.mini_batch_prompts,
            mean_prompt=mean_prompt,
            max_prompt=settings.data.max_prompt_tokens,
            responses=ResponseLengths(mean_response, settings.rollout.max_response_tokens),
            micro_batch_tokens=settings.batch.tokens_per_micro_batch,
            fraction=selection.largest_fraction,
            old_entropies=selection.entropy == "old",
            informative_share=informative_share,
            max_inflight=max_inflight,
            overlap=settings.rollout.overlap == "one_step",
        )

    @property
    def mean_sequence(self) -> float:
        """Mean number of tokens of a sequence."""
        return self.mean_prompt + self.responses.mean

    @property
    def mean_square_sequence(self) -> float:
        """Mean of the squared number of tokens of a sequence."""
        return self.mean_prompt**2 + 2 * self.mean_prompt * self.responses.mean + self.responses.mean_square

    @property
    def max_sequence(self) -> int:
        """Maximum number of tokens of a sequence."""
        return self.max_prompt + self.responses.cap

    @property
    def completions(self) -> int:
        """Completions trained on in a step."""
        return self.prompts * self.group_size

    @property
    def mini_batches(self) -> int:
        """Optimizer steps of a training step."""
        return self.prompts // self.mini_batch_prompts

    def sequences_per_replica(self, replicas: int) -> float:
        """Return the number of sequences of one optimizer step on the data-parallel replica with the most."""
        return max(1.0, self.mini_batch_prompts * self.group_size / replicas)

    def micro_batches(self, parallel: ParallelSettings, replicas: int) -> MicroBatches:
        """Pack one optimizer step's sequences of a replica; the longest micro-batch is full, or one long sequence."""
        sequences = self.sequences_per_replica(replicas)
        capacity = max(self.micro_batch_tokens, self.mean_sequence)
        count = math.ceil(sequences * self.mean_sequence / capacity - 1e-9)
        if parallel.virtual_pipeline > 1:
            count += -count % parallel.pipeline
        tokens = max(self.micro_batch_tokens, self.max_sequence)
        # The fullest case: all tokens are response tokens, and the selected share is as large as elsewhere.
        rows = round(self.fraction * tokens)
        return MicroBatches(tokens=tokens, longest_sequence=self.max_sequence, rows=rows, count=count)


def _mean_share(u: float) -> float:
    """Return the mean of the density e^(-u x) on 0 .. 1."""
    if abs(u) < 1e-4:
        return 0.5 - u / 12
    return 1 / u - (1 / math.expm1(u) if u < 700 else 0.0)
