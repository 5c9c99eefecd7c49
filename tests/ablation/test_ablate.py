"""The command `rlvr ablate`: cells that run, fail, resume; and results against the runs' own files."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from scipy import stats

from megatron_rlvr.ablation import cells as cells_module
from megatron_rlvr.ablation.command import main
from megatron_rlvr.ablation.spec import Cell, SpecError, prepare, write_files
from megatron_rlvr.config.loading import load_settings, to_yaml
from megatron_rlvr.evaluation.folder import evaluation_folder

SETS = 20
EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "ablations").glob("*.yaml"))

# Does what a run leaves behind: argument 1 is the settings file; fails once for the arm that is named in argument 2.
RUN = """
import json, pathlib, sys
sys.path[:0] = {path!r}
from test_ablate import write_run
from megatron_rlvr.config.loading import load_settings
file = pathlib.Path(sys.argv[1])
if file.parent.name == sys.argv[2]:
    sys.exit("megatron_rlvr: out of luck; try again")
write_run(load_settings(file))
"""


def write_run(settings: Any) -> None:
    """Write the folder of a finished run whose accuracies depend on arm, seed and problem."""
    folder, seed = Path(settings.run.dir), settings.run.seed
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(settings))
    share = accuracies(settings.selection.fraction, seed)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(settings.run.steps + 1):
            line = {"step": step, "eval/held_out/accuracy": step / settings.run.steps}
            if step:
                line |= {"time/step": 2.0, "rollout/response_tokens": 100.0 * (1 + seed), "entropy/mean": 0.5 + seed}
                line |= {"rollout/groups_sampled": 10.0, "rollout/groups_dropped": 4.0}
            file.write(json.dumps(line) + "\n")
    own = evaluation_folder(folder, settings.run.steps)
    (own / "records").mkdir(parents=True, exist_ok=True)
    a_set = {"path": "x", "prompt_key": None, "answer_key": None, "id_key": None, "problems": SETS}
    reward = {"function": "math", "correct": 1.0, "incorrect": 0.0, "answer_after": None}
    description = {"target": {}, "prompts": {}, "sampling": {"group_size": 4}, "reward": reward}
    (own / "evaluation.json").write_text(json.dumps(description | {"sets": {"held_out": a_set}}))
    with (own / "records" / "00000.jsonl").open("w") as file:
        for problem, count in enumerate(share):
            for index in range(4):
                record = {"problem": f"held_out/{problem}", "index": index, "seed": 0, "tokens": 3, "gold": "1"}
                record |= {"finish_reason": "stop", "answer": "1", "correct": bool(index < count), "reward": 1.0}
                file.write(json.dumps(record | {"failure": None, "seconds": 1.0, "response": "1"}) + "\n")
    (folder / "summary.json").write_text(json.dumps({"steps": settings.run.steps}))


def accuracies(fraction: float, seed: int) -> np.ndarray:
    """Numbers of correct completions of four of each problem."""
    return np.random.default_rng([round(100 * fraction), seed]).binomial(4, 0.3 + 0.6 * fraction, SETS)


def write_spec(folder: Path, **changes: Any) -> Path:
    values = tiny.settings_for(folder / "model", folder / "train.jsonl", folder / "unused")
    values["evaluate"] = {"sets": "held_out.jsonl", "group_size": 4}
    tiny.write_settings(folder / "base.yaml", values)
    spec = {
        "base": "base.yaml",
        "dir": str(folder / "out"),
        "seeds": [0, 1, 2],
        "baseline": "all",
        "arms": {"all": {"selection": {"keep": "all"}}, "few": {"selection": {"fraction": 0.1}}},
        "target": 0.4,
    } | changes
    return tiny.write_settings(folder / "spec.yaml", {k: v for k, v in spec.items() if v is not None})


@pytest.fixture
def fake_runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Replace `rlvr train`; the arm under "fails" fails."""
    chosen = {"fails": ""}
    script = RUN.format(path=[str(Path(__file__).parent), str(Path(tiny.__file__).parent)])

    def start(cell: Cell, ranks: int | None) -> "subprocess.Popen[bytes]":
        with cell.log.open("ab") as log:
            command = [sys.executable, "-c", script, str(cell.file), chosen["fails"]]
            return subprocess.Popen(command, stdout=log, stderr=log)

    monkeypatch.setattr(cells_module, "_start", start)
    return chosen


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_failed_arm_is_reported_and_the_same_command_runs_what_is_missing(tmp_path, fake_runs, capsys):
    spec = write_spec(tmp_path)
    fake_runs["fails"] = "few"
    assert main([str(spec), "--jobs", "2"], "rlvr ablate") == 1
    text = capsys.readouterr().out
    assert "few, seed 1: failed, status 1: out of luck; try again; see" in text
    assert "nothing can be compared yet" in text
    states = [(row["arm"], row["seed"], row["state"]) for row in rows_of(tmp_path / "out" / "runs.csv")]
    assert states[0] == ("all", "0", "finished")
    assert states[1] == ("few", "0", "failed, status 1: out of luck; try again")
    fake_runs["fails"] = "all"  # those are finished, and not run again
    assert main([str(spec)], "rlvr ablate") == 0
    text = capsys.readouterr().out
    assert "3 of 6 runs are finished" in text
    assert "all, seed" not in text
    # The differences, against a direct computation.
    d = np.array([(accuracies(0.1, s) - accuracies(1.0, s)) / 4 for s in range(3)])
    (row,) = rows_of(tmp_path / "out" / "differences.csv")
    assert float(row["difference"]) == pytest.approx(d.mean())
    rows, columns = d.mean(1).var(ddof=1) / 3, d.mean(0).var(ddof=1) / SETS
    rest = ((d - d.mean(1)[:, None] - d.mean(0) + d.mean()) ** 2).sum() / (2 * 19) / d.size
    error = max(rows + columns - rest, rows, columns) ** 0.5
    assert float(row["standard error"]) == pytest.approx(error)
    freedom = max(2, int(error**4 / (rows**2 / 2 + columns**2 / 19 + rest**2 / 38)))
    assert float(row["95 % to"]) == pytest.approx(d.mean() + stats.t.ppf(0.975, freedom) * error)
    arms = rows_of(tmp_path / "out" / "arms.csv")
    assert [row["arm"] for row in arms] == ["all", "few"]
    # Two steps: 0.5 after the first, which is over the target, at 2 s and 100, 200, 300 tokens.
    assert [float(arms[0][key]) for key in ("step", "seconds", "response tokens")] == [1.0, 2.0, 200.0]
    assert float(arms[0]["share dropped"]) == pytest.approx(0.4)
    page = (tmp_path / "out" / "ablation.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["conclusion"] in text.replace("\n", " ")
    entropy = data["curves"]["runs"][0]["values"]
    assert entropy["entropy/mean"] == [None, 1.5, 1.5]
    assert entropy["entropy/mean/standard_error_over_seeds"][1] == pytest.approx(1 / 3**0.5, abs=1e-4)


# Writes the signals that it gets; ends with the first SIGINT.
LISTENER = """
import signal, sys, time
def note(number, frame):
    print(signal.Signals(number).name, flush=True)
    if number == signal.SIGINT:
        sys.exit(1)
for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(each, note)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("signals", "sent"),
    [(["SIGINT", "SIGINT"], "SIGTERM SIGINT"), (["SIGHUP", "SIGTERM", "SIGINT"], "SIGTERM SIGTERM SIGINT")],
)
def test_the_first_signal_has_runs_save_and_a_later_ctrl_c_ends_them(signals, sent, tmp_path, monkeypatch):
    logs: list[Path] = []

    def start(cell: Cell, ranks: int | None) -> "subprocess.Popen[bytes]":
        logs.append(cell.log)
        with cell.log.open("ab") as log:
            return subprocess.Popen([sys.executable, "-c", LISTENER], stdout=log, stderr=log)

    def send() -> None:
        said, deadline = "ready", time.monotonic() + 30
        for name, answer in zip(signals, sent.split(), strict=True):
            while len(logs) < 2 or not all(said in log.read_text().splitlines()[-1:] for log in logs):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            os.kill(os.getpid(), signal.Signals[name])
            said = answer
            time.sleep(0.5)  # equal answers cannot be told apart

    monkeypatch.setattr(cells_module, "_start", start)
    sender = threading.Thread(target=send)
    sender.start()
    assert main([str(write_spec(tmp_path)), "--jobs", "2"], "rlvr ablate") == 128 + signal.Signals[signals[0]]
    sender.join()
    assert [log.read_text().split() for log in logs] == [["ready", *sent.split()]] * 2


def test_one_cell_runs_by_its_index_and_slurm_gets_all_of_them(tmp_path, fake_runs, capsys):
    spec = write_spec(tmp_path)
    assert main([str(spec), "--index", "3"], "rlvr ablate") == 0
    assert [c.index for c in prepare(spec).cells if (c.folder / "summary.json").exists()] == [3]
    assert not (tmp_path / "out" / "runs.csv").exists()
    capsys.readouterr()
    assert main([str(spec), "--slurm", "--jobs", "4"], "rlvr ablate") == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-5%4\n" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert main([str(spec), "--list"], "rlvr ablate") == 0
    assert capsys.readouterr().out.splitlines()[3] == "3\tfew\t1\tfinished"


def test_a_run_of_other_settings_is_not_taken_for_an_arm(tmp_path, fake_runs):
    assert main([str(write_spec(tmp_path)), "--index", "0"], "rlvr ablate") == 0
    changed = write_spec(tmp_path, settings={"optimizer": {"learning_rate": 0.5}})
    with pytest.raises(SpecError, match=r"all, seed 0: its run has optimizer.learning_rate=0.01, and .* 0.5; choose"):
        main([str(changed)], "rlvr ablate")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "no.yaml"}, "base=no.yaml does not exist; correct the path"),
        ({"seeds": [1, 1]}, "seeds=1: given twice; give each once"),
        ({"seeds": []}, r"seeds=\[\]: .*; correct it"),
        ({"baseline": "none"}, "baseline=.*none.*: none of the arms; choose from all, few"),
        ({"baseline": None}, "baseline is missing; set it"),
        ({"arms": {"all": {}}}, "arms: 1 given, and one alone compares nothing"),
        ({"arms": {"all": {}, "a/b": {}}}, "arms.*a/b.*: no name of an arm"),
        ({"arms": {"all": {}, "few": 3}}, "arms.few=3: not a mapping"),
        ({"arms": {"all": {}, "few": {"run": {"steps": 3}}}}, "arms.few.run: all arms run and are evaluated alike"),
        ({"arms": {"all": {}, "few": {"selection": {"fractoin": 1}}}}, "arm few: .*did you mean selection.fraction"),
        (
            {"arms": {"all": {}, "few": {"selection": {"fraction": 0.2}}}},
            "arms.few: the same settings as arms.all; remove one",
        ),
        ({"arms": {"all": {}, "few": {"extends": "x.yaml"}}}, "arms.few.extends: all arms extend the base; remove it"),
        ({"settings": {"extends": "x.yaml"}}, "settings.extends: all arms extend the base; remove it"),
        ({"arms": {"all": {}, "All": {}}}, "arms.All: differs from arms.all in upper and lower case only"),
        ({"arms": {"all": {}, "Settings.yaml": {}}}, "arms.Settings.yaml: rlvr ablate has a file of this name"),
        ({"arms": {"all": {}, "arms.json": {}}}, "arms.arms.json: rlvr ablate has a file of this name"),
        ({"arms": {"all": {}, "slurm_0.log": {}}}, "arms.slurm_0.log: rlvr ablate has a file of this name"),
        ({"settings": {"run": 3}}, "run=3: not a section"),
        ({"arms": {"all": {}, "few": {"selection.fraction": 0.1}}}, r"few: unknown key .*: selection: .fraction: 0.1"),
        ({"settings": {"run": {"seed": 1}}}, "settings.run.seed: is set for each run"),
        ({"settings": {"evaluate": {"sets": []}}}, "evaluate.sets is empty"),
        ({"evaluation": "other"}, "evaluation=.*other.*: no set; choose from held_out"),
        ({"target": 2.0}, "target=2.0: .*; correct it"),
        ({"armz": {}}, "unknown key armz; the keys are base"),
    ],
)
def test_a_wrong_specification_is_one_line(tmp_path, changes, message):
    with pytest.raises(SpecError, match=message) as found:
        prepare(write_spec(tmp_path, **changes))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("base", "directory", "replaced"),
    [
        ("settings.yaml", ".", "settings.yaml"),
        ("above.yaml", ".", "settings.yaml"),
        ("base.yaml", "few/..", "spec.yaml"),
        ("few/arm.yaml", ".", "few/arm.yaml"),
    ],
)
def test_a_specification_that_would_replace_what_it_reads_is_refused(base, directory, replaced, tmp_path):
    spec = write_spec(tmp_path, base=base, dir=str(tmp_path / directory))
    content = (tmp_path / "base.yaml").read_text()
    (tmp_path / "few").mkdir()
    for name in ("settings.yaml", "few/arm.yaml"):
        (tmp_path / name).write_text(content)
    (tmp_path / "above.yaml").write_text("extends: settings.yaml\n")
    if replaced == "spec.yaml":
        spec = spec.rename(tmp_path / "settings.yaml")
        replaced = spec.name
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SpecError, match=f"{tmp_path / replaced} would be replaced, which is read; choose another dir"):
        main([str(spec), "--list"], "rlvr ablate")
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_nothing_is_written_if_a_run_has_other_settings_or_has_done_more_steps(tmp_path):
    spec = write_spec(tmp_path)
    assert main([str(spec), "--list"], "rlvr ablate") == 0
    first = prepare(spec).cells[0]
    write_run(first.settings)
    (tmp_path / "out" / "few" / "seed_0" / "checkpoints" / "step_000002").mkdir(parents=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    for values, message in (
        ({"optimizer": {"learning_rate": 0.5}}, "all, seed 0: its run has optimizer.learning_rate=0.01"),
        ({"run": {"steps": 1}}, "all, seed 0: its run has done 2 steps, and .* run.steps=1; give 2 or more"),
    ):
        with pytest.raises(SpecError, match=message):
            main([str(write_spec(tmp_path, settings=values)), "--list"], "rlvr ablate")
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert main([str(write_spec(tmp_path, settings={"run": {"steps": 3}})), "--list"], "rlvr ablate") == 0


def test_results_in_another_process_know_which_runs_failed_and_which_are_damaged(tmp_path, fake_runs, capsys):
    spec = write_spec(tmp_path, seeds=[0, 1])
    cells = prepare(spec).cells
    fake_runs["fails"] = "few"
    assert main([str(spec), "--index", "1"], "rlvr ablate") == 1
    for cell in (cells[0], cells[2], cells[3]):
        write_run(cell.settings)
    (cells[2].folder / "summary.json").write_text("[")
    metrics = cells[3].folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines()[0] + "\n{")
    assert main([str(spec), "--results"], "rlvr ablate") == 1
    states = [row["state"] for row in rows_of(tmp_path / "out" / "runs.csv")]
    assert states[:2] == ["finished", "failed, status 1: out of luck; try again"]
    assert "summary.json" in states[2]
    assert states[3] == f"{metrics} has no step 1; remove {cells[3].folder}, to run it again"
    assert "few, seed 0: failed, status 1: out of luck; try again; see" in capsys.readouterr().out
    fake_runs["fails"] = ""
    assert main([str(spec), "--index", "1"], "rlvr ablate") == 0
    assert main([str(spec), "--results"], "rlvr ablate") == 0
    assert rows_of(tmp_path / "out" / "runs.csv")[1]["state"] == "finished"


@pytest.mark.parametrize("name", ["a b", "50%", "it's", "a#b"])
def test_a_folder_that_slurm_would_misread_is_refused(name, tmp_path, capsys):
    spec = write_spec(tmp_path, dir=str(tmp_path / name))
    with pytest.raises(SpecError, match="the options of a Slurm script cannot hold blanks"):
        main([str(spec), "--slurm"], "rlvr ablate")
    assert capsys.readouterr().out == ""


def test_equal_differences_are_no_certainty(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(f"{__name__}.accuracies", lambda fraction, seed: np.full(SETS, 4 if fraction == 0.1 else 0))
    spec = write_spec(tmp_path)
    for cell in prepare(spec).cells:
        write_run(cell.settings)
    assert main([str(spec), "--results"], "rlvr ablate") == 0
    text = capsys.readouterr().out
    assert "no difference to all shown: few +100.0 (no interval)" in text
    assert "better" not in text


def test_what_an_arm_leaves_out_of_the_base_is_printed(tmp_path, capsys):
    arms = {"all": {"selection": {"keep": "all"}}, "few": {}}
    spec = write_spec(tmp_path, settings={"selection": {"scope": "rollout_batch"}}, arms=arms)
    assert main([str(spec), "--results"], "rlvr ablate") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "not used" in line] == [
        "all: selection.scope=rollout_batch is not used with selection.keep=all"
    ]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_has_settings_that_differ_between_its_arms(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ablation = prepare(example)
    write_files(ablation)
    first = [cell.settings for cell in ablation.cells if cell.seed == ablation.spec.seeds[0]]
    texts = [to_yaml(settings).split("data:", 1)[1] for settings in first]
    assert len(set(texts)) == len(ablation.spec.arms)
    for cell in ablation.cells:
        loaded = load_settings(cell.file)
        assert (loaded, loaded.unused) == (cell.settings, cell.settings.unused)
