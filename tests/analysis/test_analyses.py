"""The analyses as a user runs them, on a run folder and on models of a few parameters."""

import csv
import html
import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from recorded_runs import WORDS, response, write_run
from safetensors.torch import save_file
from tiny import model_config

from megatron_rlvr.analysis.command.analyses import Scored, change
from megatron_rlvr.analysis.command.main import main
from megatron_rlvr.analysis.command.models import find_models
from megatron_rlvr.analysis.command.sources import Response, Source, SourceError
from megatron_rlvr.analysis.command.temperatures import Grid, temperatures
from megatron_rlvr.analysis.command.weights import UnlikeModelsError, parameters
from megatron_rlvr.analysis.parameters import by, changes
from megatron_rlvr.analysis.results import Result, write_result
from megatron_rlvr.errors import InputError


def test_tokens_of_a_run_are_written_as_json_csv_png_and_svg_with_the_same_numbers(tmp_path: Path, capsys):
    run = write_run(tmp_path / "run", 3, recorded={1: [response(1, 0, i, tokens=200) for i in range(4)]})
    assert main(["tokens", str(run), "--least", "30"], "rlvr analyze") == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert {path.name for path in written} == {path.name for path in (run / "analysis").iterdir()}
    assert {path.suffix for path in written} == {".json", ".csv", ".png", ".svg"}
    entropy = np.concatenate([response(1, 0, i, tokens=200).entropy for i in range(4)])
    found = json.loads((run / "analysis" / "entropy.json").read_text(encoding="utf-8"))
    assert found["metrics"]["tokens"] == 800
    assert found["metrics"]["percentile 80"] == pytest.approx(np.percentile(entropy.astype(float), 80))
    assert found["metrics"]["80th percentile in the paper"] == 0.672
    with (run / "analysis" / "forking_tokens.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["token", "id", "occurrences", "mean entropy"]
    assert [float(row[3]) for row in rows[1:]] == sorted((float(row[3]) for row in rows[1:]), reverse=True)
    assert {row[0] for row in rows[1:]} <= set(WORDS)


def test_a_cloud_has_the_tokens_in_their_order_and_larger_the_more_often_they_occur(tmp_path: Path):
    rows = [(" wait", 7, 100, 2.0), ("$a_b$", 8, 25, 1.0), ("\n", 9, 1, 0.5)]
    result = Result("forks", "Forks", {}, ("token", "id", "occurrences", "mean entropy"), rows, cloud=True)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        *_, svg = write_result(tmp_path, result)
    words = re.findall(r"<text style=.font-size: ([0-9.]+)px[^>]*>([^<]*)<", svg.read_text(encoding="utf-8"))
    sizes = {html.unescape(text): float(size) for size, text in words}
    assert list(sizes) == ["wait", "$a_b$", "<U+000A>", "Forks"]
    assert sizes["wait"] > sizes["$a_b$"] > sizes["<U+000A>"]


def test_changes_of_several_models_are_one_table():
    recorded = response(1, 0, 0, tokens=400)
    base = recorded.entropy
    source = Source([Response(recorded.prompt_ids, recorded.token_ids)], 1.0, str)
    by_bin, top, by_step = change(
        source, Scored(["base", "step 5", "step 10"], [None, 5, 10], [base, base / 2, base]), 20
    )
    assert len(by_bin.rows) == 40
    assert all(row[6] == pytest.approx(-float(row[4] or 0) / 2, rel=1e-5) for row in by_bin.rows[:20])
    assert all(row[6] == 0 for row in by_bin.rows[20:])
    assert [row[1] for row in top.rows] == [1.0, 1.0]
    assert top.plot is not None
    assert (top.plot.x, top.plot.curves[0].x, top.plot.curves[0].y) == ("training step", [0, 5, 10], [1, 1, 1])
    assert [row[0] for row in by_step.rows] == ["base", "step 5", "step 10"]
    assert [row[-1] for row in by_step.rows] == pytest.approx([np.percentile(e, 99) for e in (base, base / 2, base)])


def test_a_parameter_has_changed_if_its_bfloat16_differs():
    base = torch.tensor([1.0, 2.0, 0.0, float("nan"), 3.0, 4.0])
    other = torch.tensor([1.001, 2.5, -0.0, float("nan"), 3.0, float("nan")])
    pairs = [
        ("model.layers.0.mlp.up_proj.weight", base, other),
        ("model.layers.12.mlp.experts.7.up_proj.weight", base, base),
        ("model.layers.12.mlp.experts.8.up_proj.weight", base, other),
        ("lm_head.weight", base, other),
    ]
    found = list(changes(pairs))
    assert [change.changed for change in found] == [2, 0, 2, 2]
    assert by(found, "layer") == {0: (6, 2), 12: (12, 2), None: (6, 2)}
    assert by(found, "kind") == {
        "mlp.up_proj.weight": (6, 2),
        "mlp.experts.up_proj.weight": (12, 2),
        "lm_head.weight": (6, 2),
    }


@pytest.fixture
def models(model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The tiny model, and a copy of which one parameter in each tensor has doubled."""
    from safetensors.torch import load_file

    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(model / "model.safetensors")
    for tensor in tensors.values():
        tensor.view(-1)[0] = 2 * tensor.view(-1)[0] + 1
    save_file(tensors, other / "model.safetensors")
    (other / "config.json").write_text((model / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    return model, other


def test_changed_parameters_of_two_folders_are_counted_by_layer_and_kind(models: tuple[Path, Path], tmp_path: Path):
    base, other = find_models(models, None)
    result = parameters(base, other, tmp_path)
    layers = model_config()["num_hidden_layers"]
    tensors = sum(row[0] == "name" for row in result.rows)
    assert result.metrics["changed"] == tensors
    shares = {row[1]: row[3] for row in result.rows if row[0] == "layer"}
    assert list(shares) == ["none", *(str(layer) for layer in range(layers))]
    assert parameters(base, base, tmp_path).metrics["changed"] == 0


def _changed(base: Path, other: Path, place: Path) -> None:
    first, second = find_models([base, other], None)
    parameters(first, second, place)


def test_models_that_do_not_fit_and_runs_without_records_are_one_line(models: tuple[Path, Path], tmp_path: Path):
    base, other = models
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}), encoding="utf-8")
    with pytest.raises((UnlikeModelsError, InputError), match=r"layers\.1"):
        _changed(base, other, tmp_path)
    run = write_run(tmp_path / "run", 3, recorded={})
    with pytest.raises(SourceError, match=r"has no recorded responses .* set log.rollouts above 0"):
        main(["tokens", str(run)], "rlvr analyze")


def test_a_grid_of_temperatures_is_read_from_its_evaluations(tmp_path: Path):
    grid = Grid(0.672, [0.6, 1.4], [0.5, 1.0])
    for high in grid.high:
        for low in grid.low:
            folder = grid.folder(tmp_path, high, low)
            folder.mkdir()
            accuracy = {"value": high / (2 + low), "standard_error": 0.01 * high, "problems": 5}
            found = {"problems": 5, "completions": 20, "accuracy": accuracy, "response_tokens": {"mean": 12.5}}
            (folder / "summary.json").write_text(json.dumps({"sets": {"held": found}}), encoding="utf-8")
    (result,) = temperatures("model", tmp_path, grid)
    assert result.name == "temperatures_held"
    assert [row[:2] for row in result.rows] == [(0.6, 0.5), (1.4, 0.5), (0.6, 1.0), (1.4, 1.0)]
    for row in result.rows:
        high, low = float(row[0] or 0), float(row[1] or 0)
        assert (row[2], row[3], row[6]) == (5, 20, 12.5)
        assert (row[4], row[5]) == (high / (2 + low), 0.01 * high)
    assert result.plot is not None
    assert result.plot.curves[1].y == [0.6 / 3, 1.4 / 3]
    assert result.plot.curves[1].errors == [0.01 * 0.6, 0.01 * 1.4]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("temperatures --model m --high 1 --low 1", "the words of rlvr evaluate are missing"),
        ("temperatures --model m --high 1 --low -1 -- --sets f", "not finite or below 0"),
        ("tokens run --step 3", "no effect without --model"),
        ("tokens run --temperature 2", "no effect without --model"),
        ("tokens run --temperature 0 --model m", "is no temperature"),
        ("gradient run --model m --step 3 4", "gradient looks into one model"),
        ("parameters --base a --model b -- --sets f", "samples no responses"),
    ],
)
def test_options_that_do_not_fit_are_one_line(capsys, words: str, problem: str):
    with pytest.raises(SystemExit) as ended:
        main(words.split(), "rlvr analyze")
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
