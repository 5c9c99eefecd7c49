"""The command `rlvr evaluate` in this process: results, resuming, grading again, and every kind of wrong input."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from raw_server import plain, raw_server

from megatron_rlvr.evaluation.command import main as command
from megatron_rlvr.evaluation.command import options as command_line
from megatron_rlvr.evaluation.records import read_records, read_responses
from megatron_rlvr.signals import Signals

FAST = (
    *("--rollout.max_response_tokens", "16", "--data.max_prompt_tokens", "128", "--model.dtype", "float32"),
    *("--reward.workers", "1", "--reward.timeout_seconds", "60"),
)


@pytest.fixture(autouse=True)
def _no_signal_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Signals, "listen", lambda self: None)


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sets")
    return tiny.write_gsm8k(folder / "additions.jsonl"), tiny.write_aime(folder / "more.parquet")


def evaluate(*arguments: str | Path) -> int:
    return command.main(list(map(str, arguments)), "rlvr evaluate")


def status_of(*arguments: str | Path) -> object:
    """Exit status, also where the parser of the command line exits."""
    try:
        return evaluate(*arguments)
    except SystemExit as left:
        return left.code


def write_reward(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A reward for the first character of a response, which names it as the answer."""
    (folder / "first_letter.py").write_text(
        "from megatron_rlvr.types import Graded\n\n\n"
        "def reward(prompt, response):\n"
        "    return Graded(response[:1] > 'a', response[:1] or None)\n",
        encoding="ascii",
    )
    monkeypatch.syspath_prepend(str(folder))
    return "first_letter:reward"


