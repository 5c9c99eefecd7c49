"""Wrong settings: one sentence with key, value and remedy, exit status 2, and no import of torch."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from pydantic import TypeAdapter

from megatron_rlvr.config import Settings, SettingsError
from megatron_rlvr.config.loading import RENAMED, fields, load_settings
from megatron_rlvr.config.no_effect import NO_EFFECT

REQUIRED = "run: {dir: run, steps: 1}\nmodel: {path: model}\ndata: {train: train.jsonl}\n"

# Flags, and parts of the message: key, value, remedy.
UNKNOWN = [
    ("--run.stepz=3", "unknown key run.stepz; did you mean run.steps?"),
    ("--loss.clip_hgh=1", "unknown key loss.clip_hgh; did you mean loss.clip_high?"),
    ("--selection.fractions=1", "did you mean selection.fraction?"),
    ("--rum.steps=3", "unknown key rum; did you mean run?"),
    ("--optimiser.eps=1", "unknown key optimiser; did you mean optimizer?"),
    ("--rollout.top_k=50", "unknown key rollout.top_k; training samples from the whole distribution"),
    ("--rollouts.top_p=1", "unknown key rollouts; did you mean rollout?"),
    ("--rollout.learning_rate=1", "unknown key rollout.learning_rate; did you mean optimizer.learning_rate?"),
    ("--loss.fraction=1", "did you mean selection.fraction?"),
    ("--batch.group_size=1", "did you mean rollout.group_size?"),
    ("--steps=3", "unknown flag --steps; did you mean run.steps?"),
    ("--clip-high=3", "unknown flag --clip-high; did you mean loss.clip_high?"),
    ("--run=3", "unknown flag --run; set one of its keys, such as run.dir"),
    ("--optimizer.lr=1", "the keys of optimizer are learning_rate, schedule"),
    ("--nonsense.key=1", "unknown key nonsense; see --help"),
    ("--nonsense=1", "unknown flag --nonsense; flags look like --section.key value"),
    ("--run.steps.x=1", "unknown flag --run.steps.x; run.steps holds a value"),
    ("--data.train=[{path: a, wieght: 2}]", "unknown key data.train.0.wieght; did you mean data.train.0.weight?"),
    ("--evaluate.sets=[{path: a, weight: 2}]", "unknown key evaluate.sets.0.weight; the keys"),
    ("--.steps=1", "unknown flag --.steps; did you mean run.steps?"),
    ("--=1", "unknown flag --; flags look like"),
    ("config.yaml", "unexpected argument 'config.yaml'; flags look like"),
    ("-x", "unexpected argument '-x'; flags look like"),
    ("--run.steps", "flag --run.steps has no value; write --run.steps VALUE"),
    ("--run.dir --run.steps=3", "flag --run.dir has no value"),
    ("--run.steps=[1", "value '[1' of flag --run.steps is not valid YAML (", "; quote it"),
]

WRONG_TYPE = [
    ("--run.steps=ten", "run.steps=ten: not an int; "),
    ("--run.steps=2.5", "run.steps=2.5: not an int; "),
    ("--run.steps=1e6", "run.steps=1000000.0: not an int; write 1000000"),
    ("--run.steps=true", "run.steps=true: not an int; "),
    ("--run.steps=", "run.steps=null: not an int; "),
    ("--run.export=1", "run.export=1: not true or false; "),
    ("--run.export=maybe", "run.export=maybe: not true or false; "),
    ("--run.dir=null", "run.dir=null: not a str; "),
    ("--run.dir=", "run.dir='': empty; "),
    ("--model.path=", "model.path='': empty; "),
    ("--optimizer.learning_rate=1e-6x", "optimizer.learning_rate=1e-6x: not a float; "),
    ('--selection.fraction="0.2"', "selection.fraction='0.2': not a float; "),
    ("--selection.fraction=[0.2]", "selection.fraction=[0.2]: not a float; "),
    ("--selection.fraction={a: 1}", "selection.fraction={a: 1}: not a float; "),
    ("--selection.fraction=false", "selection.fraction=false: not a float; "),
    ("--selection.fraction=null", "selection.fraction=null: not a float; "),
    ("--data.train=", "data.train.0=null: not a path; "),
    ("--data.train=3", "data.train.0=3: not a path; "),
    ("--data.train=[a.jsonl, [b.jsonl]]", "data.train.1=[b.jsonl]: not a path; "),
    ("--data.train=[]", "data.train=[]: empty; give at least one"),
    ("--data.train=[{weight: 1}]", "data.train.0.path is missing; set it"),
    ("--data.max_prompt_tokens=" + "x" * 300, "data.max_prompt_tokens=xxx", "xxx...: not an int; "),
]

NOT_A_CHOICE = [
    (
        "--selection.keep=tops",
        "selection.keep=tops: not one of top, bottom, band, random, all; did you mean top?",
    ),
    ("--selection.keep=3", "selection.keep=3: not one of top, bottom, band, random, all; choose one"),
    ("--model.dtype=bf16", "model.dtype=bf16: not one of float32, bfloat16; did you mean bfloat16?"),
    ("--model.dtype=float16", "model.dtype=float16: not one of"),
    ("--advantage.estimator=ppo", "advantage.estimator=ppo: not one of grpo, dr_grpo, rloo, batch; "),
    ("--loss.normalizer=tokens", "loss.normalizer=tokens: not one of all_tokens, selected_tokens, sequence_mean, "),
    ("--optimizer.schedule=linear", "optimizer.schedule=linear: not one of constant, cosine; "),
    ("--data.template=Chat", "data.template=Chat: not one of auto, chat, plain; did you mean chat?"),
    ("--reward.function=maths", "reward.function=maths: maths is neither math, exact, "),
    ("--reward.function='a.b:'", "reward.function='a.b:': a.b: is neither math, "),
    (
        "--reward.function=a.b:",
        "reward.function={a.b: null}: neither a str nor a mapping of str to str; write a function",
    ),
    ("--reward.function=a:b:c", "reward.function=a:b:c: a:b:c is neither math, "),
    ("--reward.function=number(digits=3)", "number() has no option digits; its options are tolerance, last"),
    ("--reward.function={gsm8k: maths}", "source 'gsm8k': maths is neither math, "),
    ("--reward.function={gsm8k: 3}", "reward.function"),
    ("--reward.function={}", "reward.function={}: empty; give a function, or one for each source"),
    ("--reward.function=code(seconds=3000)", "not above the 3000 s that code() gives each test"),
]

OUT_OF_RANGE = [
    ("--run.steps=0", "run.steps=0: out of range; give at least 1"),
    ("--run.seed=-1", "run.seed=-1: out of range; give at least 0"),
    ("--run.seed=5000000000", "run.seed=5000000000: out of range; give a value below 4294967296"),
    ("--run.timeout_minutes=0", "run.timeout_minutes=0: out of range; give at least 0.001"),
    ("--parallel.tensor=0", "parallel.tensor=0: out of range; give at least 1"),
    ("--parallel.pipeline=-2", "parallel.pipeline=-2: out of range; give at least 1"),
    ("--data.train=[{path: a, weight: 0}]", "data.train.0.weight=0: out of range; give a value above 0"),
    ("--rollout.group_size=1", "rollout.group_size=1: out of range; give at least 2"),
    ("--rollout.temperature=0", "rollout.temperature=0: out of range; give at least 0.01"),
    ("--rollout.top_p=1.1", "rollout.top_p=1.1: out of range; give at most 1"),
    ("--rollout.top_p=0", "rollout.top_p=0: out of range; give a value above 0"),
    ("--rollout.max_response_tokens=0", "rollout.max_response_tokens=0: out of range; give at least 1"),
    (
        "--rollout.max_response_tokens=1048576",
        "rollout.max_response_tokens=1048576: out of range; give a value below",
    ),
    ("--reward.workers=0", "reward.workers=0: out of range; give at least 1"),
    ("--reward.timeout_seconds=1e9", "reward.timeout_seconds=1000000000.0: out of range; give at most 86400"),
    ("--reward.overlong_buffer=-1", "reward.overlong_buffer=-1: out of range; give at least 0"),
    ("--selection.fraction=0", "selection.fraction=0: out of range; give a value above 0"),
    ("--selection.fraction=1.5", "selection.fraction=1.5: out of range; give at most 1"),
    ("--selection.fraction=-0.2", "selection.fraction=-0.2: out of range; give a value above 0"),
    ("--selection.fraction_end=0", "selection.fraction_end=0: out of range; give a value above 0"),
    ("--selection.fraction_steps=1", "selection.fraction_steps=1: out of range; give at least 2"),
    ("--selection.guard_probability=1", "selection.guard_probability=1: out of range; give a value below 1"),
    ("--selection.guard_quantile=0", "selection.guard_quantile=0: out of range; give a value above 0"),
    ("--loss.clip_low=1", "loss.clip_low=1: out of range; give a value below 1"),
    ("--loss.clip_high=0", "loss.clip_high=0: out of range; give a value above 0"),
    ("--loss.dual_clip=1", "loss.dual_clip=1: out of range; give a value above 1"),
    ("--loss.correction_veto=0", "loss.correction_veto=0: out of range; give a value above 0"),
    ("--loss.kl_coefficient=-1", "loss.kl_coefficient=-1: out of range; give at least 0"),
    ("--loss.entropy_target=-1", "loss.entropy_target=-1: out of range; give at least 0"),
    ("--loss.entropy_step=0", "loss.entropy_step=0: out of range; give a value above 0"),
    ("--advantage.entropy_bonus=-1", "advantage.entropy_bonus=-1: out of range; give at least 0"),
    ("--advantage.entropy_bound=1", "advantage.entropy_bound=1: out of range; give a value above 1"),
    ("--batch.prompts=0", "batch.prompts=0: out of range; give at least 1"),
    ("--optimizer.learning_rate=-1e-6", "optimizer.learning_rate=-1e-06: out of range; give a value above 0"),
    ("--optimizer.warmup_steps=-1", "optimizer.warmup_steps=-1: out of range; give at least 0"),
    ("--optimizer.weight_decay=-0.1", "optimizer.weight_decay=-0.1: out of range; give at least 0"),
    ("--optimizer.beta2=1", "optimizer.beta2=1: out of range; give a value below 1"),
    ("--evaluate.top_p=2", "evaluate.top_p=2: out of range; give at most 1"),
    ("--evaluate.temperature=-1", "evaluate.temperature=-1: out of range; give at least 0"),
    ("--log.rollouts=-1", "log.rollouts=-1: out of range; give at least 0"),
    ("--selection.fraction=.nan", "selection.fraction=nan: not finite; give a finite float"),
    ("--loss.clip_high=.inf", "loss.clip_high=inf: not finite; give a finite float"),
    ("--optimizer.learning_rate=1e400", "optimizer.learning_rate=inf: not finite; give a finite float"),
    ("--run.steps=9007199254740993", "run.steps=9007199254740993: too large to compute with; give at most"),
    ("--loss.clip_high=1e30", "loss.clip_high=1e+30: too large to compute with; give at most"),
    ("--optimizer.eps=1e-320", "optimizer.eps=1e-320: too small to compute with; give 0, or at least 1e-18"),
    ("--rollout.group_size=1000000", "rollout.group_size=1000000: out of range; give at most 65536"),
    ("--megatron.x={y: [1e30]}", "megatron.x.y.0=1e+30: too large to compute with; give at most"),
    ("--run.dir=" + "a/" * 2000, "run.dir=a/a/", "too long for a path; give one of at most 2000 bytes"),
    ("--reward.incorrect=-.inf", "reward.incorrect=-inf: not finite; give a finite float"),
    ("--reward.correct=.nan", "reward.correct=nan: not finite; give a finite float"),
    ("--data.train=[{path: a, weight: .inf}]", "data.train.0.weight=inf: not finite; give a finite float"),
]

IMPOSSIBLE_TOGETHER = [
    ("--run.overwrite=true --run.resume=must", "run.overwrite=true: ", "run.resume=must", "remove one"),
    ("--run.keep_every=15", "run.keep_every=15: ", "run.save_every=10", "choose one"),
    ("--reward.correct=-1", "reward.correct=-1", "reward.incorrect=-1", "raise it"),
    ("--reward.overlong_buffer=20480", "reward.overlong_buffer=20480", "rollout.max_response_tokens=20480", "lower it"),
    ("--rollout.max_response_tokens=40", "reward.overlong_buffer=4096", "rollout.max_response_tokens=40", "lower it"),
    ("--selection.entropy=current", "selection.entropy=current", "scope=micro_batch, not mini_batch", "set scope"),
    (
        "--selection.entropy=current --selection.scope=rollout_batch",
        "selection.entropy=current", "scope=micro_batch, not rollout_batch", "set scope",
    ),
    ("--selection.keep=band", "selection.band=null", "selection.keep=band", "give [low, high]"),
    (
        "--selection.keep=band --selection.band=[0.8, 0.5]",
        "selection.band=[0.8, 0.5]", "selection.keep=band", "give [low, high]",
    ),
    ("--selection.fraction_end=0.1", "selection.fraction_end=0.1", "selection.fraction_steps", "set it"),
    ("--selection.fraction_steps=9", "selection.fraction_steps=9", "selection.fraction_end", "set it"),
    (
        "--selection.entropy=current --selection.scope=micro_batch --selection.guard_probability=0.002",
        "selection.guard_probability=0.002", "selection.entropy=current", "remove one",
    ),
    ("--rollout.top_p=0.9", "rollout.top_p=0.9", "whole one train", "set it to 1"),
    ("--batch.mini_batch_prompts=30", "batch.prompts=512", "batch.mini_batch_prompts=30", "choose a divisor"),
    ("--batch.prompts=16", "batch.prompts=16", "batch.mini_batch_prompts=32", "choose a divisor"),
    ("--optimizer.schedule=cosine", "optimizer.decay_steps=null", "schedule=cosine", "warmup_steps=10; set it"),
    (
        "--optimizer.schedule=cosine --optimizer.decay_steps=10",
        "optimizer.decay_steps=10", "optimizer.warmup_steps=10", "set it",
    ),
    (
        "--optimizer.schedule=cosine --optimizer.decay_steps=20 --optimizer.min_learning_rate=1",
        "optimizer.min_learning_rate=1.0", "optimizer.learning_rate=1e-06", "lower it",
    ),
    ("--evaluate.sets=[a/x.jsonl, b/x.jsonl]", "evaluate.sets: ", "two sets have the name 'x'", "set name beside"),
    ("--evaluate.sets=a.jsonl --evaluate.temperature=0", "evaluate.group_size=32", "temperature=0", "set 1"),
    ("--selection.keep=band --selection.band=[0, 1]", "selection.band=[0, 1]", "every token", "set selection.keep"),
    (
        "--selection.fraction=0.3 --selection.fraction_end=0.3 --selection.fraction_steps=9",
        "selection.fraction_end=0.3", "selection.fraction is the same", "remove it",
    ),
    (
        "--loss.entropy_target=0.3 --loss.entropy_step=0.1 --loss.entropy_max=0.01",
        "loss.entropy_step=0.1", "loss.entropy_max=0.01", "lower it",
    ),
    ("--rollout.max_batch_tokens=20000", "rollout.max_batch_tokens=20000", "20480", "raise it"),
]  # fmt: skip

# Flags, the setting without effect, the setting that disables it, the remedy.
WITHOUT_EFFECT = [
    ("--run.keep_every=20 --run.save_every=0", "run.keep_every=20", "run.save_every=0", "remove it"),
    ("--run.eval_every=5", "run.eval_every=5", "evaluate.sets=[]", "name a set"),
    ("--parallel.sequence=true", "parallel.sequence=true", "parallel.tensor=1", "remove it"),
    ("--parallel.virtual_pipeline=2", "parallel.virtual_pipeline=2", "parallel.pipeline=1", "remove it"),
    ("--rollout.servers=http://a:1", "rollout.servers=[http://a:1]", "rollout.engine=embedded", "remove it"),
    (
        "--rollout.engine=sglang --rollout.servers=http://a:1 --rollout.max_batch_rows=8",
        "rollout.max_batch_rows=8", "rollout.engine=sglang", "remove it",
    ),
    (
        "--rollout.dynamic_sampling=false --rollout.max_rounds=3",
        "rollout.max_rounds=3", "rollout.dynamic_sampling=false", "remove it",
    ),
    ("--sync.dir=/x", "sync.dir=/x", "rollout.engine=embedded", "remove it"),
    ("--selection.keep=all --selection.fraction=0.3", "selection.fraction=0.3", "selection.keep=all", "remove it"),
    (
        "--selection.keep=all --selection.scope=micro_batch",
        "selection.scope=micro_batch", "selection.keep=all", "remove it",
    ),
    (
        "--selection.keep=all --selection.entropy=current",
        "selection.entropy=current", "selection.keep=all", "remove it",
    ),
    (
        "--selection.keep=random --selection.entropy=current",
        "selection.entropy=current", "selection.keep=random", "remove it",
    ),
    (
        "--selection.keep=all --loss.normalizer=selected_tokens",
        "loss.normalizer=selected_tokens", "selection.keep=all", "remove it",
    ),
    (
        "--advantage.entropy_bound=3", "advantage.entropy_bound=3.0", "advantage.entropy_bonus=0.0", "remove it",
    ),
    ("--selection.band=[0.1, 0.2]", "selection.band=[0.1, 0.2]", "selection.keep=top", "remove it"),
    (
        "--selection.keep=band --selection.band=[0.1, 0.2] --selection.fraction=0.3",
        "selection.fraction=0.3", "selection.keep=band", "remove it",
    ),
    (
        "--selection.keep=all --selection.fraction_end=0.3 --selection.fraction_steps=9",
        "selection.fraction_end=0.3", "selection.keep=all", "remove it",
    ),
    (
        "--selection.keep=random --selection.signal=surprisal",
        "selection.signal=surprisal", "selection.keep=random", "remove it",
    ),
    ("--selection.keep=all --selection.by_sign=true", "selection.by_sign=true", "selection.keep=all", "remove it"),
    (
        "--selection.signal=gradient --selection.entropy=current --selection.scope=micro_batch",
        "selection.entropy=current", "selection.signal=gradient", "remove it",
    ),
    (
        "--selection.guard_quantile=0.5",
        "selection.guard_quantile=0.5", "selection.guard_probability=0.0", "remove it",
    ),
    ("--optimizer.decay_steps=9", "optimizer.decay_steps=9", "optimizer.schedule=constant", "set cosine"),
    (
        "--optimizer.min_learning_rate=1", "optimizer.min_learning_rate=1.0", "optimizer.schedule=constant",
        "set cosine",
    ),
    ("--evaluate.group_size=4", "evaluate.group_size=4", "evaluate.sets=[]", "name a set"),
    ("--evaluate.temperature=0", "evaluate.temperature=0.0", "evaluate.sets=[]", "name a set"),
    ("--log.wandb_project=mine", "log.wandb_project=mine", "log.wandb=false", "set log.wandb to true"),
]  # fmt: skip


def refusal(path: Path, flags: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(path, re.split(r" (?=--)", flags))
    return str(caught.value)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of valid settings, with the paper's defaults."""
    path = tmp_path_factory.mktemp("bad_input") / "config.yaml"
    path.write_text(REQUIRED, encoding="utf-8")
    return path


