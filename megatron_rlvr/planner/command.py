"""Command line of the planner: its options, the inputs of the plan that they describe, and the output."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rlvr.command_line import Parser, path, positive_int, share
from megatron_rlvr.config import ParallelSettings, Settings, SettingsError
from megatron_rlvr.config.loading import load_settings, validate
from megatron_rlvr.errors import InputError
from megatron_rlvr.hf.files import read_config
from megatron_rlvr.hf.gguf import model_folder
from megatron_rlvr.input_files import is_file, read_json_object
from megatron_rlvr.planner import report
from megatron_rlvr.planner.devices import DEVICES
from megatron_rlvr.planner.layouts import Plan, PlanInputs, layout_error, plan_with_least_recompute, ranked_plans
from megatron_rlvr.planner.roofline import Efficiency
from megatron_rlvr.planner.shapes import ModelShape
from megatron_rlvr.planner.workload import MEAN_PROMPT_SHARE, MEAN_RESPONSE_SHARE, Workload

DESCRIPTION = """\
Estimates memory, time and the best layouts of a run from config.json alone; needs no GPU and no weights.

    rlvr plan CONFIG.yaml --gpus 64 --gpu h100
    rlvr plan --model DIR --gpus 64 --gpu h100 --prompts 512 --group-size 16 \\
        --prompt-tokens 2048 --response-tokens 20480 --mean-response-tokens 8000

With CONFIG.yaml, model, lengths, batch and layout are the run's; its own layout is listed first, then others. With
--model, options give them instead. Every layout in the table is one that the trainer accepts, with the least activation
checkpointing (recompute) with which it fits. Below the table are memory by part and time by phase of the best layout
(or of the requested one), the assumption behind each estimate, and the settings to paste.

How much is known: bytes of weights, gradients, optimizer and KV cache are counted and exact to a percent; activations
to a few percent for this project's own layers, counted from the source for Transformer Engine's; seconds are a roofline
with given shares of the peaks, good for comparing layouts, and otherwise as accurate as --mfu, --bandwidth-share and
--mean-response-tokens. docs/planning.md has the formulas.

  columns   tp cp pp vp ep dp   parallel.tensor, context, pipeline, virtual_pipeline, expert; data-parallel replicas
            GiB, free           peak of training on the fullest GPU, and what remains of the memory it may use
            rollout .. total    seconds of a step's phases; tokens/s: response tokens trained on

