"""Values that a whole run records of its responses, against transformers in float64, before and after the step."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch

from megatron_rlvr.data.tokenizer import load_tokenizer
from megatron_rlvr.recording.files import RecordedResponse, read_recorded

LIMIT = 6  # responses a step: a group of 4, and 2 of another


@dataclass(frozen=True)
class Recorded:
    """A run of one step."""

    folder: Path
    model: Path
    responses: list[RecordedResponse]


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two data-parallel ranks"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    place = tmp_path_factory.mktemp("recorded")
    (place / "rewards.py").write_text(tiny.REWARDS, encoding="utf-8")
    model, train = tiny.write_model(place / "model"), tiny.write_gsm8k(place / "gsm8k.jsonl")
    settings = tiny.settings_for(
        model,
        train,
        place / "run",
        run={"steps": 1},
        reward={"function": "rewards:even"},
        log={"rollouts": LIMIT},
        optimizer={"learning_rate": 1e-3},
    )
    config = tiny.write_settings(place / "config.yaml", settings)
    ended = tiny.run_train(config, cwd=place, ranks=request.param if request.param > 1 else 0, search=[place])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return Recorded(place / "run", model, list(read_recorded(place / "run")))


def log_softmax_of(model: Path, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """[T, V] float64 log-probabilities at the positions that predict the response."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model).double()
    ids = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))
    with torch.no_grad():
        logits = network(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, dim=-1).numpy()


def test_every_value_is_that_of_transformers_in_float64(run: Recorded):
    tokenizer = load_tokenizer(run.model)
    for response in run.responses:
        prompt, ids = response.prompt_ids, response.token_ids
        assert tokenizer.encode(response.prompt) == prompt.tolist()
        before, after = (log_softmax_of(m, prompt, ids) for m in (run.model, run.folder / "hf"))
        places = np.arange(len(ids))
        np.testing.assert_allclose(response.old_logp, before[places, ids], atol=1e-4)
        np.testing.assert_allclose(response.rollout_logp, before[places, ids], atol=1e-4)
        np.testing.assert_allclose(response.new_logp, after[places, ids], atol=1e-4)
        assert np.abs(response.new_logp - response.old_logp).max() > 1e-3  # the step has changed something
        np.testing.assert_allclose(response.entropy, -(np.exp(before) * before).sum(1), atol=1e-4)
        top = np.argsort(-before[response.selected], axis=1)[:, :5]
        assert np.array_equal(response.alternative_ids, top)
        np.testing.assert_allclose(
            response.alternative_logp, np.take_along_axis(before[response.selected], top, 1), atol=1e-4
        )
        assert response.alternative_texts == [tokenizer.token_text(int(i)) for i in top.ravel()]


def test_whole_groups_are_recorded_first_with_their_advantages_and_the_mask(run: Recorded):
    assert len(run.responses) <= LIMIT
    by_group: dict[int, list[RecordedResponse]] = {}
    for response in run.responses:
        by_group.setdefault(response.group, []).append(response)
    whole = [group for group in by_group.values() if len(group) == 4]
    assert whole
    for group in whole:
        rewards = np.array([response.reward for response in group])
        expected = (rewards - rewards.mean()) / rewards.std()
        np.testing.assert_allclose([response.advantage for response in group], expected, atol=1e-3)
        assert {response.correct for response in group} == {True, False}
    for response in run.responses:
        kept, dropped = response.entropy[response.selected], response.entropy[~response.selected]
        assert not len(kept) or not len(dropped) or kept.min() >= dropped.max()  # of one mini-batch
    total = sum(len(response.selected) for response in run.responses)
    assert 0 < sum(response.selected.sum() for response in run.responses) < 0.6 * total


def test_any_reader_of_parquet_reads_the_same(run: Recorded):
    table = pq.read_table(run.folder / "rollouts" / "step_000001.parquet")
    assert table.column("entropy").to_pylist() == [response.entropy.tolist() for response in run.responses]
    texts = ["".join(response.texts) for response in run.responses]
    assert ["".join(row) for row in table.column("texts").to_pylist()] == texts
    tokenizer = load_tokenizer(run.model)
    for text, response in zip(texts, run.responses, strict=True):
        assert tokenizer.decode(response.token_ids) in text  # special tokens are left out there
