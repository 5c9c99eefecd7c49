"""Whole runs on a tiny scale: a random Qwen3, a tokenizer trained on the problems, settings, and the command.

The problems are literals in this file, so that nothing outside the checkout is read. A random model of 2 layers gives
no correct answer: the math grader gives -1, and responses differ only in their length and characters.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import zygote
from zygote import CHECKOUT

# Variables that torchrun and Slurm set, and that a user's own shell does not have.
MEASURED = ("time/", "memory/", "rollout/tokens_per_second")
"""Beginnings of the names of metrics that measure this machine, and differ between equal runs."""
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|start|>", "<|end|>"]

_NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve")
_ITEMS = ("apples", "books", "coins", "pens")

PROBLEMS: list[tuple[str, int]] = [
    (f"{name} has {3 + i} {item} and buys {2 * j + 1} more. How many {item} does {name} have?", 4 + i + 2 * j)
    for i, name in enumerate(_NAMES)
    for j, item in enumerate(_ITEMS)
]
"""20 problems, each different, with their answers."""


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write JSON lines or parquet, by the extension."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_gsm8k(path: Path) -> Path:
    """Write the problems in GSM8K's format: question, and an answer that ends in `#### n`."""
    rows = [
        {"question": text, "answer": f"Both numbers are added: <<{n - 1}+1={n}>>{n}.\n#### {n}"} for text, n in PROBLEMS
    ]
    return write_rows(path, rows)


def write_aime(path: Path) -> Path:
    """Write the problems in AIME's format: problem and answer, among columns that are ignored."""
    rows = [
        {"id": 60 + i, "problem": text, "solution": f"It is $\\boxed{{{n}}}$.", "answer": str(n), "url": "none"}
        for i, (text, n) in enumerate(PROBLEMS)
    ]
    return write_rows(path, rows)


def write_verl(path: Path) -> Path:
    """Write the problems in verl's format: chat messages, a nested gold answer, a nested index."""
    rows = [
        {
            "data_source": "additions",
            "prompt": [{"role": "user", "content": text}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(n), "style": "rule"},
            "extra_info": {"index": f"row-{i}"},
        }
        for i, (text, n) in enumerate(PROBLEMS)
    ]
    return write_rows(path, rows)


def write_tokenizer(folder: Path, *, chat_template: str | None = None) -> None:
    """Write a byte-level BPE tokenizer of 320 tokens: <|pad|> 0, <|start|> 1, <|end|> 2 (eos)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for text, _ in PROBLEMS], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_sentencepiece(path: Path) -> Path:
    """Write a sentencepiece model such as Llama's, of 310 pieces: <unk> 0, <s> 1, </s> 2 (eos), bytes, pairs."""
    import sentencepiece

    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text for text, _ in PROBLEMS]),
            model_writer=file,
            model_type="bpe",
            vocab_size=310,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )
    return path


def model_config(**changes: Any) -> dict[str, Any]:
    """config.json of the tiny model, as a dictionary."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_sliding_window": False,
        "vocab_size": 320,
        "eos_token_id": 2,
        "dtype": "float32",
    } | changes


def write_model(folder: Path, *, chat_template: str | None = None, experts: bool = False, **changes: Any) -> Path:
    """Write a Hugging Face folder: random Qwen3 weights (fp32), config.json with ``changes``, the tokenizer.

    With ``experts`` the model is a Qwen3-MoE with four experts and top-2 routing.

    The weights are 10 times larger than transformers draws them, so that entropies differ between tokens.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(initializer_range=0.2, **changes)
    torch.manual_seed(0)
    if experts:
        config |= {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
        config |= {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**config)).save_pretrained(folder)
    else:
        Qwen3ForCausalLM(Qwen3Config(**config)).save_pretrained(folder)
    write_tokenizer(folder, chat_template=chat_template)
    return folder


def settings_for(model: Path, train: Any, folder: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run of 2 steps of 4 prompts x 4 completions of 16 tokens; ``sections`` are merged over them."""
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder), "steps": 2},
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": str(train) if isinstance(train, Path) else train, "max_prompt_tokens": 128},
        "rollout": {"group_size": 4, "max_response_tokens": 16, "max_rounds": 2},
        "reward": {"overlong_buffer": 0, "workers": 1, "timeout_seconds": 60.0},
        "batch": {"prompts": 4, "mini_batch_prompts": 2, "tokens_per_micro_batch": 512},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 0},
        "log": {"tensorboard": False, "rollouts": 4},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return values


def write_settings(path: Path, values: dict[str, Any]) -> Path:
    """Write settings as JSON, which is YAML."""
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return path


REWARDS = '''\
"""A user's reward functions, which distinguish the responses of a random model."""

import time


def even(prompt, response):
    return len(response) % 2 == 0


def slow(prompt, response):
    time.sleep(0.2)
    return len(response) % 2 == 0
'''


def command(*arguments: str | Path, ranks: int = 0) -> list[str]:
    """The command line of a run: under torchrun with ``ranks`` processes, or without a launcher (0)."""
    start = ["-m", "megatron_rlvr.train"]
    if ranks:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *start]
    return [sys.executable, *start, *map(str, arguments)]


def environment(search: Sequence[Path] = (), **variables: str) -> dict[str, str]:
    """The environment of a user who has the checkout (and ``search``) on PYTHONPATH and no launcher around them."""
    inherited = {key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES}
    path = os.pathsep.join(map(str, filter(None, [*search, CHECKOUT, inherited.get("PYTHONPATH")])))
    return {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


def unmeasured(variables: dict[str, str]) -> dict[str, str]:
    """An environment in which a process does not write the lines that it ran, for its disk is to be full."""
    return {key: value for key, value in variables.items() if not key.startswith("COVERAGE_")}


def start_train(
    *arguments: str | Path, cwd: Path, ranks: int, stdout: Any, stderr: Any = None, search: Sequence[Path] = ()
) -> "zygote.Process | psutil.Popen":
    """Start the program in a session of its own: forked, or under torchrun with ``ranks`` processes.

    Without ``stderr``, its errors are written to ``stdout`` as well.
    """
    words, env, errors = command(*arguments, ranks=ranks), environment(search), stderr or stdout
    if not ranks:
        return zygote.start(words, cwd=cwd, env=env, stdout=stdout, stderr=errors)
    return psutil.Popen(words, cwd=cwd, env=env, stdout=stdout, stderr=errors, start_new_session=True)


def run_train(
    *arguments: str | Path,
    cwd: Path,
    ranks: int = 0,
    search: Sequence[Path] = (),
    variables: dict[str, str] | None = None,
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run the program to its end.

    Its processes are forked, and there is no launcher, unless ``fresh``: then the start itself is what a test is about.
    """
    env = environment(search, **(variables or {}))
    if not fresh:
        return zygote.run(command(*arguments), cwd=cwd, env=env, ranks=ranks)
    return subprocess.run(
        command(*arguments, ranks=ranks), cwd=cwd, env=env, capture_output=True, text=True, timeout=400, check=False
    )
