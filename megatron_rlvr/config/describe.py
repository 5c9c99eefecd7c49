"""Settings in words: a line for each subject that the settings alone decide."""

from megatron_rlvr.config import Settings


def describe_settings(settings: Settings) -> dict[str, str]:
    """{subject: line} of what the settings alone say about a run."""
    return {
        "model": f"{settings.model.path}, {settings.model.dtype}",
        "rollout": describe_rollout(settings),
        "reward": describe_reward(settings),
        "mask": describe_mask(settings),
        "loss": describe_loss(settings),
        "optimizer": describe_optimizer(settings),
        "run": f"{settings.run.steps} steps into {settings.run.dir}",
    }


def describe_mask(settings: Settings) -> str:
    """Return the meaning of `selection` in one line."""
    s = settings.selection
    if s.keep == "all":
        return "the policy gradient touches all response tokens"
    which = {
        "top": "with the highest entropy",
        "bottom": "with the lowest entropy",
        "random": "drawn at random",
    }[s.keep]
    scope = {
        "micro_batch": "each micro-batch on its own",
        "mini_batch": "a mini-batch over all ranks",
        "rollout_batch": "the whole rollout over all ranks",
    }[s.scope]
    owner = "policy before the update" if s.entropy == "old" else "policy being trained"
    whose = "" if s.keep == "random" else f", by the entropies of the {owner}"
    return f"the policy gradient touches the {s.fraction * 100:g} % of response tokens {which}, of {scope}{whose}"


def describe_reward(settings: Settings, answer_after: str | None = None) -> str:
    """Return the reward of a correct and of an incorrect answer in one line.

    Args:
        settings: Settings of the run.
        answer_after: Text of a response after which its answer is read; None if it is read in the whole response.
    """
    s = settings.reward
    overlong = f", overlong penalty over the last {s.overlong_buffer} tokens" if s.overlong_buffer else ""
    after = f" on what follows {answer_after}" if answer_after else ""
    return f"{s.function}{after}: correct {s.correct:g}, incorrect {s.incorrect:g}{overlong}"


def describe_rollout(settings: Settings) -> str:
    """Return how many responses of which length a step samples, and from what, in one line."""
    s = settings
    engine = ""
    if s.rollout.engine == "sglang":
        engine = f" from {len(s.rollout.servers)} SGLang server(s), which get weights by {s.sync.method}"
    dynamic = (
        f"groups that are not informative replaced, at most {s.rollout.max_rounds} rounds"
        if s.rollout.dynamic_sampling
        else "no dynamic sampling"
    )
    return (
        f"{s.batch.prompts} prompts x {s.rollout.group_size} responses a step of up to "
        f"{s.rollout.max_response_tokens} tokens at temperature {s.rollout.temperature:g}{engine}; {dynamic}"
    )


def describe_loss(settings: Settings) -> str:
    """Return the loss and its divisor in one line."""
    s = settings
    divisor = "all response tokens" if s.loss.normalizer == "all_tokens" else "the number of selected tokens"
    return (
        f"{describe_ratio(s)}, sum over the selected tokens / {divisor} of the mini-batch; advantages "
        f"{s.advantage.estimator}"
    )


def describe_ratio(settings: Settings) -> str:
    """Return in one line how `loss` bounds a token's probability ratio, and which weight a token gets."""
    s = settings.loss
    ratio = {"dapo": "clip", "gspo": "gspo, clip of sequence ratios", "cispo": "cispo, weight"}[s.objective]
    bounds = f"{1 + s.clip_high:g}"
    bounds = f"at most {bounds}" if s.clip_low is None else f"{1 - s.clip_low:g} .. {bounds}"
    words = f"{ratio} {bounds}"
    if s.correction_cap is not None:
        beyond = {"tis": "truncated at {:g}", "mis": "0 beyond 1/{0:g} .. {0:g}"}[s.rollout_correction]
        words += f", times policy / engine probability {beyond.format(s.correction_cap)} ({s.rollout_correction})"
    return words


def describe_optimizer(settings: Settings) -> str:
    """Return the optimizer steps of a rollout in one line."""
    s = settings
    updates = f"{s.batch.prompts // s.batch.mini_batch_prompts} steps a rollout on {s.batch.mini_batch_prompts} prompts"
    warmup = f" after {s.optimizer.warmup_steps} warm-up steps" if s.optimizer.warmup_steps else ""
    return f"{updates} each, Adam, learning rate {s.optimizer.learning_rate:g}{warmup}"
