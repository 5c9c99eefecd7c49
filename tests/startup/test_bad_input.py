"""Wrong settings: one sentence that names key, value and remedy, exit status 2, and no torch imported for it."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from megatron_rlvr.config import SettingsError
from megatron_rlvr.config.loading import load_settings

REQUIRED = "run: {dir: run, steps: 1}\nmodel: {path: model}\ndata: {train: train.jsonl}\n"

# Flags, and what the message has to hold: key, value, remedy.
UNKNOWN = [
    ("--run.stepz=3", "unknown key run.stepz; did you mean run.steps?"),
    ("--loss.clip_hgh=1", "unknown key loss.clip_hgh; did you mean loss.clip_high?"),
    ("--selection.fractions=1", "did you mean selection.fraction?"),
    ("--rum.steps=3", "unknown key rum; did you mean run?"),
    ("--optimiser.eps=1", "unknown key optimiser; did you mean optimizer?"),
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
    ("--run.steps=[1", "value '[1' of flag --run.steps is not valid YAML; quote it"),
]

WRONG_TYPE = [
    ("--run.steps=ten", "run.steps 'ten' is not a whole number; "),
    ("--run.steps=2.5", "run.steps 2.5 is not a whole number; "),
    ("--run.steps=1e6", "run.steps 1000000.0 is not written as a whole number; write 1000000"),
    ("--run.steps=true", "run.steps true is not a whole number; "),
    ("--run.steps=", "run.steps null is not a whole number; "),
    ("--run.export=1", "run.export 1 is not true or false; "),
    ("--run.export=maybe", "run.export 'maybe' is not true or false; "),
    ("--run.dir=null", "run.dir null is not text; "),
    ("--run.dir=", "run.dir '' is empty; "),
    ("--model.path=", "model.path '' is empty; "),
    ("--optimizer.learning_rate=1e-6x", "optimizer.learning_rate '1e-6x' is not a number; "),
    ('--selection.fraction="0.2"', "selection.fraction '0.2' is not a number; "),
    ("--selection.fraction=[0.2]", "selection.fraction [0.2] is not a number; "),
    ("--selection.fraction={a: 1}", "selection.fraction {'a': 1} is not a number; "),
    ("--selection.fraction=false", "selection.fraction false is not a number; "),
    ("--selection.fraction=null", "selection.fraction null is not a number; "),
    ("--data.train=", "data.train.0 null is not a path; "),
    ("--data.train=3", "data.train.0 3 is not a path; "),
    ("--data.train=[a.jsonl, [b.jsonl]]", "data.train.1 ['b.jsonl'] is not a path; "),
    ("--data.train=[]", "data.train [] is empty; give at least one"),
    ("--data.train=[{weight: 1}]", "data.train.0.path is missing; set it"),
    ("--data.max_prompt_tokens=" + "x" * 300, "data.max_prompt_tokens 'xxx", "xxx... is not a whole number; "),
]

NOT_A_CHOICE = [
    (
        "--selection.keep=tops",
        "selection.keep 'tops' is not one of 'top', 'bottom', 'random', 'all'; did you mean top?",
    ),
    ("--selection.keep=3", "selection.keep 3 is not one of 'top', 'bottom', 'random', 'all'; choose one"),
    ("--model.dtype=bf16", "model.dtype 'bf16' is not one of 'float32', 'bfloat16'; did you mean bfloat16?"),
    ("--model.dtype=float16", "model.dtype 'float16' is not one of"),
    ("--advantage.estimator=ppo", "advantage.estimator 'ppo' is not one of 'grpo', 'dr_grpo', 'rloo'; "),
    ("--loss.normalizer=tokens", "loss.normalizer 'tokens' is not one of 'all_tokens', 'selected_tokens'; "),
    ("--optimizer.schedule=linear", "optimizer.schedule 'linear' is not one of 'constant', 'cosine'; "),
    ("--data.template=Chat", "data.template 'Chat' is not one of 'auto', 'chat', 'plain'; did you mean chat?"),
    ("--reward.function=exact", "reward.function 'exact' is neither math nor module:function; write either"),
    ("--reward.function=a.b:", "reward.function 'a.b:' is neither math nor module:function"),
    ("--reward.function=a:b:c", "reward.function 'a:b:c' is neither math nor module:function"),
]

OUT_OF_RANGE = [
    ("--run.steps=0", "run.steps 0 is out of range; give at least 1"),
    ("--run.seed=-1", "run.seed -1 is out of range; give at least 0"),
    ("--run.seed=5000000000", "run.seed 5000000000 is out of range; give a value below 4294967296"),
    ("--run.timeout_minutes=0", "run.timeout_minutes 0 is out of range; give a value above 0"),
    ("--parallel.tensor=0", "parallel.tensor 0 is out of range; give at least 1"),
    ("--parallel.pipeline=-2", "parallel.pipeline -2 is out of range; give at least 1"),
    ("--data.train=[{path: a, weight: 0}]", "data.train.0.weight 0 is out of range; give a value above 0"),
    ("--rollout.group_size=1", "rollout.group_size 1 is out of range; give at least 2"),
    ("--rollout.temperature=0", "rollout.temperature 0 is out of range; give a value above 0"),
    ("--rollout.top_p=1.1", "rollout.top_p 1.1 is out of range; give at most 1"),
    ("--rollout.top_p=0", "rollout.top_p 0 is out of range; give a value above 0"),
    ("--rollout.max_response_tokens=0", "rollout.max_response_tokens 0 is out of range; give at least 1"),
    (
        "--rollout.max_response_tokens=1048576",
        "rollout.max_response_tokens 1048576 is out of range; give a value below",
    ),
    ("--reward.workers=0", "reward.workers 0 is out of range; give at least 1"),
    ("--reward.timeout_seconds=1e9", "reward.timeout_seconds 1000000000.0 is out of range; give at most 86400"),
    ("--reward.overlong_buffer=-1", "reward.overlong_buffer -1 is out of range; give at least 0"),
    ("--selection.fraction=0", "selection.fraction 0 is out of range; give a value above 0"),
    ("--selection.fraction=1.5", "selection.fraction 1.5 is out of range; give at most 1"),
    ("--selection.fraction=-0.2", "selection.fraction -0.2 is out of range; give a value above 0"),
    ("--loss.clip_low=1", "loss.clip_low 1 is out of range; give a value below 1"),
    ("--loss.clip_high=0", "loss.clip_high 0 is out of range; give a value above 0"),
    ("--loss.dual_clip=1", "loss.dual_clip 1 is out of range; give a value above 1"),
    ("--batch.prompts=0", "batch.prompts 0 is out of range; give at least 1"),
    ("--optimizer.learning_rate=-1e-6", "optimizer.learning_rate -1e-06 is out of range; give a value above 0"),
    ("--optimizer.warmup_steps=-1", "optimizer.warmup_steps -1 is out of range; give at least 0"),
    ("--optimizer.weight_decay=-0.1", "optimizer.weight_decay -0.1 is out of range; give at least 0"),
    ("--optimizer.beta2=1", "optimizer.beta2 1 is out of range; give a value below 1"),
    ("--evaluate.top_p=2", "evaluate.top_p 2 is out of range; give at most 1"),
    ("--evaluate.temperature=-1", "evaluate.temperature -1 is out of range; give at least 0"),
    ("--log.rollouts=-1", "log.rollouts -1 is out of range; give at least 0"),
    ("--selection.fraction=.nan", "selection.fraction nan is not finite; give a number"),
    ("--loss.clip_high=.inf", "loss.clip_high inf is not finite; give a number"),
    ("--optimizer.learning_rate=1e400", "optimizer.learning_rate inf is not finite; give a number"),
    ("--reward.wrong=-.inf", "reward.wrong -inf is not finite; give a number"),
    ("--reward.correct=.nan", "reward.correct nan is not finite; give a number"),
    ("--data.train=[{path: a, weight: .inf}]", "data.train.0.weight inf is not finite; give a number"),
]

IMPOSSIBLE_TOGETHER = [
    ("--parallel.sequence=true", "parallel.sequence true", "parallel.tensor 1", "drop one"),
    ("--parallel.virtual_pipeline=2", "parallel.virtual_pipeline 2", "parallel.pipeline 1", "drop it"),
    ("--evaluate.samples=4", "evaluate.samples 4", "evaluate.sets", "drop it"),
    ("--reward.correct=-1", "reward.correct -1", "reward.wrong -1", "raise it"),
    ("--reward.overlong_buffer=20480", "reward.overlong_buffer 20480", "rollout.max_response_tokens 20480", "lower it"),
    ("--rollout.max_response_tokens=40", "reward.overlong_buffer 4096", "rollout.max_response_tokens 40", "lower it"),
    ("--selection.keep=all --selection.fraction=0.3", "selection.fraction 0.3", "selection.keep all", "drop it"),
    ("--selection.keep=all --selection.scope=micro_batch", "selection.scope micro_batch", "selection.keep all", "drop"),
    ("--selection.keep=all --selection.entropy=current", "selection.entropy current", "selection.keep all", "drop it"),
    ("--selection.keep=random --selection.entropy=current", "selection.entropy current", "keep random", "drop it"),
    ("--selection.entropy=current", "selection.entropy current", "scope micro_batch, not mini_batch", "set scope"),
    (
        "--selection.entropy=current --selection.scope=rollout_batch",
        "selection.entropy current", "scope micro_batch, not rollout_batch", "set scope",
    ),
    (
        "--selection.keep=all --loss.normalizer=selected_tokens",
        "loss.normalizer selected_tokens", "selection.keep all", "drop it",
    ),
    ("--batch.mini_batch_prompts=30", "batch.prompts 512", "batch.mini_batch_prompts 30", "choose a divisor"),
    ("--batch.prompts=16", "batch.prompts 16", "batch.mini_batch_prompts 32", "choose a divisor"),
    ("--optimizer.decay_steps=9", "optimizer.decay_steps 9", "optimizer.schedule constant", "drop it"),
    ("--optimizer.min_learning_rate=1e-7", "optimizer.min_learning_rate 1e-07", "schedule constant", "drop it"),
    ("--optimizer.schedule=cosine", "optimizer.decay_steps is missing", "schedule cosine", "set it above"),
    (
        "--optimizer.schedule=cosine --optimizer.decay_steps=10",
        "optimizer.decay_steps 10", "optimizer.warmup_steps 10", "set it above",
    ),
    (
        "--optimizer.schedule=cosine --optimizer.decay_steps=20 --optimizer.min_learning_rate=1",
        "optimizer.min_learning_rate 1.0", "optimizer.learning_rate 1e-06", "lower it",
    ),
    ("--evaluate.sets=[a/x.jsonl, b/x.jsonl]", "evaluate.sets", "'x' twice", "another name"),
    ("--evaluate.sets=a.jsonl --evaluate.temperature=0", "evaluate.samples 32", "temperature 0", "set samples to 1"),
    ("--run.eval_every=5", "run.eval_every 5", "without evaluate.sets", "name a set"),
    (
        "--rollout.dynamic_sampling=false --rollout.max_rounds=3",
        "rollout.max_rounds 3", "rollout.dynamic_sampling false", "drop it",
    ),
    ("--log.wandb_project=mine", "log.wandb_project 'mine'", "log.wandb false", "log.wandb to true"),
    ("--rollout.max_batch_tokens=20000", "rollout.max_batch_tokens 20000", "20480", "raise it"),
]  # fmt: skip


def refusal(path: Path, flags: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(path, re.split(r" (?=--)", flags))
    return str(caught.value)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of settings that are right, with the paper's defaults."""
    path = tmp_path_factory.mktemp("bad_input") / "config.yaml"
    path.write_text(REQUIRED, encoding="utf-8")
    return path


