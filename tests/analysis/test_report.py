"""What a report says of a run, against the run's own files."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded_runs import WORDS, response, write_run

from megatron_rlvr.analysis.report import write_report
from megatron_rlvr.analysis.report_command import main
from megatron_rlvr.analysis.runs import RunError, read_runs
from megatron_rlvr.analysis.shown_rollouts import show_rollouts
from megatron_rlvr.analysis.token_means import TokenMeans
from megatron_rlvr.recording.files import LIKELIEST, RecordingError, read_recorded, write_recorded


def page_data(report: Path) -> dict[str, Any]:
    """Data of a page."""
    block = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', report.read_text(encoding="utf-8"), re.S)
    assert block is not None
    return json.loads(block[1])


def test_mean_entropies_by_token_are_those_of_a_loop():
    responses = [response(1, 0, index, tokens=300) for index in range(5)]
    means = TokenMeans()
    for each in responses:
        means.add(each.token_ids, each.entropy, each.selected)
    most, fewest = means.extremes(4, 90, WORDS.__getitem__)
    by_text: dict[str, list[tuple[float, bool]]] = {}
    for each in responses:
        for text, entropy, selected in zip(each.texts, each.entropy, each.selected, strict=True):
            by_text.setdefault(text, []).append((float(entropy), bool(selected)))
    expected = sorted(
        ((np.mean([e for e, _ in pairs]), text) for text, pairs in by_text.items() if len(pairs) >= 90), reverse=True
    )
    assert [mean.text for mean in most] == [text for _, text in expected[:4]]
    assert [mean.text for mean in fewest] == [text for _, text in expected[::-1][:4]]
    for mean in most:
        pairs = by_text[mean.text]
        assert mean.count == len(pairs)
        assert mean.entropy == pytest.approx(np.mean([e for e, _ in pairs]))
        assert mean.selected == pytest.approx(np.mean([s for _, s in pairs]))


def test_shown_steps_are_spread_over_the_run_and_fit_the_page(tmp_path: Path):
    recorded = {step: [response(step, 0, index, tokens=100) for index in range(2)] for step in range(1, 101)}
    run = write_run(tmp_path / "run", 100, recorded=recorded)
    step_bytes = 2 * (400 + len(recorded[1][0].prompt) + 100 * 24 + 20 * 62)
    shown = show_rollouts(read_runs([run]), most_bytes=5 * step_bytes + 99)
    assert (shown.recorded_steps, shown.shown_steps) == ([100], [5])
    assert sorted({r["step"] for r in shown.responses}) == [1, 26, 51, 75, 100]
    first = shown.responses[0]
    original = recorded[1][0]
    assert [shown.texts[i] for i in first["t"]] == original.texts
    np.testing.assert_allclose(np.array(first["e"]) / 1000, original.entropy, atol=6e-4)
    np.testing.assert_allclose((np.array(first["o"]) + first["n"]) / 1000, original.new_logp, atol=6e-4)
    np.testing.assert_allclose((np.array(first["o"]) + first["r"]) / 1000, original.rollout_logp, atol=6e-4)
    assert first["s"] == np.flatnonzero(original.selected).tolist()
    np.testing.assert_allclose(np.array(first["a"])[:, 1::2] / 1000, np.exp(original.alternative_logp), atol=6e-4)
    too_long = write_run(tmp_path / "long", 2, recorded={1: [response(1, 0, 0, tokens=5000)] * 3})
    assert len(show_rollouts(read_runs([too_long]), most_bytes=1000).responses) == 1


@pytest.mark.parametrize(("all_selected", "most"), [(False, 40), (True, 60)], ids=["a fifth selected", "all selected"])
def test_a_recorded_token_takes_at_most_60_bytes_and_is_read_as_it_was(tmp_path: Path, all_selected: bool, most: int):
    # Random tokens of a large vocabulary compress worse than any text does.
    tokens, texts = 2000, tuple(f" word{i}" for i in range(150_000))
    random = np.random.default_rng(0)

    def alternatives() -> dict[str, Any]:
        if not all_selected:
            return {}
        ids = random.integers(len(texts), size=(tokens, LIKELIEST)).astype(np.int32)
        logp = -np.sort(random.gamma(1.0, 1.0, ids.shape).astype(np.float32), axis=1)
        return {
            "selected": np.ones(tokens, bool),
            "alternative_ids": ids,
            "alternative_texts": [texts[i] for i in ids.ravel()],
            "alternative_logp": logp,
        }

    responses = [response(1, 0, i, tokens=tokens, texts=texts, **alternatives()) for i in range(8)]
    path = write_recorded(tmp_path, 1, responses)
    assert path.stat().st_size <= most * 8 * tokens
    for wrote, read in zip(responses, read_recorded(tmp_path), strict=True):
        for field in fields(wrote):
            value, expected = getattr(read, field.name), getattr(wrote, field.name)
            if isinstance(expected, np.ndarray):
                assert value.dtype == expected.dtype
                rounded = 2**-15 if field.name == "alternative_logp" else 0.0
                np.testing.assert_allclose(value, expected, atol=rounded, rtol=0)
            else:
                assert value == expected


def test_a_recorded_token_takes_at_most_60_bytes_in_short_responses_too(tmp_path: Path):
    texts = tuple(f" word{i}" for i in range(50_000))
    responses = [response(1, i // 8, i % 8, tokens=20, texts=texts) for i in range(16)]
    assert write_recorded(tmp_path, 1, responses).stat().st_size <= 60 * 16 * 20


def test_pandas_reads_recorded_responses_and_the_texts_of_alternatives(tmp_path: Path):
    pandas = pytest.importorskip("pandas", reason="no pandas")
    responses = [response(1, group, index) for group in range(2) for index in range(4)]
    frame = pandas.read_parquet(write_recorded(tmp_path, 1, responses))
    new = frame[["new_alternative_ids", "new_alternative_texts"]].explode([*frame.columns[-2:]]).dropna()
    text_of = dict(zip(new.iloc[:, 0], new.iloc[:, 1], strict=True))
    assert len(new) == len(text_of)
    for wrote, (_, row) in zip(responses, frame.iterrows(), strict=True):
        np.testing.assert_array_equal(row.token_ids, wrote.token_ids)
        assert row.texts.tolist() == wrote.texts
        np.testing.assert_array_equal(row.entropy, wrote.entropy)
        assert [text_of[i] for i in row.alternative_ids] == wrote.alternative_texts


def test_a_run_without_records_or_with_other_settings_is_reported_all_the_same(tmp_path: Path):
    run = write_run(tmp_path / "run", 3, recorded={})
    (run / "config.yaml").write_text("run: {unknown: 3}\n", encoding="utf-8")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    write_report([run], tmp_path / "report.html")
    assert "of another version" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert read_runs([run])[0].steps == [0, 1, 2, 3]


def test_wrong_folders_and_files_are_one_line_with_the_remedy(tmp_path: Path):
    with pytest.raises(RunError, match=r"metrics.jsonl does not exist; give the folder of a run \(run.dir\)"):
        main([str(tmp_path)], "rlvr report")
    run = write_run(tmp_path / "run", 2)
    with pytest.raises(RunError, match=r"a run folder is given twice; give each once"):
        main([str(run), str(run)], "rlvr report")


def test_a_recorded_file_that_cannot_be_read_is_named_and_left_out_of_the_report(tmp_path: Path, caplog):
    recorded = {step: [response(step, 0, index) for index in range(2)] for step in (1, 2, 3, 4)}
    run = write_run(tmp_path / "run", 4, recorded=recorded)
    (run / "rollouts" / "step_000001.parquet").write_bytes(b"PAR1 no")
    content = bytearray((run / "rollouts" / "step_000002.parquet").read_bytes())
    content[len(content) // 4] ^= 1  # of a page, which has a checksum
    (run / "rollouts" / "step_000002.parquet").write_bytes(content)
    whole = (run / "rollouts" / "step_000003.parquet").read_bytes()
    (run / "rollouts" / "step_000003.parquet").write_bytes(whole[:-100])
    (run / "rollouts" / "step_of_mine.parquet").write_bytes(b"not ours")
    write_report([run], run / "report.html")
    named = [record.getMessage() for record in caplog.records if "leaves out a file" in record.getMessage()]
    assert len(named) == 3
    for step, message in enumerate(sorted(named), 1):
        assert f"step_00000{step}.parquet cannot be read as recorded" in message
        assert message.endswith("; remove the file")
    data = page_data(run / "report.html")
    assert {r["step"] for r in data["responses"]} == {4}
    for step in (1, 2, 3):
        with pytest.raises(RecordingError, match=f"step_00000{step}.parquet cannot be read as recorded .*; remove"):
            list(read_recorded(run, [step]))


@pytest.mark.parametrize("length", [29_696, 300], ids=["long", "short"])
def test_a_page_of_1000_steps_takes_at_most_10_mb_even_if_all_tokens_are_selected(tmp_path: Path, length: int):
    texts = tuple(f" word{i}" for i in range(20_000))
    ids = np.random.default_rng(0).integers(len(texts), size=(length, LIKELIEST)).astype(np.int32)
    every = {
        "selected": np.ones(length, bool),
        "alternative_ids": ids,
        "alternative_texts": [texts[i] for i in ids.ravel()],
        "alternative_logp": np.full(ids.shape, -1.6, np.float32),
    }
    recorded = {
        step: [response(step, 0, i, tokens=length, texts=texts, **every) for i in range(2 if length > 1000 else 16)]
        for step in ((1, 500, 1000) if length > 1000 else range(10, 1001, 25))
    }
    run = write_run(tmp_path / "run", 1000, recorded=recorded)
    write_report([run], run / "report.html")
    assert 3e6 < (run / "report.html").stat().st_size <= 10e6
    assert page_data(run / "report.html")["runs"][0]["shownSteps"] < len(recorded)


def test_the_command_writes_the_page_into_the_first_run_and_prints_its_path(tmp_path: Path, capsys):
    run = write_run(tmp_path / "run", 2)
    assert main([str(run)], "rlvr report") == 0
    assert capsys.readouterr().out == f"{run}/report.html\n"
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "http://" not in text.replace("http://www.w3.org", "")
    content = text.split('id="data">')[1].split("</script>")[0]
    data = json.loads(content)
    assert data["runs"][0]["words"][1][0] == "rollout"
    assert len(list(read_recorded(run))) == len(data["responses"])