def test_an_evaluation_resumes_reports_again_and_is_graded_with_another_reward(
    model: Path,
    sets: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    out, again, new = tmp_path / "out", tmp_path / "again", tmp_path / "new"
    common = (model, "--sets", sets[0], f"other={sets[1]}", "--samples", "2", *FAST)
    assert evaluate(*common, "--evaluate.pass_at", "[1]", "--out", out) == 0
    asked = (*common, "--evaluate.pass_at", "[2]")  # of the same records
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["problems", "x", "completions", *("20", "x", "2") * 2] in table
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["complete"], summary["completions"], list(summary["sets"])) == (True, 80, ["additions", "other"])
    records = {record.key: (record.seed, text) for record, text in read_responses(out)}
    assert len(records) == 80

    path = out / "records" / "00000.jsonl"  # as if it had been killed in the middle of a line
    path.write_bytes(path.read_bytes()[:2000])
    kept = path.read_bytes().rpartition(b"\n")[0]
    assert evaluate(*asked, "--out", out, "--json") == 0
    resumed = json.loads(capsys.readouterr().out)
    assert path.read_bytes().startswith(kept + b"\n")
    assert {record.key: (record.seed, text) for record, text in read_responses(out)} == records
    others = {name: {**own, "pass_at": resumed["sets"][name]["pass_at"]} for name, own in summary["sets"].items()}
    assert resumed["sets"] == others
    assert list(resumed["sets"]["other"]["pass_at"]) == ["2"]

    written = path.read_bytes()
    monkeypatch.setattr("megatron_rlvr.evaluation.command.session.run_session", None)  # nothing is left to sample
    assert evaluate(*asked, "--out", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["sets"] == resumed["sets"]
    assert path.read_bytes() == written

    assert evaluate("--regrade", out, "--out", again, "--reward.timeout_seconds", "60") == 0
    assert "hint: verdicts: 0 of 80 have changed" in capsys.readouterr().out
    regraded = json.loads((again / "summary.json").read_text())["sets"]["other"]
    assert regraded == {**resumed["sets"]["other"], "hints": []}, "with the same values of k"
    function = write_reward(tmp_path, monkeypatch)
    for _ in range(2):  # the second time all is graded
        assert evaluate("--regrade", out, "--out", new, "--reward.function", function) == 0
        expected = sum(text[:1] > "a" for _, text in records.values())
        assert f"hint: verdicts: {expected} of 80 have changed" in capsys.readouterr().out
    assert {r.key: r.correct for r in read_records(new)} == {key: text[:1] > "a" for key, (_, text) in records.items()}
    assert evaluate("--compare", out, new) == 0
    text = capsys.readouterr().out
    assert 'unlike settings: reward.function: "math" in A, "first_letter:reward" in B' in text
    sets[0].write_text(sets[0].read_text().replace("#### 6", "#### 7"))
    assert evaluate("--regrade", out, "--out", tmp_path / "newer") == 2
    assert "the set's file has changed since the evaluation" in capsys.readouterr().err
    sets[0].write_text(sets[0].read_text().replace("#### 7", "#### 6"))


def test_the_prompts_sampling_and_reward_of_a_run_are_taken(model: Path, sets: tuple[Path, Path], tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    changes: dict[str, dict[str, Any]] = {
        "run": {"seed": 7},
        "data": {"suffix": " Box it."},
        "reward": {"answer_after": "Then:"},
        "evaluate": {"sets": [str(sets[0])], "group_size": 3, "top_p": 0.4, "temperature": 0.5},
    }
    tiny.write_settings(run / "config.yaml", tiny.settings_for(model, sets[0], run, **changes))
    options = command_line.parse([str(model), "--like", str(run), "--out", "out", "--evaluate.top_p", "0.9"], "rlvr")
    found = command_line.settings_of(options, model, None, [])
    assert (found.run.seed, found.data.suffix, found.reward.answer_after) == (7, " Box it.", "Then:")
    assert (found.evaluate.group_size, found.evaluate.top_p, found.evaluate.temperature) == (3, 0.9, 0.5)
    assert found.rollout.max_response_tokens == 16
    assert [file.path for file in found.evaluate.sets] == [str(sets[0])]
    on_servers = command_line.settings_of(options, model, None, ["http://127.0.0.1:1"])
    assert on_servers.rollout.engine == "sglang"


Edit = Callable[[Path], object]
WRONG: dict[str, tuple[list[str], str]] = {
    "an empty set": (["MODEL", "--sets", "empty.jsonl", "--out", "out"], "empty.jsonl has no rows; give a file"),
    "duplicate ids": (
        ["MODEL", "--sets", "twice.jsonl", "--out", "out"],
        "twice.jsonl, line 2: id 'a' repeats that of",
    ),
    "k above the samples": (
        ["MODEL", "--sets", "a.jsonl", "--samples", "4", "--evaluate.pass_at", "[1, 8]", "--out", "out"],
        "evaluate.pass_at=8: pass@k needs k completions, and evaluate.group_size=4; give ints from 1 to that",
    ),
    "sets of one name": (
        ["MODEL", "--sets", "a.jsonl", "b/a.jsonl", "--out", "out"],
        "two sets have the name 'a'; set name beside the path of one of them (--sets NAME=FILE)",
    ),
    "no tokenizer": (
        ["bare", "--sets", "a.jsonl", "--out", "out"],
        "bare has no tokenizer.json, tokenizer_config.json",
    ),
    "another evaluation": (
        ["MODEL", "--sets", "a.jsonl", "--samples", "2", "--out", "used"],
        "--out used: holds records of another evaluation, with sampling.group_size=3, not 2; choose another folder",
    ),
    "other weights": (["bare2", "--sets", "a.jsonl", "--samples", "3", "--out", "used"], "with target.path="),
    "a folder of something else": (["MODEL", "--sets", "a.jsonl", "--out", "b"], "--out b: holds a.jsonl, and no"),
    "no sets": (["MODEL", "--out", "out"], "--sets is missing; give the problem sets, or --like with a run"),
    "no model": (["b", "--sets", "a.jsonl", "--out", "out"], "b is no model, checkpoint or run (it has no config.json"),
    "a step of a model": (
        ["MODEL", "--step", "4", "--sets", "a.jsonl", "--out", "out"],
        "--step 4: MODEL is a model and",
    ),
    "a step that a run lacks": (
        ["run", "--step", "4", "--sets", "a.jsonl", "--out", "out"],
        "run: the run has no model of step 4 (it has no checkpoint and no export); give --step of a checkpoint",
    ),
    "a setting of training": (
        ["MODEL", "--sets", "a.jsonl", "--out", "out", "--selection.fraction", "0.1"],
        "--selection.fraction: no setting of an evaluation; rlvr evaluate --help lists them",
    ),
    "a limit of servers": (
        ["MODEL", "--sets", "a.jsonl", "--out", "out", "--rollout.max_inflight", "7"],
        "rollout.max_inflight=7: has no effect with rollout.engine=embedded (there are no servers); remove it",
    ),
    "greedy and several": (
        ["MODEL", "--sets", "a.jsonl", "--samples", "4", "--evaluate.temperature", "0", "--out", "out"],
        "with evaluate.temperature=0 all completions are alike; set 1",
    ),
    "too long": (
        ["MODEL", "--sets", "a.jsonl", "--out", "out", "--rollout.max_response_tokens", "4000"],
        "exceed the model's 512 positions; lower one of them",
    ),
    "no run": (["MODEL", "--like", "b", "--out", "out"], "--like b: holds no config.yaml; give the folder of a run"),
    "a folder that cannot be": (["MODEL", "--sets", "a.jsonl", "--out", "x" * 300], "cannot be the path of a file"),
    "a model that cannot be": (["x" * 300, "--sets", "a.jsonl", "--out", "out"], "cannot be the path of a file"),
    "a set that is a pipe": (["MODEL", "--sets", "pipe.jsonl", "--out", "out"], "pipe.jsonl is not a file"),
    "a file for a folder": (["MODEL", "--sets", "a.jsonl", "--out", "a.jsonl/b"], "--out=a.jsonl/b: cannot be written"),
    "a set with a slash": (
        ["MODEL", "--evaluate.sets", "[{path: a.jsonl, name: a/b}]", "--out", "out"],
        "evaluate.sets: a/b is no name of a set",
    ),
    "a set of no name": (["MODEL", "--sets", "=a.jsonl", "--out", "out"], "evaluate.sets: '' is no name of a set"),
    "samples of many digits": (
        ["MODEL", "--sets", "a.jsonl", "--samples", "9" * 30, "--out", "out"],
        "at most nine digits",
    ),
    "no url": (["MODEL", "--servers", "nonsense", "--sets", "a.jsonl", "--out", "out"], "--servers=nonsense: not the"),
    "a url twice": (
        ["--servers", "http://127.0.0.1:1", "http://127.0.0.1:1/", "--sets", "a.jsonl", "--out", "out"],
        "--servers=http://127.0.0.1:1: given twice; remove one of them",
    ),
    "no key": (
        ["--servers", "http://127.0.0.1:1", "--sets", "a.jsonl", "--out", "out", "--rollout.api_key_file", "none"],
        "rollout.api_key_file=none: does not exist; give a file with the servers' key",
    ),
    "a key for no servers": (
        ["MODEL", "--sets", "a.jsonl", "--out", "out", "--rollout.api_key_file", "a.jsonl"],
        "rollout.api_key_file=a.jsonl: has no effect with rollout.engine=embedded (there are no servers); remove it",
    ),
    "an empty key": (
        ["MODEL", "--serve", "cpu", "--sets", "a.jsonl", "--out", "out", "--rollout.api_key_file", "empty.jsonl"],
        "rollout.api_key_file=empty.jsonl: holds no key; write one line",
    ),
    "no server": (
        ["--servers", "http://127.0.0.1:1", "--sets", "a.jsonl", "--out", "out"],
        "--servers=http://127.0.0.1:1: the server cannot be used",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "b").mkdir()
    (folder / "run").mkdir()
    rows = [{"id": "a", "problem": "1 + 1?", "answer": "2"}, {"id": "b", "problem": "1 + 2?", "answer": "3"}]
    for path in (folder / "a.jsonl", folder / "b" / "a.jsonl"):
        tiny.write_rows(path, rows)
    tiny.write_rows(folder / "twice.jsonl", [rows[0], rows[0]])
    (folder / "empty.jsonl").touch()
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "run" / "config.yaml").write_text("{}")
    (folder / "MODEL").symlink_to(model)
    for name in ("bare", "bare2"):
        (folder / name).mkdir()
        for file in model.iterdir():
            if name == "bare2" or not file.name.startswith("tokenizer"):
                (folder / name / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line_and_status_2_and_nothing_is_written(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(folder)
    if not (folder / "used").exists():
        with monkeypatch.context() as patch:
            patch.setattr(command, "_sample", describe_only)
            assert evaluate("MODEL", "--sets", "a.jsonl", "--samples", "3", "--out", "used", *FAST) == 0
    before = sorted(str(path) for path in folder.rglob("*"))
    arguments, message = WRONG[name]
    assert status_of(*FAST, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(str(path) for path in folder.rglob("*")) == before


def describe_only(options: Any, resolved: Any, target: Any, description: dict[str, Any]) -> int:
    from megatron_rlvr.evaluation.folder import write_description

    write_description(options.out, description)
    return 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no TARGET; give a model, a checkpoint or a run, or --servers URL"),
        (["m"], "--out is missing; give the folder to write, or to resume"),
        (["m", "--out", "o", "--serve-port", "3"], "--serve-port: has no effect without --serve; remove it"),
        (["m", "--out", "o", "--", "--tp", "2"], "--: has no effect without --serve; remove it"),
        (["m", "--out", "o", "--serve", "cpu", "--servers", "u"], "--serve and --servers exclude each other"),
        (["m", "--out", "o", "--ranks", "0"], "--ranks 0: not above 0"),
        (["--compare", "a", "b", "--samples", "3"], "--samples: has no effect with --compare; remove it"),
        (["--compare", "a", "b", "--serve-port", "3"], "--serve-port: has no effect with --compare; remove it"),
        (["m", "--compare", "a", "b"], "TARGET: has no effect with --compare; remove it"),
        (["--compare", "a", "b", "--reward.correct", "1"], "--reward.correct: has no effect with --compare; remove it"),
        (["--compare", "a"], "--compare: needs two evaluations or more; name their folders"),
        (["m", "--out", "o", "--samples", "3", "--evaluate.group_size=4"], "--evaluate.group_size set the same"),
        (["m", "--out", "o", "--sets", "a", "--evaluate.sets", "b"], "--sets and --evaluate.sets set the same"),
        (["--regrade", "a", "--out", "o", "--step", "3"], "--step: has no effect with --regrade; remove it"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as exit_:
        evaluate(*arguments)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_the_command_is_run_again_on_servers_without_what_started_them():
    words = ["m", "--serve", "cpu", "--serve-port=3", "--out", "o", "--serve-python", "p", "--json", "--", "--tp", "2"]
    assert command._without_serving(words) == ["m", "--out", "o", "--json"]
    assert command._servers(["http://a:1", "http://b:2"]) == ["http://a:1", "http://b:2"]
    assert command._servers(['[http://a:1, "http://[::1]:2"]']) == ["http://a:1", "http://[::1]:2"]
    assert command._servers(["http://b:2/", "http://[::1]"]) == ["http://b:2", "http://[::1]"]


def test_the_key_of_servers_is_sent_to_them_and_given_to_those_that_are_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(folder)
    key, run = tmp_path / "key", tmp_path / "run"
    key.write_text("secret-key\n")
    run.mkdir()
    with raw_server() as server:
        server.answer = lambda: [plain(b"{}", "401 Unauthorized")]
        rollout = {"engine": "sglang", "servers": [server.url], "api_key_file": str(key)}
        changes: dict[str, dict[str, Any]] = {"rollout": rollout, "evaluate": {"sets": ["a.jsonl"]}}
        tiny.write_settings(run / "config.yaml", tiny.settings_for(Path("MODEL"), Path("a.jsonl"), run, **changes))
        flags: tuple[tuple[str, ...], ...] = (
            ("--sets", "a.jsonl", "--rollout.api_key_file", str(key)),
            ("--like", str(run)),
            ("--sets", "a.jsonl"),
        )
        for number, words in enumerate(flags):
            server.requests.clear()
            assert evaluate("--servers", server.url, *words, "--out", tmp_path / "out") == 2
            assert f"--servers={server.url}: the server cannot be used" in capsys.readouterr().err
            assert server.requests
            assert all((b"Bearer secret-key" in request) == (number < 2) for request in server.requests)
    started: list[list[str]] = []

    def start(words: list[str], program: str, output: Any) -> int:
        started.append(words)
        return 0

    monkeypatch.setattr("megatron_rlvr.engines.sglang.launcher.command.main", start)
    asked = ("MODEL", "--sets", "a.jsonl", *FAST, "--serve", "cpu", "--out", tmp_path / "out")
    assert evaluate(*asked, "--rollout.api_key_file", key) == 0
    (line,) = started
    own, again = line[: line.index("--then")], line[line.index("--then") :]
    assert own[own.index("--api-key-file") + 1] == str(key)
    assert again[again.index("--rollout.api_key_file") + 1] == str(key)
    assert again[-2:] == ["--servers", "{servers}"]