def test_the_settings_around_the_bad_ones_are_right(config: Path) -> None:
    assert load_settings(config).run.steps == 1


@pytest.mark.parametrize(
    "case", [*UNKNOWN, *WRONG_TYPE, *NOT_A_CHOICE, *OUT_OF_RANGE, *IMPOSSIBLE_TOGETHER], ids=lambda case: case[0][:60]
)
def test_bad_settings_are_one_sentence_with_key_value_and_remedy(case: tuple[str, ...], config: Path) -> None:
    flags, *parts = case
    message = refusal(config, flags)
    assert [part for part in parts if part not in message] == []
    assert "\n" not in message
    assert len(message) < 300
    complaint, _, remedy = message.partition("; ")
    assert complaint
    assert remedy
    assert not re.search(r"pydantic|Settings\b|instance|validation|None|Input", message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {dir: run, steps: 1}\n", "section model is missing; write it in the file, or set --model.path"),
        ("run: {dir: run}\nmodel: {path: m}\ndata: {train: t}\n", "run.steps is missing; set it in the file or with"),
        (REQUIRED + "log:\n", "log null is not a section; write its keys below it, or remove the line"),
        (REQUIRED + "log: 3\n", "log 3 is not a section; "),
        (REQUIRED + "megatron: [1]\n", "megatron [1] is not a section; "),
        (REQUIRED + "selections: {fraction: 0.1}\n", "unknown key selections; did you mean selection?"),
        (REQUIRED + "steps: 3\n", "unknown key steps; did you mean run.steps?"),
    ],
)
def test_bad_sections_of_a_file_say_what_to_write(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        load_settings(tmp_path / "config.yaml")
    assert str(caught.value).startswith(message)


def test_of_two_mistakes_one_is_told(config: Path) -> None:
    assert refusal(config, "--run.steps=0 --run.seed=-1").count("out of range") == 1


# As a user meets it -------------------------------------------------------------------------------------------------

# Python imports sitecustomize by itself; it notes at exit what the program had imported.
WITNESS = """
import atexit, os, sys
atexit.register(lambda: open(os.environ["WITNESS"], "w").write(" ".join(m for m in sys.modules if "." not in m)))
"""


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The only line that the program said, after checking that it ended as it has to."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("megatron_rlvr: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config.yaml", "--selection.fraction", "1.5"], "selection.fraction 1.5 is out of range; give at most 1"),
        (["config.yaml", "--run.stepz=3", "--check"], "unknown key run.stepz; did you mean run.steps?"),
        (["broken.yaml"], "broken.yaml, line 2: not valid YAML"),
        (["none.yaml"], "none.yaml does not exist; give a settings file"),
        (["--run.steps", "3"], "the first argument is not a settings file; give CONFIG.yaml"),
        ([], "the first argument is not a settings file; give CONFIG.yaml"),
        (["config.yaml"], "model holds no config.json; give the folder of a Hugging Face model"),
    ],
    ids=["value", "key", "yaml", "missing", "flag first", "nothing", "model"],
)
def test_the_program_says_one_line_and_imports_no_torch(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(REQUIRED, encoding="utf-8")
    (tmp_path / "broken.yaml").write_text("run:\n\tdir: x\n", encoding="utf-8")
    (tmp_path / "sitecustomize.py").write_text(WITNESS, encoding="utf-8")
    witness = tmp_path / "witness"
    done = tiny.run_train(*arguments, cwd=tmp_path, search=[tmp_path], variables={"WITNESS": str(witness)})
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


def test_several_ranks_without_torchrun_are_told_how_to_start(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    line = one_line(tiny.run_train(write_config(parallel={"tensor": 2}), cwd=tmp_path))
    assert "2 ranks are needed" in line
    assert "torchrun --nproc-per-node 2" in line


def test_weights_that_do_not_belong_to_the_config_are_one_line(
    write_config: Callable[..., Path], model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "three_layers"
    shutil.copytree(model, broken)
    changed = json.loads((broken / "config.json").read_text()) | {"num_hidden_layers": 3, "layer_types": None}
    (broken / "config.json").write_text(json.dumps(changed))
    done = tiny.run_train(write_config(model={"path": str(broken)}), cwd=tmp_path)
    line = one_line(done)
    assert f"{broken} lacks model.layers.2." in line
    assert "config.json" in line


def test_under_torchrun_a_bad_setting_is_said_once_and_all_ranks_leave(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(REQUIRED, encoding="utf-8")
    done = tiny.run_train("config.yaml", "--selection.fraction=2", cwd=tmp_path, ranks=2)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("megatron_rlvr:")]
    assert said == ["megatron_rlvr: selection.fraction 2 is out of range; give at most 1"]
    assert done.stdout == ""
