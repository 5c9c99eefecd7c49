"""A run that is stopped and resumed equals a run that was never stopped: every metric and every weight, bit by bit."""

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asynchronous_runs
import numpy as np
import pytest
import tiny
from launcher import Ranks
from resuming import train_process
from safetensors.torch import load_file
from scripted import LAYOUTS as REPLICAS

from megatron_rlvr.checkpoint.resume import checkpoint_to_resume, prepare_checkpoints
from megatron_rlvr.checkpoint.state import encode_state, read_state
from megatron_rlvr.checkpoint.store import Checkpoint, Checkpoints, latest_checkpoint
from megatron_rlvr.config import RunSettings, SettingsError
from megatron_rlvr.config.loading import load_settings
from megatron_rlvr.rollout.saved_groups import restored_form, saved_form

STEPS, CUT = 8, 4
PATIENCE_SECONDS = 200.0
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "tensor 2": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "pipeline 2": (2, {"parallel": {"pipeline": 2}}),
    "experts 2": (2, {"experts": True, "parallel": {"expert": 2}}),
    "bfloat16": (1, {"model": {"dtype": "bfloat16"}}),
    "data 2": (2, {"megatron": {"use_distributed_optimizer": True}}),
    "bfloat16 data 2": (2, {"model": {"dtype": "bfloat16"}, "megatron": {"use_distributed_optimizer": True}}),
    "difficulty, data 2": (2, {"data": {"difficulty": {"retire_above": 0.9, "rest_below": 0.1, "rest_steps": 2}}}),
}
"""{name of a layout: (number of ranks, settings)}"""
OTHER_SAMPLES = ("experts 2", "bfloat16", "bfloat16 data 2")
"""Layouts with other weights, which happen to have no surplus groups at step CUT."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    world = Ranks(2)
    yield world
    world.stop()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "rewards.py").write_text(tiny.REWARDS, encoding="utf-8")
    tiny.write_gsm8k(folder / "problems.jsonl")
    (folder / "model").symlink_to(model)
    tiny.write_model(folder / "experts", experts=True)
    return folder


def config(place: Path, name: str, **sections: Any) -> Path:
    """Settings of a run whose epoch ends within its steps, and which always has surplus groups.

    Half of the groups are uninformative.
    """
    values = tiny.settings_for(
        place / ("experts" if sections.pop("experts", False) else "model"),
        place / "problems.jsonl",
        place / name,
        **{
            "run": {"steps": STEPS, "save_every": STEPS} | sections.pop("run", {}),
            "rollout": {"group_size": 2, "max_rounds": 4} | sections.pop("rollout", {}),
            "batch": {"prompts": 2, "mini_batch_prompts": 1} | sections.pop("batch", {}),
            "reward": {"function": "rewards:even"},
            "optimizer": {"learning_rate": 0.001, "warmup_steps": 4} | sections.pop("optimizer", {}),
            **sections,
        },
    )
    return tiny.write_settings(place / f"{name}.yaml", values)


def metrics(folder: Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl without metrics that measure the machine."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(tiny.MEASURED)} for line in lines
    ]


def drawn(state: Mapping[str, Any]) -> int:
    """Number of prompts drawn when a checkpoint was saved."""
    return sum(file["drawn"] for file in state["collector"]["cursor"]["files"])


def weights(folder: Path) -> dict[str, np.ndarray]:
    tensors = load_file(folder / "hf" / "model.safetensors")
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


class Uninterrupted(dict[str, Path]):
    """Run folders of runs that were never stopped, by layout; each run is made when it is first asked for."""

    def __init__(self, place: Path, ranks: Ranks) -> None:
        super().__init__()
        self._place, self._ranks = place, ranks

    def __missing__(self, name: str) -> Path:
        size, sections = LAYOUTS[name]
        run = config(self._place, f"uninterrupted {name}", **sections)
        assert self._ranks.run(train_process, size, str(run), timeout=PATIENCE_SECONDS) == [""] * size
        self[name] = self._place / f"uninterrupted {name}"
        return self[name]


@pytest.fixture(scope="module")
def uninterrupted(place: Path, ranks: Ranks) -> Uninterrupted:
    return Uninterrupted(place, ranks)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_resumed_run_equals_a_run_that_was_never_stopped(
    name: str, place: Path, ranks: Ranks, uninterrupted: Uninterrupted
) -> None:
    size, sections = LAYOUTS[name]
    run, folder = str(config(place, f"cut {name}", **sections)), place / f"cut {name}"
    assert ranks.run(train_process, size, run, CUT, timeout=PATIENCE_SECONDS) == [""] * size
    assert not (folder / "hf").exists()
    assert not (folder / "summary.json").exists()
    state = Checkpoint(folder / "checkpoints" / f"step_{CUT:06d}", CUT).state()
    assert state["collector"]["ready"] or name in OTHER_SAMPLES, "surplus groups must be part of the test"
    assert drawn(state) < 20, "the epoch must end after the run is resumed"
    assert ranks.run(train_process, size, run, timeout=PATIENCE_SECONDS) == [""] * size

    last = latest_checkpoint(folder / "checkpoints")
    assert last is not None
    assert last.step == STEPS
    assert drawn(last.state()) > 20
    assert [line["step"] for line in metrics(folder)] == list(range(1, STEPS + 1))
    assert metrics(folder) == metrics(uninterrupted[name])
    assert all(line["train/grad_norm"] > 0 for line in metrics(folder))
    found, wanted = weights(folder), weights(uninterrupted[name])
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if (found[key] != wanted[key]).any()] == []
    if name.startswith("difficulty"):
        counts = ("data/prompts_retired", "data/prompts_resting", "data/prompts_new", "data/prompts_active")
        assert all(sum(line[key] for key in counts) == len(tiny.PROBLEMS) for line in metrics(folder))
        assert all(metrics(folder)[-1][key] > 0 for key in ("data/prompts_retired", "data/prompts_resting"))


@pytest.mark.parametrize("name", ["alone", "data 2"])
def test_a_checkpoint_written_in_the_background_is_not_changed_by_the_next_step(
    name: str, place: Path, ranks: Ranks, uninterrupted: Uninterrupted
) -> None:
    size, sections = LAYOUTS[name]
    folder, saving = place / f"late {name}", {"save_every": 2, "async_save": True}
    run = str(config(place, folder.name, run=saving, **sections))
    assert ranks.run(train_process, size, run, CUT + 1, 0.5, timeout=PATIENCE_SECONDS) == [""] * size
    latest = folder / "checkpoints" / "latest"
    assert latest.read_text(encoding="utf-8") == f"step_{CUT + 1:06d}\n"
    latest.write_text(f"step_{CUT:06d}\n", encoding="utf-8")
    assert ranks.run(train_process, size, run, timeout=PATIENCE_SECONDS) == [""] * size
    assert metrics(folder) == metrics(uninterrupted[name])
    found, wanted = weights(folder), weights(uninterrupted[name])
    assert [key for key in wanted if (found[key] != wanted[key]).any()] == []


@pytest.mark.parametrize("distributed", [True, False])
def test_a_run_resumes_in_another_layout(
    distributed: bool, place: Path, ranks: Ranks, uninterrupted: Uninterrupted
) -> None:
    folder, optimizer = place / f"changing {distributed}", {"use_distributed_optimizer": distributed}
    for size, parallel in (
        (2, {}),
        (2, {"tensor": 2, "sequence": True}),
        (2, {"pipeline": 2}),
        (1, {}),
    ):  # two steps in each layout
        run = str(config(place, folder.name, parallel=parallel, megatron=optimizer))
        assert ranks.run(train_process, size, run, 2, timeout=PATIENCE_SECONDS) == [""] * size
    assert [line["step"] for line in metrics(folder)] == list(range(1, STEPS + 1))
    for found, wanted in zip(metrics(folder), metrics(uninterrupted["data 2"]), strict=True):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    mine, theirs = weights(folder), weights(uninterrupted["data 2"])
    # Adam moves a weight by up to the learning rate, 1e-3, in each of 16 steps.
    assert max(float(np.abs(mine[key] - theirs[key]).max()) for key in theirs) < 1e-4


def test_an_export_that_cannot_be_written_is_an_error_on_all_ranks_and_keeps_the_checkpoint(
    place: Path, ranks: Ranks
) -> None:
    sections: dict[str, Any] = {"parallel": {"tensor": 2, "sequence": True}}
    saving = {"steps": 3, "save_every": 1, "async_save": True}
    run, folder = str(config(place, "export", run=saving, **sections)), place / "export"
    assert ranks.run(train_process, 2, run, 1, timeout=PATIENCE_SECONDS) == [""] * 2
    (folder / "exports").touch()  # where a folder should be
    config(place, "export", run=saving | {"export_every": 2}, **sections)
    wanted = f"the export step_000002 could not be written to {folder / 'exports'} ([Errno "
    for message in ranks.run(train_process, 2, run, timeout=PATIENCE_SECONDS):
        assert message.startswith(wanted)
        assert message.endswith("; correct that, and the same command resumes after step 2")
    last = latest_checkpoint(folder / "checkpoints")
    assert last is not None
    assert last.step == 2
    (folder / "exports").unlink()
    assert ranks.run(train_process, 2, run, timeout=PATIENCE_SECONDS) == [""] * 2
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]
    assert weights(folder)


def test_output_written_after_the_last_checkpoint_is_removed(
    place: Path, ranks: Ranks, uninterrupted: Uninterrupted
) -> None:
    run, folder = str(config(place, "crashed")), place / "crashed"
    assert ranks.run(train_process, 1, run, CUT, timeout=PATIENCE_SECONDS) == [""]
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": CUT + 1, "reward/mean": 7.0}) + "\n" + '{"step": 6, "rew')
    for suffix in ("jsonl", "parquet", "parquet.incomplete"):
        (folder / "rollouts" / f"step_000009.{suffix}").write_text("{}\n", encoding="utf-8")
    checkpoints = folder / "checkpoints"
    for name in ("step_000005", "step_000005.incomplete", "step_000001.removing"):
        shutil.copytree(checkpoints / f"step_{CUT:06d}", checkpoints / name)
    (checkpoints / "step_000005.incomplete" / ".metadata").unlink()
    assert ranks.run(train_process, 1, run, timeout=PATIENCE_SECONDS) == [""]
    assert metrics(folder) == metrics(uninterrupted["alone"])
    assert sorted(path.name for path in (folder / "rollouts").glob("*.jsonl")) == [
        f"step_{step:06d}.jsonl" for step in range(1, STEPS + 1)
    ]
    assert list((folder / "rollouts").glob("step_000009*")) == []
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "latest", "settings.json", f"step_{CUT:06d}", f"step_{STEPS:06d}",
    ]  # fmt: skip
    before = weights(folder)
    # A finished run has no steps left, and writes the same export again.
    assert ranks.run(train_process, 1, run, timeout=PATIENCE_SECONDS) == [""]
    assert metrics(folder) == metrics(uninterrupted["alone"])
    assert [key for key in before if (before[key] != weights(folder)[key]).any()] == []


def test_a_damaged_checkpoint_is_named_and_nothing_is_changed_until_another_one_is_chosen(
    place: Path, ranks: Ranks, uninterrupted: Uninterrupted
) -> None:
    run, folder = str(config(place, "damaged", run={"save_every": 2})), place / "damaged"
    assert ranks.run(train_process, 1, run, CUT, timeout=PATIENCE_SECONDS) == [""]
    root = folder / "checkpoints"
    damaged = root / f"step_{CUT:06d}" / "__0_0.distcp"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)

    def listing() -> dict[str, Any]:
        return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}

    before = listing()
    assert ranks.run(train_process, 1, run, timeout=PATIENCE_SECONDS) == [
        f"{damaged.parent}: __0_0.distcp is not as it was saved; restore it, or write step_000002 into {root}/latest "
        "to resume from there"
    ]
    assert listing() == before
    (root / "latest").write_text("step_000002\n", encoding="utf-8")
    assert ranks.run(train_process, 1, run, timeout=PATIENCE_SECONDS) == [""]
    assert metrics(folder) == metrics(uninterrupted["alone"])
    found, wanted = weights(folder), weights(uninterrupted["alone"])
    assert [key for key in wanted if (found[key] != wanted[key]).any()] == []


# With servers -------------------------------------------------------------------------------------------------------


class Resuming:
    """An asynchronous collector that is stopped before each step, and replaced by one restored from its saved state.

    Sampling in the background is stopped in the middle.
    """

    collector: Any = None

    def __init__(self, **parts: Any) -> None:
        self.parts, self.lives = parts, 0
        self.inner = self.born()

    def born(self) -> Any:
        import torch.distributed as dist

        self.lives += 1
        store = dist.PrefixStore(f"life {self.lives}", self.parts["store"])
        cursor = copy.deepcopy(self.parts["cursor"])  # as it was before the first step
        return self.collector(**self.parts | {"store": store, "cursor": cursor})

    def collect(self, step: int, on_finished: Any) -> Any:
        import torch.distributed as dist

        inner, take_in = self.inner, self.inner._take_in
        inner._take_in = lambda _: take_in(on_finished)  # so that the test counts these too
        inner._start = lambda: None  # this life ends here
        files = [encode_state(saved_form(inner.state()))]
        dist.broadcast_object_list(files, src=0)
        inner.close()
        self.inner = self.born()
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files[0].items():
                Path(folder, name).write_bytes(content)
            self.inner.restore(restored_form(read_state(Path(folder)), self.parts["cursor"]._set.prompts))
        return self.inner.collect(step, on_finished)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def run_resumed_cases(*arguments: Any) -> Any:
    """`asynchronous_runs.run_cases` with such collectors."""
    from unittest import mock

    from megatron_rlvr.rollout import asynchronous as streaming

    Resuming.collector = streaming.AsynchronousCollector
    with mock.patch.object(streaming, "AsynchronousCollector", Resuming):
        return asynchronous_runs.run_cases(*arguments)


def test_groups_in_progress_and_partial_responses_resume_and_nothing_is_graded_or_trained_twice(tmp_path: Path) -> None:
    (tmp_path / "user_reward.py").write_text(asynchronous_runs.JOURNAL_REWARD, encoding="ascii")
    asynchronous_runs.assert_nothing_is_lost_or_done_twice(REPLICAS[5], tmp_path, run_resumed_cases)


# Choice of the checkpoint to resume from -----------------------------------------------------------------------------


def write_run_folder(place: Path, *, saved: bool) -> list[str]:
    """Write the folder of an earlier run with the settings of `config`; return the names in it."""
    root = place / "checkpoints"
    root.mkdir(parents=True)
    (place / "metrics.jsonl").touch()
    settings = load_settings(place.with_suffix(".yaml"))
    (root / "settings.json").write_text(json.dumps(settings.model_dump()), encoding="utf-8")
    if saved:
        (root / "step_000004").mkdir()
        (root / "latest").write_text("step_000004\n", encoding="utf-8")
    return ["metrics.jsonl", "checkpoints"]


def start_of(place: Path, name: str, earlier: list[str], **sections: Any) -> Checkpoint | None:
    return checkpoint_to_resume(load_settings(config(place, name, **sections)), earlier)


def test_resume_and_overwrite_decide_from_which_checkpoint_a_run_starts(place: Path) -> None:
    config(place, "decided")
    earlier = write_run_folder(place / "decided", saved=True)
    last = Checkpoint(place / "decided" / "checkpoints" / "step_000004", 4)
    assert start_of(place, "decided", earlier) == last
    assert start_of(place, "decided", earlier, run={"resume": "must"}) == last
    assert start_of(place, "decided", earlier, run={"overwrite": True}) is None
    assert start_of(place, "decided", earlier, run={"overwrite": True, "resume": "never"}) is None
    with pytest.raises(SettingsError, match=r"holds an earlier run .* set run.overwrite to true"):
        start_of(place, "decided", earlier, run={"resume": "never"})
    deletes = r"^run.overwrite=true: would delete the checkpoint that run.resume=must requires"
    with pytest.raises(SettingsError, match=deletes):
        start_of(place, "decided", earlier, run={"overwrite": True, "resume": "must"})
    with pytest.raises(SettingsError, match=r"^run.resume=must: there is no checkpoint in"):
        start_of(place, "elsewhere", [], run={"resume": "must"})
    assert start_of(place, "elsewhere", []) is None


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(place: Path) -> None:
    config(place, "early")
    earlier = write_run_folder(place / "early", saved=False)
    assert start_of(place, "early", earlier) is None
    (place / "early" / "checkpoints" / "settings.json").unlink()
    with pytest.raises(
        SettingsError, match=r"holds an earlier run .* and no checkpoint"
    ):  # nor is it known to be a run of this program
        start_of(place, "early", earlier)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("run", "seed", 1),
        ("model", "dtype", "bfloat16"),
        ("data", "suffix", " Box it."),
        ("batch", "prompts", 4),
        ("rollout", "group_size", 3),
        ("optimizer", "learning_rate", 0.002),
        ("megatron", "use_distributed_optimizer", True),
    ],
)
def test_settings_that_must_stay_the_same_are_refused_by_name(
    section: str, key: str, value: Any, place: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").symlink_to(place / "model")
    config(tmp_path, "changed")
    earlier = write_run_folder(tmp_path / "changed", saved=True)
    with pytest.raises(
        SettingsError, match=f"^{section}.{key}={json.dumps(value)}: the run in run.dir=.* started with .*; set it back"
    ):
        start_of(tmp_path, "changed", earlier, **{section: {key: value}})


def test_settings_that_may_change_are_accepted(place: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(place / "model")
    config(tmp_path, "changed")
    earlier = write_run_folder(tmp_path / "changed", saved=True)
    harmless: dict[str, Any] = {
        "run": {"steps": 100, "save_every": 5, "keep_last": 7, "export": False},
        "parallel": {"tensor": 2},
        "batch": {"tokens_per_micro_batch": 1024},
        "log": {"rollouts": 0},
    }
    assert start_of(tmp_path, "changed", earlier, **harmless) is not None


def test_checkpoint_settings_without_effect_are_refused(place: Path) -> None:
    with pytest.raises(SettingsError, match=r"^run.keep_every=4: has no effect with run.save_every=0 .*; remove it$"):
        load_settings(config(place, "keep", run={"keep_every": 4, "save_every": 0}))
    with pytest.raises(SettingsError, match=r"^run.keep_every=4: not a multiple of run.save_every=3; choose one$"):
        load_settings(config(place, "keep", run={"keep_every": 4, "save_every": 3}))


def test_checkpoints_are_kept_by_number_and_by_step(tmp_path: Path) -> None:
    run = RunSettings(dir=str(tmp_path), steps=9, save_every=2, keep_last=2, keep_every=4)
    checkpoints = Checkpoints(run, is_main=True)
    root = tmp_path / "checkpoints"

    def write(folder: Path, finish: Any, same: Path | None, *, background: bool) -> Any:
        assert same is None
        folder.mkdir(parents=True)
        return lambda: finish(folder, {})

    for step in range(1, 10):
        if checkpoints.due(step):
            checkpoints.save(step, {"step": step}, write)
            last = latest_checkpoint(root)
            assert last is not None
            assert last.step == step
            assert last.state() == {"step": step}
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_000004", "step_000008", "step_000009"]


def test_a_step_that_is_saved_again_keeps_its_weights_and_resumes_from_the_newer_state(tmp_path: Path) -> None:
    run = RunSettings(dir=str(tmp_path), steps=9, save_every=1, keep_last=2)
    root = tmp_path / "checkpoints"
    linked = []

    def write(folder: Path, finish: Any, same: Path | None, *, background: bool) -> Any:
        linked.append(same and same.name)
        folder.mkdir(parents=True)
        return lambda: finish(folder, {})

    checkpoints = Checkpoints(run, is_main=True)
    for number, step in enumerate((1, 2, 2, 2, 3)):
        checkpoints.save(step, {"number": number}, write)
        last = latest_checkpoint(root)
        assert last is not None
        assert (last.step, last.state()) == (step, {"number": number})
        if number == 3:
            found = sorted(path.name for path in root.iterdir())
            assert found == ["latest", "step_000002.1", "step_000002.2"]
            # Another process, which is stopped while it samples for its first step.
            checkpoints, last_but_one = Checkpoints(run, is_main=True, start=last), last
    assert linked == [None, None, "step_000002", "step_000002.1", None]
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_000002.2", "step_000003"]

    for name in ("step_000002.1", "step_000002.3", "step_000002.3.incomplete"):
        (root / name).mkdir()
    prepare_checkpoints(SimpleNamespace(run=run), last_but_one)  # type: ignore[arg-type]
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_000002.1", "step_000002.2"]


# Non-finite steps ---------------------------------------------------------------------------------------------------

HUGE = """\
def all(prompt, response):
    return 1e12 if len(response) % 2 == 0 else -1e12
