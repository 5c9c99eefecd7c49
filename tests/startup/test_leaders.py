"""Which ranks are leaders, before they have joined."""

import pytest

from megatron_rlvr.config import ParallelSettings
from megatron_rlvr.distributed import megatron_on_cpu
from megatron_rlvr.startup.process import is_leader


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 2)])
def test_leaders_are_the_first_ranks_of_megatrons_replicas(
    sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
):
    megatron_on_cpu.import_megatron()
    from megatron.core.parallel_state import RankGenerator

    tensor, context, pipeline = sizes
    world = 2 * tensor * context * pipeline
    replicas = RankGenerator(tp=tensor, ep=1, dp=2, pp=pipeline, cp=context, order="tp-cp-ep-dp-pp").get_ranks(
        "tp-cp-pp"
    )
    parallel = ParallelSettings(tensor=tensor, context=context, pipeline=pipeline)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    found = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        if is_leader(parallel):
            found.append(rank)
    assert found == sorted(min(replica) for replica in replicas)
