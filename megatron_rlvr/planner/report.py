"""Plans as text for people, and as numbers for programs."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from megatron_rlvr.planner.devices import GIB
from megatron_rlvr.planner.layouts import RELEASED_SERVER, RESERVE, SERVER_SHARE, Plan, PlanInputs
from megatron_rlvr.planner.options import MODELED_FIELDS

_SIZES = ("tensor", "context", "pipeline", "virtual_pipeline", "expert")
_MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "rotary", "working")
_TRAINING_PARTS = {
    "compute": "operations of score and train",
    "tensor": "communication of tensor parallelism",
    "context": "keys and values of context parallelism",
    "pipeline": "messages between pipeline stages",
    "experts": "tokens to their experts and back",
    "waiting": "pipeline bubble: stages that wait at the start and end of a pass",
    "reduction": "gradients and weights between data-parallel replicas",
    "optimizer": "Adam, limited by memory bandwidth",
}


def assumptions(inputs: PlanInputs) -> str:
    """Describe the inputs of a plan, and what all estimates assume."""
    work, device, share = inputs.work, inputs.device, inputs.efficiency
    where = "shared by servers and training"
    if not inputs.shared:
        where = f"{inputs.ranks} for training, {inputs.server_gpus} for servers"
    layers = "Transformer Engine's" if inputs.transformer_engine else "this project's own"
    if inputs.settings.rollout.engine == "embedded":
        where += "; rollouts are planned for SGLang servers, not for the embedded engine"
    sampled = "" if work.informative_share == 1 else f", {work.completions / work.informative_share:,.0f} sampled"
    return "\n".join(
        (
            f"model      {inputs.shape.parameters / 1e9:.2f} billion parameters, {inputs.shape.layers} layers of "
            f"{inputs.shape.hidden}, {inputs.settings.model.dtype}; layers are {layers}",
            f"GPUs       {inputs.gpus} x {device.name} ({device.memory / GIB:.1f} GiB), {where}",
            f"step       {work.prompts:,} prompts x {work.group_size} responses{sampled}, {work.mini_batches} "
            f"optimizer steps; {work.fraction * 100:g} % of response tokens carry the gradient",
            f"lengths    prompts: mean {work.mean_prompt:,.0f} tokens, at most {work.max_prompt:,}; responses: mean "
            f"{work.responses.mean:,.0f}, at most {work.responses.cap:,}, with density e^(-rate x)",
            f"achieved   {share.mfu * 100:g} % of {device.flops / 1e12:,.0f} TFLOP/s, {share.bandwidth * 100:g} % of "
            f"{device.bandwidth / 1e12:.2f} TB/s (memory), {device.link / 1e9:.0f} GB/s (node), "
            f"{device.network / 1e9:.0f} GB/s (network); guesses, see --mfu and --bandwidth-share",
        )
    )


def table(plans: Sequence[Plan]) -> str:
    """Format plans as a table with one line each."""
    head = " tp  cp  pp  vp  ep   dp  recompute    GiB    free   rollout   score   train    sync   total s  tokens/s"
    return "\n".join([head, *(_table_line(plan) for plan in plans)])


def _table_line(plan: Plan) -> str:
    p = plan.parallel
    sizes = f"{p.tensor:>3} {p.context:>3} {p.pipeline:>3} {p.virtual_pipeline:>3} {p.expert:>3} {plan.data:>4}"
    memory = f"{plan.options.recompute:<10} {plan.memory.peak / GIB:>6.1f} {plan.headroom / GIB:>7.1f}"
    if plan.rollout is None:
        return f"{sizes}  {memory}   servers do not fit"
    phases = (plan.rollout.seconds, plan.training.score, plan.training.train, plan.sync)
    seconds = f"{phases[0]:>9,.0f} {phases[1]:>7,.0f} {phases[2]:>7,.0f} {phases[3]:>7,.1f}"
    return f"{sizes}  {memory} {seconds} {plan.seconds:>9,.0f} {plan.tokens_per_second:>9,.0f}"


def memory_table(plan: Plan) -> str:
    """Format the memory of a GPU by part, each with its assumption."""
    memory, inputs, options, batches = plan.memory, plan.inputs, plan.options, plan.batches
    parallel = plan.parallel
    shards = inputs.ranks // parallel.pipeline // parallel.tensor
    sharding = f"sharded over {shards} rank(s)" if options.distributed_optimizer else "complete on every rank"
    stage = f"stage {memory.stage + 1} of {parallel.pipeline}, the fullest; " if parallel.pipeline > 1 else ""
    recompute = {
        "none": "everything that autograd saves",
        "selective": f"recomputing {', '.join(options.recompute_modules)}",
        "full": "the input of every layer",
    }[options.recompute]
    working = f"a layer's backward pass: its gradients{'' if options.recompute == 'none' else ', and recompute'}"
    if memory.head > memory.layer:
        working = f"the head's backward pass on {batches.rows:,} rows, the whole gradient of the output weight"
    lines = [
        "memory of a GPU, GiB",
        _gib("weights", memory.weights, f"{stage}{options.weight_bytes} bytes per parameter, vocabulary padded"),
        _gib("gradients", memory.gradients, f"one buffer, {options.gradient_bytes} bytes per parameter"),
        _gib("optimizer", memory.optimizer, f"Adam with fp32 weights, {sharding}"),
        _gib("activations", memory.activations, f"micro-batches of {batches.tokens:,} tokens: {recompute}"),
        _gib("rotary", memory.rotary, "cached angles for the last 32 lengths, fp32"),
        _gib("working", memory.working, working),
        _gib("peak", memory.peak, ""),
        _gib("free", plan.headroom, _usable_in_words(inputs)),
    ]
    rollout = plan.rollout
    if rollout is not None:
        place = "beside weights, gradients and optimizer" if inputs.shared else f"{SERVER_SHARE:.0%} of a GPU"
        longest = rollout.cached_tokens / inputs.work.max_sequence
        lines += [
            "",
            _gib("server", rollout.weights, f"weights on each of its {rollout.tensor} GPU(s), {place}"),
            _gib(
                "cache",
                rollout.cache,
                f"KV cache: {rollout.cached_tokens:,.0f} tokens per server, {longest:,.0f} requests of maximum length",
            ),
        ]
    ranks = min(inputs.ranks, inputs.device.gpus_per_node)
    lines += [
        "",
        "memory of a machine while a checkpoint is saved, GiB (on GPUs: none)",
        _gib("rank", memory.save, "a copy of what it writes; ranks with the same weights share the writing"),
        _gib("machine", ranks * memory.save, f"{ranks} ranks; the limit of the job's cgroup must allow it"),
    ]
    return "\n".join(lines)


def _usable_in_words(inputs: PlanInputs) -> str:
    server = f" and {RELEASED_SERVER / GIB:.0f} GiB of a server that has released its memory" if inputs.shared else ""
    return (
        f"of {inputs.usable / GIB:.1f}: the GPU's memory minus {RESERVE:.0%} (driver, buffers, fragmentation: a guess)"
        f"{server}"
    )


def time_table(plan: Plan) -> str:
    """Format the time of a step by phase, each with its assumption."""
    rollout, training, work = plan.rollout, plan.training, plan.inputs.work
    lines = ["a step, seconds"]
    if rollout is not None:
        lines += [
            _part(
                "rollout",
                rollout.seconds,
                f"{rollout.servers} server(s) of {rollout.tensor} GPU(s), each running {rollout.running:,.0f} requests "
                f"at once{_inflight_limit(plan)}",
            ),
            _part("  saturated", rollout.saturated, "full running batch while requests queue"),
            _part(
                "  tail", rollout.tail, f"the last requests, up to {work.responses.cap:,} tokens, ever fewer at once"
            ),
            _part("  prefill", rollout.prefill, "the prompt of every request, no shared prefixes"),
        ]
    lines += [
        _part("score", training.score, "one forward pass of all tokens, the head on response tokens"),
        _part("train", training.train, "forward and backward of all tokens (none trimmed), the head on selected ones"),
    ]
    lines += [_part(f"  {name}", training.parts[name], _TRAINING_PARTS[name]) for name in _nonzero(training.parts)]
    method = plan.inputs.settings.sync.method
    how = "weights through a folder at 2 GB/s" if method == "disk" else f"weights by {method}, once per server"
    order = "the longer of rollout and score + train, plus sync" if work.overlap else "one phase after the other"
    lines += [_part("sync", plan.sync, how), _part("total", plan.seconds, order)]
    lines.append(_part("tokens/s", plan.tokens_per_second, "response tokens trained on, over the whole step"))
    return "\n".join(lines)


def _inflight_limit(plan: Plan) -> str:
    """Return a remark if rollout.max_inflight leaves part of a server's KV cache unused."""
    rollout, work = plan.rollout, plan.inputs.work
    if rollout is None or work.max_inflight is None or rollout.capacity < 1.2 * work.max_inflight:
        return ""
    return f" (rollout.max_inflight; its KV cache has room for {rollout.capacity:,.0f})"


