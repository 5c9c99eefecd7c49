"""Settings of sampling, of the weight sync to the engine, and of rewards."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_rlvr.config.data import MIN_TEMPERATURE
from megatron_rlvr.config.section import OptionalPath, Section, check_tree
from megatron_rlvr.config.urls import check_urls, without_slash
from megatron_rlvr.config.yaml_format import shown
from megatron_rlvr.reward_spec import Functions, parse_functions


class RolloutSettings(Section):
    """Rollout engine and its limits, sampling, dynamic sampling, and how far sampling may be off-policy."""

    engine: Literal["embedded", "sglang"] = "embedded"
    """embedded: transformers in the training processes; sglang: SGLang servers, which must already be running."""
    servers: list[str] = Field(default_factory=list)
    """URLs of the SGLang servers, such as http://node7:30000; each serves the model of `model.path`."""
    api_key_file: OptionalPath = Field(default=None, min_length=1)
    """File with the key that the servers demand (`rlvr serve --api-key-file`, SGLang's --api-key), at the same path on
    every host of the trainer; null: they demand none."""
    group_size: int = Field(default=16, ge=2, le=2**16)
    """Number of completions per prompt (the group, G in the paper)."""
    temperature: float = Field(default=1.0, ge=MIN_TEMPERATURE, le=100)
    """Sampling temperature. Log-probabilities and entropies are of softmax(logits / temperature) everywhere."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Probability mass of the tokens to sample from. Only 1, the whole distribution: nucleus sampling draws from other
    probabilities than those that train. `evaluate.top_p` is free."""
    max_response_tokens: int = Field(default=20480, ge=1, lt=2**20)
    """Longest response in tokens; longer ones are truncated."""
    stop: list[str | int] = Field(default_factory=list)
    """Further tokens that end a response, as texts or ids. The end of turn of the chat template and the eos tokens of
    tokenizer, config.json and generation_config.json always end one; the plan lists all of them."""
    dynamic_sampling: bool = True
    """Replace groups that are all correct or all incorrect, which carry no gradient, by groups of other prompts."""
    max_rounds: int = Field(default=10, ge=1, le=10**6)
    """Maximum number of sampling rounds per step, or with servers of prompts, as a multiple of `batch.prompts`. Then
    the step trains on the informative groups so far."""
    max_batch_rows: int = Field(default=256, ge=1, le=2**20)
    """Embedded engine: maximum number of completions in the running batch of a rank."""
    max_batch_tokens: int = Field(default=65536, ge=1, le=2**31)
    """Embedded engine: size of the KV cache of a rank, in tokens."""
    max_inflight: int = Field(default=64, ge=1, le=2**16)
    """Maximum concurrent requests per server over all ranks (each data-parallel replica always gets one)."""
    retries: int = Field(default=3, ge=0, le=1000)
    """Number of times that a failed request is sent again, to another server if there is one."""
    server_timeout_seconds: float = Field(default=300.0, gt=0, le=604800)
    """Seconds to wait for servers to start, and for any server to be re-admitted when all are unhealthy."""
    oversampling: float = Field(default=1.0, ge=1, le=1000)
    """In-flight groups as a multiple of what is expected to fill the batch; the slowest spill over into the next
    step."""
    partial: bool = False
    """true: responses unfinished when the batch is full resume in a later step; false: they are sampled again."""
    overlap: Literal["none", "one_step"] = "none"
    """one_step: servers sample the next batch while this one trains, from weights that are one step older."""
    colocated: bool = False
    """Servers share the GPUs with training and release their memory while a step trains."""
    max_staleness: int = Field(default=4, ge=1, le=10**6)
    """Maximum off-policy steps of any token; groups with an older token are discarded and resampled."""
    max_logprob_gap: float = Field(default=1.0, gt=0, le=10**6)
    """Stop the run if the mean absolute difference in log-probability between engine and policy, in nats, exceeds
    this: the engine samples from other weights."""

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list(cls, values: Any) -> Any:
        """Read one server or one stop token as a list of it; a URL may end in a slash."""
        if not isinstance(values, dict):
            return values
        values = values | {key: [values[key]] for key in ("servers", "stop") if isinstance(values.get(key), str | int)}
        if isinstance(values.get("servers"), list):
            values = values | {"servers": without_slash(values["servers"])}
        return values

    @field_validator("stop", mode="before")
    @classmethod
    def _tokens(cls, values: Any) -> Any:
        for value in values if isinstance(values, list) else []:
            if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
                raise ValueError(f"rollout.stop={shown(value)}: not a token; give its text or its id")
        return values

    @model_validator(mode="after")
    def _samples_from_what_trains(self) -> "RolloutSettings":
        if self.top_p < 1:
            raise ValueError(
                f"rollout.top_p={self.top_p}: samples from a truncated distribution, while the probabilities of the "
                "whole one train; set it to 1 (evaluate.top_p may be lower)"
            )
        return self

    @model_validator(mode="after")
    def _servers(self) -> "RolloutSettings":
        if self.engine == "sglang" and not self.servers:
            raise ValueError("rollout.servers=[]: rollout.engine=sglang needs servers; give their URLs")
        check_urls("rollout.servers", self.servers)
        return self


