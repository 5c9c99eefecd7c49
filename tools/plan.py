#!/usr/bin/env python3
"""Memory, time and the best layouts of a run, before there is one. Reads config.json only; needs no GPU and no weights.

    python tools/plan.py CONFIG.yaml --gpus 64 --gpu h100
    python tools/plan.py --model DIR --gpus 64 --gpu h100 --prompts 512 --samples 16 \\
        --prompt-tokens 2048 --response-tokens 20480 --mean-response-tokens 8000

With CONFIG.yaml, model, lengths, batch and layout are the run's; its own layout is priced first, others follow. With
--model they are given here. Every layout in the table is one that the trainer accepts; of each the least recompute that
fits is taken. Below the table stand memory by part and time by phase of the best layout (or the one asked for), with
what each figure assumes, and the settings to paste.

How much is known: bytes of weights, gradients, optimizer and cache are counted and exact to a percent; activations to
a few percent with this project's own layers, counted from the source for Transformer Engine's; seconds are a roofline
with stated shares of the peaks, good for comparing layouts, and as good as --mfu, --bandwidth-share and
--mean-response-tokens for anything else. docs/planning.md has the formulas.

  columns   tp cp pp vp ep dp   parallel.tensor, context, pipeline, virtual_pipeline, expert, and replicas
            GiB, free           peak of training on the fullest GPU, and what is left of what it may have
            rollout .. total    seconds of a step's phases; tokens/s: response tokens trained on

Exit status: 0; 1 if the layout asked for, or every layout, does not fit (what is missing is said); 2 and one line where
the input is wrong.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from megatron_rlvr.config import ParallelSettings, Settings, SettingsError
from megatron_rlvr.config.loading import load_settings, validate
from megatron_rlvr.hf.files import read_config
from megatron_rlvr.planner import report
from megatron_rlvr.planner.devices import DEVICES
from megatron_rlvr.planner.layouts import Plan, Question, least_recompute, ranked, refusal
from megatron_rlvr.planner.roofline import Efficiency
from megatron_rlvr.planner.shapes import Shape
from megatron_rlvr.planner.workload import MEAN_PROMPT_SHARE, MEAN_RESPONSE_SHARE, Workload


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    try:
        question, own = _question(options)
        asked = _asked(question, own, options)
    except ValueError as error:
        parser.error(str(error))
    plans = ranked(question)
    best = asked or (plans[0] if plans else None)
    if best is None:
        parser.error(
            refusal(question, ParallelSettings()) or f"no layout divides {question.ranks} GPUs; give others with --gpus"
        )
    shown = [plan for plan in plans if plan.fits][: options.top] or plans[:1]
    if options.json:
        print(json.dumps({"best": report.numbers(best), "ranked": [report.numbers(plan) for plan in shown]}, indent=1))
        return 0 if best.fits else 1
    print(report.assumptions(question))
    if unknown := report.left_out(question.settings.megatron):
        print(unknown)
    print()
    if asked:
        print("the layout asked for", report.table([asked]), sep="\n", end="\n\n")
    print("layouts that fit, the fastest first" if shown[0].fits else "no layout fits; the nearest is")
    print(report.table(shown), end="\n\n")
    print(report.memory(best), end="\n\n")
    if not best.fits:
        print(report.misfit(best))
        return 1
    print(report.seconds(best), end="\n\n")
    print("to paste", report.section(best), sep="\n")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="%(prog)s (CONFIG.yaml | --model DIR) --gpus N --gpu TYPE [OPTIONS]",
    )  # fmt: skip
    add = parser.add_argument
    add("config", nargs="?", type=Path, metavar="CONFIG.yaml", help="settings of a run; or --model and lengths")
    add("--gpus", type=_positive, required=True, metavar="N", help="all of them, servers' and training's")
    add("--gpu", choices=sorted(DEVICES), required=True, help="their type")
    add("--model", type=Path, metavar="DIR", help="model folder, or its config.json (default: CONFIG's model.path)")
    add("--prompts", type=_positive, metavar="N", help="a step (default 512)")
    add("--samples", type=_positive, metavar="N", help="responses of each (default 16)")
    add("--mini-batch-prompts", type=_positive, metavar="N", help="an optimizer step (default 32)")
    add("--prompt-tokens", type=_positive, metavar="N", help="of a prompt at most (default 2048)")
    add("--response-tokens", type=_positive, metavar="N", help="of a response at most (default 20480)")
    add("--micro-batch-tokens", type=_positive, metavar="N", help="batch.tokens_per_micro_batch (default 24576)")
    add("--mean-response-tokens", type=_positive, metavar="N", help=f"default {MEAN_RESPONSE_SHARE:g} of the most")
    add("--mean-prompt-tokens", type=_positive, metavar="N", help=f"default {MEAN_PROMPT_SHARE:g} of the most")
    add("--informative", type=_share, default=1.0, metavar="X",
        help="share of the sampled groups that are neither all right nor all wrong (default 1)")  # fmt: skip
    add("--server-gpus", type=_positive, metavar="N", help="GPUs of servers alone (default: all are shared, colocated)")
    add("--server-tensor", type=_positive, metavar="N", help="GPUs a server (default: the fastest)")
    add("--layout", metavar="A=N,B=N", help="price one, such as tensor=8,pipeline=2,context=1")
    add("--recompute", choices=("none", "selective", "full"), help="for --layout (default: the least that fits)")
    add("--without-transformer-engine", action="store_true", help="layers are this project's own")
    add("--mfu", type=_share, default=Efficiency.mfu, metavar="X", help="share of peak FLOP/s (default %(default)s)")
    add("--bandwidth-share", type=_share, default=Efficiency.bandwidth, metavar="X",
        help="share of the peak of memory and links (default %(default)s)")  # fmt: skip
    add("--top", type=_positive, default=10, metavar="N", help="layouts in the table (default %(default)s)")
    add("--json", action="store_true", help="numbers in bytes and seconds instead of tables")
    return parser


# Option, and the section and key of the settings that it is.
_KEYS = {
    "prompts": ("batch", "prompts"),
    "samples": ("rollout", "group_size"),
    "mini_batch_prompts": ("batch", "mini_batch_prompts"),
    "prompt_tokens": ("data", "max_prompt_tokens"),
    "response_tokens": ("rollout", "max_response_tokens"),
    "micro_batch_tokens": ("batch", "tokens_per_micro_batch"),
}


def _question(options: argparse.Namespace) -> tuple[Question, Settings | None]:
    """What is asked, and the settings of the run where they were given."""
    if options.config is None and options.model is None:
        raise SettingsError("give CONFIG.yaml, or --model DIR")
    given = {name: getattr(options, name) for name in _KEYS if getattr(options, name) is not None}
    own = None
    if options.config is not None:
        flags = [f"--{section}.{key}={given[name]}" for name, (section, key) in _KEYS.items() if name in given]
        settings = own = load_settings(options.config, flags)
        folder = str(options.model or settings.model.path)
        inflight = settings.rollout.max_inflight if settings.rollout.engine == "sglang" else None
        if settings.rollout.engine == "sglang" and not settings.rollout.colocated and options.server_gpus is None:
            raise SettingsError("rollout.colocated is false: give --server-gpus N, the GPUs that servers have alone")
    else:
        folder = str(options.model)
        settings, inflight = _made_up(folder, given, shared=options.server_gpus is None), None
    if options.server_gpus is not None and options.server_gpus >= options.gpus:
        raise SettingsError(f"--server-gpus {options.server_gpus} leaves none of --gpus {options.gpus} for training")
    mean, mean_prompt = _means(settings, options)
    question = Question(
        settings=settings,
        shape=Shape.of(_config(Path(folder))),
        work=Workload.of(settings, mean, mean_prompt, options.informative, inflight),
        device=DEVICES[options.gpu],
        efficiency=Efficiency(options.mfu, options.bandwidth_share),
        gpus=options.gpus,
        server_gpus=options.server_gpus,
        server_tensor=options.server_tensor or _named_servers(own, options),
        transformer_engine=not options.without_transformer_engine,
    )
    _check_servers(question)
    return question, own


def _means(settings: Settings, options: argparse.Namespace) -> tuple[float, float]:
    """Tokens of a response and of a prompt on average."""
    caps = {"response": settings.rollout.max_response_tokens, "prompt": settings.data.max_prompt_tokens}
    means = {
        "response": options.mean_response_tokens or max(1.0, MEAN_RESPONSE_SHARE * caps["response"]),
        "prompt": options.mean_prompt_tokens or max(1.0, MEAN_PROMPT_SHARE * caps["prompt"]),
    }
    for name, mean in means.items():
        if mean > caps[name]:
            raise SettingsError(f"--mean-{name}-tokens {mean} is above the most, {caps[name]}; lower it")
    return means["response"], means["prompt"]


def _check_servers(question: Question) -> None:
    gpus, tensor = question.server_gpus or question.gpus, question.server_tensor or 1
    if gpus % tensor or question.shape.heads % tensor:
        raise SettingsError(
            f"--server-tensor {tensor} does not divide the {gpus} GPUs of servers and the model's "
            f"{question.shape.heads} attention heads; choose another"
        )


def _named_servers(own: Settings | None, options: argparse.Namespace) -> int | None:
    """GPUs of each server where the settings name servers among which they can be dealt out; not those of a router."""
    gpus, named = options.server_gpus or options.gpus, len(own.rollout.servers) if own is not None else 0
    fits = named and gpus % named == 0 and gpus // named <= DEVICES[options.gpu].node
    return gpus // named if fits else None


def _config(path: Path) -> dict[str, Any]:
    """Of a model's folder, or the file itself."""
    if not path.is_file():
        return read_config(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"{path} is not valid JSON ({error}); give the config.json of a model") from None
    if not isinstance(config, dict):
        raise SettingsError(f"{path} holds no JSON object; give the config.json of a model")
    return config


