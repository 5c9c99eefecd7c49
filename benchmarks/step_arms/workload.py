"""Common workload of both arms: sizes, prompts, reward, hyperparameters, and a stopwatch. Imports no torch.

No response ends before its cap, since the stop token lies outside the model's vocabulary, so both arms sample exactly
the same number of tokens. The reward depends on token ids and is 1 for half of each group, so every response has an
advantage and none can be left out.
"""

import random
import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FRACTION = 0.2
LEARNING_RATE = 1e-4
CLIP_LOW, CLIP_HIGH, CLIP_GRAD = 0.2, 0.28, 1.0
BETA2, EPSILON = 0.999, 1e-8
# Optimizer steps per rollout, each on one half of the responses: with a single one TRL scores nothing beforehand.
UPDATES = 2
PAD = 0
PROMPT_TOKENS = (24, 40)


@dataclass(frozen=True)
class Case:
    """A rollout of ``prompts`` x ``samples`` responses of ``response`` tokens each, by a Qwen3 of this shape."""

    prompts: int
    samples: int
    response: int
    hidden: int
    vocabulary: int
    layers: int = 4

    @property
    def stop(self) -> int:
        """A token id that the model cannot sample."""
        return self.vocabulary

    def __str__(self) -> str:
        return (
            f"{self.prompts} prompts x {self.samples} samples x {self.response:,} tokens, {self.layers} layers of "
            f"{self.hidden}, vocabulary {self.vocabulary:,}"
        )


CASES = {
    "tiny": Case(2, 4, 8, 64, 128, layers=1),
    "short": Case(16, 8, 64, 128, 512),
    "medium": Case(4, 8, 512, 128, 512),
    "long": Case(1, 4, 2048, 256, 32_768),
}


def write_model(case: Case, folder: Path) -> None:
    """A random Qwen3 and a tokenizer of which token n is the word "n"."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=3 * case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 32,
        num_key_value_heads=case.hidden // 64,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=0.1,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({str(n): n for n in range(case.vocabulary + 1)}, unk_token=str(PAD)))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=str(PAD), eos_token=str(case.stop), padding_side="left"
    )
    tokenizer.save_pretrained(folder)


def prompts_of(case: Case) -> list[list[int]]:
    """Token ids of the prompts of every step; their lengths differ, as those of real ones do."""
    source = random.Random(0)
    return [
        [source.randrange(1, case.vocabulary) for _ in range(source.randint(*PROMPT_TOKENS))]
        for _ in range(case.prompts)
    ]


def half_right(group: Sequence[Sequence[int]]) -> list[float]:
    """Rewards of a group of responses, 1.0 for the half whose token ids have the larger sums."""
    order = sorted(range(len(group)), key=lambda i: (sum(group[i]), i))
    right = set(order[len(group) // 2 :])
    return [float(i in right) for i in range(len(group))]


class Stopwatch:
    """Seconds of process time by phase, added up until they are taken."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self._seconds[phase] += time.process_time() - start

    def take(self) -> dict[str, float]:
        """Return {phase: seconds} since the last call."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds


def resident_mb() -> float:
    """Return the peak memory of this process in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
