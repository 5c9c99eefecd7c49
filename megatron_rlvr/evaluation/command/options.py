"""The command line of ``rlvr evaluate``, and the settings that it stands for. Imports no torch.

Prompts, sampling and graders are set by the same keys as in training, so that an accuracy before and after means the
same. ``--like RUN`` takes their values from a run, and flags win over it.
"""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rlvr.command_line import Parser, path, small_int
from megatron_rlvr.config import Settings, SettingsError
from megatron_rlvr.config.loading import load_settings, parse_flags, set_key, validate
from megatron_rlvr.input_files import is_file

DESCRIPTION = """\
Say how good a model is on problem sets, and how sure that is.

    rlvr evaluate TARGET --sets aime24.jsonl math500.parquet --samples 16 --out OUT
    rlvr evaluate RUN --step 40 --out OUT             a step of a run, with the prompts, sampling and reward of the run
    rlvr evaluate MODEL --like RUN --out OUT          another model, with those of a run
    rlvr evaluate MODEL ... --servers URL URL         on SGLang servers that are running
    rlvr evaluate MODEL ... --serve gpu               on SGLang servers that this command starts and stops
    rlvr evaluate --compare OUT_A OUT_B               are two models different, paired by problem
    rlvr evaluate --regrade OUT --out NEW             grade the recorded responses again, with another reward if given

TARGET is a Hugging Face folder, a checkpoint, or the folder of a run. With --servers it may be left out: the servers'
own model folder is then read.

Every completion is written to OUT/records as soon as it is graded. Ctrl-C ends with what there is; the same command
resumes it, and samples and grades nothing twice. OUT/summary.json has the metrics.

Keys of the settings are flags, as in `rlvr train`, which explains them (rlvr train --help):
    --data.template, template_kwargs, system, suffix, max_prompt_tokens        how problems become prompts
    --rollout.max_response_tokens, stop                                        the end of a response
    --rollout.max_batch_rows, max_batch_tokens                                 embedded engine
    --rollout.api_key_file, max_inflight, retries, server_timeout_seconds      servers
    --evaluate.sets, group_size, temperature, top_p, pass_at                   sets with columns of their own; sampling
    --reward.function, answer_after, correct, incorrect, timeout_seconds, workers
    --model.tokenizer, dtype    --run.seed

Exit status: 0; 1 after a fault; 2 and one line on stderr for wrong input; 128 + n after signal n.
"""

_PROMPTS = ("template", "template_kwargs", "system", "suffix", "max_prompt_tokens")
_EMBEDDED = ("max_batch_rows", "max_batch_tokens")
_SERVERS = ("api_key_file", "max_inflight", "retries", "server_timeout_seconds")
_REWARD = ("function", "answer_after", "correct", "incorrect", "timeout_seconds", "workers")
_KEYS = {
    "data": _PROMPTS,
    "rollout": ("max_response_tokens", "stop", *_EMBEDDED, *_SERVERS),
    "evaluate": ("sets", "group_size", "temperature", "top_p", "pass_at"),
    "reward": _REWARD,
    "model": ("tokenizer", "dtype"),
    "run": ("seed",),
}
_FLAG = re.compile(r"--[a-z_]+\.[^\s=]+(=.*)?", re.DOTALL)


def parse(arguments: Sequence[str], program: str) -> argparse.Namespace:
    """Return the options; ``flags`` are those with the key of a setting, ``server_flags`` follow ``--``.

    Exits with status 2 and one line on stderr if they cannot be read or do not fit together.
    """
    words, server_flags = list(arguments), []
    if "--" in words:
        index = words.index("--")
        words, server_flags = words[:index], words[index + 1 :]
    words, flags = _split_flags(words)
    parser = _parser(program)
    options = parser.parse_args(words)
    options.flags, options.server_flags = flags, server_flags
    if problem := _problem(options):
        parser.error(problem)
    return options


