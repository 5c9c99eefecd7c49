"""Tests of the preflight on small real runs, and of its checks on measurements that this machine does not produce."""

import io
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
from preflight_runs import Preflight, run_all, run_ranks

from megatron_rlvr.checkpoint.manifest import write_manifest
from megatron_rlvr.config.loading import load_settings, validate
from megatron_rlvr.hf.families import parameter_count
from megatron_rlvr.preflight import disk
from megatron_rlvr.preflight.bandwidth import Bandwidth, judge
from megatron_rlvr.preflight.checks import CHECKS, select_checks
from megatron_rlvr.preflight.machines import untested, version_in_range
from megatron_rlvr.preflight.results import CheckResult, Report, failure

NAMES = [check.name for check in CHECKS]
UNUSED_PORT = 9  # discard: nothing answers there


def listing(folder: Path) -> dict[str, bytes | None]:
    """Return {path: content} of everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


# Whole preflights ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preflight")


@pytest.fixture(scope="module")
def alone(place: Path, model: Path, problems: Path) -> dict[str, Any]:
    """Run preflights of one rank, and list the run folders before and after them."""

    def config(name: str, **sections: Any) -> Path:
        values = tiny.settings_for(model, problems, place / "runs" / name, **sections)
        return tiny.write_settings(place / f"{name}.yaml", values)

    # The folder of an earlier run that was killed: a run would resume from it.
    earlier = place / "runs" / "passing"
    interrupted_run(earlier, config("passing"))
    dead = {"engine": "sglang", "servers": [f"http://127.0.0.1:{UNUSED_PORT}"], "server_timeout_seconds": 1}
    runs: dict[str, list[str | Path]] = {
        "passing": [config("passing"), "--largest-micro-batches"],
        "failing": [config("failing", run={"steps": 10**9, "save_every": 1, "keep_last": 10**9}, rollout=dead)],
        "some": [config("some"), "--only", "mismatch", "--model.dtype", "bfloat16"],
        "without": [config("without"), "--skip", "rehearsal", "bandwidth"],
        "refused": [config("refused"), "--parallel.tensor", "3"],
        "unknown": [config("unknown"), "--only", "bandwith"],
    }
    runs |= {f"only {name}": [config(f"only {name}"), "--only", name] for name in NAMES}
    runs["stuck"] = ["ranks", "test_preflight", config("stuck")]
    before = listing(place / "runs")
    done = run_all(place, runs | saving(place, problems))
    return {"before": before, "after": listing(place / "runs")} | done


def interrupted_run(folder: Path, config: Path) -> None:
    """Create a run folder with a checkpoint of step 1 that the rehearsal would fail to read."""
    (folder / "checkpoints" / "step_000001").mkdir(parents=True)
    write_manifest(folder / "checkpoints" / "step_000001", {"checkpoint": "step_000001"})
    (folder / "checkpoints" / "latest").write_text("step_000001\n", encoding="utf-8")
    settings = load_settings(config).model_dump_json()
    (folder / "checkpoints" / "settings.json").write_text(settings, encoding="utf-8")
    (folder / "metrics.jsonl").write_text('{"step": 7}\n', encoding="utf-8")


def test_every_check_passes_for_a_run_that_can_start(alone: dict[str, Any]) -> None:
    passing: Preflight = alone["passing"]
    assert passing.status == 0, passing.stdout + passing.stderr
    assert passing.results == dict.fromkeys(NAMES, "passed")
    assert "no GPU" in passing.checks["accelerators"]["message"]
    assert "16 tokens" in passing.checks["rehearsal"]["message"]
    assert float(passing.checks["mismatch"]["message"].split()[0]) < 1e-4, "nats, in fp32"
    assert "with micro-batches of 512 tokens" in passing.checks["memory"]["message"]
    assert re.search(
        r"each rank holds at most .* while it saves, .*; written in ", passing.checks["checkpoint"]["message"]
    )
    for name in NAMES:
        assert f"passed     {name}" in passing.stdout
    assert "checking rehearsal" in passing.stderr, "a line for each check while it runs"
    assert "\033" not in passing.stdout, "no colours without a terminal"


def test_the_run_folder_is_unchanged_and_nothing_is_resumed(alone: dict[str, Any]) -> None:
    assert alone["before"] == alone["after"]
    assert "resuming after step 1" in alone["passing"].checks["settings"]["message"], "what a run would do"


def test_a_disk_that_is_too_small_fails_and_checks_that_do_not_need_it_run(alone: dict[str, Any]) -> None:
    failing: Preflight = alone["failing"]
    assert failing.status == 1
    assert failing.results["disk"] == "failed"
    assert "are free at" in failing.checks["disk"]["message"]
    assert "1000000000 checkpoint(s)" in failing.checks["disk"]["message"]
    assert "keep less: run.keep_last" in failing.checks["disk"]["remedy"]
    assert failing.results["grader"] == "passed"


def test_an_unreachable_server_fails_and_checks_that_need_it_say_so(alone: dict[str, Any]) -> None:
    failing: Preflight = alone["failing"]
    assert failing.results["servers"] == "failed"
    assert (
        f"rollout.servers=http://127.0.0.1:{UNUSED_PORT}: the server cannot be used"
        in failing.checks["servers"]["message"]
    )
    assert failing.checks["servers"]["remedy"] == "start it, or remove it from the list"
    assert failing.checks["rehearsal"]["message"] == "needs servers, which failed"
    assert {failing.results[name] for name in ("rehearsal", "mismatch", "memory", "checkpoint", "restored")} == {
        "not tried"
    }
    assert "failed     servers" in failing.stdout


def test_selected_checks_run_with_those_that_they_need(alone: dict[str, Any]) -> None:
    some: Preflight = alone["some"]
    assert some.status == 0, some.stdout + some.stderr
    assert list(some.checks) == ["settings", "ranks", "grader", "servers", "rehearsal", "mismatch", "restored"]
    assert 1e-4 < float(some.checks["mismatch"]["message"].split()[0]) < 0.2, "bfloat16: flags of the run are applied"
    without: Preflight = alone["without"]
    assert without.status == 0
    assert "bandwidth" not in without.checks
    assert without.checks["mismatch"]["message"] == "needs rehearsal, which was skipped"


@pytest.mark.parametrize("name", NAMES)
def test_every_check_can_be_the_only_one(name: str, alone: dict[str, Any]) -> None:
    only: Preflight = alone[f"only {name}"]
    assert only.status == 0, only.stdout + only.stderr
    assert only.results == {check.name: "passed" for check in select_checks([name], [])}
    assert name in only.results
    assert f"{len(only.results)} passed in" in only.stdout


def test_wrong_input_is_one_line_and_status_2(alone: dict[str, Any]) -> None:
    for name, said in {
        "refused": "1 ranks do not divide into parallel.tensor=3; launch a multiple of 3",
        "unknown": "--only bandwith: no such check; choose from settings,",
    }.items():
        found: Preflight = alone[name]
        assert (found.status, found.stdout, found.checks) == (2, "", {})
        assert found.stderr.count("\n") == 1
        assert said in found.stderr


def test_every_check_passes_on_two_data_parallel_ranks_with_their_bandwidth(
    place: Path, model: Path, problems: Path
) -> None:
    values = tiny.settings_for(model, problems, place / "two")
    two = run_ranks(place, "two", 2, tiny.write_settings(place / "two.yaml", values))
    assert two.status == 0, two.stdout + two.stderr
    bandwidth = two.checks["bandwidth"]
    assert two.results | {"bandwidth": "passed"} == dict.fromkeys(NAMES, "passed")
    assert bandwidth["status"] == "passed" or "is below 0.1" in bandwidth["remedy"], "on a busy machine"
    assert two.checks["bandwidth"]["message"].startswith("data ")
    assert "data neighbours" in two.checks["bandwidth"]["message"]
    assert "to 2 prompt(s)" in two.checks["rehearsal"]["message"], "one per data-parallel replica"
    assert two.stdout.count("passed     settings") == 1, "one rank prints"
    assert not (place / "two").exists()
    assert list(place.glob(".preflight-*")) == []


# Ranks that fail ----------------------------------------------------------------------------------------------------


def together(*arguments: str) -> None:
    """Run, on each of two ranks, a preflight in which two checks fail on rank 1 while rank 0 waits in the second."""
    import torch.distributed as dist

    from megatron_rlvr.preflight import bandwidth, barrier, machines
    from megatron_rlvr.preflight.command import main
    from megatron_rlvr.preflight.context import PreflightContext, PreflightError

    def fails_on_rank_1(context: PreflightContext) -> CheckResult:
        if context.ranks.rank == 1:
            raise PreflightError("no luck; try again")
        return CheckResult("accelerators", "passed", "fine here")

    def hangs(context: PreflightContext) -> CheckResult:
        context.new_folder(Path(context.resolved.settings.run.dir))
        result = fails_on_rank_1(context)
        dist.barrier()
        return result

    barrier.STUCK_SECONDS = 10.0
    with (
        mock.patch.object(machines, "check_versions", fails_on_rank_1),
        mock.patch.object(bandwidth, "check_bandwidth", hangs),
    ):
        main(arguments, "")


def test_a_rank_that_fails_hangs_no_other_rank_and_stuck_ranks_are_ended(alone: dict[str, Any], place: Path) -> None:
    stuck: Preflight = alone["stuck"]
    assert stuck.status == 1, stuck.stderr
    for name in ("versions", "bandwidth"):
        assert stuck.results[name] == "failed"
        assert (stuck.checks[name]["message"], stuck.checks[name]["remedy"]) == ("rank 1: no luck", "try again")
    assert stuck.results["accelerators"] == "passed", "a check after one that all ranks have left"
    assert stuck.checks["disk"]["message"] == "ranks are stuck in bandwidth"
    assert {stuck.results[name] for name in NAMES[NAMES.index("disk") :]} == {"not tried"}
    assert list((place / "runs").glob(".preflight-*")) == []


# Disk ---------------------------------------------------------------------------------------------------------------


LARGER: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"model": {"dtype": "float32"}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "distributed": {"megatron": {"use_distributed_optimizer": True}},
}


def saving(place: Path, problems: Path) -> dict[str, list[str | Path]]:
    """Return one-step training runs that save a checkpoint of a larger model."""
    model = tiny.write_model(place / "larger", **LARGER)
    every = {"run": {"steps": 1, "export": False}, "rollout": {"max_rounds": 1}, "log": {"rollouts": 0}}
    return {
        name: ["train", tiny.write_settings(
            place / f"{name}.yaml", tiny.settings_for(model, problems, place / f"{name} saves", **every, **precision)
        )]
        for name, precision in PRECISIONS.items()
    }  # fmt: skip


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_predicted_size_of_a_checkpoint_is_that_of_a_real_one(
    name: str, alone: dict[str, Any], place: Path
) -> None:
    assert alone[name].status == 0, alone[name].stderr
    saved = sum(p.stat().st_size for p in (place / f"{name} saves").rglob("*.distcp"))
    predicted = disk.disk_use(load_settings(place / f"{name}.yaml"), tiny.model_config(**LARGER)).checkpoint
    assert predicted < saved < 1.08 * predicted, "every tensor has a header of a few hundred bytes"


def test_disk_use_is_the_maximum_over_the_run(model: Path, problems: Path, tmp_path: Path) -> None:
    def needs(**sections: Any) -> disk.DiskUse:
        return disk.disk_use(validate(tiny.settings_for(model, problems, tmp_path / "run", **sections)), config)

    config = tiny.model_config()
    parameters = parameter_count(config)
    # By hand: a layer has q and o, k and v, gate and up and down, two norms, and the norms of queries and keys.
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 2 * 32 + 2 * 8
    assert parameters == 2 * 320 * 32 + 2 * layer + 32
    long = {"steps": 100, "save_every": 10, "keep_last": 2}
    assert needs(run=long).checkpoints == 3, "one is being built beside the two that are kept"
    assert needs(run=long | {"keep_every": 20}).checkpoints == 8
    assert needs(run={"steps": 20, "save_every": 10, "keep_last": 5}).checkpoints == 2
    assert needs(run={"steps": 100, "save_every": 0}).checkpoints == 1
    assert needs().exports == 4 * parameters
    assert needs(model={"dtype": "bfloat16"}, run={"steps": 5, "export_every": 2}).exports == 3 * 2 * parameters
    assert needs(run={"export": False}).exports == 0
    on_servers = {"rollout": {"engine": "sglang", "servers": ["http://a:1"], "max_rounds": 2}}
    assert needs(**on_servers, sync={"method": "disk"}).sync == 2 * 4 * parameters
    assert needs(**on_servers).sync == 0


def test_a_file_system_that_replaces_in_two_steps_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, in_two = tmp_path / "whole", tmp_path / "in two"
    whole.mkdir()
    in_two.mkdir()
    assert disk.renaming_problem(whole) is None

    def replace_in_two_steps(self: Path, target: Path) -> None:
        target.unlink()
        time.sleep(0.001)
        self.rename(target)

    monkeypatch.setattr(Path, "replace", replace_in_two_steps)
    assert disk.renaming_problem(in_two) == "a reader can see a file that is only partly replaced"


# Memory -------------------------------------------------------------------------------------------------------------


def test_the_largest_micro_batch_fills_the_budget_or_holds_the_longest_sequence(model: Path, problems: Path) -> None:
    from megatron_rlvr.batching.packing import Packing
    from megatron_rlvr.preflight.memory import largest_micro_batch

    def lengths(budget: int, **packing: int) -> tuple[int, ...]:
        batch = largest_micro_batch(settings, Packing(budget=budget, **packing), vocabulary=320)
        assert int(batch.tokens.max()) < 320
        return batch.lengths

    settings = validate(tiny.settings_for(model, problems, Path("run")))  # 128 and 16 tokens
    assert lengths(512) == (143, 143, 143, 83), "the last token of a sequence is only predicted"
    assert lengths(512, sequence_multiple=4) == (144, 144, 144, 80), "padding counts"
    assert lengths(143) == (143,)
    assert lengths(100) == (143,), "a longer sequence has a micro-batch of its own"


# Bandwidth and versions ---------------------------------------------------------------------------------------------


def bandwidths(kind: str, speeds: list[float]) -> list[Bandwidth]:
    return [Bandwidth(kind, (2 * i, 2 * i + 1), (f"node{i}",), speed) for i, speed in enumerate(speeds)]


def test_a_group_below_half_of_the_median_or_below_the_floor_is_named() -> None:
    assert judge([]).status == "passed"
    assert judge(bandwidths("tensor", [1.0, 1.1, 0.6])).status == "passed"
    slow = judge(bandwidths("data", [2.0, 2.0]) + bandwidths("tensor", [1.0, 1.1, 0.4]))
    assert slow.status == "warned"
    assert "tensor, ranks 4-5 on node2: 0.4 GB/s, is below half of the median 1" in slow.remedy
    assert "data, " not in slow.remedy
    assert "is below 0.1" in judge(bandwidths("data", [0.05])).remedy


def test_version_ranges_compare_leading_numbers() -> None:
    assert version_in_range("2.13.0+cu128", (2, 6), (2, 13))
    assert version_in_range("0.16.1", (0, 16, 1), (0, 16))
    assert version_in_range("0.16.9", (0, 16, 1), (0, 16))
    assert version_in_range("2.6.0a0+df5bbc09d1.nv24.12", (2, 6), (2, 13))
    assert not version_in_range("0.16.0", (0, 16, 1), (0, 16))
    assert not version_in_range("0.17.0", (0, 16, 1), (0, 16))
    assert not version_in_range("2.14.0", (2, 6), (2, 13))
    assert not version_in_range("unknown", (2, 6), (2, 13))


def test_releases_between_two_tested_ones_are_untested() -> None:
    versions = {"python": "3.12.1", "torch": "2.14.1+cu130", "megatron-core": "0.19.2", "transformers": "5.1.0"}
    assert untested(versions) == []
    assert untested(versions | {"megatron-core": "0.16.1"}) == []
    for release in ("0.17.0", "0.18.2", "0.20.0"):
        assert untested(versions | {"megatron-core": release}) == [f"megatron-core {release} (tested: 0.16.1, 0.19.2)"]
    assert untested(versions | {"torch": "2.7.1"}) == ["torch 2.7.1 (tested: 2.8 to 2.14)"]


# The table ----------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_results_are_coloured_on_a_terminal_unless_no_color_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    result = CheckResult("disk", "failed", "x " * 100, "free some space")
    plain, coloured, refused = io.StringIO(), Terminal(), Terminal()
    Report(plain, io.StringIO(), enabled=True).add(result)
    Report(coloured, io.StringIO(), enabled=True).add(result)
    monkeypatch.setenv("NO_COLOR", "1")
    Report(refused, io.StringIO(), enabled=True).add(result)
    assert coloured.getvalue().startswith("\033[31mfailed")
    assert plain.getvalue() == refused.getvalue()
    first, *others = plain.getvalue().splitlines()
    assert first.startswith("failed     disk          x x")
    assert others[-1] == " " * 25 + "-> free some space"
    assert max(map(len, [first, *others])) <= 120


def test_an_error_message_is_split_into_problem_and_remedy() -> None:
    result = failure("servers", "url cannot be used (a; b); start it")
    assert (result.message, result.remedy) == ("url cannot be used (a; b)", "start it")


def test_needs_come_first_and_servers_are_restored_after_every_rehearsal() -> None:
    for number, check in enumerate(CHECKS):
        assert set(check.needs) <= set(NAMES[:number])
    assert [c.name for c in select_checks(["memory"], [])] == [
        *("settings", "ranks", "grader", "servers", "rehearsal", "memory", "restored")
    ]
    assert [c.name for c in select_checks([], ["mismatch"])] == [name for name in NAMES if name != "mismatch"]


def test_help_names_every_check() -> None:
    done = subprocess.run(
        [sys.executable, "tools/preflight.py", "--help"],
        cwd=tiny.CHECKOUT, env=tiny.environment(), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert all(f"  {check.name:<13} {check.description}" in done.stdout for check in CHECKS)
