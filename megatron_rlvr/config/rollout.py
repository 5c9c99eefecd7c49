"""Settings of sampling, and of the way that weights take to the engine."""

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_rlvr.config.section import Section


class RolloutSettings(Section):
    engine: Literal["embedded", "sglang"] = "embedded"
    """embedded: transformers in the training processes; sglang: SGLang servers that were started beforehand."""
    servers: list[str] = Field(default_factory=list)
    """URLs of SGLang servers, such as http://node7:30000; each holds the model of `model.path`."""
    group_size: int = Field(default=16, ge=2)
    """Completions a prompt (the group, G in the paper)."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; log-probabilities and entropies are of softmax(logits / temperature) everywhere."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; 1.0 samples from the whole distribution."""
    max_response_tokens: int = Field(default=20480, ge=1, lt=2**20)
    """Responses are cut at this length."""
    dynamic_sampling: bool = True
    """Replace groups that are all right or all wrong, which carry no gradient, by fresh prompts."""
    max_rounds: int = Field(default=10, ge=1)
    """Rounds of sampling a step, at most; then the step goes on with the groups there are."""
    max_batch_rows: int = Field(default=256, ge=1)
    """Completions the embedded engine samples at once on a rank."""
    max_batch_tokens: int = Field(default=65536, ge=1)
    """Tokens the embedded engine caches at once on a rank."""
    max_inflight: int = Field(default=64, ge=1)
    """Requests that are in flight to a server at once, those of all ranks together; at least one of each replica."""
    retries: int = Field(default=3, ge=0)
    """A request that failed is sent again this many times, to other servers where there are some."""
    server_timeout_seconds: float = Field(default=300.0, gt=0)
    """How long a run waits for its servers to start, and for any of them to come back when all are gone."""
    oversampling: float = Field(default=1.0, ge=1)
    """Groups that servers work on at once, over those that the batch is expected to need; the slowest then wait."""
    partial: bool = False
    """When the batch is full, unfinished responses stop and go on in a later step; false: they start again there."""
    overlap: Literal["none", "one_step"] = "none"
    """one_step: servers sample the next batch while this one trains, from weights that are one step older."""
    colocated: bool = False
    """Servers share the GPUs with training: their memory is released while a step trains."""
    max_staleness: int = Field(default=4, ge=1)
    """Steps by which training may be ahead of the weights that sampled a token; older groups are sampled again."""
    max_logprob_gap: float = Field(default=1.0, gt=0)
    """Mean |log-probability at sampling - policy's|, above which the run stops: the engine's weights are wrong."""

    @model_validator(mode="before")
    @classmethod
    def _one_server_is_a_list(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("servers"), str):
            return values | {"servers": [values["servers"]]}
        return values

    @model_validator(mode="after")
    def _settings_of_the_engine(self) -> "RolloutSettings":
        others = _ONLY_SGLANG if self.engine == "embedded" else _ONLY_EMBEDDED
        for key in others:
            value, field = getattr(self, key), RolloutSettings.model_fields[key]
            if value != field.get_default(call_default_factory=True):
                value = ", ".join(value) if isinstance(value, list) else value
                raise ValueError(f"rollout.{key} {value} does nothing with rollout.engine {self.engine}; drop it")
        if self.engine == "sglang" and not self.servers:
            raise ValueError("rollout.servers is empty with rollout.engine sglang; give the servers' URLs")
        for url in self.servers:
            if not _URL.fullmatch(url):
                raise ValueError(f"rollout.servers {url!r} is not the URL of a server; write it as http://HOST:PORT")
        twice = sorted({url for url in self.servers if self.servers.count(url) > 1})
        if twice:
            raise ValueError(f"rollout.servers holds {twice[0]} twice; drop one of them")
        return self


_ONLY_SGLANG = (
    "servers",
    "max_inflight",
    "retries",
    "server_timeout_seconds",
    "oversampling",
    "partial",
    "overlap",
    "colocated",
)
_ONLY_EMBEDDED = ("max_batch_rows", "max_batch_tokens")
_URL = re.compile(r"https?://([\w.-]+|\[[0-9a-fA-F:]+\])(:[0-9]{1,5})?")


class SyncSettings(Section):
    method: Literal["disk", "distributed", "tensor"] = "distributed"
    """How servers get weights: a process group with them, a folder, or their control port (tensor: this machine)."""
    dir: str | None = Field(default=None, min_length=1)
    """Folder for `sync.method: disk` that trainer and servers see under this path; default: `DIR/sync`."""
    bucket_bytes: int = Field(default=2**28, ge=1)
    """Weights travel in buckets of this size, the extra memory of a sync (distributed, tensor)."""

    @model_validator(mode="after")
    def _settings_of_the_method(self) -> "SyncSettings":
        if self.method != "disk" and self.dir is not None:
            raise ValueError(f"sync.dir {self.dir} does nothing with sync.method {self.method}; drop it")
        if self.method == "disk" and self.bucket_bytes != SyncSettings.model_fields["bucket_bytes"].default:
            raise ValueError(f"sync.bucket_bytes {self.bucket_bytes} does nothing with sync.method disk; drop it")
        return self