def test_the_settings_without_the_flags_are_accepted(config: Path) -> None:
    assert load_settings(config).run.steps == 1


@pytest.mark.parametrize(
    "case",
    [*UNKNOWN, *WRONG_TYPE, *NOT_A_CHOICE, *OUT_OF_RANGE, *IMPOSSIBLE_TOGETHER, *WITHOUT_EFFECT],
    ids=lambda case: case[0][:60],
)
def test_bad_settings_are_one_sentence_with_key_value_and_remedy(case: tuple[str, ...], config: Path) -> None:
    flags, *parts = case
    message = refusal(config, flags)
    assert [part for part in parts if part not in message] == []
    assert "\n" not in message
    assert len(message) < 300
    problem, _, remedy = message.partition("; ")
    assert problem
    assert remedy
    assert not re.search(r"pydantic|Settings\b|instance|validation|None|Input", message)


@pytest.mark.parametrize("case", WITHOUT_EFFECT, ids=lambda case: case[0][:60])
def test_a_setting_without_effect_is_named_with_the_setting_that_disables_it(
    case: tuple[str, str, str, str], config: Path
) -> None:
    flags, setting, other, remedy = case
    problem, _, said = refusal(config, flags).partition("; ")
    assert problem.startswith(f"{setting}: has no effect with {other} (")
    assert remedy in said


