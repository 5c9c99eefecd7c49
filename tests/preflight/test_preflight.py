"""The preflight on real runs in small, and what its checks make of metrics that this machine does not have."""

import io
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
from preflight_runs import Preflight, run_all, run_ranks

from megatron_rlvr.config.command_line import load_settings, validate
from megatron_rlvr.preflight import disk
from megatron_rlvr.preflight.bandwidth import Rate, judged
from megatron_rlvr.preflight.command import CHECKS, chosen
from megatron_rlvr.preflight.machines import within
from megatron_rlvr.preflight.results import Finding, Report, from_sentence, in_spans

NAMES = [check.name for check in CHECKS]
FREE_PORT_OF_NOBODY = 9  # discard: nothing answers there


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


# Whole preflights ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preflight")


@pytest.fixture(scope="module")
def alone(place: Path, model: Path, problems: Path) -> dict[str, Any]:
    """Preflights of one rank, and what run folders held before and after."""

    def config(name: str, **sections: Any) -> Path:
        values = tiny.settings_for(model, problems, place / "runs" / name, **sections)
        return tiny.write_settings(place / f"{name}.yaml", values)

    # What an earlier run that was killed has left: a run would go on from it.
    earlier = place / "runs" / "green"
    begun(earlier, config("green"))
    dead = {"engine": "sglang", "servers": [f"http://127.0.0.1:{FREE_PORT_OF_NOBODY}"], "server_timeout_seconds": 1}
    runs: dict[str, list[str | Path]] = {
        "green": [config("green"), "--longest"],
        "red": [config("red", run={"steps": 10**9, "save_every": 1, "keep_last": 10**9}, rollout=dead)],
        "some": [config("some"), "--only", "gap", "--model.dtype", "bfloat16"],
        "without": [config("without"), "--skip", "rehearsal", "bandwidth"],
        "refused": [config("refused"), "--parallel.tensor", "3"],
        "unknown": [config("unknown"), "--only", "bandwith"],
    }
    runs["stuck"] = ["ranks", "test_preflight", config("stuck")]
    before = listing(place / "runs")
    done = run_all(place, runs | saving(place, problems))
    return {"before": before, "after": listing(place / "runs")} | done


def begun(folder: Path, config: Path) -> None:
    """A run folder with a checkpoint of step 7, which the rehearsal would fail to read."""
    (folder / "checkpoints" / "step_000007").mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("step_000007\n", encoding="utf-8")
    settings = load_settings(config).model_dump_json()
    (folder / "checkpoints" / "settings.json").write_text(settings, encoding="utf-8")
    (folder / "metrics.jsonl").write_text('{"step": 7}\n', encoding="utf-8")


def test_a_run_that_can_begin_is_green(alone: dict[str, Any]) -> None:
    green: Preflight = alone["green"]
    assert green.status == 0, green.stdout + green.stderr
    assert green.results == dict.fromkeys(NAMES, "passed")
    assert "no GPU" in green.checks["accelerators"]["found"]
    assert "16 tokens" in green.checks["rehearsal"]["found"]
    assert float(green.checks["gap"]["found"].split()[0]) < 1e-4, "nats, in fp32"
    assert "with micro-batches of 512 tokens" in green.checks["memory"]["found"]
    for name in NAMES:
        assert f"passed     {name}" in green.stdout
    assert "checking rehearsal" in green.stderr, "a line for each check while it runs"
    assert "\033" not in green.stdout, "no colours off a terminal"


def test_the_run_folder_is_as_it_was_and_nothing_is_resumed(alone: dict[str, Any]) -> None:
    assert alone["before"] == alone["after"]
    assert "going on after step 7" in alone["green"].checks["settings"]["found"], "what a run would do"


def test_a_disk_too_small_is_red_and_checks_that_do_not_need_it_go_on(alone: dict[str, Any]) -> None:
    red: Preflight = alone["red"]
    assert red.status == 1
    assert red.results["disk"] == "failed"
    assert "are free at" in red.checks["disk"]["found"]
    assert "1000000000 checkpoint(s)" in red.checks["disk"]["found"]
    assert "keep less: run.keep_last" in red.checks["disk"]["remedy"]
    assert red.results["grader"] == "passed"


