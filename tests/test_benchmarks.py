"""Tests of the benchmarks: all methods compute the same values, wrong ones are detected, metrics are correct.

Shapes are tiny, so that these tests show nothing about speed.
"""

import dataclasses
import importlib
import json
import multiprocessing
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import zygote

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
head = importlib.import_module("head")
host_sync = importlib.import_module("host_sync")
numerics = importlib.import_module("numerics")
peers = importlib.import_module("head_methods.peers")
step = importlib.import_module("step")
workload = importlib.import_module("step_arms.workload")

SHAPE = (96, 16, 512)
OURS = ["a", "b", "dense", "naive", "product", "megatron"]
PEERS = ["verl", "trl", "liger"]
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")


def measured(names: list[str], group: Any) -> dict[str, dict[str, Any]]:
    """Measures the methods; runs on a rank."""
    return {name: head.measure(name, SHAPE, "float32", 0.2, group) for name in names}


def measured_with_a_fault(group: Any) -> dict[str, Any]:
    """Measures mode A with a loss that omits the last selected row; runs on a rank."""
    mode_a = head.METHODS["a"].load()

    def faulty(inputs: Any) -> Any:
        outcome = mode_a(inputs)
        return head.Outcome(-outcome.logp[inputs.selected[:-1]].sum(), outcome.logp, outcome.entropy)

    head.METHODS["a"] = dataclasses.replace(head.METHODS["a"], load=lambda: faulty)
    return measured(["a"], group)["a"]


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return zygote.run([sys.executable, *arguments], cwd=BENCHMARKS.parent, env=tiny.environment())


@LINUX
@pytest.mark.parametrize("methods", [OURS, pytest.param(PEERS, marks=pytest.mark.soak)], ids=["own", "peers"])
def test_every_method_has_the_values_and_gradients_of_float64(methods: list[str]):
    (rows,) = head.on_ranks(1, measured, methods)
    assert {name: row["why_not"] for name, row in rows.items() if "why_not" in row} == {}
    for name, row in rows.items():
        assert row["agrees"]
        assert row["seconds"] == row["forward"] + row["backward"] > 0
        for kind, error in row["errors"].items():
            assert error < (1e-4 if kind in ("logp", "entropy") else 1e-5), (name, kind)
    for name in rows.keys() & {"a", "b", "dense", "naive", "megatron"}:
        assert set(rows[name]["errors"]) == {"logp", "entropy", "dhidden", "dweight"}
        assert rows[name]["gradients_mb"] * 2**20 == 4 * 16 * (96 + 512)


@LINUX
@pytest.mark.soak
def test_methods_that_can_shard_the_vocabulary_agree_on_two_ranks():
    for rows in head.on_ranks(2, measured, ["a", "b", "dense", "megatron", "naive"]):
        assert "no tensor-parallel form" in rows.pop("naive")["why_not"]
        assert all(row["agrees"] for row in rows.values())
        assert rows["a"]["gradients_mb"] * 2**20 == 4 * 16 * (96 + 512 // 2)


@LINUX
def test_a_wrong_gradient_is_detected():
    (row,) = head.on_ranks(1, measured_with_a_fault)
    assert not row["agrees"]
    assert row["errors"]["logp"] < 1e-4
    assert row["errors"]["dhidden"] > 1e-2


@LINUX
def test_the_program_prints_a_table_and_writes_its_metrics(tmp_path):
    arguments = ("--shape", "96,16,512", "--methods", "a", "b", "--json", str(tmp_path / "metrics.json"))
    done = run_program("benchmarks/head.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "mode B / mode A" in done.stdout
    (result,) = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert result["shape"] == [96, 16, 512]
    a, b = result["methods"]["a"], result["methods"]["b"]
    assert b["times_mode_a"] == b["seconds"] / a["seconds"]
    assert a["beyond_mb"] == a["peak_mb"] - a["gradients_mb"]
    assert {bar["name"] for bar in result["bars"]} == {"mode B / mode A", "MB of mode A beyond the gradients"}


@pytest.mark.parametrize("shape", ["4096,1024", "4096,1024,7", "a,b,c"])
def test_a_malformed_shape_is_refused(shape):
    done = run_program("benchmarks/head.py", "--shape", shape)
    assert done.returncode == 2
    assert shape in done.stderr


def test_bars_hold_up_to_their_limit_and_need_their_metrics():
    methods = {
        "a": {"seconds": 5.5, "forward": 3.0, "backward": 2.5, "beyond_mb": 65.0},
        "megatron": {"seconds": 10.0},
        "naive": {"seconds": 10.0},
        "product": {"forward": 3.0},
        "dense": {"why_not": "no reason"},
    }
    holds = {bar["name"]: (bar["value"], bar["holds"]) for bar in head.judge(methods)}
    assert holds == {
        "mode A / Megatron + entropy": (0.55, True),
        "mode A / naive": (0.55, False),
        "forward / product alone": (1.0, True),
        "MB of mode A beyond the gradients": (65.0, False),
    }


@LINUX
def test_a_peak_counts_added_memory_even_if_freed_and_not_what_existed_before():
    existing = torch.ones(200 * 2**18)[: 40 * 2**18].clone()  # an earlier, higher peak
    with head.peak_of_process() as peak:
        temporary = torch.ones(64 * 2**18)
        del temporary
        remaining = torch.ones(16 * 2**18)
    assert 60 <= peak[0] / 2**20 <= 75  # the resident pages of libraries vary
    assert len(existing) > len(remaining)


def test_a_missing_peer_is_reported_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry.endswith("build/peers")])
    for load in (peers.load_trl, peers.load_liger):
        with pytest.raises(ModuleNotFoundError, match="pip install --no-deps --target build/peers"):
            load()