def _nonzero(parts: Mapping[str, float]) -> list[str]:
    return [name for name in _TRAINING_PARTS if parts[name] > 0]


def _gib(name: str, value: float, words: str) -> str:
    return _part(name, value / GIB, words)


def _part(name: str, value: float, words: str) -> str:
    return f"  {name:<14}{value:>10,.1f}   {words}".rstrip()


def settings_yaml(plan: Plan) -> str:
    """Return the settings of a plan to paste into a configuration, and the command that starts its servers."""
    values: dict[str, Any] = {"parallel": plan.parallel.model_dump(exclude_defaults=True)}
    values["batch"] = {"tokens_per_micro_batch": plan.inputs.work.micro_batch_tokens}
    if megatron := plan.options.megatron:
        values["megatron"] = megatron
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120).rstrip()
    rollout = plan.rollout
    if rollout is None:
        return text
    share = (rollout.weights + rollout.cache) / plan.inputs.device.memory
    colocated = " --colocated" if plan.inputs.shared else ""
    return (
        f"{text}\n# SGLang servers: rollout.max_inflight {max(1, int(rollout.capacity))}; tools/serve.py MODEL "
        f"--tensor {rollout.tensor} --memory-share {share:.2f}{colocated}"
    )


def unmodeled_fields(megatron: Mapping[str, Any]) -> str:
    """Name the fields of the user's ``megatron:`` section that the estimates ignore; "" if there are none."""
    unknown = [f"megatron.{key}" for key in megatron if key not in MODELED_FIELDS]
    return f"ignored by the estimates: {', '.join(unknown)}" if unknown else ""