def _made_up(folder: str, given: dict[str, int], shared: bool) -> Settings:
    """Settings that say what the options say, of a run that will not be; servers share its GPUs or have their own."""
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


def _asked(question: Question, own: Settings | None, options: argparse.Namespace) -> Plan | None:
    """The plan of --layout, or of the run's own layout; SettingsError if the trainer refuses it."""
    if options.layout is None:
        if options.recompute is not None:
            raise SettingsError(f"--recompute {options.recompute} does nothing without --layout; give both")
        if own is None:
            return None
        parallel = own.parallel
        megatron = {"recompute_granularity": None} | own.megatron
    else:
        parallel = _layout(question.settings, options.layout)
        megatron = {"use_distributed_optimizer": True} | question.settings.megatron
        if options.recompute is not None:
            modules = ["moe" if any(question.shape.sparse) else "mlp"]
            megatron |= {"recompute_granularity": options.recompute, "recompute_modules": modules}
    if why := refusal(question, parallel):
        raise SettingsError(why)
    return least_recompute(question, parallel, megatron)


def _layout(settings: Settings, text: str) -> ParallelSettings:
    """ParallelSettings from `tensor=8,pipeline=2`; sequence parallel with tensor parallel, unless it says otherwise."""
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not (value.isdecimal() or value in ("true", "false")):
            raise SettingsError(f"--layout {part!r} is not NAME=NUMBER, as in tensor=8,pipeline=2")
        values[name.strip()] = int(value) if value.isdecimal() else value == "true"
    values.setdefault("sequence", values.get("tensor", 1) != 1)
    return validate(settings.model_dump() | {"parallel": values}).parallel


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share; give a number above 0, at most 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
