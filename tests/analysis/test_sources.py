"""Responses that analyses read: of an evaluation, of a file, and what cannot be read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from recorded_runs import response, write_run

from megatron_rlvr.analysis.command.sources import SourceError, check_tokens, read_source
from megatron_rlvr.data.tokenizer import load_tokenizer
from megatron_rlvr.recording.token_texts import TokenTexts


def write_evaluation(folder: Path, model: Path, train: Path, texts: list[list[str]], **sampling: object) -> Path:
    """An evaluation of the first problems of ``train`` with these responses, of which those with even index are right.

    The last response of each problem is truncated.
    """
    description = {
        "target": {"path": str(model)},
        "prompts": {"template": "plain", "system": None, "suffix": " Think.", "tokenizer": None, "template_kwargs": {}},
        "sampling": {"group_size": len(texts[0]), "temperature": 0.5, **sampling},
        "reward": {"function": "math", "correct": 1.0, "incorrect": 0.0, "answer_after": None},
        "sets": {"held": {"path": str(train), "prompt_key": None, "answer_key": None, "id_key": None, "problems": 2}},
    }
    (folder / "records").mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(description), encoding="utf-8")
    tokenizer, golds = load_tokenizer(model), [json.loads(line)["answer"] for line in train.open(encoding="utf-8")]
    with (folder / "records" / "00000.jsonl").open("w", encoding="utf-8") as file:
        for number, group in enumerate(texts):
            for index, text in enumerate(group):
                truncated = index == len(group) - 1
                record = {
                    "problem": f"held/{number + 1}",
                    "index": index,
                    "seed": 1,
                    "tokens": len(tokenizer.encode(text)) + (not truncated),
                    "finish_reason": "length" if truncated else "stop",
                    "gold": golds[number].rsplit("####", 1)[-1].strip(),
                    "answer": None,
                    "correct": index % 2 == 0,
                    "reward": float(index % 2 == 0),
                    "failure": None,
                    "seconds": 1.0,
                    "response": text,
                }
                file.write(json.dumps(record) + "\n")
    return folder


@pytest.fixture
def train(problems: Path, tmp_path: Path) -> Path:
    """A file of problems that a test may change."""
    return Path(shutil.copy(problems, tmp_path / "problems.jsonl"))


TEXTS = [["a b", "so 4", "the answer is 7", "x"], ["because", "9", "no", ""]]


def test_responses_of_an_evaluation_have_its_prompts_temperature_and_advantages(
    tmp_path: Path, model: Path, train: Path
):
    source = read_source(write_evaluation(tmp_path / "out", model, train, TEXTS), model, None)
    tokenizer = load_tokenizer(model)
    texts = [text for group in TEXTS for text in group if text]  # a response without tokens has nothing to analyse
    assert [tokenizer.decode(r.token_ids) for r in source.responses] == texts
    rows = [json.loads(line) for line in train.open(encoding="utf-8")]
    assert tokenizer.decode(source.responses[0].prompt_ids).rstrip().endswith(rows[0]["question"] + " Think.")
    assert source.temperature == 0.5
    assert [r.advantage for r in source.responses[:4]] == pytest.approx([1, -1, 1, -1], abs=1e-4)
    assert list(source.notes.values()) == [0]
    assert source.text_of(int(source.responses[0].token_ids[0])) in "a b"


def test_responses_of_a_file_are_tokenized_and_so_many_are_spread_over_all(tmp_path: Path, model: Path):
    path = tmp_path / "responses.jsonl"
    rows = [{"prompt": f"Problem {i}:", "response": f"answer {i}", "advantage": i - 5} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = load_tokenizer(model)
    source = read_source(path, model, None)
    for row, found in zip(rows, source.responses, strict=True):
        assert found.prompt_ids.tolist() == tokenizer.encode(str(row["prompt"]))
        assert found.token_ids.tolist() == tokenizer.encode(str(row["response"]))
        assert found.advantage == row["advantage"]
    assert [r.advantage for r in read_source(path, model, 4).responses] == [-5, -3, 0, 2]
    assert source.tokens == sum(len(r.token_ids) for r in source.responses)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[]", "no JSON object"),
        ('{"prompt": "a"}', "no text as prompt or response"),
        ('{"prompt": "", "response": "a"}', "an empty prompt"),
        ('{"prompt": "a", "response": "b", "advantage": "1"}', "an advantage that is no number"),
        ('{"prompt": "a", "response": "b", "advantage": 1e999}', "an advantage that is no number"),
        ('{"prompt": "a", "response": "\\ud83d"}', "half of a character"),
        ('{"problem": "set/1", "response": "b"}', "give the folder of the evaluation"),
    ],
)
def test_a_file_of_other_lines_is_refused_with_the_line(tmp_path: Path, model: Path, line: str, problem: str):
    path = tmp_path / "responses.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(SourceError, match=f"line 2: .*{problem}"):
        read_source(path, model, None)


def test_folders_without_responses_and_models_that_are_missing_are_one_line(tmp_path: Path, model: Path, train: Path):
    with pytest.raises(SourceError, match=r"set log.rollouts above 0"):
        read_source(write_run(tmp_path / "run", 2, recorded={}), model, None)
    evaluation = write_evaluation(tmp_path / "out", model, train, TEXTS)
    with pytest.raises(SourceError, match="give --model"):
        read_source(evaluation, None, None)
    train.write_text("\n".join(train.read_text(encoding="utf-8").splitlines()[1:]) + "\n", encoding="utf-8")
    with pytest.raises(SourceError, match=r"held/1 is not in the file of its set any more"):
        read_source(evaluation, model, None)


def test_recorded_responses_keep_steps_entropies_and_advantages(tmp_path: Path):
    given = {step: [response(step, 0, i) for i in range(2)] for step in (1, 4)}
    source = read_source(write_run(tmp_path / "run", 5, recorded=given), None, None)
    assert [r.step for r in source.responses] == [1, 1, 4, 4]
    for found, wanted in zip(source.responses, given[1] + given[4], strict=True):
        np.testing.assert_array_equal(found.entropy, wanted.entropy)
        assert found.advantage == wanted.advantage


def test_token_ids_of_another_tokenizer_are_refused_with_the_first_that_differs(
    tmp_path: Path, model: Path, train: Path
):
    evaluation = read_source(write_evaluation(tmp_path / "out", model, train, TEXTS), model, None)
    check_tokens(evaluation, [model, model])
    tokenizer = load_tokenizer(model)
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode("so the answer \U0001f469\u200d\U0001f52c is 4")
    own = replace(response(1, 0, 0, tokens=len(ids)), token_ids=np.array(ids, np.int32), texts=texts(ids))
    run = read_source(write_run(tmp_path / "own", 2, recorded={1: [own]}), model, None)
    check_tokens(run, [model])
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((model / "config.json").read_text(), encoding="utf-8")
    check_tokens(run, [bare])
    # The run's words have the numbers 0 to 11.
    other = read_source(write_run(tmp_path / "other", 2, recorded={1: [response(1, 0, 0)]}), model, None)
    with pytest.raises(SourceError, match=r"token 0 of the responses is 'The', and .* in its tokenizer; give a model"):
        check_tokens(other, [model])
    high = replace(response(1, 0, 0, tokens=1), token_ids=np.array([999_999], np.int32))
    beyond = read_source(write_run(tmp_path / "beyond", 2, recorded={1: [high]}), None, None)
    with pytest.raises(SourceError, match=r"token id 999999, and its vocabulary is of \d+ tokens; give a model"):
        check_tokens(beyond, [bare])
