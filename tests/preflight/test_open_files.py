"""The check of the limit on open files."""

import resource
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rlvr import open_files
from megatron_rlvr.preflight.machines import _too_few_files


@pytest.mark.parametrize(
    ("ranks", "leader", "store", "needed"),
    [(32, False, False, 224), (32, True, False, 224 + 4 * 16), (32, True, True, 224 + 4 * 16 + 4 * 32)],
)
def test_a_limit_below_what_a_rank_needs_is_named_with_the_remedy(
    ranks: int, leader: bool, store: bool, needed: int, monkeypatch: pytest.MonkeyPatch
):
    rollout = SimpleNamespace(max_inflight=64, servers=["http://a", "http://b", "http://c", "http://d"])
    place = SimpleNamespace(
        rank=0 if store else 1, world_size=ranks, data_size=4, replica_rank=0 if leader else 1, is_main=store
    )
    context: Any = SimpleNamespace(ranks=place, resolved=SimpleNamespace(settings=SimpleNamespace(rollout=rollout)))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(open_files, "limit", lambda: needed)
    assert _too_few_files(context) is None
    monkeypatch.setattr(open_files, "limit", lambda: needed - 1)
    problem = _too_few_files(context)
    assert problem is not None
    assert f"the limit of {needed - 1} open files is below the {needed} that it may need" in problem
    assert "ulimit -Hn" in problem
    if store:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        assert _too_few_files(context) is None


def test_running_out_of_files_is_seen_as_that():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files.is_open() + 4, hard))
    opened = []
    try:
        while True:
            opened.append(open("/dev/null"))  # noqa: SIM115
    except OSError as error:
        found = error.errno
    finally:
        for each in opened:
            each.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found in open_files.EXHAUSTED