"""


def train_on_huge_advantages(config: str) -> str:
    """Run the trainer with advantages that overflow, which the bounds of rewards do not permit."""
    from unittest import mock

    from megatron_rlvr.batching import mini_batches

    with mock.patch.object(mini_batches, "group_advantages", lambda rewards, estimator: rewards * 1e27):
        return train_process(config)


def test_non_finite_steps_are_skipped_and_counted_and_too_many_in_a_row_end_the_run(place: Path, ranks: Ranks) -> None:
    (place / "huge.py").write_text(HUGE, encoding="utf-8")
    run = config(
        place, "huge", reward={"function": "huge:all"}, advantage={"estimator": "dr_grpo"},
        optimizer={"max_skipped_steps": 3}, run={"save_every": 1},
    )  # fmt: skip
    folder = place / "huge"
    for _ in range(2):  # the count is part of the checkpoint: the same command ends at the same step
        answers = ranks.run(train_on_huge_advantages, 2, str(run), timeout=PATIENCE_SECONDS)
        assert answers[0] == answers[1]
        assert answers[0].startswith("step 2: loss ")
        assert "mini-batch 1 are not finite, nor were those of the 3 optimizer steps up to it" in answers[0]
        assert [(line["step"], line["train/skipped_steps"]) for line in metrics(folder)] == [(1, 2)]
        lines = [json.loads(line) for line in (folder / "skipped" / "step_000002.jsonl").read_text().splitlines()]
        assert len(lines) == 2  # completions of the one prompt
        for line in lines:
            assert line["prompt_id"] in answers[0]
            assert abs(line["reward"]) == 1e12
            assert len(line["response_token_ids"]) == len(line["logprobs"]) == line["tokens"]