def explain_misfit(plan: Plan) -> str:
    """Explain what a plan lacks to fit, and what helps, one sentence each."""
    inputs, memory, p = plan.inputs, plan.memory, plan.parallel
    layout = ", ".join(f"{name} {getattr(p, name)}" for name in _SIZES if getattr(p, name) > 1)
    layout = layout or "one GPU per replica"
    lines = []
    if plan.headroom < 0:
        parts = {name: getattr(memory, name) for name in _MEMORY_PARTS}
        largest = max(parts, key=lambda name: parts[name])
        lines.append(
            f"{layout}: training needs {memory.peak / GIB:.1f} GiB and may use {inputs.usable / GIB:.1f} of one "
            f"{inputs.device.name}, {-plan.headroom / GIB:.1f} too few; the largest part is {largest} with "
            f"{parts[largest] / GIB:.1f}"
        )
        lines.append(f"what helps: {_remedies(plan, largest)}")
    elif plan.rollout is None:
        lines.append(
            f"{layout}: no server can hold the longest sequence of {inputs.work.max_sequence:,} tokens"
            + (f" beside {memory.static / GIB:.1f} GiB of weights, gradients and optimizer" if inputs.shared else "")
        )
        lines.append(
            "what helps: more GPUs per server (--server-tensor), "
            + ("servers on GPUs of their own (--server-gpus), " if inputs.shared else "")
            + "a shorter rollout.max_response_tokens, GPUs with more memory"
        )
    return "\n".join(lines)


def _remedies(plan: Plan, largest: str) -> str:
    inputs, options = plan.inputs, plan.options
    shard = "more GPUs, to shard it" if plan.parallel.replica == inputs.ranks else "shard it"
    found = []
    if largest == "activations":
        if options.recompute != "full":
            found.append("megatron.recompute_granularity full")
        if not options.fused_activation and options.recompute != "full":
            found.append("megatron.bias_activation_fusion true, the default on GPUs")
        if inputs.work.micro_batch_tokens > inputs.work.max_sequence:
            found.append(
                f"batch.tokens_per_micro_batch {inputs.work.max_sequence} instead of {inputs.work.micro_batch_tokens}"
            )
        found += [f"{shard} further by parallel.context or parallel.tensor", "a shorter rollout.max_response_tokens"]
    elif largest == "working":
        found.append(f"{shard} further by parallel.tensor")
        if not options.fused_gradient:
            found.append("megatron.gradient_accumulation_fusion true, the default with apex")
    else:
        if not options.distributed_optimizer:
            found.append("megatron.use_distributed_optimizer true")
        found.append(f"{shard} further by parallel.tensor or parallel.pipeline")
        if options.gradient_bytes == 4 and options.weight_bytes == 2:
            found.append("megatron.grad_reduce_in_fp32 false, which rounds sums of gradients to bf16")
    return ", ".join([*found, "GPUs with more memory"])


def as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as numbers for a program, in bytes and seconds."""
    memory, rollout = plan.memory, plan.rollout
    return {
        "parallel": plan.parallel.model_dump() | {"data": plan.data},
        "megatron": plan.options.megatron,
        "fits": plan.fits,
        "memory": {name: getattr(memory, name) for name in (*_MEMORY_PARTS, "peak", "save")}
        | {"headroom": plan.headroom},
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
