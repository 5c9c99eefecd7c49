"""Settings in words: a line for each subject that the settings alone decide."""

from megatron_rlvr.config import Settings
from megatron_rlvr.config.yaml_format import shown


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
    guard = ""
    if s.guard_probability:
        guard = (
            f", without the {s.guard_quantile * 100:g} % of lowest entropy of those of positive advantage and a "
            f"probability below {s.guard_probability:g}"
        )
    if s.keep == "all":
        return f"the policy gradient touches all response tokens{guard}"
    value = {
        "entropy": "entropy",
        "surprisal": "surprisal",
        "covariance": "covariance of advantage and log-probability",
        "gradient": "gradient norm",
    }[s.signal]
    share = f"{s.fraction * 100:g} %"
    if s.fraction_end is not None:
        share += f" (from step {s.fraction_steps} on, {s.fraction_end * 100:g} %)"
    if s.band is not None:
        share = f"{s.band[0] * 100:g} to {s.band[1] * 100:g} % quantile"
    which = {
        "top": f"with the highest {value}",
        "bottom": f"with the lowest {value}",
        "band": f"of {value}",
        "random": "drawn at random",
    }[s.keep]
    signs = " of positive and of negative advantage each" if s.by_sign else ""
    scope = {
        "micro_batch": "each micro-batch on its own",
        "mini_batch": "a mini-batch over all ranks",
        "rollout_batch": "the whole rollout over all ranks",
    }[s.scope]
    owner = "policy before the update" if s.entropy == "old" else "policy being trained"
    by = "entropies" if s.signal == "entropy" else "probabilities"
    whose = "" if s.keep == "random" else f", by the {by} of the {owner}"
    return f"the policy gradient touches the {share} of response tokens{signs} {which}, of {scope}{whose}{guard}"


def describe_reward(settings: Settings, answer_after: str | None = None) -> str:
    """Return the reward of a correct and of an incorrect answer in one line.

    Args:
        settings: Settings of the run.
        answer_after: Text of a response after which its answer is read; None if it is read in the whole response.
    """
    s = settings.reward
    overlong = f", overlong penalty over the last {s.overlong_buffer} tokens" if s.overlong_buffer else ""
    after = f" on what follows {answer_after}" if answer_after else ""
    return f"{shown(s.function)}{after}: correct {s.correct:g}, incorrect {s.incorrect:g}{overlong}"


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
    divided = {
        "all_tokens": "sum over the selected tokens / all response tokens of the mini-batch",
        "selected_tokens": "sum over the selected tokens / the number of selected tokens of the mini-batch",
        "sequence_mean": "mean over sequences of the sum over the selected tokens / response tokens",
        "prompt_mean": "mean over prompts of the sum over the selected tokens / response tokens",
    }[s.loss.normalizer]
    shaped = ""
    if s.advantage.entropy_bonus:
        shaped = f" plus min({s.advantage.entropy_bonus:g} entropy, |A| / {s.advantage.entropy_bound:g})"
    return f"{describe_ratio(s)}, {divided}; advantages {s.advantage.estimator}{shaped}"


def describe_ratio(settings: Settings) -> str:
    """Return in one line how `loss` bounds a token's probability ratio, and which weight a token gets."""
    s = settings.loss
    ratio = {
        "dapo": "clip",
        "gspo": "gspo, clip of sequence ratios",
        "cispo": "cispo, weight",
        "dppo": "dppo, change of",
    }
    bounds = f"{1 + s.clip_high:g}"
    bounds = f"at most {bounds}" if s.clip_low is None else f"{1 - s.clip_low:g} .. {bounds}"
    if s.objective == "dppo":
        bounds = f"a probability within {-(s.clip_low or 0.0):g} .. {s.clip_high:g}"
    words = f"{ratio[s.objective]} {bounds}"
    if s.correction_cap is not None:
        beyond = {"tis": "truncated at {:g}", "mis": "0 beyond 1/{0:g} .. {0:g}"}[s.rollout_correction]
        level = {"token": "", "sequence": " of the response", "geometric": ", geometric mean over the response,"}
        words += f", times policy / engine probability{level[s.correction_level]} {beyond.format(s.correction_cap)}"
        words += f" ({s.rollout_correction})"
    if s.correction_veto is not None:
        words += f", 0 for responses with a token below {s.correction_veto:g}"
    if s.kl_coefficient:
        words += f", plus {s.kl_coefficient:g} KL to model.path ({s.kl_estimator})"
    if s.entropy_target is not None:
        words += f", minus up to {s.entropy_max:g} entropy below {s.entropy_target:g} nats"
    return words


def describe_optimizer(settings: Settings) -> str:
    """Return the optimizer steps of a rollout in one line."""
    s = settings
    updates = f"{s.batch.prompts // s.batch.mini_batch_prompts} steps a rollout on {s.batch.mini_batch_prompts} prompts"
    warmup = f" after {s.optimizer.warmup_steps} warm-up steps" if s.optimizer.warmup_steps else ""
    return f"{updates} each, Adam, learning rate {s.optimizer.learning_rate:g}{warmup}"
