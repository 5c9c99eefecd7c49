"""The plan in words: as ``--check`` prints it before a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from resolving import Resolve

from megatron_rlvr.config.describe import describe_mask, describe_ratio
from megatron_rlvr.config.loading import load_settings, validate
from megatron_rlvr.startup import describe
from megatron_rlvr.startup.describe import describe_plan

WITNESS = """
import atexit, os, sys

def note():
    distributed = sys.modules.get("torch.distributed")
    started = distributed is not None and distributed.is_initialized()
    open(os.environ["WITNESS"], "w").write(f"process group {started}, megatron {'megatron' in sys.modules}")

atexit.register(note)
"""


def test_check_prints_the_plan_and_starts_nothing(write_config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITNESS)
    config = write_config(
        data={"max_prompt_tokens": 16},
        parallel={"tensor": 2, "pipeline": 2, "sequence": True},
        rollout={"max_response_tokens": 100},
        reward={"overlong_buffer": 40},
        optimizer={"learning_rate": 1e-6, "warmup_steps": 10},
        run={"steps": 200},
    )
    done = tiny.run_train(
        config, "--check", "--selection.fraction=0.1", cwd=tmp_path, search=[tmp_path],
        variables={"WORLD_SIZE": "64", "WITNESS": str(tmp_path / "witness")}, fresh=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    settings, words, prompt = done.stdout.split("\n\n")
    assert yaml.safe_load(settings)["selection"]["fraction"] == 0.1
    assert yaml.safe_load(settings)["parallel"]["pipeline"] == 2
    (tmp_path / "printed.yaml").write_text(settings, encoding="utf-8")
    assert load_settings(tmp_path / "printed.yaml") == load_settings(config, ["--selection.fraction=0.1"])
    plan = dict(line.split(maxsplit=1) for line in words.splitlines())
    assert plan["ranks"] == "64 = tensor 2 x pipeline 2 x data 16 with sequence parallel"
    assert plan["mask"] == (
        "the policy gradient touches the 10 % of response tokens with the highest entropy, of a mini-batch over all "
        "ranks, by the entropies of the policy before the update"
    )
    dropped = _prompts_over(tmp_path / "config.yaml", 16)
    assert 0 < dropped < 16
    assert plan["prompts"] == f"{20 - dropped} from 1 file(s), {dropped} left out as too long"
    assert plan["loss"] == (
        "clip 0.8 .. 1.28, sum over the selected tokens / all response tokens of the mini-batch; advantages grpo"
    )
    assert plan["reward"] == "math: correct 1, incorrect -1, overlong penalty over the last 40 tokens"
    # By hand: 2 layers and two tables of 320 x 32 of a Qwen3 of this shape, 4 bytes a weight and gradient, 8 of Adam.
    assert plan["memory"].startswith("39,104 parameters; 0.00 GB a rank for weights, gradients and Adam's state")
    first, *_, last = prompt.splitlines()
    assert first.startswith("prompt      additions/")
    assert first.endswith("tokens, as the model reads it; the response begins at its end:")
    assert last == "            a response ends with '<|end|>', or after 100 tokens"
    assert plan["optimizer"].endswith("on 2 prompts each, Adam, learning rate 1e-06 after 10 warm-up steps")
    assert plan["evaluation"] == "none"
    assert (tmp_path / "witness").read_text() == "process group False, megatron False"
    assert not (tmp_path / "run").exists()


def _prompts_over(config: Path, limit: int) -> int:
    """Number of problems with more tokens than ``limit``, counted with the tokenizers library."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(load_settings(config).model.path) / "tokenizer.json"))
    return sum(len(tokenizer.encode(text).ids) > limit for text, _ in tiny.PROBLEMS)