def test_a_server_that_is_not_there_is_red_and_what_needs_it_says_so(alone: dict[str, Any]) -> None:
    red: Preflight = alone["red"]
    assert red.results["servers"] == "failed"
    assert f"http://127.0.0.1:{FREE_PORT_OF_NOBODY} cannot be used" in red.checks["servers"]["found"]
    assert red.checks["servers"]["remedy"] == "start it, or drop it from the list"
    assert red.checks["rehearsal"]["found"] == "needs servers, which failed"
    assert {red.results[name] for name in ("rehearsal", "gap", "memory", "restored")} == {"not tried"}
    assert "failed     servers" in red.stdout


def test_single_checks_are_tried_with_what_they_need(alone: dict[str, Any]) -> None:
    some: Preflight = alone["some"]
    assert some.status == 0, some.stdout + some.stderr
    assert list(some.checks) == ["settings", "ranks", "grader", "servers", "rehearsal", "gap", "restored"]
    assert 1e-4 < float(some.checks["gap"]["found"].split()[0]) < 0.2, "bfloat16: flags of the run count"
    without: Preflight = alone["without"]
    assert without.status == 0
    assert "bandwidth" not in without.checks
    assert without.checks["gap"]["found"] == "needs rehearsal, which was skipped"


def test_wrong_input_is_one_line_and_status_2(alone: dict[str, Any]) -> None:
    for name, said in {
        "refused": "start it as the run: torchrun --nproc-per-node 3",
        "unknown": "--only bandwith is no check; choose from settings,",
    }.items():
        found: Preflight = alone[name]
        assert (found.status, found.stdout, found.checks) == (2, "", {})
        assert found.stderr.count("\n") == 1
        assert said in found.stderr


def test_two_data_parallel_ranks_are_green_with_their_bandwidth(place: Path, model: Path, problems: Path) -> None:
    values = tiny.settings_for(model, problems, place / "two")
    two = run_ranks(place, "two", 2, tiny.write_settings(place / "two.yaml", values))
    assert two.status == 0, two.stdout + two.stderr
    bandwidth = two.checks["bandwidth"]
    assert two.results | {"bandwidth": "passed"} == dict.fromkeys(NAMES, "passed")
    assert bandwidth["result"] == "passed" or "is below 0.1" in bandwidth["remedy"], "on a busy machine"
    assert two.checks["bandwidth"]["found"].startswith("data ")
    assert "data neighbours" in two.checks["bandwidth"]["found"]
    assert "to 2 prompt(s)" in two.checks["rehearsal"]["found"], "one for each replica"
    assert two.stdout.count("passed     settings") == 1, "one rank prints"
    assert not (place / "two").exists()
    assert list(place.glob(".preflight-*")) == []


# Ranks that fail ----------------------------------------------------------------------------------------------------


def together(*arguments: str) -> None:
    """What each of two ranks does: a preflight in which two checks fail on rank 1, where rank 0 waits in the second."""
    import torch.distributed as dist

    from megatron_rlvr.preflight import bandwidth, context, machines
    from megatron_rlvr.preflight.command import main

    def fails_on_rank_1(here: context.Site) -> Finding:
        if here.ranks.rank == 1:
            raise context.PreflightError("no luck; try again")
        return Finding("accelerators", "passed", "well here")

    def hangs(here: context.Site) -> Finding:
        here.new_folder(Path(here.resolved.settings.run.dir))
        finding = fails_on_rank_1(here)
        dist.barrier()
        return finding

    context.STUCK_SECONDS = 10.0
    with (
        mock.patch.object(machines, "check_versions", fails_on_rank_1),
        mock.patch.object(bandwidth, "check_bandwidth", hangs),
    ):
        main(arguments, "")


