"""The recipes in examples/: each passes `--check` for its ranks on the published shapes, and has the paper's values."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from megatron_rlvr.config import Settings
from megatron_rlvr.config.layers import read_layers
from megatron_rlvr.config.loading import load_settings, to_yaml
from megatron_rlvr.data.prompts import PromptFile, load_prompts
from megatron_rlvr.data.tokenizer import load_tokenizer
from megatron_rlvr.reward.math import math_reward
from megatron_rlvr.startup.describe import describe_first_prompt, describe_plan
from megatron_rlvr.startup.golds import describe_golds
from megatron_rlvr.startup.layout_checks import check_megatron
from megatron_rlvr.startup.resolve import Resolved, resolve

EXAMPLES = tiny.CHECKOUT / "examples"
PUBLISHED = Path(__file__).parent / "published"
MODELS = ("qwen3_8b", "qwen3_14b", "qwen3_32b")
RECIPES = [
    f"{model}/{kind}_{size}" for model in MODELS for kind in ("forking", "all_tokens") for size in ("20k", "29k")
]

BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


def settings_of(recipe: str, *flags: str) -> Settings:
    return load_settings(EXAMPLES / f"{recipe}.yaml", list(flags))


def values_of(recipe: str) -> dict[str, Any]:
    """{section.key: value} of all settings."""
    dumped = settings_of(recipe).model_dump()
    return {f"{section}.{key}": value for section, values in dumped.items() for key, value in values.items()}


def differences(one: str, other: str) -> set[str]:
    mine, theirs = values_of(one), values_of(other)
    assert mine.keys() == theirs.keys()
    return {key for key in mine if mine[key] != theirs[key]}


def numbers_of(model: str) -> dict[str, int]:
    """{name: number} of the numbers in run.sh."""
    text = (EXAMPLES / model / "run.sh").read_text()
    return {name: int(value) for name, value in re.findall(r"\b([A-Z_]+)=(\d+)\b", text)}


# Data ----------------------------------------------------------------------------------------------------------------


def prepare(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_rlvr.cli", "data", "prepare", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=tiny.environment(), capture_output=True, text=True, check=False)


def dapo_row(text: str, answer: str, index: str, *, instructed: bool = True) -> dict[str, Any]:
    """A row of DAPO-Math-17k as BytedTsinghua-SIA publishes it."""
    content = BEFORE + text + AFTER if instructed else text
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": content, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder data/ of the recipes, made by rlvr data prepare from files in the published layouts."""
    folder = tmp_path_factory.mktemp("published_data")
    additions = [(f"What is {i} + {2 * i}?", str(3 * i)) for i in range(600)]
    copies = [dapo_row(text, answer, f"uuid-{text}") for _ in range(3) for text, answer in additions]
    tiny.write_rows(folder / "dapo-math-17k.parquet", copies)
    tiny.write_aime(folder / "aime24.parquet")
    tiny.write_rows(folder / "aime25.jsonl", [{"problem": t, "answer": str(n), "id": str(i)} for i, (t, n) in
                                              enumerate(tiny.PROBLEMS)])  # fmt: skip
    for published, set_name, name in (
        ("dapo-math-17k.parquet", "dapo-math-17k", "dapo_math_17k"),
        ("aime24.parquet", "aime24", "aime24"),
        ("aime25.jsonl", "aime25", "aime25"),
    ):
        out = folder / f"data/{name}.jsonl"
        done = prepare(set_name, folder / published, "--frame", "paper", "--out", out, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder / "data"


def test_dapo_loses_duplicates_and_instructions_and_gets_the_papers_prompt(tmp_path: Path) -> None:
    rows = [dapo_row("What is $1+1$?\u2028So?", "2", "a"), dapo_row("Twice?", "4", "b"), dapo_row("Twice?", "5", "c")]
    rows = [*rows * 100, dapo_row("Bare", "7", "d", instructed=False)]
    source = tiny.write_rows(tmp_path / "dapo.parquet", rows)
    done = prepare("dapo-math-17k", source, "--frame", "paper", "--out", "new/dapo.jsonl", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "new/dapo.jsonl: 4 problems from 301 rows, 297 repeated rows omitted; DAPO's instructions removed from 300 "
        "rows; problems with more than one answer, all kept: 1; expected 1,791,700 rows, found 301; not the published "
        "file, or not all of it\n"
    )
    asked = "\nPlease reason step by step, and put your final answer within \\boxed{}.\n\nAssistant:\n"
    lines = (tmp_path / "new/dapo.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [
        {"id": 1, "prompt": f"User:\nWhat is $1+1$?\u2028So?{asked}", "answer": "2", "source": "math_dapo"},
        {"id": 2, "prompt": f"User:\nTwice?{asked}", "answer": "4", "source": "math_dapo"},
        {"id": 3, "prompt": f"User:\nTwice?{asked}", "answer": "5", "source": "math_dapo"},
        {"id": 4, "prompt": f"User:\nBare{asked}", "answer": "7", "source": "math_dapo"},
    ]


def test_all_published_layouts_of_aime_give_the_same_file(tmp_path: Path) -> None:
    problems = [(f"Problem {i}: find $n$ with $n^2={i * i}$.", str(i)) for i in range(30)]
    tiny.write_rows(tmp_path / "h4.parquet", [
        {"id": 60 + i, "problem": text, "solution": "s", "answer": answer, "url": "u", "year": "2024"}
        for i, (text, answer) in enumerate(problems)])  # fmt: skip
    repeated = [dapo_row(text, answer, str(i)) for _ in range(32) for i, (text, answer) in enumerate(problems)]
    tiny.write_rows(tmp_path / "verl.parquet", repeated)
    halves = [
        [{"question": text, "answer": answer} for text, answer in part] for part in (problems[:15], problems[15:])
    ]
    tiny.write_rows(tmp_path / "I.jsonl", halves[0])
    tiny.write_rows(tmp_path / "II.jsonl", halves[1])
    tiny.write_rows(tmp_path / "own.jsonl", [{"Problem": text, "Answer": int(answer)} for text, answer in problems])
    found = []
    for number, files in enumerate([
        ["h4.parquet"], ["verl.parquet"], ["I.jsonl", "II.jsonl"],
        ["own.jsonl", "--problem-key", "Problem", "--answer-key", "Answer"],
    ]):  # fmt: skip
        done = prepare("aime24", *files, "--out", f"{number}.jsonl", cwd=tmp_path)
        assert done.stdout.startswith(f"{number}.jsonl: 30 problems from {960 if number == 1 else 30} rows"), (
            done.stderr
        )
        found.append([(row["prompt"], row["answer"]) for row in rows_of(tmp_path / f"{number}.jsonl")])
    assert found[1:] == found[:1] * 3


def test_prepared_problems_are_read_by_the_policy_and_graded_by_the_reward(data: Path, tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path, chat_template=tiny.TEMPLATE)
    tokenizer = load_tokenizer(tmp_path)
    settings = settings_of("qwen3_8b/forking_20k").data
    prompts = load_prompts(
        [PromptFile(data / "dapo_math_17k.jsonl")], tokenizer, max_prompt_tokens=2048, template=settings.template
    )
    rows = rows_of(data / "dapo_math_17k.jsonl")
    assert len(prompts) == len(rows) == 600
    assert [tokenizer.decode(prompt.token_ids) for prompt in prompts.prompts] == [row["prompt"] for row in rows]
    assert math_reward(prompts.prompts[7], "So it is $\\boxed{21}$.")
    assert not math_reward(prompts.prompts[7], "So it is $\\boxed{22}$.")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["none.parquet"], "none.parquet is not a file; check the path"),
        (["good.jsonl", "--frame", "Solve: {question}"], "--frame='Solve: {question}': no {problem} in it"),
        (["chat.jsonl"], "chat/1 has 2 chat messages"),
        (["good.jsonl", "bad.jsonl"], "bad.jsonl, line 1: no column prompt"),
    ],
)
def test_rows_that_cannot_be_prepared_are_one_line_and_leave_the_old_file(
    arguments: list[str], part: str, tmp_path: Path
) -> None:
    tiny.write_rows(tmp_path / "good.jsonl", [{"problem": "p", "answer": "1"}])
    tiny.write_rows(tmp_path / "bad.jsonl", [{"text": "p"}])
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]
    tiny.write_rows(tmp_path / "chat.jsonl", [{"prompt": turns, "answer": "1"}])
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    done = prepare("aime24", *arguments, "--out", out, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert part in done.stderr
    assert done.stderr.count("\n") == 1
    assert out.read_text() == "old"


# Shapes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "billions", "without_embeddings"),
    [("qwen3_8b", 8.2, 6.95), ("qwen3_14b", 14.8, 13.2), ("qwen3_32b", 32.8, 31.2)],  # Qwen's model cards
)
def test_the_published_configs_have_the_published_numbers_of_parameters(
    model: str, billions: float, without_embeddings: float
) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        built = Qwen3ForCausalLM(Qwen3Config.from_dict(json.loads((PUBLISHED / f"{model}.json").read_text())))
    sizes = {name: parameter.numel() for name, parameter in built.named_parameters()}
    embeddings = sizes["model.embed_tokens.weight"] + sizes["lm_head.weight"]
    assert round(sum(sizes.values()) / 1e9, 1) == billions
    assert (sum(sizes.values()) - embeddings) / 1e9 == pytest.approx(without_embeddings, abs=0.05)


