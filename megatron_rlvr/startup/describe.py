"""The plan in words: a few lines that say what a run is going to do, for a person to read before it does."""

from collections.abc import Iterator, Set

from megatron_rlvr.checkpoint.size import WEIGHT_BYTES, optimizer_bytes
from megatron_rlvr.config.describe import (
    describe_loss,
    describe_mask,
    describe_optimizer,
    describe_reward,
    describe_rollout,
)
from megatron_rlvr.config.yaml_format import shown
from megatron_rlvr.data.prompts import PromptSet
from megatron_rlvr.hf.families import parameter_count, transformer_fields
from megatron_rlvr.hf.headers import list_names
from megatron_rlvr.reward.code.confinement import LANDLOCK, NAMESPACE, SECCOMP
from megatron_rlvr.reward.code.runner import confinement
from megatron_rlvr.startup.resolve import Resolved

_SHOWN_CHARACTERS = 4000
"""Longest prompt that is shown whole."""


def describe_plan(resolved: Resolved) -> str:
    """Return the plan of a run, one line per subject."""
    s = resolved.settings
    start = f", resuming after step {resolved.start.step}" if resolved.start else ""
    lines = {
        "model": _model(resolved),
        "ranks": _layout(resolved),
        "memory": _memory(resolved),
        "prompts": _prompts(resolved),
        "columns": _columns(resolved),
        "stop": _stop(resolved),
        "rollout": describe_rollout(s),
        "reward": describe_reward(s, resolved.answer_after),
        "mask": describe_mask(s),
        "loss": describe_loss(s),
        "optimizer": describe_optimizer(s),
        "evaluation": _evaluation(resolved),
        "run": f"{s.run.steps} steps into {s.run.dir}{start}",
    }
    if any(part.name == "code" for call in s.reward.functions.all for part in call.walk()):
        lines["code"] = _confinement()
    if resolved.now is not None:
        lines["clock"] = f"the chat template reads it, and sees {resolved.now:%Y-%m-%d %H:%M:%S} until the run ends"
    if resolved.skipped_tensors:
        lines["skipped"] = f"{list_names(resolved.skipped_tensors)}, which no next-token logit depends on"
    if s.unused:
        lines["not used"] = "; ".join(
            f"{each.key}={shown(each.value)} (with {each.other}={shown(each.other_value)})" for each in s.unused
        )
    return "\n".join(f"{subject:<11} {text}" for subject, text in lines.items())


def describe_first_prompt(resolved: Resolved) -> str:
    """Return the first prompt to train on as the model reads it, special tokens included, and what follows it."""
    prompt, tokenizer = resolved.train.prompts[0], resolved.tokenizer
    ids = prompt.token_ids.tolist()
    text = tokenizer.decode_all(ids)
    if len(text) > _SHOWN_CHARACTERS:
        half = _SHOWN_CHARACTERS // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half} characters ...\n{text[-half:]}"
    ends = " or ".join(repr(tokenizer.token_text(token)) for token in resolved.stop_token_ids)
    lines = [f"    |{line}" for line in text.split("\n")]
    return "\n".join(
        [
            f"{'prompt':<11} {prompt.id}, {len(ids)} tokens, as the model reads it; the response begins at its end:",
            *lines,
            f"{'':<11} a response ends with {ends}, or after {resolved.settings.rollout.max_response_tokens} tokens",
        ]
    )


def _confinement() -> str:
    """Return in one line what solutions cannot do on this machine, and what they can."""
    found = confinement()
    network = SECCOMP in found or NAMESPACE in found
    refused = [
        *(["the network"] if network else []),
        *(["processes of their own"] if SECCOMP in found else []),
        *(["files"] if LANDLOCK in found else []),
    ]
    allowed = [
        *([] if network else ["OPEN SOCKETS"]),
        *([] if SECCOMP in found else ["START PROCESSES"]),
        *([] if LANDLOCK in found else ["READ AND REMOVE FILES"]),
    ]
    without = f"without {', '.join(refused)}" if refused else "with limits only"
    can = f"; this kernel does not prevent that they {', '.join(allowed)}: run in a container" if allowed else ""
    return f"solutions run {without}, and within limits of CPU time, memory and output{can}"


def _model(resolved: Resolved) -> str:
    s, fields = resolved.settings, transformer_fields(resolved.hf_config)
    return (
        f"{s.model.path}: {resolved.hf_config['model_type']}, {fields['num_layers']} layers of "
        f"{fields['hidden_size']}, vocabulary {resolved.hf_config['vocab_size']}, {s.model.dtype}"
    )


def _layout(resolved: Resolved) -> str:
    p = resolved.settings.parallel
    sizes = [("tensor", p.tensor), ("context", p.context), ("pipeline", p.pipeline)]
    layout = [f"{name} {size}" for name, size in sizes if size > 1] + [f"data {resolved.world_size // p.replica}"]
    extras = [
        *(["sequence parallel"] if p.sequence else []),
        *([f"{p.virtual_pipeline} virtual stages"] if p.virtual_pipeline > 1 else []),
        *([f"experts over {p.expert} ranks"] if p.expert > 1 else []),
    ]
    return f"{resolved.world_size} = {' x '.join(layout)}{' with ' + ', '.join(extras) if extras else ''}"


