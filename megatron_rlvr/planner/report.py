"""Plans as text for a person, and as numbers for a program."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from megatron_rlvr.planner.devices import GIB
from megatron_rlvr.planner.layouts import RELEASED_SERVER, RESERVE, SERVER_SHARE, Plan, Question
from megatron_rlvr.planner.options import PLANNED_FOR

_SIZES = ("tensor", "context", "pipeline", "virtual_pipeline", "expert")
_PARTS = ("weights", "gradients", "optimizer", "activations", "rotary", "working")
_TRAINING_WORDS = {
    "compute": "operations of both",
    "tensor": "exchanges of tensor parallelism",
    "context": "keys and values of context parallelism",
    "pipeline": "messages between stages",
    "experts": "tokens to their experts and back",
    "waiting": "stages that wait at the beginning and end of a pass",
    "reduction": "gradients and weights between replicas",
    "optimizer": "Adam, limited by memory",
}


def assumptions(question: Question) -> str:
    """What is planned, and what all figures assume."""
    work, device, share = question.work, question.device, question.efficiency
    where = "shared by servers and training"
    if not question.shared:
        where = f"{question.ranks} for training, {question.server_gpus} for servers"
    layers = "Transformer Engine's" if question.transformer_engine else "this project's own"
    if question.settings.rollout.engine == "embedded":
        where += "; rollouts are planned as SGLang servers do them, not the embedded engine"
    sampled = "" if work.informative == 1 else f", of {work.trained / work.informative:,.0f} sampled"
    return "\n".join(
        (
            f"model      {question.shape.parameters / 1e9:.2f} billion parameters, {question.shape.layers} layers of "
            f"{question.shape.hidden}, {question.settings.model.dtype}; layers are {layers}",
            f"GPUs       {question.gpus} x {device.name} ({device.memory / GIB:.1f} GiB), {where}",
            f"step       {work.prompts:,} prompts x {work.samples} responses{sampled}, {work.mini_batches} optimizer "
            f"steps; {work.fraction * 100:g} % of response tokens carry the gradient",
            f"lengths    prompts of {work.prompt:,.0f} tokens on average, {work.prompt_cap:,} at most; responses of "
            f"{work.responses.mean:,.0f}, {work.responses.cap:,} at most, of a density e^(-rate x) with that mean",
            f"reached    {share.mfu * 100:g} % of {device.flops / 1e12:,.0f} TFLOP/s, {share.bandwidth * 100:g} % of "
            f"{device.bandwidth / 1e12:.2f} TB/s (memory), {device.link / 1e9:.0f} GB/s (node), "
            f"{device.network / 1e9:.0f} GB/s (network); guesses, see --mfu and --bandwidth-share",
        )
    )


def table(plans: Sequence[Plan]) -> str:
    """Ranked layouts, a line each."""
    head = " tp  cp  pp  vp  ep   dp  recompute    GiB    free   rollout   score   train    sync   total s  tokens/s"
    return "\n".join([head, *(_line(plan) for plan in plans)])


def _line(plan: Plan) -> str:
    p = plan.parallel
    sizes = f"{p.tensor:>3} {p.context:>3} {p.pipeline:>3} {p.virtual_pipeline:>3} {p.expert:>3} {plan.data:>4}"
    memory = f"{plan.options.recompute:<10} {plan.memory.peak / GIB:>6.1f} {plan.headroom / GIB:>7.1f}"
    if plan.rollout is None:
        return f"{sizes}  {memory}   servers do not fit beside it"
    phases = (plan.rollout.seconds, plan.training.score, plan.training.train, plan.sync)
    seconds = f"{phases[0]:>9,.0f} {phases[1]:>7,.0f} {phases[2]:>7,.0f} {phases[3]:>7,.1f}"
    return f"{sizes}  {memory} {seconds} {plan.seconds:>9,.0f} {plan.tokens_per_second:>9,.0f}"


def memory(plan: Plan) -> str:
    """Memory of a GPU by part, each with what it assumes."""
    parts, question, options, batches = plan.memory, plan.question, plan.options, plan.batches
    parallel = plan.parallel
    replicas = question.ranks // parallel.pipeline // parallel.tensor
    sharing = f"shared by {replicas} rank(s)" if options.distributed else "whole on every rank"
    stage = f"stage {parts.stage + 1} of {parallel.pipeline}, the fullest; " if parallel.pipeline > 1 else ""
    recompute = {
        "none": "all that autograd saves",
        "selective": f"recomputing {', '.join(options.modules)}",
        "full": "the input of every layer",
    }[options.recompute]
    working = f"the backward of a layer: gradients inside it{'' if options.recompute == 'none' else ', and recompute'}"
    if parts.head > parts.layer:
        working = f"the head's backward on {batches.rows:,} rows, the gradient of the output weight in whole"
    lines = [
        "memory of a GPU, GiB",
        _gib("weights", parts.weights, f"{stage}{options.element} bytes a parameter, vocabulary padded"),
        _gib("gradients", parts.gradients, f"one buffer, {options.gradient} bytes a parameter"),
        _gib("optimizer", parts.optimizer, f"Adam with fp32 weights, {sharing}"),
        _gib("activations", parts.activations, f"micro-batches of {batches.tokens:,} tokens: {recompute}"),
        _gib("rotary", parts.rotary, "angles of the last 32 lengths, fp32"),
        _gib("working", parts.working, working),
        _gib("peak", parts.peak, ""),
        _gib("free", plan.headroom, _of_what(question)),
    ]
    rollout = plan.rollout
    if rollout is not None:
        beside = "beside weights, gradients and optimizer" if question.shared else f"{SERVER_SHARE:.0%} of a GPU"
        lines += [
            "",
            _gib("server", rollout.weights, f"weights on each of its {rollout.tensor} GPU(s), {beside}"),
            _gib(
                "cache",
                rollout.cache,
                f"{rollout.cached_tokens:,.0f} tokens a server, {rollout.cached_tokens / question.work.longest:,.0f} "
                f"requests of the longest",
            ),
        ]
    return "\n".join(lines)


def _of_what(question: Question) -> str:
    server = f" and {RELEASED_SERVER / GIB:.0f} GiB of a server that has released its memory" if question.shared else ""
    return (
        f"of {question.usable / GIB:.1f}: the GPU's memory less {RESERVE:.0%} (driver, buffers, holes: a guess){server}"
    )


def seconds(plan: Plan) -> str:
    """Time of a step by phase, each with what it assumes."""
    rollout, training, work = plan.rollout, plan.training, plan.question.work
    lines = ["a step, seconds"]
    if rollout is not None:
        lines += [
            _part(
                "rollout",
                rollout.seconds,
                f"{rollout.servers} server(s) of {rollout.tensor} GPU(s), each with {rollout.running:,.0f} requests at "
                f"once{_limit(plan)}",
            ),
            _part("  full", rollout.full, "while requests wait, all slots taken"),
            _part("  tail", rollout.tail, f"the last of {work.responses.cap:,} tokens, fewer and fewer at once"),
            _part("  prefill", rollout.prefill, "every request's prompt, no prefix shared"),
        ]
    lines += [
        _part("score", training.score, "one forward of all tokens, the head on response tokens"),
        _part("train", training.train, "forward and backward of all tokens (none trimmed), the head on selected ones"),
    ]
    lines += [_part(f"  {name}", training.parts[name], _TRAINING_WORDS[name]) for name in _shown(training.parts)]
    method = plan.question.settings.sync.method
    how = "weights by a folder, 2 GB/s" if method == "disk" else f"weights by {method}, once a server"
    together = "the longer of rollout and the two passes, and sync" if work.overlap else "one phase after the other"
    lines += [_part("sync", plan.sync, how), _part("total", plan.seconds, together)]
    lines.append(_part("tokens/s", plan.tokens_per_second, "response tokens trained on, over the whole step"))
    return "\n".join(lines)


def _limit(plan: Plan) -> str:
    """Where rollout.max_inflight leaves a server's cache unused."""
    rollout, work = plan.rollout, plan.question.work
    if rollout is None or work.inflight is None or rollout.room < 1.2 * work.inflight:
        return ""
    return f" (rollout.max_inflight; its cache has room for {rollout.room:,.0f})"