def test_help_ends_with_status_0(tmp_path: Path) -> None:
    done = tiny.run_train("--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: rlvr train")
    assert "--selection.fraction" in done.stdout


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ({}, "the 20 % of response tokens with the highest entropy, of a mini-batch over all ranks, by the entropies "
             "of the policy before the update"),
        ({"keep": "bottom", "fraction": 0.5, "scope": "rollout_batch"},
         "the 50 % of response tokens with the lowest entropy, of the whole rollout over all ranks, by the entropies "
         "of the policy before the update"),
        ({"keep": "random", "fraction": 0.125}, "the 12.5 % of response tokens drawn at random, of a mini-batch over "
                                                "all ranks"),
        ({"scope": "micro_batch", "entropy": "current"}, "the 20 % of response tokens with the highest entropy, of "
         "each micro-batch on its own, by the entropies of the policy being trained"),
        ({"keep": "all"}, "all response tokens"),
    ],
)  # fmt: skip
def test_the_mask_in_words(selection: dict[str, Any], words: str) -> None:
    settings = validate(tiny.settings_for(Path("model"), Path("train.jsonl"), Path("run"), selection=selection))
    assert describe_mask(settings) == f"the policy gradient touches {words}"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "clip 0.8 .. 1.28"),
        ({"objective": "gspo"}, "gspo, clip of sequence ratios 0.9997 .. 1.0004"),
        ({"objective": "cispo"}, "cispo, weight at most 5"),
        ({"rollout_correction": "tis"}, "clip 0.8 .. 1.28, times policy / engine probability truncated at 2 (tis)"),
        (
            {"objective": "cispo", "rollout_correction": "mis", "correction_cap": 2.5},
            "cispo, weight at most 5, times policy / engine probability 0 beyond 1/2.5 .. 2.5 (mis)",
        ),
    ],
)
def test_the_loss_in_words(values: dict[str, Any], words: str) -> None:
    settings = validate(tiny.settings_for(Path("model"), Path("train.jsonl"), Path("run"), loss=values))
    assert describe_ratio(settings) == words


def test_the_plan_names_what_differs_from_the_paper(resolve_with: Resolve, problems: Path) -> None:
    plan = describe_plan(
        resolve_with(
            loss={"normalizer": "selected_tokens"},
            rollout={"dynamic_sampling": False, "max_rounds": 10},
            evaluate={"sets": {"path": str(problems), "name": "adds"}, "group_size": 3},
            run={"eval_every": 5},
        )
    )
    assert "/ the number of selected tokens of the mini-batch" in plan
    assert "no dynamic sampling" in plan
    assert "adds (20 problems, 20 OF THEM TRAINED ON) x 3 completions, before and after, every 5 steps" in plan


def test_the_plan_counts_problems_that_are_evaluated_and_trained_on(
    resolve_with: Resolve, problems: Path, tmp_path: Path
) -> None:
    rows = problems.read_text(encoding="utf-8").splitlines()[:3]
    rows[1] = json.dumps({"question": "What is 1 + 1?", "answer": "#### 2"})
    for number, (kept, words) in enumerate(((rows, "3 problems, 2 OF THEM TRAINED ON"), (rows[1:2], "1 problems"))):
        held_out = tmp_path / f"held_out_{number}.jsonl"
        held_out.write_text("\n".join(kept), encoding="utf-8")
        plan = describe_plan(resolve_with(evaluate={"sets": str(held_out), "group_size": 3}))
        assert f"held_out_{number} ({words}) x 3" in plan


def test_the_plan_says_how_much_memory_a_rank_holds(resolve_with: Resolve) -> None:
    """Expectations are computed by hand for 39,104 float32 weights; 2 x 2 x 2 x 8 floats are cached."""
    sections: dict[str, Any] = {"rollout": {"max_batch_tokens": 10**9}}
    plan = describe_plan(resolve_with(2, megatron={"use_distributed_optimizer": True}, **sections))
    (line,) = [line for line in plan.splitlines() if line.startswith("memory")]
    cache = 10**9 * 2 * 2 * (2 * 8) * 4 / 1e9
    assert f"up to {cache:.2f} GB for its KV cache (rollout.max_batch_tokens=1000000000)" in line


def test_the_plan_says_what_confines_solutions(resolve_with: Resolve, monkeypatch: pytest.MonkeyPatch) -> None:
    def line(*found: str) -> str:
        monkeypatch.setattr(describe, "confinement", lambda: list(found))
        plan = describe_plan(resolve_with(reward={"function": "code(seconds=5)"}))
        (only,) = [each for each in plan.splitlines() if each.startswith("code")]
        return only

    assert "without the network, processes of their own, files, and within limits" in line("landlock", "seccomp")
    assert "does not prevent" not in line("landlock", "seccomp")
    assert "they READ AND REMOVE FILES: run in a container" in line("seccomp")
    assert "they START PROCESSES, READ AND REMOVE FILES" in line("namespace")
    assert "they OPEN SOCKETS, START PROCESSES, READ AND REMOVE FILES" in line()