def test_entropy_in_tiles_does_not_depend_on_the_tiles_and_lse_minus_mean_is_worse(monkeypatch):
    monkeypatch.setattr(numerics, "VOCABULARY", 3000)
    torch.manual_seed(0)
    z = numerics.peaked_rows(torch.linspace(0, 20, 40), 45.0)
    p = z.double().softmax(1)
    truth = -(p * p.log()).sum(1)
    for width in (1, 7, 2048, 3000):
        assert (numerics.in_tiles(z, width) - truth).abs().max() < 1e-6
    assert (numerics.log_sum_exp_minus_mean(z) - truth).abs().max() > 3e-6
    assert (numerics.log_sum_exp_minus_mean(z.double()) - truth).abs().max() < 1e-12


def test_the_mask_table_holds_the_head_against_float64(monkeypatch, capsys):
    monkeypatch.setattr(numerics, "VOCABULARY", 2048)
    torch.manual_seed(0)
    numerics.mask_table(tokens=640, width=256)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[4:]]
    of_head, of_bf16_logits, of_bf16_throughout = rows
    assert of_head[0].startswith("the head")
    assert float(of_head[2]) < 1e-4 < 1e-3 < float(of_bf16_logits[2]) < float(of_bf16_throughout[2])
    assert of_head[5] == "0.0%"
    assert float(of_bf16_throughout[5].rstrip("%")) > 1


def test_the_wrong_share_of_a_mask_counts_kept_tokens_that_should_not_be():
    truth = torch.arange(10).double()
    assert numerics.wrong_share(truth, truth) == (0.0, 1)
    assert numerics.wrong_share(truth.flip(0), truth) == (1.0, 1)
    swapped = truth.clone()
    swapped[[7, 8]] = truth[[8, 7]]  # of the two kept tokens, 9 stays and 7 replaces 8
    assert numerics.wrong_share(swapped, truth) == (0.5, 1)
    assert numerics.wrong_share(torch.ones(10).double(), truth)[1] == 10


def test_the_numerics_program_refuses_a_table_that_does_not_exist():
    done = run_program("benchmarks/numerics.py", "entropies")
    assert done.returncode == 2
    assert "unknown table 'entropies'" in done.stderr


@pytest.mark.soak
def test_the_step_on_long_responses_grows_by_less_than_its_logits(tmp_path):
    finished = run_program(
        "benchmarks/long_response.py", "--lengths", "512", "4096", "--json", str(tmp_path / "metrics.json")
    )
    assert finished.returncode == 0, finished.stderr
    short, long = json.loads((tmp_path / "metrics.json").read_text())
    assert (short["length"], long["length"]) == (512, 4096)
    assert long["logits_gib"] == pytest.approx(4096 * 151_936 * 4 / 2**30)
    assert long["peak_gib"] - long["before_gib"] < long["logits_gib"] / 5
    assert "memory grows by" in finished.stdout