class SyncSettings(Section):
    """Weight sync from the policy to SGLang servers."""

    method: Literal["disk", "distributed", "tensor"] = "distributed"
    """distributed: a process group with the servers; disk: a folder; tensor: HTTP requests (servers on this host)."""
    dir: OptionalPath = Field(default=None, min_length=1)
    """Folder for `sync.method: disk`, at the same path for trainer and servers; null: `DIR/sync`."""
    bucket_bytes: int = Field(default=2**28, ge=1, le=2**40)
    """Bytes of weights sent at once (distributed and tensor). A sync takes twice this memory: one bucket is
    filled while another is sent."""


class RewardSettings(Section):
    """Function that grades a response, its limits, and the value of its verdicts."""

    function: str | dict[str, str] = "math"
    """math, exact, choice, number, format, code or all of some, with options in parentheses (docs/rewards.md);
    module:function: your own. A mapping {source: function} has one for each source, and "*" for all others."""
    answer_after: str = Field(default="auto", min_length=1)
    """Text that ends the thinking section: built-in functions grade only what follows its last occurrence, and without
    it a response has no answer. auto: `</think>` if the prompts end in an open `<think>`, else none; none: nothing."""
    correct: float = Field(default=1.0, ge=-(10**12), le=10**12)
    """Reward of a correct answer."""
    incorrect: float = Field(default=-1.0, ge=-(10**12), le=10**12)
    """Reward of an incorrect answer."""
    timeout_seconds: float = Field(default=2.0, ge=0.01, le=86400)
    """Seconds after which a grader is killed and restarted; the answer counts as incorrect."""
    workers: int = Field(default=2, ge=1, le=1024)
    """Number of grader processes per rank."""
    overlong_buffer: int = Field(default=4096, ge=0)
    """Number of tokens before the cap over which a length penalty falls from 0 to -1 (DAPO's soft overlong
    punishment); 0: no penalty."""

    @field_validator("function", mode="before")
    @classmethod
    def _is_text_or_mapping(cls, value: Any) -> Any:
        texts = [*value, *value.values()] if isinstance(value, dict) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"reward.function={shown(value)}: neither a str nor a mapping of str to str; write a function, or "
                "{SOURCE: FUNCTION}"
            )
        return check_tree(value)

    @model_validator(mode="after")
    def _combination(self) -> "RewardSettings":
        if self.correct <= self.incorrect:
            raise ValueError(f"reward.correct={self.correct}: not above reward.incorrect={self.incorrect}; raise it")
        try:
            functions = parse_functions(self.function)
        except ValueError as error:
            raise ValueError(f"reward.function={shown(self.function)}: {error}") from None
        if self.answer_after != "auto" and not any(call.reads_answers for call in functions.all):
            raise ValueError(
                f"reward.answer_after={shown(self.answer_after)}: has no effect with "
                f"reward.function={shown(self.function)} (it reads the whole response); remove it"
            )
        for call in (part for each in functions.all for part in each.walk() if part.name == "code"):
            seconds = dict(call.options)["seconds"]
            if self.timeout_seconds <= seconds:
                raise ValueError(
                    f"reward.timeout_seconds={self.timeout_seconds:g}: not above the {seconds:g} s that code() gives "
                    "each test of a solution; raise it to the time of all tests together, such as 30"
                )
        return self

    @property
    def functions(self) -> Functions:
        """The functions that `function` names."""
        return parse_functions(self.function)