def test_the_configuration_for_one_gpu_fits_into_16_and_24_gb_as_the_readme_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from megatron_rlvr.hf.families import parameter_count
    from megatron_rlvr.planner.command import main

    recipe, config = EXAMPLES / "qwen3_0_6b" / "one_gpu_24gb.yaml", PUBLISHED / "qwen3_0_6b.json"
    model, settings = json.loads(config.read_text()), load_settings(recipe)
    parameters = parameter_count(model)
    assert round(parameters / 1e9, 1) == 0.6  # the model card
    flags = ["--model", str(config), "--gpus", "1", "--gpu", "rtx4090", "--layout", "tensor=1,pipeline=1", "--json"]
    assert main([str(recipe), *flags], "plan") == 0
    training = json.loads(capsys.readouterr().out)["best"]["memory"]["peak"]
    cached = model["num_hidden_layers"] * 2 * model["num_key_value_heads"] * model["head_dim"] * 2
    engine = 2 * parameters
    assert [round(size / 2**30, 1) for size in (training, engine, 16384 * cached)] == [11.2, 1.1, 1.8]
    assert training + engine + 16384 * cached < 15 * 2**30
    assert settings.rollout.max_batch_tokens == 32768
    assert training + engine + 32768 * cached < 22 * 2**30


# The check -----------------------------------------------------------------------------------------------------------


