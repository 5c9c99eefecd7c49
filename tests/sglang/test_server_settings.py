"""Tests of the settings of servers: combinations that are refused before a run, and the printed plan."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.config import Settings, SettingsError
from megatron_rlvr.config.loading import load_settings, validate
from megatron_rlvr.startup.describe import describe_plan
from megatron_rlvr.startup.resolve import resolve
from megatron_rlvr.startup.run_folder import RUN_FILES

REQUIRED: dict[str, Any] = {"run": {"dir": "run", "steps": 1}, "model": {"path": "model"}, "data": {"train": "a.jsonl"}}
SERVERS = {"engine": "sglang", "servers": ["http://node1:30000", "http://[::1]:30001"]}


def settings(rollout: dict[str, Any], **sections: Any) -> Settings:
    return validate(REQUIRED | {"rollout": rollout} | sections)


def test_one_server_is_a_list_of_one_in_the_file_and_as_a_flag(write_config: Callable[..., Path]) -> None:
    config = write_config(rollout={"engine": "sglang", "servers": "https://router.example"})
    assert load_settings(config).rollout.servers == ["https://router.example"]
    flags = ["--rollout.servers", "[http://a:1, http://b:2]"]
    assert load_settings(config, flags).rollout.servers == ["http://a:1", "http://b:2"]
    assert load_settings(config, ["--rollout.servers", "http://a:1"]).rollout.servers == ["http://a:1"]


@pytest.mark.parametrize(
    ("rollout", "sections", "parts"),
    [
        ({"engine": "sglang"}, {}, ["rollout.servers=[]: rollout.engine=sglang needs servers", "give their URLs"]),
        ({"servers": "http://a:1"}, {}, ["rollout.servers=[http://a:1]: has no effect with rollout.engine=embedded"]),
        ({"max_inflight": 8}, {}, ["rollout.max_inflight=8: has no effect with rollout.engine=embedded"]),
        ({"retries": 0}, {}, ["rollout.retries=0: has no effect with rollout.engine=embedded"]),
        ({"server_timeout_seconds": 5}, {}, ["rollout.server_timeout_seconds=5.0: has no effect"]),
        (SERVERS | {"max_batch_rows": 8}, {}, ["rollout.max_batch_rows=8: has no effect with rollout.engine=sglang"]),
        (SERVERS | {"max_batch_tokens": 80000}, {}, ["rollout.max_batch_tokens=80000: has no effect"]),
        (SERVERS | {"max_inflight": 0}, {}, ["rollout.max_inflight=0", "at least 1"]),
        (SERVERS | {"servers": ["node1:30000"]}, {}, ["rollout.servers=node1:30000: not the URL", "http://HOST:PORT"]),
        (SERVERS | {"servers": ["http://node1:30000/v1"]}, {}, ["rollout.servers=", "not the URL"]),
        (SERVERS | {"servers": ["http://a b:1"]}, {}, ["rollout.servers=", "not the URL"]),
        (
            SERVERS | {"servers": ["http://a:1", "http://b:1", "http://a:1"]},
            {},
            ["rollout.servers=http://a:1: given twice"],
        ),
        (SERVERS, {"sync": {"dir": "/x"}}, ["sync.dir=/x: has no effect with sync.method=distributed"]),
        (
            SERVERS,
            {"sync": {"method": "disk", "bucket_bytes": 8}},
            ["sync.bucket_bytes=8: has no effect with sync.method=disk"],
        ),
        ({"partial": True}, {}, ["rollout.partial=true: has no effect with rollout.engine=embedded"]),
        ({"oversampling": 1.5}, {}, ["rollout.oversampling=1.5: has no effect with rollout.engine=embedded"]),
        (
            SERVERS | {"overlap": "one_step"},
            {},
            ["rollout.overlap=one_step", "loss.rollout_correction=none", "tis or mis"],
        ),
        (
            SERVERS | {"overlap": "one_step", "colocated": True},
            {"loss": {"rollout_correction": "tis"}},
            ["rollout.overlap=one_step", "rollout.colocated=true", "remove one"],
        ),
        (SERVERS | {"colocated": True}, {}, ["sync.method=distributed", "rollout.colocated=true", "disk"]),
        ({}, {"sync": {"method": "disk"}}, ["sync.method=disk: has no effect with rollout.engine=embedded"]),
    ],
)
def test_settings_without_effect_or_in_conflict_are_refused(
    rollout: dict[str, Any], sections: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(SettingsError) as caught:
        settings(rollout, **sections)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_kv_cache_of_the_embedded_engine_does_not_limit_servers() -> None:
    data = {"train": "a.jsonl", "max_prompt_tokens": 60000}
    assert settings(SERVERS, data=data).rollout.servers == SERVERS["servers"]
    with pytest.raises(SettingsError, match=r"rollout\.max_batch_tokens=65536: cannot hold"):
        settings({}, data=data)


def test_the_plan_names_the_servers_and_the_sync_method(write_config: Callable[..., Path]) -> None:
    resolved = resolve(load_settings(write_config(rollout={**SERVERS, "max_response_tokens": 16})))
    (line,) = [line for line in describe_plan(resolved).splitlines() if line.startswith("rollout")]
    assert "at temperature 1 from 2 SGLang server(s), which get weights by distributed; groups" in line
    assert "SGLang" not in describe_plan(resolve(load_settings(write_config())))


def test_weights_of_an_earlier_run_count_as_run_files_and_a_sync_folder_must_be_writable(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    assert "sync" in RUN_FILES
    (tmp_path / "file").write_text("")
    config = write_config(
        rollout={**SERVERS, "max_response_tokens": 16}, sync={"method": "disk", "dir": str(tmp_path / "file" / "sync")}
    )
    with pytest.raises(SettingsError, match=r"sync\.dir=.*: cannot be written"):
        resolve(load_settings(config))