Exit status: 0; 1 if the requested layout, or every layout, does not fit (the output says by how much); 2 and one line
on stderr if the input is wrong.
"""


def main(arguments: Sequence[str], program: str) -> int:
    """Print a plan and return the exit status: 0, or 1 if the requested layout, or every layout, does not fit.

    Exits with status 2 and one line on stderr if the input is wrong.

    Args:
        program: Name of the command in messages.
    """
    parser = _parser(program)
    options = parser.parse_args(list(arguments))
    try:
        inputs, own = _inputs(options)
        requested = _requested_plan(inputs, own, options)
    except InputError as error:
        parser.error(str(error))
    plans = ranked_plans(inputs)
    best = requested or (plans[0] if plans else None)
    if best is None:
        parser.error(
            layout_error(inputs, ParallelSettings())
            or f"--gpus {options.gpus}: no layout divides {inputs.ranks} training GPUs; give another number"
        )
    shown = [plan for plan in plans if plan.fits][: options.top] or plans[:1]
    if options.json:
        content = {"best": report.as_json(best), "ranked": [report.as_json(plan) for plan in shown]}
        text = json.dumps(content, indent=1)
    else:
        text = _tables(inputs, best, requested, shown)
    sys.stdout.write(text + "\n")
    return 0 if best.fits else 1


def _tables(inputs: PlanInputs, best: Plan, requested: Plan | None, shown: Sequence[Plan]) -> str:
    """Format the plans for people: assumptions, layouts, and the memory and time of the best one."""
    ignored = report.unmodeled_fields(inputs.settings.megatron)
    parts = ["\n".join([report.assumptions(inputs), *([ignored] if ignored else [])])]
    if requested:
        parts.append(f"requested layout\n{report.table([requested])}")
    title = "layouts that fit, fastest first" if shown[0].fits else "no layout fits; the closest is"
    parts += [f"{title}\n{report.table(shown)}", report.memory_table(best)]
    if best.fits:
        parts += [report.time_table(best), f"settings to paste\n{report.settings_yaml(best)}"]
    else:
        parts.append(report.explain_misfit(best))
    return "\n\n".join(parts)


def _parser(program: str) -> Parser:
    parser = Parser(
        program,
        description=DESCRIPTION,
        usage="%(prog)s (CONFIG.yaml | --model DIR) --gpus N --gpu TYPE [OPTIONS]",
    )
    add = parser.add_argument
    add("config", nargs="?", type=path, metavar="CONFIG.yaml", help="settings of a run, instead of --model and lengths")
    add("--gpus", type=positive_int, required=True, metavar="N", help="number of all GPUs, for servers and training")
    add("--gpu", choices=sorted(DEVICES), required=True, help="type of the GPUs")
    add("--model", type=path, metavar="DIR", help="model folder or config.json (default: model.path of CONFIG.yaml)")
    add("--prompts", type=positive_int, metavar="N", help="prompts of a training step (default 512)")
    add("--group-size", type=positive_int, metavar="N", help="responses per prompt (default 16)")
    add("--mini-batch-prompts", type=positive_int, metavar="N", help="prompts of an optimizer step (default 32)")
    add("--prompt-tokens", type=positive_int, metavar="N", help="maximum tokens of a prompt (default 2048)")
    add("--response-tokens", type=positive_int, metavar="N", help="maximum tokens of a response (default 20480)")
    add("--micro-batch-tokens", type=positive_int, metavar="N", help="batch.tokens_per_micro_batch (default 24576)")
    add("--mean-response-tokens", type=positive_int, metavar="N",
        help=f"mean tokens of a response (default {MEAN_RESPONSE_SHARE:g} of the maximum)")  # fmt: skip
    add("--mean-prompt-tokens", type=positive_int, metavar="N",
        help=f"mean tokens of a prompt (default {MEAN_PROMPT_SHARE:g} of the maximum)")  # fmt: skip
    add("--informative", type=share, default=1.0, metavar="X",
        help="share of the sampled groups with both correct and incorrect responses (default 1)")  # fmt: skip
    add("--server-gpus", type=positive_int, metavar="N",
        help="number of GPUs used by servers only (default: servers and training share all GPUs)")  # fmt: skip
    add("--server-tensor", type=positive_int, metavar="N", help="GPUs per server (default: the fastest choice)")
    add("--layout", metavar="A=N,B=N", help="estimate this layout, such as tensor=8,pipeline=2,context=1")
    add(
        "--recompute",
        choices=("none", "selective", "full"),
        help="recompute of --layout (default: the least that fits)",
    )
    add("--without-transformer-engine", action="store_true", help="use this project's own layers")
    add("--mfu", type=share, default=Efficiency.mfu, metavar="X",
        help="achieved share of the peak FLOP/s (default %(default)s)")  # fmt: skip
    add("--bandwidth-share", type=share, default=Efficiency.bandwidth, metavar="X",
        help="achieved share of the peak bandwidth of memory and links (default %(default)s)")  # fmt: skip
    add(
        "--top", type=positive_int, default=10, metavar="N", help="number of layouts in the table (default %(default)s)"
    )
    add("--json", action="store_true", help="print JSON in bytes and seconds instead of tables")
    return parser


# {option: (section, key) of the setting that it overrides}
_KEYS = {
    "prompts": ("batch", "prompts"),
    "group_size": ("rollout", "group_size"),
    "mini_batch_prompts": ("batch", "mini_batch_prompts"),
    "prompt_tokens": ("data", "max_prompt_tokens"),
    "response_tokens": ("rollout", "max_response_tokens"),
    "micro_batch_tokens": ("batch", "tokens_per_micro_batch"),
}


def _inputs(options: argparse.Namespace) -> tuple[PlanInputs, Settings | None]:
    """Return the inputs of the plan, and the settings of the run if CONFIG.yaml was given."""
    if options.config is None and options.model is None:
        raise SettingsError("no model is given; give CONFIG.yaml, or --model DIR")
    given = {name: getattr(options, name) for name in _KEYS if getattr(options, name) is not None}
    own = None
    if options.config is not None:
        flags = [f"--{section}.{key}={given[name]}" for name, (section, key) in _KEYS.items() if name in given]
        settings = own = load_settings(options.config, flags)
        folder = str(options.model or settings.model.path)
        max_inflight = settings.rollout.max_inflight if settings.rollout.engine == "sglang" else None
        if settings.rollout.engine == "sglang" and not settings.rollout.colocated and options.server_gpus is None:
            raise SettingsError(
                "rollout.colocated=false: servers have GPUs of their own; give their number with --server-gpus"
            )
    else:
        folder = str(options.model)
        settings, max_inflight = _placeholder_settings(folder, given, shared=options.server_gpus is None), None
    if options.server_gpus is not None and options.server_gpus >= options.gpus:
        raise SettingsError(
            f"--server-gpus {options.server_gpus}: leaves none of --gpus {options.gpus} for training; lower it"
        )
    mean_response, mean_prompt = _mean_lengths(settings, options)
    inputs = PlanInputs(
        settings=settings,
        shape=ModelShape.of(_read_config(Path(folder))),
        work=Workload.of(settings, mean_response, mean_prompt, options.informative, max_inflight),
        device=DEVICES[options.gpu],
        efficiency=Efficiency(options.mfu, options.bandwidth_share),
        gpus=options.gpus,
        server_gpus=options.server_gpus,
        server_tensor=options.server_tensor or _gpus_per_listed_server(own, options),
        transformer_engine=not options.without_transformer_engine,
    )
    _check_server_tensor(inputs)
    return inputs, own


def _mean_lengths(settings: Settings, options: argparse.Namespace) -> tuple[float, float]:
    """Return the mean tokens of a response and of a prompt."""
    caps = {"response": settings.rollout.max_response_tokens, "prompt": settings.data.max_prompt_tokens}
    means = {
        "response": options.mean_response_tokens or max(1.0, MEAN_RESPONSE_SHARE * caps["response"]),
        "prompt": options.mean_prompt_tokens or max(1.0, MEAN_PROMPT_SHARE * caps["prompt"]),
    }
    for name, mean in means.items():
        if mean > caps[name]:
            raise SettingsError(f"--mean-{name}-tokens {mean}: above the maximum of {caps[name]} tokens; lower it")
    return means["response"], means["prompt"]


def _check_server_tensor(inputs: PlanInputs) -> None:
    gpus, tensor = inputs.server_gpus or inputs.gpus, inputs.server_tensor or 1
    if gpus % tensor or inputs.shape.heads % tensor:
        raise SettingsError(
            f"--server-tensor {tensor}: does not divide the {gpus} GPUs of servers and the model's "
            f"{inputs.shape.heads} attention heads; give a common divisor"
        )


def _gpus_per_listed_server(own: Settings | None, options: argparse.Namespace) -> int | None:
    """Return the GPUs per server if the listed `rollout.servers` divide the GPUs evenly; None for a router's URL."""
    gpus, listed = options.server_gpus or options.gpus, len(own.rollout.servers) if own is not None else 0
    fits = listed and gpus % listed == 0 and gpus // listed <= DEVICES[options.gpu].gpus_per_node
    return gpus // listed if fits else None


