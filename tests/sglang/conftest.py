"""Two real servers for the whole session, started with weights that no test expects: tests must push others."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from real_servers import RealServer, installed


@pytest.fixture(scope="session")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model with weights that are 20 % larger."""
    from safetensors.torch import load_file, save_file

    folder = tiny.write_model(tmp_path_factory.mktemp("other") / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: 1.2 * t for name, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory, other_weights: Path) -> Iterator[list[RealServer]]:
    logs = tmp_path_factory.mktemp("servers")
    python = installed()
    both = [RealServer(python, other_weights, logs / f"server_{i}.log") for i in range(2)]
    try:
        for server in both:
            server.start()
        for server in both:
            server.wait()
        yield both
    finally:
        for server in both:
            server.kill()


@pytest.fixture
def servers(started: list[RealServer]) -> list[RealServer]:
    """Two running servers; one that an earlier test has killed is started."""
    dead = [server for server in started if not server.alive]
    for server in dead:
        server.start()
    for server in dead:
        server.wait()
    return started


@pytest.fixture(autouse=True)
def _logs_of_servers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print the servers' logs when a test fails."""
    failed_before = request.session.testsfailed
    yield
    if request.session.testsfailed > failed_before and "started" in request.fixturenames:
        for server in request.getfixturevalue("started"):
            print(f"---- {server.url}\n{server.log}")


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Any]:
    """The ranks of a world of this process alone."""
    from megatron_rlvr.distributed.ranks import Ranks

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = dist.group.WORLD
    places = {f"{name}_rank": 0 for name in ("tensor", "pipeline", "context", "expert", "data")}
    sizes = {f"{name}_size": 1 for name in ("tensor", "pipeline", "context", "expert", "data")}
    names = ("tensor_group", "pipeline_group", "context_group", "expert_group", "data_group", "data_context_group")
    groups = dict.fromkeys((*names, "expert_data_group", "data_objects", "replica_objects"), world)
    yield Ranks(rank=0, world_size=1, **places, **sizes, **groups)  # type: ignore[arg-type]
    dist.destroy_process_group()


@pytest.fixture
def engine_on(one_rank: Any, model: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Factory of engines on servers, to which no weights were pushed yet."""
    from sync_runs import sync_by

    from megatron_rlvr.config import RolloutSettings
    from megatron_rlvr.engines.sglang.connect import connect
    from megatron_rlvr.engines.sglang.engine import SglangEngine
    from megatron_rlvr.hf.files import read_config

    engines = []

    def make(
        urls: list[str], stop: tuple[int, ...] = (2,), max_sequence_tokens: int = 512, **settings: Any
    ) -> SglangEngine:
        config = read_config(model) | settings.pop("config", {})
        sync_options = {"method": settings.pop("method", "disk"), "bucket_bytes": settings.pop("bucket_bytes", 2**20)}
        two_temperatures = settings.pop("two_temperatures", None)
        rollout = RolloutSettings(engine="sglang", servers=urls, **settings)
        pool = connect(rollout, one_rank, config, max_sequence_tokens=max_sequence_tokens)
        sync = sync_by(**sync_options, folder=tmp_path / "sync", source=model, pool=pool, ranks=one_rank)
        engine = SglangEngine(
            pool,
            sync,
            stop_token_ids=stop,
            vocab_size=config["vocab_size"],
            max_sequence_tokens=max_sequence_tokens,
            colocated=rollout.colocated,
            two_temperatures=two_temperatures,
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def reference(model: Path) -> Any:
    """The tiny model in transformers, float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