def _shown(parts: Mapping[str, float]) -> list[str]:
    return [name for name in _TRAINING_WORDS if parts[name] > 0]


def _gib(name: str, value: float, words: str) -> str:
    return _part(name, value / GIB, words)


def _part(name: str, value: float, words: str) -> str:
    return f"  {name:<14}{value:>10,.1f}   {words}".rstrip()


def section(plan: Plan) -> str:
    """The settings to paste, and how servers are started for them."""
    values: dict[str, Any] = {"parallel": plan.parallel.model_dump(exclude_defaults=True)}
    values["batch"] = {"tokens_per_micro_batch": plan.question.work.budget}
    if megatron := plan.options.megatron:
        values["megatron"] = megatron
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120).rstrip()
    rollout = plan.rollout
    if rollout is None:
        return text
    share = (rollout.weights + rollout.cache) / plan.question.device.memory
    colocated = " --colocated" if plan.question.shared else ""
    return (
        f"{text}\n# of SGLang servers: rollout.max_inflight {max(1, int(rollout.room))}; tools/launch_sglang.py MODEL "
        f"--tensor {rollout.tensor} --memory-share {share:.2f}{colocated}"
    )


def left_out(megatron: Mapping[str, Any]) -> str:
    """Which of the user's fields of Megatron the figures know nothing of; empty if none."""
    unknown = [f"megatron.{key}" for key in megatron if key not in PLANNED_FOR]
    return f"not in the figures: {', '.join(unknown)}" if unknown else ""