def test_a_rank_that_fails_hangs_no_other_and_one_that_is_stuck_is_given_up(alone: dict[str, Any], place: Path) -> None:
    stuck: Preflight = alone["stuck"]
    assert stuck.status == 1, stuck.stderr
    for name in ("versions", "bandwidth"):
        assert stuck.results[name] == "failed"
        assert (stuck.checks[name]["found"], stuck.checks[name]["remedy"]) == ("rank 1: no luck", "try again")
    assert stuck.results["accelerators"] == "passed", "a check after one that all ranks have left"
    assert stuck.checks["disk"]["found"] == "ranks are stuck in bandwidth"
    assert {stuck.results[name] for name in NAMES[NAMES.index("disk") :]} == {"not tried"}
    assert list((place / "runs").glob(".preflight-*")) == []


# Disk ---------------------------------------------------------------------------------------------------------------


LARGER = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"model": {"dtype": "float32"}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "distributed": {"megatron": {"use_distributed_optimizer": True}},
}


def saving(place: Path, problems: Path) -> dict[str, list[str | Path]]:
    """Runs of a step that save a checkpoint of a larger model."""
    model = tiny.write_model(place / "larger", **LARGER)
    every = {"run": {"steps": 1, "export": False}, "rollout": {"max_rounds": 1}, "log": {"rollouts": 0}}
    return {
        name: ["train", tiny.write_settings(
            place / f"{name}.yaml", tiny.settings_for(model, problems, place / f"{name} saves", **every, **precision)
        )]
        for name, precision in PRECISIONS.items()
    }  # fmt: skip


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_size_of_a_checkpoint_is_that_of_a_real_one(name: str, alone: dict[str, Any], place: Path) -> None:
    assert alone[name].status == 0, alone[name].stderr
    saved = sum(p.stat().st_size for p in (place / f"{name} saves").rglob("*.distcp"))
    foreseen = disk.wanted(load_settings(place / f"{name}.yaml"), tiny.model_config(**LARGER)).checkpoint
    assert foreseen < saved < 1.08 * foreseen, "every tensor has a header of some hundred bytes"


def test_the_room_that_a_run_needs_is_counted_at_its_worst_moment(model: Path, problems: Path, tmp_path: Path) -> None:
    def needs(**sections: Any) -> disk.Wanted:
        return disk.wanted(validate(tiny.settings_for(model, problems, tmp_path / "run", **sections)), config)

    config = tiny.model_config()
    parameters = disk.parameter_count(config)
    # By hand: a layer is q and o, k and v, gate and up and down, two norms, and those of queries and keys.
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 2 * 32 + 2 * 8
    assert parameters == 2 * 320 * 32 + 2 * layer + 32
    long = {"steps": 100, "save_every": 10, "keep_last": 2}
    assert needs(run=long).checkpoints == 3, "the one that is built stands beside the two that are kept"
    assert needs(run=long | {"keep_every": 20}).checkpoints == 8
    assert needs(run={"steps": 20, "save_every": 10, "keep_last": 5}).checkpoints == 2
    assert needs(run={"steps": 100, "save_every": 0}).checkpoints == 1
    assert needs().exports == 4 * parameters
    assert needs(model={"dtype": "bfloat16"}, run={"steps": 5, "export_every": 2}).exports == 3 * 2 * parameters
    assert needs(run={"export": False}).exports == 0
    on_servers = {"rollout": {"engine": "sglang", "servers": ["http://a:1"], "max_rounds": 2}}
    assert needs(**on_servers, sync={"method": "disk"}).sync == 2 * 4 * parameters
    assert needs(**on_servers).sync == 0


def test_a_file_system_that_replaces_in_two_steps_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, in_two = tmp_path / "whole", tmp_path / "in two"
    whole.mkdir()
    in_two.mkdir()
    assert disk.renaming_problem(whole) is None

    def replace_in_two_steps(self: Path, target: Path) -> None:
        target.unlink()
        time.sleep(0.001)
        self.rename(target)

    monkeypatch.setattr(Path, "replace", replace_in_two_steps)
    assert disk.renaming_problem(in_two) == "a file that is replaced is seen half-done by who reads it"


# Memory -------------------------------------------------------------------------------------------------------------