def _read_config(path: Path) -> dict[str, Any]:
    """Read config.json from a model's folder, or from the path of the file itself; a GGUF file is unpacked."""
    path = model_folder(path)
    if not is_file(path):
        return read_config(path)
    return read_json_object(path, SettingsError, "give the config.json of a model")


def _placeholder_settings(folder: str, given: dict[str, int], shared: bool) -> Settings:
    """Return settings with the values of the options and placeholders for everything that a plan does not need.

    Args:
        given: {option: value} for the options in ``_KEYS``.
        shared: True if servers and training share their GPUs.
    """
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": "plan", "steps": 1},
        "model": {"path": folder},
        "data": {"train": "plan.jsonl"},
        "reward": {"overlong_buffer": 0},
        "rollout": {"engine": "sglang", "servers": ["http://plan:30000"], "colocated": shared},
        "sync": {"method": "disk" if shared else "distributed"},
    }
    for name, value in given.items():
        section, key = _KEYS[name]
        values.setdefault(section, {})[key] = value
    return validate(values)


def _requested_plan(inputs: PlanInputs, own: Settings | None, options: argparse.Namespace) -> Plan | None:
    """Return the plan of --layout, or of the run's own layout; SettingsError if the trainer rejects it."""
    megatron: dict[str, Any]
    if options.layout is None:
        if options.recompute is not None:
            raise SettingsError(f"--recompute {options.recompute}: has no effect without --layout; give both")
        if own is None:
            return None
        parallel = own.parallel
        megatron = {"recompute_granularity": None} | own.megatron
    else:
        parallel = _parse_layout(inputs.settings, options.layout)
        megatron = {"use_distributed_optimizer": True} | inputs.settings.megatron
        if options.recompute is not None:
            modules = ["moe" if any(inputs.shape.moe_layers) else "mlp"]
            recompute: dict[str, Any] = {"recompute_granularity": options.recompute, "recompute_modules": modules}
            megatron |= recompute
    if problem := layout_error(inputs, parallel):
        raise SettingsError(problem)
    return plan_with_least_recompute(inputs, parallel, megatron)


def _parse_layout(settings: Settings, text: str) -> ParallelSettings:
    """Parse a layout such as `tensor=8,pipeline=2`; tensor parallelism turns on sequence parallelism by default."""
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not (re.fullmatch("[0-9]{1,9}", value) or value in ("true", "false")):
            raise SettingsError(f"--layout {part[:60]!r}: not NAME=NUMBER; write it as in tensor=8,pipeline=2")
        values[name.strip()] = int(value) if value.isdecimal() else value == "true"
    values.setdefault("sequence", values.get("tensor", 1) != 1)
    return validate(settings.model_dump() | {"parallel": values}).parallel
