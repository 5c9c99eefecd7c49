"""Tokens that end a response: found in the files of the model, named in the plan, and obeyed by the engine."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from resolving import Resolve, refusal
from safetensors.torch import load_file

from megatron_rlvr.engines.embedded.engine import EmbeddedEngine
from megatron_rlvr.rollout.sampler import requests_for
from megatron_rlvr.startup.describe import describe_plan
from megatron_rlvr.startup.resolve import Resolved

TURN = "the end of turn of the chat template"
PAD, START, END = 0, 1, 2  # tokens of the tiny tokenizer
RENDERED = "<|start|>user\n{}<|end|>\n<|start|>assistant\n"


@pytest.fixture
def base_model(model: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The section `model:` with a base model's folder: its chat template ends turns with <|end|>, its eos is <|pad|>.

    ``generation`` is the content of its generation_config.json, ``config`` changes its config.json.
    """

    def make(
        *, template: str | None = tiny.TEMPLATE, generation: Any = None, config: Any = None, **tokenizer: Any
    ) -> dict[str, Any]:
        folder = tmp_path / "base"
        shutil.copytree(model, folder, dirs_exist_ok=True)
        tiny.write_tokenizer(folder, chat_template=template)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|pad|>"} | tokenizer))
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": PAD} | (config or {})))
        (folder / "generation_config.json").write_text(json.dumps({} if generation is None else generation))
        return {"path": str(folder), "dtype": "float32"}

    return make


def reasons(resolved: Resolved) -> dict[int, tuple[str, ...]]:
    return {token.id: token.reasons for token in resolved.stop_tokens}


def plan(resolved: Resolved) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in describe_plan(resolved).splitlines())


def test_the_end_of_turn_of_the_template_in_use_is_a_stop_token(
    base_model: Callable[..., dict[str, Any]], resolve_with: Resolve
) -> None:
    eos = ("eos of the tokenizer", "eos of config.json")
    chat = resolve_with(model=base_model())
    assert reasons(chat) == {PAD: eos, END: (TURN,)}
    assert plan(chat)["stop"] == f"'<|pad|>' (0): eos of the tokenizer, eos of config.json; '<|end|>' (2): {TURN}"
    assert reasons(resolve_with(model=base_model(), data={"template": "plain"})) == {PAD: eos}
    assert reasons(resolve_with(model=base_model(template=None))) == {PAD: eos}


def test_prompts_that_were_rendered_beforehand_use_the_template_too(
    base_model: Callable[..., dict[str, Any]], resolve_with: Resolve, tmp_path: Path
) -> None:
    rows = [{"prompt": RENDERED.format(text), "answer": n} for text, n in tiny.PROBLEMS]
    train = str(tiny.write_rows(tmp_path / "rendered.jsonl", rows))
    found = resolve_with(model=base_model(), data={"train": train, "template": "plain"})
    assert found.stop_token_ids == (PAD, END)
    assert "begin the turn" not in plan(found)["stop"]


DEMANDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"


def test_a_template_that_demands_a_system_message_shows_its_tokens_too(
    base_model: Callable[..., dict[str, Any]], resolve_with: Resolve, tmp_path: Path
) -> None:
    model, system = base_model(template=DEMANDS_SYSTEM + tiny.TEMPLATE), {"system": "Be brief."}
    assert reasons(resolve_with(model=model, data=system))[END] == (TURN,)
    rows = [{"prompt": RENDERED.format(text), "answer": n} for text, n in tiny.PROBLEMS]
    rendered = {"train": str(tiny.write_rows(tmp_path / "rendered.jsonl", rows))}
    assert reasons(resolve_with(model=model, data=rendered | {"template": "plain"}))[END] == (TURN,)
    assert "begins with <|start|>" in refusal(resolve_with, model=model, data=rendered | system)


