"""Completion requests as the bodies of server requests, and the answers of servers as completions.

Token ids are sent and received, never text. A server returns log_softmax(logits / temperature) before top-p, and leaves
the stop token in the response, as the embedded engine does. Neither is taken on trust: every answer is checked against
its request before it is used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from megatron_rlvr.engines.sglang.answers import is_int, shown
from megatron_rlvr.engines.sglang.client import UnhealthyServerError
from megatron_rlvr.engines.sglang.logit_processor import processor_fields
from megatron_rlvr.engines.sglang.request import AbortedRequestError, ServerRequest
from megatron_rlvr.engines.two_temperatures import TwoTemperatures
from megatron_rlvr.protocols import EngineError, Sampling
from megatron_rlvr.types import Completion, CompletionRequest, empty_completion

# Bounds one attempt on a server that is healthy and yet loses a request; a hung server fails its health check earlier.
_SECONDS_PER_REQUEST, _SECONDS_PER_TOKEN = 60.0, 0.5
# Rounding can leave the log-probability of a certain token slightly above 0.
_MAX_LOGPROB = 1e-3
# Far below any that sampling can give; its square is finite in fp32.
_MIN_LOGPROB = -1e18
# Weights are pushed once in a step, and tokens that are older than a few steps are not trained on.
_MAX_SPANS, _MAX_POSITION = 1000, 2**31


class CompletionCodec:
    """Encodes completion requests for servers, and decodes and checks the answers.

    Args:
        stop_token_ids: Tokens that end a response, of which they stay the last token.
        vocab_size: Size of the vocabulary.
        max_sequence_tokens: Maximum number of tokens of a prompt and its response together.
        two_temperatures: Temperatures by entropy; None for that of the sampling parameters.

    Attributes:
        versions: {name of the weights on servers: their version}, of all weights of this run.
    """

    def __init__(
        self,
        *,
        stop_token_ids: Sequence[int],
        vocab_size: int,
        max_sequence_tokens: int,
        two_temperatures: TwoTemperatures | None = None,
    ) -> None:
        self.versions: dict[str, int] = {}
        self._stop_token_ids = frozenset(stop_token_ids)
        self._vocab_size = vocab_size
        self._max_sequence_tokens = max_sequence_tokens
        self._processor = None if two_temperatures is None else processor_fields(two_temperatures)

    def encode(
        self, request: CompletionRequest, resume_from: Completion | None, sampling: Sampling, oldest_version: int
    ) -> ServerRequest:
        """Return the request to send to a server.

        Args:
            resume_from: Partial response from an earlier step, to be continued.
            oldest_version: Version of the weights on servers now; no new token may be from older ones.

        Raises:
            EngineError: No server could answer the request, or it would crash a server.
        """
        prompt, response = request.prompt.token_ids, sampling.max_response_tokens
        name = f"completion {request.index} of prompt {request.prompt.id}"
        if not len(prompt) or prompt.min() < 0 or prompt.max() >= self._vocab_size:
            raise EngineError(f"{name} is empty or has a token id outside the vocabulary of {self._vocab_size}")
        if len(prompt) + response > self._max_sequence_tokens:
            limit = self._max_sequence_tokens
            raise EngineError(f"{name} has {len(prompt)} + {response} tokens, more than the maximum of {limit}")
        partial_response = resume_from or empty_completion(request)
        remaining = response - len(partial_response.token_ids)
        parameters = {
            "max_new_tokens": remaining,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "stop_token_ids": sorted(self._stop_token_ids),
            "sampling_seed": request.seed,
        }
        body = {
            "input_ids": [*prompt.tolist(), *partial_response.token_ids.tolist()],
            "return_logprob": True,
            "sampling_params": parameters,
        }
        if self._processor is not None:
            body["custom_logit_processor"], parameters["custom_params"] = self._processor
        return ServerRequest(
            name=name,
            body=body,
            read=partial(self._decode, request, partial_response, remaining, oldest_version),
            timeout_seconds=_SECONDS_PER_REQUEST + _SECONDS_PER_TOKEN * remaining,
        )

    def _decode(
        self, request: CompletionRequest, resume_from: Completion, max_tokens: int, oldest_version: int, answer: Any
    ) -> tuple[CompletionRequest, Completion]:
        """Return the request and ``resume_from`` continued by a server's answer.

        Raises:
            UnhealthyServerError: The answer cannot be a continuation by at most ``max_tokens`` tokens.
            AbortedRequestError: The server ended the request early; the error has the completion so far.
        """
        try:
            meta, tokens = answer["meta_info"], answer["output_ids"]
            reason = meta["finish_reason"]
            kind = reason["type"]
            pairs = [(entry[0], entry[1]) for entry in meta.get("output_token_logprobs") or []]
            versions = _versions_of(meta, len(tokens), self.versions)
        except (LookupError, TypeError, AttributeError):
            raise UnhealthyServerError("the answer lacks tokens, log-probabilities or a finish reason") from None
        aborted = kind == "abort"
        if problem := self._problem(tokens, pairs, 0 if aborted else 1, max_tokens):
            raise UnhealthyServerError(f"the answer has {problem}")
        if len(versions) and versions.min() < oldest_version:
            raise UnhealthyServerError(
                f"the server sampled from weights of version {versions.min()}, older than {oldest_version}"
            )
        logprobs = np.array([logprob for logprob, _ in pairs], dtype=np.float32)
        completion = replace(
            resume_from,
            token_ids=np.concatenate([resume_from.token_ids, np.array(tokens, dtype=np.int32)]),
            logprobs=np.concatenate([resume_from.logprobs, logprobs]),
            weight_versions=np.concatenate([resume_from.weight_versions, versions]),
        )
        # At the cap a server reports "length", whatever the last token is; and it reports "abort" even if the token
        # that it has just sampled ends the response.
        stopped = kind == "stop" or (bool(tokens) and tokens[-1] in self._stop_token_ids)
        if kind == "stop" and (not tokens or reason.get("matched") != tokens[-1]):
            raise UnhealthyServerError(
                f"the answer was stopped by {shown(reason.get('matched'), quoted=True)} and ends with {tokens[-1:]}"
            )
        if stopped or len(tokens) == max_tokens:
            return request, replace(completion, finish_reason="stop" if stopped else "length")
        if aborted:
            raise AbortedRequestError(
                f"the server aborted the request: {shown(reason.get('message'))}", (request, completion)
            )
        raise UnhealthyServerError(
            f"the answer of {len(tokens)} tokens has finish reason {shown(kind, quoted=True)} below the cap of "
            f"{max_tokens}"
        )

    def _problem(self, tokens: Any, pairs: list[tuple[Any, Any]], min_tokens: int, max_tokens: int) -> str | None:
        """Return a description of what is impossible in a response, or None."""
        if not isinstance(tokens, list):
            return f"{shown(tokens)} as tokens"
        if not min_tokens <= len(tokens) <= max_tokens:
            return f"{len(tokens)} tokens, not {min_tokens} to {max_tokens}"
        outside = [token for token in tokens if not is_int(token, 0, self._vocab_size - 1)]
        if outside:
            return f"token id {shown(outside[0], quoted=True)}, outside the vocabulary of {self._vocab_size}"
        if [token for _, token in pairs] != tokens:
            return "log-probabilities of other tokens"
        impossible = [p for p, _ in pairs if type(p) not in (int, float) or not _MIN_LOGPROB <= p <= _MAX_LOGPROB]
        return f"log-probability {shown(impossible[0])}" if impossible else None


def _versions_of(meta: Mapping[str, Any], tokens: int, known: Mapping[str, int]) -> np.ndarray:
    """Return [T] int32, the version of the weights of each of ``tokens`` new tokens, from the spans in an answer.

    Spans follow each other; the last may reach beyond the tokens of a request that was aborted.
    """
    versions = np.full(tokens, -1, dtype=np.int32)
    if not tokens:
        return versions
    spans = meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": tokens}]
    if len(spans) > _MAX_SPANS:
        raise UnhealthyServerError(f"the answer has {len(spans)} spans of weights, more than {_MAX_SPANS}")
    for span in spans:
        name, start, end = span["version"], span["start"], span["end"]
        if not isinstance(name, str) or name not in known:
            raise UnhealthyServerError(f"the server sampled from weights {shown(name)}, which are not of this run")
        if not (is_int(start, 0, _MAX_POSITION) and is_int(end, start, _MAX_POSITION)):
            raise UnhealthyServerError(f"the answer has weights from token {shown(start)} to {shown(end)}")
        versions[start:end] = known[name]
    if versions.min() < 0:
        raise UnhealthyServerError("the answer does not give the weights of each token")
    return versions
