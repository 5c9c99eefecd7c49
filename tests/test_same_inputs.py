"""A run resumes with what it started with, or is refused: problems, stop tokens, and what a template read of the clock.

The chat template shows the clock to the microsecond, so prompts of any two starts would differ, and those of two ranks.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from launcher import Ranks
from resuming import train_process

from megatron_rlvr.checkpoint.store import Checkpoint
from megatron_rlvr.config import SettingsError
from megatron_rlvr.config.loading import load_settings
from megatron_rlvr.startup.describe import describe_plan
from megatron_rlvr.startup.resolve import resolve

MICROSECONDS = "{{ strftime_now('%Y-%m-%dT%H:%M:%S.%f') }} " + tiny.TEMPLATE
PATIENCE_SECONDS = 300.0


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    world = Ranks(2)
    yield world
    world.stop()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, model: Path, ranks: Ranks) -> Path:
    """A folder with a run of two ranks that has ended after its only step, in which the template read the clock."""
    place = tmp_path_factory.mktemp("same_inputs")
    (place / "rewards.py").write_text(tiny.REWARDS, encoding="utf-8")
    shutil.copytree(model, place / "model")
    tiny.write_tokenizer(place / "model", chat_template=MICROSECONDS)
    rows = [{"id": i, "problem": text, "answer": n, "tests": [n]} for i, (text, n) in enumerate(tiny.PROBLEMS)]
    tiny.write_rows(place / "train.jsonl", rows)
    tiny.write_aime(place / "held_out.jsonl")
    assert ranks.run(train_process, 2, str(config(place, steps=1)), timeout=PATIENCE_SECONDS) == ["", ""]
    return place


def copy(started: Path, place: Path) -> Path:
    """Copy the run with everything that it reads, as if it had started there."""
    shutil.copytree(started, place)
    settings = place / "run" / "checkpoints" / "settings.json"
    settings.write_text(settings.read_text(encoding="utf-8").replace(str(started), str(place)), encoding="utf-8")
    return place


def config(place: Path, steps: int, **sections: Any) -> Path:
    values = tiny.settings_for(
        place / "model",
        place / "train.jsonl",
        place / "run",
        run={"steps": steps},
        # No two starts have the same prompts: how far a step moves the policy is left to chance.
        rollout={"max_response_tokens": 8, "max_logprob_gap": 1e6},
        reward={"function": "rewards:even"},
        evaluate={"sets": str(place / "held_out.jsonl"), "group_size": 1},
        log={"rollouts": 100},
        **sections,
    )
    return tiny.write_settings(place / "config.yaml", values)


def moments(place: Path, step: int) -> set[str]:
    """Moments at the start of the prompts of a step."""
    lines = (place / "run" / "rollouts" / f"step_{step:06d}.jsonl").read_text(encoding="utf-8").splitlines()
    return {json.loads(line)["prompt"].split()[0] for line in lines}


def test_the_clock_stands_still_for_all_ranks_and_in_a_resumed_run(started: Path, ranks: Ranks, tmp_path: Path) -> None:
    place = copy(started, tmp_path / "copy")
    recorded = Checkpoint(place / "run" / "checkpoints" / "step_000001", 1).inputs()["clock"]
    (first,) = moments(place, 1)
    assert first == recorded
    run = config(place, steps=2)
    assert f"sees {recorded[:10]} {recorded[11:19]} until" in describe_plan(resolve(load_settings(run)))
    assert ranks.run(train_process, 2, str(run), timeout=PATIENCE_SECONDS) == ["", ""]
    assert moments(place, 2) == {recorded}


def edit_rows(name: str, **changes: Any) -> Callable[[Path], None]:
    """Returns a function that changes the third row of a file."""

    def edit(place: Path) -> None:
        rows = [json.loads(line) for line in (place / name).read_text().splitlines()]
        rows[2] |= changes
        tiny.write_rows(place / name, rows)

    return edit


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(place: Path) -> None:
        path = place / "model" / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | changes))

    return edit


def edit_merges(place: Path) -> None:
    """Drop the last merge of the tokenizer, which no prompt need use."""
    path = place / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))


def remove_row(place: Path) -> None:
    lines = (place / "train.jsonl").read_text().splitlines(keepends=True)
    (place / "train.jsonl").write_text("".join(lines[1:]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_rows("train.jsonl", answer=-1), "data.train={}/train.jsonl: answers have changed since"),
        (edit_rows("train.jsonl", problem="Why?"), "data.train={}/train.jsonl: problems have changed since"),
        (edit_rows("train.jsonl", id=99), "data.train={}/train.jsonl: ids have changed since"),
        (edit_rows("train.jsonl", tests=[]), "data.train={}/train.jsonl: other columns have changed since"),
        (edit_rows("held_out.jsonl", answer="-1"), "evaluate.sets={}/held_out.jsonl: answers have changed since"),
        (remove_row, "data.train={}/train.jsonl: the number of prompts has changed from 20 to 19 since"),
        (edit_json("tokenizer_config.json", chat_template=MICROSECONDS + " "),
         "model.path={}/model: the chat template has changed since"),
        (edit_json("tokenizer_config.json", padding_side="left"),
         "model.path={}/model: the tokenizer has changed since"),
        (edit_merges, "model.path={}/model: the tokenizer has changed since"),
        (edit_json("generation_config.json", eos_token_id=[2, 9]),
         "model.path={}/model: the tokens that end a response have changed from [2] to [2, 9] since"),
    ],
)  # fmt: skip
def test_a_resumed_run_that_would_read_something_else_is_refused(
    edit: Callable[[Path], None], message: str, started: Path, tmp_path: Path
) -> None:
    place = copy(started, tmp_path / "copy")
    run = config(place, steps=3)
    assert resolve(load_settings(run)).start is not None
    edit(place)
    with pytest.raises(SettingsError) as caught:
        resolve(load_settings(run))
    said = str(caught.value)
    assert said.startswith(message.format(place))
    assert said.endswith(
        "; restore what was there, set run.accept_changed_inputs=true to train on what is there now, or start a new "
        "run in another folder"
    )
    assert f" since the checkpoint in run.dir={place / 'run'} was saved; " in said
    assert resolve(load_settings(run, ["--run.accept_changed_inputs=true"])).start is not None
    assert resolve(load_settings(run, ["--run.overwrite=true"])).start is None


def test_accepted_inputs_are_trained_on_and_become_those_of_the_next_checkpoint(
    started: Path, ranks: Ranks, tmp_path: Path
) -> None:
    place = copy(started, tmp_path / "copy")
    before = Checkpoint(place / "run" / "checkpoints" / "step_000001", 1)
    remove_row(place)
    edit_rows("train.jsonl", answer=-1)(place)
    run = config(place, steps=2)
    (said,) = ranks.run(train_process, 1, str(run), timeout=PATIENCE_SECONDS)
    assert said.startswith(f"data.train={place}/train.jsonl: the number of prompts has changed from 20 to 19 since")
    values = json.loads(run.read_text())
    values["run"]["accept_changed_inputs"] = True
    tiny.write_settings(run, values)
    assert ranks.run(train_process, 1, str(run), timeout=PATIENCE_SECONDS) == [""]
    after = Checkpoint(place / "run" / "checkpoints" / "step_000002", 2)
    assert before.inputs()["data.train/train"]["count"] == 20
    assert after.inputs()["data.train/train"]["count"] == 19
    assert after.manifest().identity != before.manifest().identity
    assert resolve(load_settings(config(place, steps=3))).start == after, "accepted once, it is what the run reads"


def other_rank_reads_another_file(folder: str) -> str:
    """Train on two ranks, each with its own copy of a file under the same name, as on two hosts."""
    import os

    os.chdir(Path(folder) / os.environ["RANK"])
    return train_process(str(Path(folder) / "config.yaml"))


def test_ranks_that_read_unlike_copies_of_a_file_are_refused(started: Path, ranks: Ranks, tmp_path: Path) -> None:
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        shutil.copy(started / "train.jsonl", tmp_path / rank)
    edit_rows("train.jsonl", answer=-1)(tmp_path / "1")
    values = tiny.settings_for(started / "model", "train.jsonl", tmp_path / "run")
    tiny.write_settings(tmp_path / "config.yaml", values)
    expected = (
        "data.train=train.jsonl: answers have changed on rank 1, compared with rank 0; give all hosts the same files"
    )
    found = ranks.run(other_rank_reads_another_file, 2, str(tmp_path), timeout=PATIENCE_SECONDS)
    assert found == [expected, expected]
    assert not (tmp_path / "run").exists()
