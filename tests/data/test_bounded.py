"""Code of others, above all chat templates, that fails in any way, never ends, or makes texts without end."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rlvr.data import bounded
from megatron_rlvr.data.bounded import BoundedError, bounded_texts
from megatron_rlvr.data.template import PromptTemplate
from megatron_rlvr.data.tokenizer import TokenizerError, load_tokenizer

RANGE = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE: dict[str, str] = {
    "division": "{{ 1 // 0 }}",
    "text plus number": "{{ 'a' + 1 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "include": "{% include 'x' %}",
    "range beyond the sandbox's": "{{ range(10**9) | list }}",
    "a text of 10 GB": "{{ 'x' * 10**10 }}",
    "a text of 500 MB": "{{ 'x' * (5 * 10**8) }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "loops": RANGE,
    "loops with text": "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
    "centre": "{{ 'x'.center(10**10) }}",
    "format": "{{ '%9999999999d' | format(1) }}",
    "syntax": "{% for %}",
    "no such filter": "{{ 1 | nothing }}",
    "undefined": "{{ x.y.z }}",
    "half of a pair": "{{ '\\ud800' }}",
}


@pytest.fixture
def _one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "SECONDS", 1.0)


@pytest.fixture(autouse=True)
def _every_process_ends() -> Iterator[None]:
    before = psutil.Process().children()
    yield
    assert [process for process in psutil.Process().children() if process not in before] == []


@pytest.mark.usefixtures("_one_second")
def test_a_template_that_fails_in_any_way_is_one_line(
    hugging_face_folder: Path, tmp_path: Path, write_config: Callable[..., None]
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(hugging_face_folder, folder)
    for name, template in HOSTILE.items():
        write_config(folder, eos_token="<|pad|>", chat_template=template)
        start = time.monotonic()
        tokenizer = load_tokenizer(folder)
        with pytest.raises(TokenizerError, match="rejects the messages") as error:
            next(tokenizer.render_chats([[{"role": "user", "content": "x"}]]))
        assert "\n" not in str(error.value).strip(), name
        assert len(str(error.value)) < 1000, name
        assert PromptTemplate(tokenizer).end_of_turn() is not None
        assert time.monotonic() - start < 60, name


@pytest.mark.parametrize("template", [5, ["x"]])
def test_a_template_that_is_no_text_is_one_line(
    template: Any, hugging_face_folder: Path, tmp_path: Path, write_config: Callable[..., None]
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(hugging_face_folder, folder)
    write_config(folder, eos_token="<|pad|>", chat_template=template)
    with pytest.raises(TokenizerError, match="tokenizer"):
        load_tokenizer(folder)


def test_texts_come_in_order_and_the_process_is_gone() -> None:
    assert list(bounded_texts(lambda item: "é" * item, range(300))) == ["é" * item for item in range(300)]
    assert list(bounded_texts(str, [])) == []
    texts = bounded_texts(str, [1, 2, 3])
    assert next(texts) == "1"
    texts.close()


@pytest.mark.usefixtures("_one_second")
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda item: os._exit(0), "it ended its process"),
        (lambda item: os.kill(os.getpid(), signal.SIGKILL), "it ended its process"),
        (lambda item: time.sleep(60), "it takes longer than 1 s"),
        (lambda item: 5, "it makes no text but a value of type int"),
        (lambda item: exit(3), "SystemExit: 3"),
        (lambda item: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda item: "x" * (2**24 + 1), "its text is longer than 16777216 bytes"),
        (lambda item: str(bytearray(2**31)), "MemoryError"),
        (lambda item: "\ud800", "UnicodeDecodeError"),
    ],
)
def test_whatever_a_function_does_is_an_error_with_its_reason(function: Callable[[int], Any], message: str) -> None:
    with pytest.raises(BoundedError, match=message):
        next(bounded_texts(function, [1]))


def end_itself(item: int) -> str:
    os.kill(os.getpid(), signal.SIGTERM)
    return "not ended"


def test_signals_to_the_process_are_not_reported_to_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with pytest.raises(BoundedError, match="it ended its process"):
            next(bounded_texts(end_itself, [1]))
        assert seen == []
    finally:
        signal.signal(signal.SIGTERM, before)
