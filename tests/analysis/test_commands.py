"""`rlvr analyze` as a user runs it, every figure against a few lines of NumPy and transformers in float64."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import zygote
from safetensors.torch import load_file, save_file

from megatron_rlvr.data.tokenizer import load_tokenizer

TEMPERATURE = 0.8
ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"Problem {i}: what is {i} + {3 * i}?",
        "response": f"so the answer {'is ' * (i % 4)}{4 * i}",
        "advantage": a,
    }
    for i, a in enumerate((1.0, -1.0, 0.5, 0.0, -0.25, 2.0))
]


@dataclass
class Given:
    """A file of responses, a base model, and one that differs from it."""

    folder: Path
    file: Path
    base: Path
    other: Path

    def analyze(self, *words: str | Path) -> None:
        """Run the command; its results are in `out`."""
        command = [sys.executable, "-m", "megatron_rlvr.cli", "analyze", *map(str, words), "--out", "out"]
        ended = zygote.run(command, cwd=self.folder, env=tiny.environment())
        assert ended.returncode == 0, ended.stderr
        assert all(Path(self.folder / line).is_file() for line in ended.stdout.splitlines())

    def result(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / "out" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Given:
    folder = tmp_path_factory.mktemp("analyze")
    file, other = folder / "responses.jsonl", folder / "other"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    other.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    save_file(tensors, other / "model.safetensors")
    for path in model.iterdir():
        if path.name != "model.safetensors":
            (other / path.name).write_bytes(path.read_bytes())
    return Given(folder, file, model, other)


def network(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).double()


def scores(model: Any, tokenizer: Any) -> tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of all response tokens: ids, log-probabilities, entropies, and advantages."""
    ids: list[int] = []
    logps, entropies, advantages = [], [], []
    for row in ROWS:
        prompt, response = (tokenizer.encode(row[key]) for key in ("prompt", "response"))
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        log_p = torch.log_softmax(logits / TEMPERATURE, dim=-1)
        logps.append(log_p[torch.arange(len(response)), torch.tensor(response)])
        entropies.append(-(log_p.exp() * log_p).sum(1))
        advantages.append(torch.full((len(response),), row["advantage"], dtype=torch.float64))
        ids += response
    return ids, torch.cat(logps), torch.cat(entropies), torch.cat(advantages)


SCORING = ("--temperature", str(TEMPERATURE), "--dtype", "float32")


def test_entropies_and_tokens_of_a_model(given: Given):
    given.analyze("tokens", given.file, "--model", given.base, "--least", "2", *SCORING)
    tokenizer = load_tokenizer(given.base)
    with torch.no_grad():
        ids, _, entropy, _ = scores(network(given.base), tokenizer)
    metrics = given.result("entropy")["metrics"]
    assert metrics["tokens"] == len(ids)
    assert metrics["mean"] == pytest.approx(float(entropy.mean()), abs=1e-5)
    assert metrics["share below 0.01 nats"] == float((entropy < 0.01).double().mean())
    for percent in (1, 50, 80, 99):
        assert metrics[f"percentile {percent}"] == pytest.approx(np.percentile(entropy.numpy(), percent), abs=1e-4)
    by_id: dict[int, list[float]] = {}
    for token, value in zip(ids, entropy.tolist(), strict=True):
        by_id.setdefault(token, []).append(value)
    means = {token: float(np.mean(values)) for token, values in by_id.items() if len(values) >= 2}
    rows = given.result("forking_tokens")["rows"]
    assert [row[3] for row in rows] == pytest.approx(sorted(means.values(), reverse=True)[: len(rows)], abs=1e-5)
    assert all(row[2] == len(by_id[row[1]]) for row in rows)
    assert all(row[3] == pytest.approx(means[row[1]], abs=1e-5) for row in rows)


def test_changes_from_a_base_to_a_model(given: Given):
    given.analyze("change", given.file, "--base", given.base, "--model", given.other, "--bins", "4", *SCORING)
    tokenizer = load_tokenizer(given.base)
    with torch.no_grad():
        base, other = (scores(network(folder), tokenizer)[2].numpy() for folder in (given.base, given.other))
    order = np.argsort(base, kind="stable")
    for row, part in zip(given.result("entropy_change")["rows"], np.array_split(order, 4), strict=True):
        assert row[3] == len(part)
        assert row[6] == pytest.approx((other - base)[part].mean(), abs=1e-4)
    count = int(np.ceil(0.2 * len(base)))
    tops = [set(np.argsort(-values)[:count].tolist()) for values in (base, other)]
    assert given.result("top_overlap")["rows"][0][1] == len(tops[0] & tops[1]) / count
    by_step = given.result("entropy_by_step")["rows"]
    assert [row[2] for row in by_step] == pytest.approx([base.mean(), other.mean()], abs=1e-4)


def test_gradient_by_bin_of_entropy(given: Given):
    given.analyze("gradient", given.file, "--model", given.base, "--bins", "5", *SCORING)
    model = network(given.base)
    _, logp, entropy, advantage = scores(model, load_tokenizer(given.base))
    order = torch.from_numpy(np.argsort(entropy.detach().numpy(), kind="stable"))
    parts = []
    for part in torch.tensor_split(order, 5):
        loss = -(advantage * logp)[part].sum() / len(logp)
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        parts.append(torch.cat([grad.flatten() for grad in grads]))
    whole = torch.stack(parts).sum(0)
    result = given.result("gradient")
    assert result["metrics"]["norm of the gradient"] == pytest.approx(float(whole.norm()), rel=1e-4)
    for row, part in zip(result["rows"], parts, strict=True):
        assert row[4] == pytest.approx(float(part.norm()), rel=1e-3)
        assert row[5] == pytest.approx(float(part @ whole / (whole @ whole)), abs=1e-3)
    assert sum(row[5] for row in result["rows"]) == pytest.approx(1.0, abs=1e-4)


def test_share_of_changed_parameters(given: Given):
    given.analyze("parameters", "--base", given.base, "--model", given.other)
    base, other = (load_file(folder / "model.safetensors") for folder in (given.base, given.other))
    changed = sum(int((base[name].bfloat16() != other[name].bfloat16()).sum()) for name in base)
    metrics = given.result("parameters")["metrics"]
    assert metrics["changed"] == changed
    assert metrics["share"] == changed / sum(tensor.numel() for tensor in base.values())


def test_two_temperatures_from_sampling_to_the_table(given: Given, problems: Path):
    words: tuple[Any, ...] = ("--sets", problems, "--samples", "2", "--rollout.max_response_tokens", "4")
    words = (*words, "--data.template", "plain", "--data.max_prompt_tokens", "256")
    grid = ("--threshold", "1.0", "--high", "1.5", "--low", "0.5", "--out", "grid")
    command = ["analyze", "temperatures", "--model", given.base, *grid, "--", *words, "--reward.function", "math"]
    ended = zygote.run(
        [sys.executable, "-m", "megatron_rlvr.cli", *map(str, command)], cwd=given.folder, env=tiny.environment()
    )
    assert ended.returncode == 0, ended.stderr
    place = given.folder / "grid"
    name = problems.stem
    (row,) = json.loads((place / f"temperatures_{name}.json").read_text(encoding="utf-8"))["rows"]
    folder = place / "threshold_1_high_1.5_low_0.5"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["sets"][name]
    assert row == [
        *(1.5, 0.5, summary["problems"], 2 * summary["problems"]),
        *(summary["accuracy"]["value"], summary["accuracy"]["standard_error"], summary["response_tokens"]["mean"]),
    ]
    described = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["sampling"]
    assert described["two_temperatures"] == [1.0, 1.5, 0.5]