def write_sparse_weights(model: Path) -> None:
    """Write the header of the weights that transformers has for a config.json; their bytes take no room on the disk."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).state_dict()
    header, end = {}, 0
    for name, tensor in weights.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (model / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture
def checkout(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes a folder with all files that a recipe names: the model has the published shape, its weights are a hole."""

    def lay_out(recipe: str) -> Path:
        model = tmp_path / settings_of(recipe).model.path
        model.mkdir(parents=True)
        shutil.copy(PUBLISHED / f"{recipe.split('/')[0]}.json", model / "config.json")
        write_sparse_weights(model)
        tiny.write_tokenizer(model)
        (tmp_path / "data").symlink_to(data)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("WORLD_SIZE", str(numbers_of(recipe.split("/")[0])["RANKS"]))
        return tmp_path

    return lay_out


def checked(recipe: str, *flags: str) -> Resolved:
    """The resolved settings of a recipe with flags, checked as by `--check`."""
    resolved = resolve(settings_of(recipe, *flags))
    check_megatron(resolved.settings, resolved.hf_config, kernels=False)
    return resolved


LAYOUTS = {
    "qwen3_8b": "8 = tensor 4 x data 2 with sequence parallel",
    "qwen3_14b": "16 = tensor 4 x data 4 with sequence parallel",
    "qwen3_32b": "32 = tensor 8 x data 4 with sequence parallel",
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_accepted_for_its_ranks(recipe: str, checkout: Callable[[str], Path]) -> None:
    checkout(recipe)
    plan = dict(line.split(maxsplit=1) for line in describe_plan(checked(recipe)).splitlines())
    model, _, name = recipe.partition("/")
    assert plan["ranks"] == LAYOUTS[model]
    assert plan["prompts"] == "600 from 1 file(s)"
    assert plan["evaluation"] == (
        "aime24 (20 problems), aime25 (20 problems) x 32 completions, before and after, every 5 steps"
    )
    assert plan["run"] == f"100 steps into runs/{recipe}"
    whole = "all response tokens" in plan["mask"]
    assert whole == name.startswith("all_tokens")


def test_the_launch_script_prints_the_plan(checkout: Callable[[str], Path]) -> None:
    folder = checkout("qwen3_32b/forking_20k")
    command: list[str | Path] = [EXAMPLES / "qwen3_32b/run.sh", "forking_20k", "--check", "--run.seed", "3"]
    environment = tiny.environment(PYTHON=sys.executable)  # without WORLD_SIZE
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    resolved = checked("qwen3_32b/forking_20k", "--run.seed", "3")
    settings, plan, prompt = to_yaml(resolved.settings), describe_plan(resolved), describe_first_prompt(resolved)
    assert done.stdout == f"{settings}\n{plan}\n{describe_golds(resolved)}\n\n{prompt}\n"


@pytest.mark.parametrize("model", MODELS)
def test_the_launch_script_checks_for_the_recipes_ranks(model: str, tmp_path: Path) -> None:
    """A stand-in for python prints its arguments."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$WORLD_SIZE" "$@"\n')
    python.chmod(0o755)
    command: list[str | Path] = [EXAMPLES / model / "run.sh", "all_tokens_29k", "--run.seed", "3", "--check"]
    environment = tiny.environment(PYTHON=str(python))
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    ranks, config = numbers_of(model)["RANKS"], EXAMPLES / model / "all_tokens_29k.yaml"
    assert said == f"{ranks} -m megatron_rlvr.train {config} --run.seed 3 --check\n"


# Values of the recipes -----------------------------------------------------------------------------------------------

# Copied by hand from arXiv 2506.01939v2, section 5.2, and the script that its authors released.
PAPER = {
    "data.max_prompt_tokens": 2048,
    "rollout.group_size": 16,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.dynamic_sampling": True,
    "rollout.max_rounds": 10,
    "rollout.overlap": "none",
    "reward.overlong_buffer": 4096,
    "advantage.estimator": "grpo",
    "loss.objective": "dapo",
    "loss.clip_low": 0.2,
    "loss.clip_high": 0.28,
    "loss.dual_clip": 10.0,
    "loss.rollout_correction": "none",
    "batch.prompts": 512,
    "batch.mini_batch_prompts": 32,
    "optimizer.learning_rate": 1e-6,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 10,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_grad": 1.0,
    "evaluate.group_size": 32,
    "evaluate.temperature": 1.0,
    "evaluate.top_p": 0.7,
}
MASK = {"forking": ("top", 0.2), "all_tokens": ("all", 1.0)}
CAP = {"20k": 20480, "29k": 29696}


@pytest.mark.parametrize("recipe", RECIPES)
def test_hyper_parameters_are_those_of_the_paper(recipe: str) -> None:
    values = values_of(recipe)
    kind, size = re.fullmatch(r".*/(forking|all_tokens)_(20k|29k)", recipe).groups()  # type: ignore[union-attr]
    assert {key: values[key] for key in PAPER} == PAPER
    assert (values["selection.keep"], values["selection.fraction"]) == MASK[kind]
    assert values["rollout.max_response_tokens"] == CAP[size]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_value_of_the_paper_is_written_in_the_recipe(recipe: str) -> None:
    """A default may change; a recipe must not."""
    layers = read_layers(EXAMPLES / f"{recipe}.yaml", lambda path: yaml.safe_load(path.read_text()))
    stated = {f"{section}.{key}" for layer in layers for section, values in layer.items() for key in values}
    implied = {"rollout.overlap", "loss.rollout_correction"}  # the paper does not mention them
    assert PAPER.keys() - stated == implied


@pytest.mark.parametrize("model", MODELS)
def test_one_recipe_of_a_model_is_whole_and_the_others_say_what_differs(model: str) -> None:
    lines = {path.stem: path.read_text().split("extends: ") for path in (EXAMPLES / model).glob("*.yaml")}
    assert [name for name, parts in lines.items() if len(parts) == 1] == ["forking_20k"]
    assert all(len(parts[1].splitlines()) <= 10 for name, parts in lines.items() if name != "forking_20k")


@pytest.mark.parametrize("model", MODELS)
def test_a_baseline_differs_only_in_the_mask(model: str) -> None:
    mask = {"selection.keep", "selection.fraction", "run.dir"}
    assert differences(f"{model}/forking_20k", f"{model}/all_tokens_20k") == mask
    # Its second stage starts from the export of its own first stage.
    assert differences(f"{model}/forking_29k", f"{model}/all_tokens_29k") == mask | {"model.path"}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["forking", "all_tokens"])
def test_the_second_stage_starts_from_the_export_of_the_first_and_differs_in_length(kind: str, model: str) -> None:
    first, second = f"{model}/{kind}_20k", f"{model}/{kind}_29k"
    assert differences(first, second) == {"run.dir", "model.path", "rollout.max_response_tokens"}
    assert settings_of(second).model.path == f"{settings_of(first).run.dir}/hf"
    assert settings_of(first).run.export


@pytest.mark.parametrize("model", MODELS)
def test_servers_and_ranks_of_settings_and_launch_script_agree(model: str) -> None:
    numbers, settings = numbers_of(model), settings_of(f"{model}/forking_20k")
    if settings.rollout.colocated:
        assert numbers["SERVERS"] * numbers["SERVER_TENSOR"] == numbers["RANKS"] == 8
        assert len(settings.rollout.servers) == numbers["SERVERS"]
        assert settings.sync.method == "disk"  # a process group cannot have two ranks on one GPU
    else:
        assert numbers["TRAIN_NODES"] * numbers["RANKS_PER_NODE"] == numbers["RANKS"]
        assert len(settings.rollout.servers) == numbers["SERVER_NODES"] * 8 // numbers["SERVER_TENSOR"]
        assert settings.sync.method == "distributed"
    heads = json.loads((PUBLISHED / f"{model}.json").read_text())["num_key_value_heads"]
    assert heads % numbers["SERVER_TENSOR"] == 0


GPU_BYTES = 79.6 * 2**30  # of an H100 with 80 GB, as its driver counts


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.endswith("29k")])  # the longer is the larger
def test_training_and_servers_fit_on_gpus_of_80_gb(recipe: str, checkout: Callable[[str], Path]) -> None:
    """According to the planner, whose own tests compare it with measurements."""
    checkout(recipe)
    settings, numbers = settings_of(recipe), numbers_of(recipe.split("/")[0])
    shared = settings.rollout.colocated
    servers = 0 if shared else numbers["SERVER_NODES"] * 8
    command: list[str | Path] = [
        sys.executable,
        tiny.CHECKOUT / "tools/plan.py",
        EXAMPLES / f"{recipe}.yaml",
        "--gpu",
        "h100",
        "--json",
    ]
    command += ["--gpus", str(numbers["RANKS"] + servers), "--server-tensor", str(numbers["SERVER_TENSOR"])]
    command += ["--server-gpus", str(servers)] if servers else []
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    best = json.loads(done.stdout)["best"]
    assert (best["parallel"]["tensor"], best["fits"]) == (settings.parallel.tensor, True)
    if shared:  # also if the trainer's allocator keeps all memory of its peak
        share = re.search(
            r"^SERVER_SHARE=([0-9.]+)$", (EXAMPLES / recipe).with_name("run.sh").read_text(), re.MULTILINE
        )
        assert share is not None
        assert best["memory"]["peak"] + float(share[1]) * GPU_BYTES < 0.9 * GPU_BYTES


# Launch scripts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["qwen3_14b", "qwen3_32b"])
def test_the_launch_script_submits_the_recipe_with_its_nodes(model: str, tmp_path: Path) -> None:
    """A stand-in for sbatch prints its arguments; tests/cluster uses a real one."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\necho "$SERVER_NODES $SERVER_TENSOR $RANKS_PER_NODE"; printf "%s\\n" "$@"\n')
    sbatch.chmod(0o755)
    environment = tiny.environment(PYTHON=sys.executable)
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    command: list[str | Path] = [EXAMPLES / model / "run.sh", "all_tokens_29k", "--run.steps", "7"]
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    exported, *arguments = said.splitlines()
    numbers = numbers_of(model)
    assert exported == f"{numbers['SERVER_NODES']} {numbers['SERVER_TENSOR']} 8"
    place = arguments.index(str(EXAMPLES / "cluster/slurm.sbatch"))
    options = dict(zip(arguments[:place:2], arguments[1:place:2], strict=True))
    assert options["--nodes"] == str(numbers["TRAIN_NODES"] + numbers["SERVER_NODES"])
    assert options["--gpus-per-node"] == "8"
    assert arguments[place + 1 :] == [str(EXAMPLES / model / "all_tokens_29k.yaml"), "--run.steps", "7"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("arguments", "part"), [([], "name a recipe"), (["forking_30k"], "forking_30k is no recipe")])
def test_the_launch_script_names_the_recipes(arguments: list[str], part: str, model: str, tmp_path: Path) -> None:
    command: list[str | Path] = [EXAMPLES / model / "run.sh", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=tiny.environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert part in done.stderr
    assert "all_tokens_29k" in done.stderr


def test_wrong_settings_are_refused_before_a_server_starts(tmp_path: Path) -> None:
    command: list[str | Path] = [EXAMPLES / "qwen3_8b/run.sh", "forking_20k", "--run.stepz", "3"]
    environment = tiny.environment(PYTHON=sys.executable)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "run: unknown key run.stepz; did you mean run.steps?\n"
    assert list(tmp_path.iterdir()) == []


def test_the_launcher_of_one_node_gets_the_recipes_model_and_servers(checkout: Callable[[str], Path]) -> None:
    """Without a GPU the launcher reads its command and then finds too few GPUs."""
    folder = checkout("qwen3_8b/forking_29k")
    python = folder / "python"  # of an environment with SGLang
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    environment = tiny.environment(PYTHON=sys.executable, SERVER_PYTHON=str(python), CUDA_VISIBLE_DEVICES="")
    command: list[str | Path] = [EXAMPLES / "qwen3_8b/run.sh", "forking_29k"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--servers 2 x --tensor 4 needs 8 GPUs and this machine has 0 visible" in done.stderr
    shutil.rmtree(folder / "runs")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert "runs/qwen3_8b/forking_20k/hf is no model" in done.stderr


def test_links_and_paths_in_the_readme_exist() -> None:
    text = (EXAMPLES / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (EXAMPLES / link).exists(), link
    for path in re.findall(r"\b(?:examples|tools)/[\w/.]+\b", text):
        assert (tiny.CHECKOUT / path).exists(), path


SCRIPTS = sorted(
    path
    for pattern in ("examples/*.sh", "examples/*/*.sh", "examples/*/*.sbatch", "tools/*.sh", "tests/*.sh", ".ci/run")
    for path in tiny.CHECKOUT.glob(pattern)
)


def test_shellcheck_finds_nothing() -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    command: list[str | Path] = [
        shellcheck,
        "--severity",
        "warning",
        "--exclude",
        "SC1007",
        "-x",
        "-P",
        "SCRIPTDIR",
        *SCRIPTS,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert len(SCRIPTS) > 8
    assert (done.stdout, done.stderr) == ("", "")
