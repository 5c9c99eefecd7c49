"""Whole runs, as a user starts them: real data formats, a user's reward function, every selection, signals.

All runs start in the background, two at a time, when the first test needs one.
"""

import json
import math
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny

from megatron_rlvr.config.loading import load_settings

ALWAYS = {
    "step", "reward/mean", "reward/accuracy", "rollout/response_tokens_mean", "rollout/truncated_fraction",
    "rollout/groups_dropped", "train/skipped_steps", "time/rollout", "time/score", "time/train", "time/sync",
    "time/step",
}  # fmt: skip
WHEN_TRAINED = {
    "rollout/logprob_gap_mean", "selection/threshold", "selection/fraction", "selection/tokens", "entropy/mean",
    "entropy/selected_mean", "train/loss", "train/grad_norm", "train/clip_fraction",
}  # fmt: skip

PROMPTS, MINI_BATCHES = 4, 2  # as in tiny.settings_for


@dataclass(frozen=True)
class Run:
    """A run that has ended: its folder and its output."""

    folder: Path
    status: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl. NaN and infinity fail: Python reads them, but they are not JSON."""
        text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of training steps."""
        return [line for line in self.lines if line["step"] > 0]

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))

    def sampled(self, step: int) -> list[dict[str, Any]]:
        """The responses of a step in rollouts/."""
        text = (self.folder / "rollouts" / f"step_{step:06d}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


@dataclass(frozen=True)
class Ending:
    """The end of a run that was sent a signal, and the processes that remained."""

    run: Run
    seconds: float
    graders: int
    left_behind: list[str]


# Starting all runs --------------------------------------------------------------------------------------------------

# (signal, ranks under torchrun, True if it is sent to all processes as Ctrl-C in a terminal is)
STOPS = {
    "interrupted": (signal.SIGINT, 0, True),
    "terminated": (signal.SIGTERM, 0, False),
    "interrupted ranks": (signal.SIGINT, 2, True),
    "terminated ranks": (signal.SIGTERM, 2, False),
    "killed": (signal.SIGKILL, 0, False),
    "killed launcher": (signal.SIGKILL, 2, False),
}


@pytest.fixture(scope="module")
def background(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[dict[str, "Future[Any]"]]:
    """{name: future} of every run in this file."""
    place = tmp_path_factory.mktemp("runs")
    (place / "rewards.py").write_text(tiny.REWARDS, encoding="utf-8")
    pool = ThreadPoolExecutor(max_workers=2)
    yield _start_all(pool, place, model)
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def finished(background: dict[str, "Future[Any]"]) -> Callable[[str], Run]:
    """Waits for a run by its name, which must end by itself."""
    return lambda name: background[name].result()[name]


def _start_all(pool: ThreadPoolExecutor, place: Path, model: Path) -> dict[str, "Future[Any]"]:
    gsm8k, aime = tiny.write_gsm8k(place / "gsm8k.jsonl"), tiny.write_aime(place / "aime.jsonl")
    verl, pieces = tiny.write_verl(place / "verl.parquet"), tiny.write_sentencepiece(place / "pieces.model")
    chat = place / "chat_model"
    shutil.copytree(model, chat)
    tiny.write_tokenizer(chat, chat_template=tiny.TEMPLATE)

    def config(name: str, *, start: Path = model, train: Any = gsm8k, **sections: Any) -> Path:
        return tiny.write_settings(place / f"{name}.yaml", tiny.settings_for(start, train, place / name, **sections))

    def alone(name: str, *, ranks: int = 0, **sections: Any) -> "Future[dict[str, Run]]":
        return pool.submit(_run, name, config(name, **sections), place, ranks)

    # A random model never answers: with 0 for an incorrect answer, all rewards are 0.
    unrewarded, even = {"incorrect": 0.0}, {"function": "rewards:even"}
    evaluate = {"sets": [{"path": str(aime), "name": "held_out"}], "group_size": 2}
    runs: dict[str, Future[Any]] = {
        "gsm8k": alone("gsm8k", reward=unrewarded, evaluate=evaluate),
        "verl": alone("verl", ranks=2, start=chat, train=verl, reward=unrewarded, data={"suffix": " Box it."}),
        "aime": alone("aime", train=aime, reward=unrewarded, model={"tokenizer": str(pieces)}),
        "even": alone(
            "even", reward=even, evaluate=evaluate, run={"eval_every": 1, "export_every": 1}, log={"tensorboard": True}
        ),
    }
    one_mini_batch: dict[str, Any] = {"batch": {"mini_batch_prompts": PROMPTS}}
    variants: dict[str, dict[str, Any]] = {
        "bottom": {"selection": {"keep": "bottom"}},
        "random": {"selection": {"keep": "random"}, "run": {"seed": 7}, "optimizer": {"warmup_steps": 2}},
        "all": {"selection": {"keep": "all"}},
        "current": {"selection": {"scope": "micro_batch", "entropy": "current"}},
        "rollout_batch": {"selection": {"scope": "rollout_batch"}},
        "all_tokens": one_mini_batch,
        "selected_tokens": one_mini_batch | {"loss": {"normalizer": "selected_tokens"}},
        "weighted": {
            "train": [{"path": str(gsm8k), "weight": 3}, {"path": str(aime), "weight": 1}],
            "rollout": {"dynamic_sampling": False, "max_rounds": 10},
            "log": {"rollouts": 16},
        },
    }
    runs |= {name: alone(name, **({"reward": even} | sections)) for name, sections in variants.items()}
    endless: dict[str, Any] = {"run": {"steps": 10**6}, "reward": {"function": "rewards:slow", "workers": 2}}
    runs |= {name: pool.submit(_stop, place / name, config(name, **endless), *how) for name, how in STOPS.items()}
    return runs


def _run(name: str, config: Path, place: Path, ranks: int) -> dict[str, Run]:
    done = tiny.run_train(config, cwd=place, ranks=ranks)
    return {name: Run(place / name, done.returncode, done.stdout, done.stderr)}


def _stop(folder: Path, config: Path, signum: signal.Signals, ranks: int, to_all: bool) -> Ending:
    """Start an endless run, send the signal after its second step, and collect the processes that remain."""
    with (folder.with_suffix(".stdout")).open("w+") as out, (folder.with_suffix(".stderr")).open("w+") as err:
        trainer = tiny.start_train(config, cwd=config.parent, ranks=ranks, stdout=out, stderr=err)
        children: list[psutil.Process] = []
        try:
            _wait_for_lines(folder / "metrics.jsonl", 2, trainer)
            children = trainer.children(recursive=True)
            graders = sum("megatron_rlvr.reward.worker" in child.cmdline() for child in children)
            sent = time.monotonic()
            os.killpg(trainer.pid, signum) if to_all else trainer.send_signal(signum)
            status = trainer.wait(60)
            seconds = time.monotonic() - sent
            _, alive = psutil.wait_procs(children, timeout=10 if signum == signal.SIGKILL else 30)
            left_behind = [" ".join(process.cmdline()) for process in alive]
        finally:
            for process in (trainer, *children):
                if process.is_running():
                    process.kill()
        out.seek(0)
        err.seek(0)
        return Ending(Run(folder, status, out.read(), err.read()), seconds, graders, left_behind)


def _wait_for_lines(path: Path, count: int, trainer: Any) -> None:
    deadline = time.monotonic() + 300
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert trainer.poll() is None, "the trainer ended by itself"
        assert time.monotonic() < deadline, "no step in 300 s"
        time.sleep(0.05)


# Real formats -------------------------------------------------------------------------------------------------------


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["gsm8k", "verl", "aime"])
def test_a_model_that_is_never_correct_trains_on_nothing_and_warns(name: str, finished: Callable[[str], Run]) -> None:
    run = finished(name)
    assert run.status == 0, run.stderr
    assert [line["step"] for line in run.steps] == [1, 2]
    for line in run.steps:
        assert set(line) >= ALWAYS
        assert set(line).isdisjoint(WHEN_TRAINED)
        assert all(math.isfinite(value) for value in line.values())
        assert (line["reward/mean"], line["reward/accuracy"]) == (0, 0)
        assert line["rollout/groups_dropped"] == line["rollout/groups_sampled"] >= PROMPTS
        assert line["train/skipped_steps"] == 0
    warnings = [line for line in run.stderr.splitlines() if "trains on 0 of 4 groups" in line]
    assert [f"step {n} trains" in line for n, line in enumerate(warnings, start=1)] == [True, True]
    assert "Traceback" not in run.stderr
    assert [line for line in run.stdout.splitlines() if line.startswith("step ")][1].startswith("step 2/2")


@pytest.mark.parametrize("name", ["gsm8k", "verl", "aime"])
def test_without_training_the_export_is_the_start(name: str, finished: Callable[[str], Run]) -> None:
    run = finished(name)
    settings = load_settings(run.folder / "config.yaml")
    before, after = tensors(Path(settings.model.path)), tensors(run.folder / "hf")
    assert set(after) == set(before)
    assert [name for name in before if (after[name] != before[name]).any()] == []
    assert run.summary["export"] == str(run.folder / "hf")
    assert run.summary["steps"] == 2


def test_the_saved_settings_are_those_of_the_run(finished: Callable[[str], Run]) -> None:
    for name in ("gsm8k", "verl", "aime", "even"):
        run = finished(name)
        assert load_settings(run.folder / "config.yaml") == load_settings(run.folder.parent / f"{name}.yaml")


def test_prompts_reach_the_model_with_the_template_applied(finished: Callable[[str], Run]) -> None:
    texts = {text for text, _ in tiny.PROBLEMS}
    answers = {text: str(answer) for text, answer in tiny.PROBLEMS}
    for name, before, after in (
        ("gsm8k", "", ""),
        ("verl", "<|start|>user\n", " Box it.<|end|>\n<|start|>assistant\n"),
        ("aime", "", ""),
    ):
        sampled = finished(name).sampled(1)
        assert len(sampled) == 4
        for line in sampled:
            assert line["prompt"].startswith(before)
            assert line["prompt"].endswith(after)
            problem = line["prompt"][len(before) : len(line["prompt"]) - len(after)]
            assert problem in texts
            assert line["answer"] == answers[problem]
            assert not line["correct"]


def test_the_tokenizer_of_the_settings_is_in_the_export_and_in_checkpoints(finished: Callable[[str], Run]) -> None:
    from megatron_rlvr.data.tokenizer import load_tokenizer

    run = finished("aime")
    text = tiny.PROBLEMS[0][0]
    own = load_tokenizer(run.folder.parent / "pieces.model")
    for folder in ("hf", "checkpoints/step_000002/hugging_face"):
        assert load_tokenizer(run.folder / folder).encode(text) == own.encode(text), folder


def test_a_run_is_evaluated_before_and_after_and_every_k_steps(finished: Callable[[str], Run]) -> None:
    unrewarded, even = finished("gsm8k"), finished("even")
    assert [line["step"] for line in unrewarded.lines if "eval/held_out/accuracy" in line] == [0, 2]
    assert [line["step"] for line in even.lines if "eval/held_out/accuracy" in line] == [0, 1, 2]
    first, last = even.lines[0], even.lines[-1]
    assert even.summary["accuracy_before"] == first["eval/held_out/accuracy"]
    assert even.summary["accuracy_after"] == last["eval/held_out/accuracy"]
    assert first["eval/held_out/accuracy"] * 40 == pytest.approx(round(first["eval/held_out/accuracy"] * 40))
    assert 0 < first["eval/held_out/accuracy"] <= first["eval/held_out/pass_at_2"] < 1.01
    # The same random streams and, as nothing was learned, the same weights.
    evaluations = [{k: v for k, v in line.items() if k.startswith("eval/")} for line in unrewarded.lines]
    assert evaluations[0] == evaluations[2]


# A user's reward function --------------------------------------------------------------------------------------------


def test_a_users_reward_trains(finished: Callable[[str], Run]) -> None:
    run = finished("even")
    assert run.status == 0, run.stderr
    assert run.stderr == ""
    assert [line["step"] for line in run.steps] == [1, 2]
    for line in run.steps:
        assert set(line) >= ALWAYS | WHEN_TRAINED
        assert all(math.isfinite(value) for value in line.values())
        assert line["entropy/selected_mean"] > line["entropy/mean"] > 0
        assert line["entropy/selected_mean"] >= line["selection/threshold"] > line["entropy/mean"]
        assert 0 < line["reward/accuracy"] < 1
        assert line["reward/mean"] == pytest.approx(2 * line["reward/accuracy"] - 1)
        assert line["train/grad_norm"] > 0
        assert line["train/skipped_steps"] == 0
        assert 0 <= line["train/clip_fraction"] < 1
        phases = sum(line[f"time/{phase}"] for phase in ("rollout", "score", "train", "sync"))
        assert 0 < phases <= line["time/step"] < phases + 5


@pytest.mark.parametrize("name", ["even", "random", "weighted", "current"])
def test_the_engine_samples_from_the_weights_of_the_policy(name: str, finished: Callable[[str], Run]) -> None:
    # Groups carried over from the previous step were sampled from older weights; the metric leaves them out.
    gaps = [line["rollout/logprob_gap_mean"] for line in finished(name).steps]
    assert max(gaps) < 1e-4
    assert min(gaps) >= 0


@pytest.mark.parametrize("name", ["even", "bottom", "random"])
def test_the_fraction_is_exact_in_each_mini_batch(name: str, finished: Callable[[str], Run]) -> None:
    for line in finished(name).steps:
        kept, total = line["selection/tokens"], line["selection/tokens"] / line["selection/fraction"]
        assert total == pytest.approx(round(total))
        assert 0.2 * total <= kept < 0.2 * total + MINI_BATCHES  # rounded up once per mini-batch


def test_the_reward_is_the_value_of_the_function(finished: Callable[[str], Run]) -> None:
    sampled = [line for step in (1, 2) for line in finished("even").sampled(step)]
    graded = [re.sub("|".join(map(re.escape, tiny.SPECIAL_TOKENS)), "", line["response"]) for line in sampled]
    assert [line["correct"] for line in sampled] == [len(text) % 2 == 0 for text in graded]
    assert [line["reward"] for line in sampled] == [1.0 if line["correct"] else -1.0 for line in sampled]
    assert {line["failure"] for line in sampled} == {None}


def test_the_export_loads_and_its_weights_have_changed(finished: Callable[[str], Run], model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = finished("even").folder / "hf"
    trained = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).state_dict()
    start = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    assert set(trained) == set(start)
    changed = {name for name in start if not torch.equal(trained[name], start[name])}
    assert changed == set(start)
    # Adam moves a weight by about the learning rate a step: 2 steps of 2 mini-batches at 0.01.
    moves = [float((trained[name] - start[name]).abs().max()) for name in start]
    assert 0.01 < max(moves) < 0.06
    assert len(AutoTokenizer.from_pretrained(export)) == 320


def test_an_export_during_the_run_is_the_model_of_its_step(finished: Callable[[str], Run], model: Path) -> None:
    exports = finished("even").folder / "exports"
    assert sorted(path.name for path in exports.iterdir()) == ["step_000001", "step_000002"]
    start, first, second, last = map(
        tensors, (model, exports / "step_000001", exports / "step_000002", finished("even").folder / "hf")
    )
    assert [name for name in last if (second[name] != last[name]).any()] == []
    for other in (start, last):
        assert all((first[name] != other[name]).any() for name in other)
    files = {path.name for path in (finished("even").folder / "hf").iterdir()}
    assert {path.name for path in (exports / "step_000001").iterdir()} == files


def test_tensorboard_has_the_same_values(finished: Callable[[str], Run]) -> None:
    import numpy as np
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = finished("even")
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    shown = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    written = {(key, line["step"]): value for line in run.lines for key, value in line.items() if key != "step"}
    assert set(shown) == set(written)
    assert [key for key in written if shown[key] != np.float32(written[key])] == []


# Ways to select -----------------------------------------------------------------------------------------------------


def first_step(run: Run) -> dict[str, Any]:
    assert run.status == 0, run.stderr
    assert [line["step"] for line in run.lines] == [1, 2]
    assert all(math.isfinite(value) for line in run.lines for value in line.values())
    assert all(line["train/grad_norm"] > 0 for line in run.lines)
    return run.lines[0]


def test_selection_changes_the_loss_but_not_the_rollout(finished: Callable[[str], Run]) -> None:
    names = ("bottom", "all", "current", "rollout_batch", "all_tokens", "selected_tokens")
    firsts = [first_step(finished(name)) for name in names]
    for key in ("reward/mean", "entropy/mean", "rollout/response_tokens"):
        assert len({line[key] for line in firsts}) == 1
    assert len({line["train/grad_norm"] for line in firsts}) == len(names)


def test_bottom_keeps_the_lowest_and_top_the_highest_entropies(finished: Callable[[str], Run]) -> None:
    top, bottom = first_step(finished("all_tokens")), first_step(finished("bottom"))
    assert bottom["entropy/selected_mean"] <= bottom["selection/threshold"] < bottom["entropy/mean"]
    assert bottom["entropy/mean"] < top["selection/threshold"] <= top["entropy/selected_mean"]
    assert top["entropy/dropped_mean"] < top["entropy/mean"] < bottom["entropy/dropped_mean"]


def test_all_keeps_everything(finished: Callable[[str], Run]) -> None:
    line = first_step(finished("all"))
    assert line["selection/fraction"] == 1
    fifth = first_step(finished("rollout_batch"))
    assert line["selection/tokens"] == pytest.approx(fifth["selection/tokens"] / fifth["selection/fraction"])
    assert line["entropy/selected_mean"] == pytest.approx(line["entropy/mean"])
    assert "selection/threshold" not in line


def test_random_ignores_entropy_and_the_learning_rate_warms_up(finished: Callable[[str], Run]) -> None:
    run = finished("random")
    line = first_step(run)
    assert "selection/threshold" not in line
    assert abs(line["entropy/selected_mean"] - line["entropy/mean"]) < 0.1 * line["entropy/mean"]
    assert [step["train/learning_rate"] for step in run.lines] == pytest.approx([0.005, 0.01])


def test_each_micro_batch_on_its_own_keeps_its_fraction(finished: Callable[[str], Run]) -> None:
    line = first_step(finished("current"))
    assert 0.2 <= line["selection/fraction"] < 0.25
    assert line["entropy/selected_mean"] > line["entropy/mean"]
    assert "selection/threshold" not in line


def test_the_whole_rollout_has_one_threshold(finished: Callable[[str], Run]) -> None:
    for line in finished("rollout_batch").steps:
        total = line["selection/tokens"] / line["selection/fraction"]
        assert line["selection/tokens"] == math.ceil(0.2 * round(total))
    assert first_step(finished("rollout_batch"))["entropy/selected_mean"] > 0


def test_normalizers_differ_by_the_fraction_of_selected_tokens(finished: Callable[[str], Run]) -> None:
    paper, code = first_step(finished("all_tokens")), first_step(finished("selected_tokens"))
    share = paper["selection/fraction"]
    assert code["train/grad_norm"] == pytest.approx(paper["train/grad_norm"] / share, rel=1e-5)
    assert code["train/loss"] == pytest.approx(paper["train/loss"] / share, rel=1e-4, abs=1e-7)


def test_files_are_drawn_by_their_weights(finished: Callable[[str], Run]) -> None:
    run = finished("weighted")
    assert first_step(run)["rollout/groups_sampled"] == PROMPTS
    prompts = {line["prompt_id"] for step in (1, 2) for line in run.sampled(step)}
    assert Counter(prompt.partition("/")[0] for prompt in prompts) == {"aime": 2, "gsm8k": 6}


# Signals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STOPS)
def test_a_signal_ends_the_run_and_leaves_nothing_behind(name: str, background: dict[str, "Future[Any]"]) -> None:
    signum, ranks, _ = STOPS[name]
    ending: Ending = background[name].result()
    assert ending.left_behind == []
    assert ending.seconds < 45
    assert ending.graders == 2 * max(1, ranks)
    steps = [line["step"] for line in ending.run.lines]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 2
    assert not (ending.run.folder / "summary.json").exists()
    line = f"stopped by SIGINT; {ending.run.folder}/metrics.jsonl is complete"
    assert ending.run.stderr.splitlines().count(line) == (signum == signal.SIGINT)
    line = f"stopped by SIGTERM after step {steps[-1]}, which is saved; the same command resumes from there"
    assert ending.run.stdout.splitlines().count(line) == (signum == signal.SIGTERM)
    assert (ending.run.folder / "checkpoints" / f"step_{steps[-1]:06d}").exists() == (signum == signal.SIGTERM)
    if not ranks:
        assert ending.run.status == {signal.SIGKILL: -signum, signal.SIGINT: 128 + signum, signal.SIGTERM: 0}[signum]
        assert "Traceback" not in ending.run.stderr
    else:
        assert ending.run.status != 0  # of the launcher, for any status of its ranks