def misfit(plan: Plan) -> str:
    """What is missing for a plan to fit, and what helps: one sentence each."""
    question, memory, p = plan.question, plan.memory, plan.parallel
    layout = ", ".join(f"{name} {getattr(p, name)}" for name in _SIZES if getattr(p, name) > 1) or "one GPU a replica"
    lines = []
    if plan.headroom < 0:
        parts = {name: getattr(memory, name) for name in _PARTS}
        largest = max(parts, key=lambda name: parts[name])
        lines.append(
            f"{layout}: training needs {memory.peak / GIB:.1f} GiB and may have {question.usable / GIB:.1f} of one "
            f"{question.device.name}, {-plan.headroom / GIB:.1f} too few; the largest part is {largest} with "
            f"{parts[largest] / GIB:.1f}"
        )
        lines.append(f"what helps: {_remedies(plan, largest)}")
    elif plan.rollout is None:
        lines.append(
            f"{layout}: no server can hold the longest sequence of {question.work.longest:,} tokens"
            + (f" beside {memory.static / GIB:.1f} GiB of weights, gradients and optimizer" if question.shared else "")
        )
        lines.append(
            "what helps: more GPUs a server (--server-tensor), "
            + ("servers on GPUs of their own (--server-gpus), " if question.shared else "")
            + "a shorter rollout.max_response_tokens, GPUs with more memory"
        )
    return "\n".join(lines)


def _remedies(plan: Plan, largest: str) -> str:
    question, options = plan.question, plan.options
    cut = "more GPUs, to cut it" if plan.parallel.replica == question.ranks else "cut it"
    found = []
    if largest == "activations":
        if options.recompute != "full":
            found.append("megatron.recompute_granularity full")
        if not options.fused_activation and options.recompute != "full":
            found.append("megatron.bias_activation_fusion true")
        if question.work.budget > question.work.longest:
            found.append(f"batch.tokens_per_micro_batch {question.work.longest} instead of {question.work.budget}")
        found += [f"{cut} further by parallel.context or parallel.tensor", "a shorter rollout.max_response_tokens"]
    elif largest == "working":
        found.append(f"{cut} further by parallel.tensor")
        if not options.fused_gradient:
            found.append("megatron.gradient_accumulation_fusion true, with apex")
    else:
        if not options.distributed:
            found.append("megatron.use_distributed_optimizer true")
        found.append(f"{cut} further by parallel.tensor or parallel.pipeline")
        if options.gradient == 4 and options.element == 2:
            found.append("megatron.grad_reduce_in_fp32 false, which rounds sums of gradients to bf16")
    return ", ".join([*found, "GPUs with more memory"])


def numbers(plan: Plan) -> dict[str, Any]:
    """A plan for a program; bytes and seconds."""
    memory, rollout = plan.memory, plan.rollout
    return {
        "parallel": plan.parallel.model_dump() | {"data": plan.data},
        "megatron": plan.options.megatron,
        "fits": plan.fits,
        "memory": {name: getattr(memory, name) for name in (*_PARTS, "peak")} | {"headroom": plan.headroom},
        "seconds": {
            "rollout": rollout.seconds if rollout else None,
            "score": plan.training.score,
            "train": plan.training.train,
            "sync": plan.sync if rollout else None,
            "total": plan.seconds if rollout else None,
        },
        "training_parts": plan.training.parts,
        "tokens_per_second": plan.tokens_per_second if rollout else 0.0,
        "servers": None
        if rollout is None
        else {
            "number": rollout.servers,
            "tensor": rollout.tensor,
            "cache": rollout.cache,
            "cached_tokens": int(rollout.cached_tokens),
            "running": rollout.running,
        },
    }