def test_lists_of_eos_and_the_users_own_tokens_are_stop_tokens(
    base_model: Callable[..., dict[str, Any]], resolve_with: Resolve
) -> None:
    section = base_model(config={"eos_token_id": [5, 6]}, generation={"eos_token_id": [6, 7]})
    newline = json.loads((Path(section["path"]) / "tokenizer.json").read_text())["model"]["vocab"]["\u010a"]
    assert reasons(resolve_with(model=section, rollout={"stop": ["<|start|>", 319, "\n", "<|end|>"]})) == {
        PAD: ("eos of the tokenizer",),
        START: ("rollout.stop",),
        END: (TURN, "rollout.stop"),
        5: ("eos of config.json",),
        6: ("eos of config.json", "eos of generation_config.json"),
        7: ("eos of generation_config.json",),
        newline: ("rollout.stop",),
        319: ("rollout.stop",),
    }


def test_a_stop_string_of_the_model_that_is_one_token_is_a_stop_token_and_others_are_named(
    base_model: Callable[..., dict[str, Any]], resolve_with: Resolve, caplog: pytest.LogCaptureFixture
) -> None:
    section = base_model(generation={"stop_strings": ["<|start|>", "Answer: 12"]})
    found = reasons(resolve_with(model=section))
    assert found[START] == ("stop_strings of generation_config.json",)
    assert "'Answer: 12', which is not one token, and ends no response" in caplog.text


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("Answer: 12", "rollout.stop='Answer: 12': not one token of the tokenizer; give"),
        (320, "rollout.stop=320: no token of the model's vocabulary of 320; give"),
        (-1, "rollout.stop=-1: no token of the model's vocabulary of 320; give"),
    ],
)
def test_an_entry_that_is_not_one_token_is_refused(stop: Any, message: str, resolve_with: Resolve) -> None:
    assert refusal(resolve_with, rollout={"stop": [stop]}).startswith(message)


def test_a_generation_config_that_is_no_object_is_refused(
    base_model: Callable[..., dict[str, Any]], resolve_with: Resolve
) -> None:
    assert "generation_config.json holds no JSON object" in refusal(resolve_with, model=base_model(generation=[]))


WITHOUT_TOKEN = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|fin|>{% endfor %}"
WITHOUT_HEADER = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "remark"),
    [
        (WITHOUT_TOKEN, "the chat template ends a turn with '<|fin|>user:', which is no special token, and that ends "
                        "no response"),
        (WITHOUT_HEADER, "prompts end with '<|end|>', so that the model has to begin the turn of the answer itself"),
    ],
)  # fmt: skip
def test_a_template_in_which_an_answer_cannot_begin_or_end_is_pointed_out(
    template: str, remark: str, base_model: Callable[..., dict[str, Any]], resolve_with: Resolve
) -> None:
    assert plan(resolve_with(model=base_model(template=template)))["stop"].endswith(f"; {remark}")


@pytest.mark.parametrize("tokenizer", [{}, {"pad_token": "<|end|>"}, {"pad_token": None}])
def test_responses_of_a_base_model_end_with_the_end_of_turn(
    tokenizer: dict[str, Any], base_model: Callable[..., dict[str, Any]], resolve_with: Resolve
) -> None:
    """Its prompts hold the same token, and the padding may be it too; neither ends a response."""
    resolved = resolve_with(model=base_model(**tokenizer), rollout={"max_response_tokens": 200})
    engine = EmbeddedEngine(
        resolved.settings.model.path,
        device=torch.device("cpu"),
        stop_token_ids=resolved.stop_token_ids,
        pad_token_id=resolved.tokenizer.pad_token_id,
    )
    weights = load_file(Path(resolved.settings.model.path) / "model.safetensors")
    engine.update_weights(weights.items(), version=0)
    prompts = resolved.train.prompts
    assert all(END in prompt.token_ids for prompt in prompts)
    requests = [request for prompt in prompts[:8] for request in requests_for(prompt, 4, 0, "test")]
    ends = set()
    for completion in engine.generate(requests, resolved.settings.rollout):
        *before, last = completion.token_ids.tolist()
        assert {PAD, END}.isdisjoint(before)
        ends.add((completion.finish_reason, last if last in (PAD, END) else None))
    assert ("stop", END) in ends
    assert ends <= {("stop", END), ("stop", PAD), ("length", None)}