def _parser(program: str) -> Parser:
    parser = Parser(
        program,
        description=DESCRIPTION,
        usage="%(prog)s [TARGET] [FLAGS] [--section.key VALUE ...] [-- SGLANG_FLAG ...]",
    )
    add = parser.add_argument
    add("target", nargs="?", type=path, metavar="TARGET", help="model, checkpoint or run to evaluate")
    add(
        "--step",
        type=small_int,
        metavar="N",
        help="step of the run TARGET (default: its export, or its latest checkpoint)",
    )
    add("--sets", nargs="+", metavar="FILE", help="problem sets (.jsonl, .parquet), or NAME=FILE (default: of --like)")
    add(
        "--samples",
        type=small_int,
        metavar="N",
        help="completions for each problem: evaluate.group_size (default: of --like, or 32)",
    )
    add("--out", type=path, metavar="DIR", help="folder to write, or to resume")
    add(
        "--like",
        type=path,
        metavar="RUN",
        help="run whose prompts, sampling and reward are used (default: a run TARGET)",
    )
    add(
        "--servers",
        nargs="+",
        metavar="URL",
        help="SGLang servers to sample on (default: this process, with transformers)",
    )
    add("--serve", choices=("gpu", "cpu"), help="start SGLang servers on this machine, and stop them at the end")
    add("--serve-count", type=small_int, metavar="N", help="number of servers (default: as many as the GPUs allow)")
    add("--serve-tensor", type=small_int, metavar="N", help="GPUs per server (default: 1)")
    add("--serve-port", type=small_int, metavar="N", help="port of the first server (default: 30000)")
    add("--serve-python", type=path, metavar="PATH", help="Python that has SGLang (default: this one)")
    add(
        "--ranks",
        type=small_int,
        metavar="N",
        help="ranks of the embedded engine on this machine (default: one per GPU)",
    )
    add(
        "--two-temperatures",
        nargs=3,
        type=float,
        metavar=("THRESHOLD", "HIGH", "LOW"),
        help="temperature HIGH for tokens whose entropy is above THRESHOLD nats, LOW for the others",
    )
    add("--compare", nargs="+", type=path, metavar="OUT", help="evaluations to compare, each with the first")
    add("--regrade", type=path, metavar="OUT", help="evaluation whose recorded responses are graded again")
    add("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _split_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words without, and those of, flags ``--section.key VALUE``."""
    rest, flags = [], []
    left = list(words)
    while left:
        word = left.pop(0)
        if not _FLAG.fullmatch(word):
            rest.append(word)
            continue
        flags.append(word)
        if "=" not in word and left and not left[0].startswith("--"):
            flags.append(left.pop(0))
    return rest, flags


def _problem(options: argparse.Namespace) -> str | None:
    """Return what is wrong with the combination of options, and what to do."""
    given = {name for name, value in vars(options).items() if value not in (None, False, [])}
    if options.compare is not None:
        if len(options.compare) < 2:
            return "--compare: needs two evaluations or more; name their folders"
        if extra := sorted(given - {"compare", "json"}):
            return f"{_written(options, extra[0])}: has no effect with --compare; remove it"
        return None
    if options.regrade is not None:
        if extra := sorted(given - {"regrade", "json", "out", "flags"}):
            return f"{_written(options, extra[0])}: has no effect with --regrade; remove it"
    elif options.target is None and options.servers is None:
        return "no TARGET; give a model, a checkpoint or a run, or --servers URL"
    if options.out is None:
        return "--out is missing; give the folder to write, or to resume"
    serving = sorted(name for name in given if name.startswith(("serve_", "server_flags")))
    if serving and options.serve is None:
        return f"{_written(options, serving[0])}: has no effect without --serve; remove it"
    keys = {word.partition("=")[0] for word in options.flags}
    for name, key in (("sets", "--evaluate.sets"), ("samples", "--evaluate.group_size")):
        if name in given and key in keys:
            return f"--{name} and {key} set the same; remove one of them"
    for one, other in (("serve", "servers"), ("ranks", "servers"), ("ranks", "serve")):
        if {one, other} <= given:
            return f"--{one} and --{other} exclude each other; remove one of them"
    if options.two_temperatures is not None:
        if "--evaluate.temperature" in keys:
            return "--two-temperatures and --evaluate.temperature exclude each other; remove one of them"
        if not all(0 <= value < math.inf for value in options.two_temperatures):
            return "--two-temperatures: needs three finite values of at least 0: nats and two temperatures"
    if options.ranks is not None and options.ranks < 1:
        return f"--ranks {options.ranks}: not above 0; give the number of ranks on this machine"
    return None


def _written(options: argparse.Namespace, name: str) -> str:
    """Return an option as it is written on the command line."""
    first = {"target": "TARGET", "flags": next(iter(options.flags), ""), "server_flags": "--"}
    return first.get(name, f"--{name.replace('_', '-')}")


def settings_of(options: argparse.Namespace, model: Path, run: Path | None, servers: Sequence[str]) -> Settings:
    """Return the settings of an evaluation.

    Args:
        options: Result of `parse`.
        model: Folder with configuration and tokenizer.
        run: Run that TARGET belongs to, whose values are the defaults unless ``--like`` names another.
        servers: URLs of SGLang servers; empty for the embedded engine.

    Raises:
        SettingsError: For the first error found.
    """
    like = options.like or run
    values = _values_of(like, servers) if like is not None else {}
    values["model"] = values.get("model", {}) | {"path": str(model)}
    values["rollout"] = values.get("rollout", {})
    if servers:
        values["rollout"] |= {"engine": "sglang", "servers": list(servers)}
    evaluate = values.setdefault("evaluate", {})
    if options.sets is not None:
        evaluate["sets"] = [_set_file(text) for text in options.sets]
    if options.samples is not None:
        evaluate["group_size"] = options.samples
    if options.two_temperatures is not None:
        evaluate["temperature"] = 1.0  # of what the engine makes of the logits
    for key, value in parse_flags(options.flags):
        section, _, name = key.partition(".")
        if name.partition(".")[0] not in _KEYS.get(section, ()):
            raise SettingsError(f"--{key}: no setting of an evaluation; rlvr evaluate --help lists them")
        set_key(values, key, value)
    if not evaluate.get("sets"):
        raise SettingsError("--sets is missing; give the problem sets, or --like with a run that has some")
    # Sections that a run needs and an evaluation does not read.
    values["run"] = {"dir": str(options.out), "steps": 1} | values.get("run", {})
    values["data"] = values.get("data", {}) | {"train": ["-"]}
    values["reward"] = values.get("reward", {}) | {"overlong_buffer": 0}
    return validate(values)


def api_key_file(options: argparse.Namespace) -> str | None:
    """Return the file with the servers' key that the flags name, or the run that ``--like`` names; None without one."""
    values = _values_of(options.like, options.servers) if options.like is not None else {}
    for key, value in parse_flags(options.flags):
        if key == "rollout.api_key_file":
            return value if isinstance(value, str) else None
    return values.get("rollout", {}).get("api_key_file")


def _values_of(run: Path, servers: Sequence[str]) -> dict[str, Any]:
    """Return the values of a run that an evaluation takes."""
    config = run / "config.yaml"
    if not is_file(config):
        raise SettingsError(f"--like {run}: holds no config.yaml; give the folder of a run")
    settings = load_settings(config)
    has_servers = settings.rollout.engine == "sglang" or bool(settings.evaluate.servers)
    rollout = ["max_response_tokens", "stop"]
    if has_servers if servers else settings.rollout.engine == "embedded":
        rollout += _SERVERS if servers else _EMBEDDED
    evaluate = {"group_size", "temperature", "top_p", "pass_at"} if settings.evaluate.sets else set()
    return {
        "run": {"seed": settings.run.seed},
        "model": settings.model.model_dump(include={"tokenizer", "dtype"}),
        "data": settings.data.model_dump(include=set(_PROMPTS)),
        "rollout": settings.rollout.model_dump(include=set(rollout)),
        "reward": settings.reward.model_dump(include=set(_REWARD)),
        "evaluate": settings.evaluate.model_dump(include=evaluate | {"sets"}),
    }


def _set_file(text: str) -> dict[str, str]:
    name, equals, path = text.partition("=")
    file = {"path": path, "name": name} if equals and "/" not in name else {"path": text}
    if not file["path"]:
        raise SettingsError(f"--sets {text}: not a file, or NAME=FILE; correct it")
    return file
