"""No weight sync: servers keep the weights that they hold, which an evaluation samples from."""

from collections.abc import Iterable, Mapping

import torch

from megatron_rlvr.engines.sglang.client import ServerError
from megatron_rlvr.engines.sglang.membership import ExpectedWeights
from megatron_rlvr.engines.sglang.weight_sync.base import WeightSync

AT_START = "default"
"""Name that SGLang gives to the weights with which a server has started."""


class CurrentWeights(WeightSync):
    """Expects of every server the weights that the first one holds; see `WeightSync`."""

    def push(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        version: int,
        exclude: Mapping[str, str] | None = None,
    ) -> tuple[ExpectedWeights, dict[str, str]]:
        """Give the weights on servers a version, without sending any; ``named_tensors`` is not read."""
        held: dict[str, str] = {}
        failures: dict[str, str] = {}
        if self._main_pool is not None:
            for url, answer in self._main_pool.everywhere(lambda server: server.weight_version()).items():
                if isinstance(answer, ServerError) or answer is None:
                    failures[url] = str(answer or "the server does not name its weights")
                else:
                    held[url] = answer
        label = self._from_main(next(iter(held.values()), AT_START))
        self.announce(label, version)
        failures |= {
            url: f"the server holds the weights {other}, and the first one {label}"
            for url, other in held.items()
            if other != label
        }
        return ExpectedWeights(label), failures

    def close(self) -> None:
        """Do nothing: nothing has been pushed."""