def test_the_largest_micro_batch_fills_the_budget_or_holds_the_longest_sequence(model: Path, problems: Path) -> None:
    from megatron_rlvr.batching.batch import Packing
    from megatron_rlvr.preflight.rehearsal import largest_micro_batch

    def lengths(budget: int, **packing: int) -> tuple[int, ...]:
        batch = largest_micro_batch(settings, Packing(budget=budget, **packing), vocabulary=320)
        assert int(batch.tokens.max()) < 320
        return batch.lengths

    settings = validate(tiny.settings_for(model, problems, Path("run")))  # 128 and 16 tokens
    assert lengths(512) == (143, 143, 143, 83), "the last token of a sequence is only predicted"
    assert lengths(512, sequence_multiple=4) == (144, 144, 144, 80), "padding counts"
    assert lengths(143) == (143,)
    assert lengths(100) == (143,), "a longer sequence gets a micro-batch of its own"


# Bandwidth and versions ---------------------------------------------------------------------------------------------


def rates(kind: str, speeds: list[float]) -> list[Rate]:
    return [Rate(kind, (2 * i, 2 * i + 1), (f"node{i}",), speed) for i, speed in enumerate(speeds)]


def test_a_group_under_half_of_the_median_or_under_the_floor_is_named() -> None:
    assert judged([]).result == "passed"
    assert judged(rates("tensor", [1.0, 1.1, 0.6])).result == "passed"
    slow = judged(rates("data", [2.0, 2.0]) + rates("tensor", [1.0, 1.1, 0.4]))
    assert slow.result == "warned"
    assert "tensor, ranks 4-5 on node2: 0.4 GB/s, is under half of the median 1" in slow.remedy
    assert "data, " not in slow.remedy
    assert "is below 0.1" in judged(rates("data", [0.05])).remedy


def test_versions_are_within_a_range_of_leading_numbers() -> None:
    assert within("2.13.0+cu128", (2, 6), (2, 13))
    assert within("0.16.1", (0, 16, 1), (0, 16))
    assert within("0.16.9", (0, 16, 1), (0, 16))
    assert within("2.6.0a0+df5bbc09d1.nv24.12", (2, 6), (2, 13))
    assert not within("0.16.0", (0, 16, 1), (0, 16))
    assert not within("0.17.0", (0, 16, 1), (0, 16))
    assert not within("2.14.0", (2, 6), (2, 13))
    assert not within("unknown", (2, 6), (2, 13))


# The table ----------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_results_are_coloured_on_a_terminal_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    finding = Finding("disk", "failed", "x " * 100, "make room")
    plain, coloured, refused = io.StringIO(), Terminal(), Terminal()
    Report(plain, io.StringIO(), enabled=True).add(finding)
    Report(coloured, io.StringIO(), enabled=True).add(finding)
    monkeypatch.setenv("NO_COLOR", "1")
    Report(refused, io.StringIO(), enabled=True).add(finding)
    assert coloured.getvalue().startswith("\033[31mfailed")
    assert plain.getvalue() == refused.getvalue()
    first, *others = plain.getvalue().splitlines()
    assert first.startswith("failed     disk          x x")
    assert others[-1] == " " * 25 + "-> make room"
    assert max(map(len, [first, *others])) <= 120


def test_what_is_wrong_is_told_from_what_to_do_about_it() -> None:
    found = from_sentence("servers", "url cannot be used (a; b); start it")
    assert (found.found, found.remedy) == ("url cannot be used (a; b)", "start it")
    assert in_spans([5, 0, 1, 2, 7]) == "0-2, 5, 7"


def test_needs_are_named_before_what_needs_them_and_servers_are_always_put_right() -> None:
    for number, check in enumerate(CHECKS):
        assert set(check.needs) <= set(NAMES[:number])
    assert [c.name for c in chosen(["memory"], [])] == [
        *("settings", "ranks", "grader", "servers", "rehearsal", "memory", "restored")
    ]
    assert [c.name for c in chosen([], ["gap"])] == [name for name in NAMES if name != "gap"]


def test_help_names_every_check() -> None:
    done = subprocess.run(
        [sys.executable, "tools/preflight.py", "--help"],
        cwd=tiny.CHECKOUT, env=tiny.environment(), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert all(f"  {check.name:<13} {check.what}" in done.stdout for check in CHECKS)