def _memory(resolved: Resolved) -> str:
    """Return the memory that an average rank holds between passes, by the accounting of `rlvr plan`.

    One copy of the model is divided over the ranks of a data-parallel replica, as pipeline and tensor parallelism do.
    """
    s, config = resolved.settings, resolved.hf_config
    parameters, weight_bytes = parameter_count(config), WEIGHT_BYTES[s.model.dtype]
    gradient_bytes = 4 if s.megatron.get("grad_reduce_in_fp32", True) else weight_bytes
    sharded = s.parallel.tensor * s.parallel.pipeline
    over = resolved.world_size // sharded if s.megatron.get("use_distributed_optimizer") else 1
    state = optimizer_bytes(weight_bytes) / over
    training = parameters / sharded * (weight_bytes + gradient_bytes + state)
    text = (
        f"{parameters:,} parameters; {training / 1e9:.2f} GB a rank for weights, gradients and Adam's state, before "
        "activations"
    )
    if s.rollout.engine == "embedded":
        fields = transformer_fields(config)
        heads = fields["num_query_groups"] * fields["kv_channels"]
        cache = s.rollout.max_batch_tokens * fields["num_layers"] * 2 * heads * weight_bytes
        text += (
            f"; {parameters * weight_bytes / 1e9:.2f} GB for the engine's copy, and up to {cache / 1e9:.2f} GB for its "
            f"KV cache (rollout.max_batch_tokens={s.rollout.max_batch_tokens})"
        )
    return text


def _prompts(resolved: Resolved) -> str:
    train = resolved.train
    return f"{len(train)} from {len(train.files)} file(s){_remarks(train)}{_difficulty(resolved)}"


def _difficulty(resolved: Resolved) -> str:
    """Return how prompts are left out by their pass rates."""
    difficulty = resolved.settings.data.difficulty
    if difficulty is None:
        return ""
    words = ""
    if difficulty.retire_above is not None:
        words += f", retired above a pass rate of {difficulty.retire_above:g}"
    if difficulty.rest_below is not None:
        words += f", resting for {difficulty.rest_steps} steps below {difficulty.rest_below:g}"
    return words


def _remarks(prompts: PromptSet) -> str:
    """Return what is remarkable about the rows that a set was read from."""
    dropped = f", {prompts.dropped_too_long} left out as too long" if prompts.dropped_too_long else ""
    repeats = "" if prompts.distinct in (None, len(prompts)) else f", {prompts.distinct} of them distinct"
    ambiguous = f", {prompts.ambiguous} with more than one gold answer" if prompts.ambiguous else ""
    return f"{dropped}{repeats}{ambiguous}"


def _columns(resolved: Resolved) -> str:
    """Return the columns from which problems and gold answers are read, file by file."""
    files = [file for prompts in (resolved.train, *resolved.evaluation.values()) for file in prompts.files]
    return "; ".join(f"{f.name}: {f.columns.prompt}, {f.columns.answer}" for f in files if f.columns is not None)


def _stop(resolved: Resolved) -> str:
    """Return the tokens that end a response, each with the reason, and what is odd about the end of a turn."""
    turn = resolved.turn
    parts = [str(token) for token in resolved.stop_tokens]
    if turn is not None and turn.token_id is None and resolved.settings.data.template != "plain":
        end = f"with {turn.text!r}, which is no special token," if turn.text else "without a special token,"
        parts.append(f"the chat template ends a turn {end} and that ends no response")
    if turn is not None and turn.token_id is not None and _ends_turn(resolved, turn.token_id):
        parts.append(f"prompts end with {turn.text!r}, so that the model has to begin the turn of the answer itself")
    return "; ".join(parts)


def _ends_turn(resolved: Resolved, turn_end: int) -> bool:
    """Return whether a file's first prompt ends with the end of a turn, and not with the start of the answer's turn."""
    tokenizer, train = resolved.tokenizer, resolved.train
    for file in train.files:
        ids = train.prompts[file.start].token_ids.tolist()
        after = ids[len(ids) - ids[::-1].index(turn_end) :] if turn_end in ids else None
        if after is not None and tokenizer.special_ids.isdisjoint(after) and not tokenizer.decode(after).strip():
            return True
    return False


def _evaluation(resolved: Resolved) -> str:
    s = resolved.settings
    if not resolved.evaluation:
        return "none"
    evaluated = set[bytes]().union(*map(_token_ids, resolved.evaluation.values()))
    trained_on = evaluated.intersection(_token_ids(resolved.train))
    sets = ", ".join(
        f"{name} ({len(prompts)} problems{_remarks(prompts)}{_overlap(prompts, trained_on)})"
        for name, prompts in resolved.evaluation.items()
    )
    every = f", every {s.run.eval_every} steps" if s.run.eval_every else ""
    return f"{sets} x {s.evaluate.group_size} completions, before and after{every}"


def _overlap(prompts: PromptSet, trained_on: Set[bytes]) -> str:
    """Return how many prompts of a set are trained on too: an accuracy on these measures memory."""
    found = sum(prompt.token_ids.tobytes() in trained_on for prompt in prompts.prompts)
    return f", {found} OF THEM TRAINED ON" if found else ""


def _token_ids(prompts: PromptSet) -> Iterator[bytes]:
    arrays = {id(prompt.token_ids): prompt.token_ids for prompt in prompts.prompts}  # equal prompts share one
    return (array.tobytes() for array in arrays.values())