def test_every_rule_about_no_effect_is_about_keys_that_exist_and_a_value_that_is_accepted() -> None:
    for row in NO_EFFECT:
        for dotted in (row.key, row.other):
            section, key = dotted.split(".")
            assert key in Settings.model_fields[section].annotation.model_fields, dotted  # type: ignore[union-attr]
        section, key = row.other.split(".")
        field = Settings.model_fields[section].annotation.model_fields[key]  # type: ignore[union-attr]
        for value in row.values:
            assert TypeAdapter(field.annotation).validate_python(value, strict=True) == value


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_earlier_name_is_answered_with_the_new_one(old: str, new: str, config: Path, tmp_path: Path) -> None:
    assert refusal(config, f"--{old}=3") == f"unknown key {old}; it is now {new}"
    section, key = old.split(".")
    (tmp_path / "config.yaml").write_text(REQUIRED + f"{section}: {{{key}: 3}}\n", encoding="utf-8")
    assert refusal(tmp_path / "config.yaml", "--run.seed=1") == f"unknown key {old}; it is now {new}"
    assert new in {f"{section}.{key}" for section, key, _ in fields()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {dir: run, steps: 1}\n", "section model is missing; write it in the file, or set --model.path"),
        ("run: {dir: run}\nmodel: {path: m}\ndata: {train: t}\n", "run.steps is missing; set it in the file or with"),
        (REQUIRED + "log:\n", "log=null: not a section; write its keys below it, or remove the line"),
        (REQUIRED + "log: 3\n", "log=3: not a section; "),
        (REQUIRED + "megatron: [1]\n", "megatron=[1]: not a section; "),
        (REQUIRED + "selections: {fraction: 0.1}\n", "unknown key selections; did you mean selection?"),
        (REQUIRED + "steps: 3\n", "unknown key steps; did you mean run.steps?"),
    ],
)
def test_bad_sections_of_a_file_say_what_to_write(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        load_settings(tmp_path / "config.yaml")
    assert str(caught.value).startswith(message)


def test_of_two_mistakes_one_is_reported(config: Path) -> None:
    assert refusal(config, "--run.steps=0 --run.seed=-1").count("out of range") == 1


# As a user sees it --------------------------------------------------------------------------------------------------

# Python imports sitecustomize by itself; it notes at exit what the program had imported.
WITNESS = """
import atexit, os, sys
atexit.register(lambda: open(os.environ["WITNESS"], "w").write(" ".join(m for m in sys.modules if "." not in m)))
"""


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The only line on stderr of a program that has ended with status 2."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("megatron_rlvr: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config.yaml", "--selection.fraction", "1.5"], "selection.fraction=1.5: out of range; give at most 1"),
        (["config.yaml", "--run.stepz=3", "--check"], "unknown key run.stepz; did you mean run.steps?"),
        (["broken.yaml"], "broken.yaml, line 2: not valid YAML"),
        (["none.yaml"], "none.yaml does not exist; give a settings file"),
        (["--run.steps", "3"], "the first argument is not a settings file; give CONFIG.yaml"),
        ([], "the first argument is not a settings file; give CONFIG.yaml"),
        (["config.yaml"], "model holds no config.json; give the folder of a Hugging Face model"),
    ],
    ids=["value", "key", "yaml", "missing", "flag first", "nothing", "model"],
)
def test_the_program_prints_one_line_and_imports_no_torch(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(REQUIRED, encoding="utf-8")
    (tmp_path / "broken.yaml").write_text("run:\n\tdir: x\n", encoding="utf-8")
    (tmp_path / "sitecustomize.py").write_text(WITNESS, encoding="utf-8")
    witness = tmp_path / "witness"
    done = tiny.run_train(*arguments, cwd=tmp_path, search=[tmp_path], variables={"WITNESS": str(witness)}, fresh=True)
    assert message in one_line(done)
    imported = witness.read_text(encoding="utf-8").split()
    assert "pydantic" in imported
    assert {"torch", "transformers", "megatron"}.isdisjoint(imported)
    assert not (tmp_path / "run").exists()


def test_a_reward_function_that_cannot_be_imported_is_one_line(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(reward={"function": "my_rewards:score", "workers": 2})
    line = one_line(tiny.run_train(config, "--check", cwd=tmp_path))
    assert "reward.function=my_rewards:score: cannot be imported" in line
    assert "No module named 'my_rewards'" in line
    assert "PYTHONPATH" in line


def test_several_ranks_without_torchrun_are_refused_with_the_command_to_start_them(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    line = one_line(tiny.run_train(write_config(parallel={"tensor": 2}), cwd=tmp_path))
    assert "2 ranks are needed" in line
    assert "torchrun --nproc-per-node 2" in line


def test_weights_that_do_not_belong_to_the_config_are_one_line_of_the_check_and_of_the_run(
    write_config: Callable[..., Path], model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "three_layers"
    shutil.copytree(model, broken)
    changed = json.loads((broken / "config.json").read_text()) | {"num_hidden_layers": 3, "layer_types": None}
    (broken / "config.json").write_text(json.dumps(changed))
    config = write_config(model={"path": str(broken)})
    line = one_line(tiny.run_train(config, cwd=tmp_path))
    assert one_line(tiny.run_train(config, "--check", cwd=tmp_path)) == line
    assert f"{broken} lacks model.layers.2." in line
    assert "config.json" in line


def test_under_torchrun_a_bad_setting_is_printed_once_and_all_ranks_exit(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(REQUIRED, encoding="utf-8")
    done = tiny.run_train("config.yaml", "--selection.fraction=2", cwd=tmp_path, ranks=2, fresh=True)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("megatron_rlvr:")]
    assert said == ["megatron_rlvr: selection.fraction=2: out of range; give at most 1"]
    assert done.stdout == ""