def test_open_files_of_a_rank_do_not_grow_with_the_number_of_ranks(tmp_path):
    done = run_program(
        "benchmarks/host.py", "--share", "0.01", "--only", "groups", "--json", str(tmp_path / "rows.json")
    )
    assert done.returncode == 0, done.stderr
    store, rank = json.loads((tmp_path / "rows.json").read_text())
    ranks, files = (int(number) for number in re.findall(r"\d+", store["size"]))
    assert (ranks, rank["name"]) == (16, "start of ranks: the slowest rank")
    # If each were connected to each, five of the groups would take 15 files each, and the others 57: 220 in all.
    assert files < 120
    assert set(store["seconds_at"]) == {"32", "256", "1024"}


def test_the_model_of_a_weight_sync_is_that_of_its_page():
    seconds = [round(host_sync.model_seconds(servers, leaders), 1) for servers in (4, 16, 64) for leaders in (1, 4)]
    assert seconds == [6.7, 2.9, 22.4, 6.7, 85.3, 22.4]


@pytest.mark.soak
def test_a_step_of_each_arm_does_the_requested_work(tmp_path):
    arguments = ("--cases", "tiny", "--rounds", "1", "--json", str(tmp_path / "metrics.json"))
    done = run_program("benchmarks/step.py", *arguments)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert result["differences"] == [], done.stderr
    assert set(result["arms"]) == {"ours", "trl"}
    for row in result["arms"].values():
        assert (row["tokens"], row["updates"]) == (2 * 4 * 8, 2)
        assert row["tokens_per_second"] == row["tokens"] / row["total"]
        seconds = [row["first"][phase] for phase in ("generation", "scoring", "training", "other")]
        assert sum(seconds) == pytest.approx(row["first"]["total"])
        assert min(seconds) > 0
        assert row["peak_mb"] >= row["before_mb"] > 0
    assert result["arms"]["ours"]["selected"] == 2 * 7  # the top fifth of each half's 32 tokens, rounded up


def test_an_arm_that_is_not_installed_is_reported_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry.endswith("build/peers")])
    here, there = multiprocessing.Pipe()
    step.serve("trl", workload.CASES["tiny"], str(tmp_path), 1, there)
    assert "No module named" in (why_not := here.recv()["why_not"])
    assert why_not.endswith(step.INSTALL)


def test_an_arm_that_dies_has_no_metrics():
    here, there = multiprocessing.Pipe()
    there.send({"before_mb": 1.0})
    there.close()
    setup = step.answer(here)
    for wake in (False, True):
        assert step.summary(setup, step.answer(here, wake)) == {"why_not": "it failed with the error above"}


def test_seconds_of_an_arm_are_the_least_of_the_steps_after_the_first():
    def metrics(seconds: float, peak: float) -> dict[str, float]:
        return dict.fromkeys(step.PHASES, seconds) | {"tokens": 60, "peak_mb": peak}

    row = step.summary({"before_mb": 5.0}, metrics(1.0, 6.0), metrics(3.0, 7.0), metrics(2.0, 8.0))
    assert row["total"] == row["generation"] == 2.0
    assert row["tokens_per_second"] == 30
    assert (row["before_mb"], row["peak_mb"], row["first"]["total"]) == (5.0, 8.0, 1.0)


@pytest.mark.parametrize(
    ("metric", "value", "complaint"),
    [
        ("tokens", 63, "trl sampled 63 tokens"),
        ("updates", 1, "trl took 1 optimizer steps"),
        ("selected", 21, "trl selected 21 tokens"),
        ("first", {"entropy": 4.1}, "mean entropies of the first rollouts are 4.100, 4.000 nats"),
    ],
)
def test_an_arm_that_does_different_work_is_reported(metric, value, complaint):
    row: dict[str, Any] = {"tokens": 64, "updates": 2, "selected": 14, "first": {"entropy": 4.0}}
    case = workload.CASES["tiny"]
    assert step.differences(case, {"trl": row, "ours": row}) == []
    assert step.differences(case, {"trl": {"why_not": "absent"}, "ours": row}) == []
    assert step.differences(case, {"trl": row | {metric: value}, "ours": row}) == [complaint]


def test_half_of_a_group_is_correct_even_if_all_completions_are_equal():
    assert workload.half_right([[9], [1, 9], [2, 3], [30]]) == [0.0, 1.0, 0.0, 1.0]
    assert sum(workload.half_right([[5, 5]] * 8)) == 4
