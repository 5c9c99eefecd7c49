"""Settings of evaluations: values of k, and servers of their own."""

from typing import Any

import pytest

from megatron_rlvr.config import Settings, SettingsError
from megatron_rlvr.config.loading import validate

REQUIRED = {"run": {"dir": "runs/a", "steps": 2}, "model": {"path": "m"}, "data": {"train": "t.jsonl"}}
SETS = {"sets": ["a.jsonl"], "group_size": 8}


def evaluate(**changes: Any) -> Settings:
    rollout = {"engine": "sglang", "servers": ["http://n1:30000"]}
    return validate(REQUIRED | {"rollout": rollout, "evaluate": SETS | changes})


@pytest.mark.parametrize("k", [0, -1, 9])
def test_k_is_at_most_the_number_of_completions(k: int):
    assert evaluate(pass_at=[1, 8]).evaluate.pass_at == [1, 8]
    with pytest.raises(SettingsError, match=rf"evaluate\.pass_at={k}: .*evaluate\.group_size=8; give ints from 1"):
        evaluate(pass_at=[1, k])


def test_servers_of_evaluations_are_urls_and_not_those_of_rollouts():
    assert evaluate(servers="http://n2:30000/").evaluate.servers == ["http://n2:30000"]
    with pytest.raises(SettingsError, match=r"evaluate\.servers=n2: not the URL of a server"):
        evaluate(servers=["n2"])
    with pytest.raises(SettingsError, match=r"evaluate\.servers=http://n2:1: given twice"):
        evaluate(servers=["http://n2:1", "http://n2:1/"])
    with pytest.raises(SettingsError, match=r"evaluate\.servers=http://n1:30000: also in rollout\.servers"):
        evaluate(servers=["http://n1:30000"])


def test_without_a_set_they_have_no_effect():
    for key, value in (("pass_at", [1]), ("servers", ["http://n2:1"])):
        with pytest.raises(SettingsError, match=rf"evaluate\.{key}=.*: has no effect with evaluate\.sets=\[\]"):
            validate(REQUIRED | {"evaluate": {key: value}})
