"""Part of host.py: answers of servers, read by a leader, and the abort of all that run, with a scripted server.

The paper's step has 8,192 responses; a server's answers have 10,000 tokens here. CPU seconds are those of the leader's
process, in which all of it runs; the server has its own. The seconds at more ranks are a leader's share of the step, at
8 ranks a replica.
"""

import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import fake_server

from megatron_rlvr import open_files
from megatron_rlvr.engines.sglang.completions import CompletionCodec
from megatron_rlvr.engines.sglang.pool import ServerPool
from megatron_rlvr.engines.sglang.request import ServerRequest
from megatron_rlvr.types import CompletionRequest, Prompt

RESPONSES, TOKENS, ABORTED = 8192, 10_000, 1024
_RANKS_OF_REPLICA = 8


class _Sampling:
    temperature = top_p = 1.0

    def __init__(self, tokens: int) -> None:
        self.max_response_tokens = tokens


def rows(share: float) -> list[dict[str, Any]]:
    """See host.py."""
    open_files.raise_limit()
    read, aborted = max(1, round(share * RESPONSES)), max(1, round(share * ABORTED))
    read_seconds, missing = _measure(read, TOKENS, abort=False)
    found = [_row("answers are read", f"{read} of {TOKENS} tokens, {missing} lost", read, read_seconds)]
    abort_seconds, lost = _measure(aborted, 2 * TOKENS, abort=True)
    found.append(_row("an abort of all requests", f"{aborted} at {TOKENS} tokens, {lost} lost", aborted, abort_seconds))
    return found


def _row(name: str, size: str, count: int, seconds: float) -> dict[str, Any]:
    at = {ranks: seconds / count * RESPONSES / (ranks / _RANKS_OF_REPLICA) for ranks in (32, 256, 1024)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return {"name": name, "size": size, "cpu_seconds": seconds, "peak_mb": peak, "seconds_at": at}


def _measure(count: int, tokens: int, *, abort: bool) -> tuple[float, int]:
    """Return the CPU seconds of reading answers, and the number of responses that are missing at the end."""
    command = [sys.executable, fake_server.__file__, "3600" if abort else "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        pool = ServerPool([server.stdout.readline().strip()], max_inflight=1024, retries=3, patience_seconds=600.0)
        try:
            with pool.open() as stream:
                stream.submit(_requests(count, tokens))
                before = time.process_time()
                if abort:
                    while pool.status()[0].requests_running < count:
                        time.sleep(0.05)
                    time.sleep(2.0)
                    found = stream.abort()
                else:
                    found = [stream.get(600.0) for _ in range(count)]
                return time.process_time() - before, count - len([each for each in found if each is not None])
        finally:
            pool.close()
            server.kill()


def _requests(count: int, tokens: int) -> list[ServerRequest]:
    codec = CompletionCodec(stop_token_ids=(), vocab_size=fake_server.VOCABULARY, max_sequence_tokens=2 * tokens)
    codec.versions["default"] = 0
    prompt = Prompt("p", np.array([1], dtype=np.int32), "", "set")
    sampling: Any = _Sampling(tokens)
    return [codec.encode(CompletionRequest(prompt, i, i), None, sampling, 0) for i in range(count)]
