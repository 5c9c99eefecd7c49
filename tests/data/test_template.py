"""Chat templates: the token that ends a turn, variables, the clock, and prompts that are already rendered."""

import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.data.prompts import PromptFile, load_prompts
from megatron_rlvr.data.rows import DataError
from megatron_rlvr.data.template import EndOfTurn, PromptTemplate
from megatron_rlvr.data.tokenizer import Tokenizer, load_tokenizer

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
THOUGHTS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content | trim }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
NEXT_ROLE = "{% for m in messages %}{{ '<|start|>' if m.role == 'user' else '<|pad|>' }}{{ m.content }}{% endfor %}"
WORDS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
NOT_A_TOKEN = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|fin|>\n{% endfor %}"
NO_ASSISTANT = "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
TWO_ENDS = "{% for m in messages %}{{ m.content }}<|end|>\n{% endfor %}<|pad|>"
CLOCK = "{% for m in messages %}Today is {{ strftime_now('%d %b %Y, %H:%M:%S.%f') }}. {{ m.content }}{% endfor %}"
ONLY_USERS = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"


@pytest.fixture
def with_template(hugging_face_folder: Path, tmp_path: Path, write_config: Callable[..., None]) -> Any:
    """Return a function that loads a tokenizer (<|pad|> 0, <|start|> 1, <|end|> 2) with a chat template."""

    def make(template: str, **settings: Any) -> Tokenizer:
        folder = tmp_path / "tokenizer"
        shutil.copytree(hugging_face_folder, folder, dirs_exist_ok=True)
        write_config(folder, **{"eos_token": "<|pad|>", "chat_template": template} | settings)
        return load_tokenizer(folder)

    return make


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, EndOfTurn("<|end|>", 2)),
        (THOUGHTS, EndOfTurn("<|end|>", 2)),
        (NEXT_ROLE, EndOfTurn("<|start|>", 1)),  # the turn ends where the user's begins
        (TWO_ENDS, EndOfTurn("<|end|>", 2)),
        (WORDS, EndOfTurn("user:", None)),
        (NOT_A_TOKEN, EndOfTurn("<|fin|>\nuser:", None)),
        (NO_ASSISTANT, EndOfTurn("", None)),
    ],
    ids=["chatml", "thoughts", "next role", "two ends", "words", "not a token", "no assistant"],
)
def test_a_turn_ends_with_the_first_special_token_after_an_answer(
    template: str, end: EndOfTurn, with_template: Callable[..., Tokenizer]
) -> None:
    tokenizer = with_template(template)
    assert tokenizer.eos_token_id == 0
    assert PromptTemplate(tokenizer).end_of_turn() == end
    assert PromptTemplate(tokenizer, "plain").end_of_turn() == end


def test_without_a_chat_template_no_turn_ends(sentencepiece_folder: Path) -> None:
    assert PromptTemplate(load_tokenizer(sentencepiece_folder)).end_of_turn() is None


def text_of(tokenizer: Tokenizer, file: Path, **options: Any) -> str:
    """The text of the only prompt of a file, special tokens included."""
    (prompt,) = load_prompts([PromptFile(file)], tokenizer, max_prompt_tokens=500, **options).prompts
    return "".join(tokenizer.token_text(token) for token in prompt.token_ids.tolist())


def test_variables_reach_the_chat_template(
    with_template: Callable[..., Tokenizer], write_rows: Callable[..., Path]
) -> None:
    tokenizer, file = with_template(THOUGHTS), write_rows("a.jsonl", [{"prompt": "one", "answer": "1"}])
    thinking = "<|start|>user\none<|end|>\n<|start|>assistant\n"
    assert text_of(tokenizer, file) == thinking
    assert text_of(tokenizer, file, template_kwargs={"enable_thinking": True}) == thinking
    assert text_of(tokenizer, file, template_kwargs={"enable_thinking": False}) == thinking + "<think>\n\n</think>\n\n"
    with pytest.raises(DataError, match=r"^data\.template_kwargs\.thinking: has no effect, as the chat template never"):
        load_prompts([PromptFile(file)], tokenizer, max_prompt_tokens=99, template_kwargs={"thinking": False})


def test_variables_without_a_chat_template_are_refused(
    sentencepiece_folder: Path, write_rows: Callable[..., Path]
) -> None:
    file = write_rows("a.jsonl", [{"prompt": "one", "answer": "1"}])
    with pytest.raises(DataError, match=r"enable_thinking: has no effect, as the tokenizer has no chat template; "):
        load_prompts(
            [PromptFile(file)],
            load_tokenizer(sentencepiece_folder),
            max_prompt_tokens=99,
            template_kwargs={"enable_thinking": False},
        )


def test_a_template_that_reads_the_clock_sees_the_moment_that_it_is_given(
    with_template: Callable[..., Tokenizer], write_rows: Callable[..., Path]
) -> None:
    tokenizer, file = with_template(CLOCK), write_rows("a.jsonl", [{"prompt": "one", "answer": "1"}])
    moment = datetime(2024, 2, 29, 23, 59, 58, 7)
    assert PromptTemplate(tokenizer).reads_clock
    assert not PromptTemplate(tokenizer, "plain").reads_clock
    assert not PromptTemplate(with_template(CHATML)).reads_clock
    assert text_of(tokenizer, file, now=moment) == "Today is 29 Feb 2024, 23:59:58.000007. one"
    assert text_of(tokenizer, file) != text_of(tokenizer, file)


@pytest.fixture
def llama(sentencepiece_bpe_folder: Path, tmp_path: Path, write_config: Callable[..., None]) -> Tokenizer:
    """A tokenizer that expects <s> (1) before plain text, and whose chat template writes it."""
    shutil.copy(sentencepiece_bpe_folder / "tokenizer.model", tmp_path)
    write_config(
        tmp_path,
        tokenizer_class="LlamaTokenizer",
        bos_token="<s>",
        eos_token="</s>",
        add_bos_token=True,
        chat_template="{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}",
    )
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("plain", "What is one?"),
        ("plain", "<s>What is one?"),
        ("plain", [{"role": "system", "content": "<s>Be brief."}, {"role": "user", "content": "What is one?"}]),
        ("chat", "What is one?"),
    ],
)
def test_a_prompt_has_one_start_token(
    template: Any, prompt: Any, llama: Tokenizer, write_rows: Callable[..., Path]
) -> None:
    assert llama.start_ids == [1]
    file = write_rows("a.jsonl", [{"prompt": prompt, "answer": "1"}])
    loaded = load_prompts([PromptFile(file)], llama, max_prompt_tokens=99, template=template)
    ids = loaded.prompts[0].token_ids.tolist()
    assert (ids[0], ids.count(1)) == (1, 1)
    assert "What is one?" in llama.decode(ids)


@pytest.mark.parametrize("text", ["<|start|>user\none<|end|>\n<|start|>assistant\n", "  <|start|>user\none"])
def test_text_that_is_already_rendered_is_not_rendered_again(
    text: str, with_template: Callable[..., Tokenizer], write_rows: Callable[..., Path]
) -> None:
    tokenizer, file = with_template(CHATML), write_rows("a.jsonl", [{"prompt": text, "answer": "1"}])
    with pytest.raises(DataError, match=r"^prompt a/1 begins with <\|start\|>, which .*; set data\.template to plain"):
        load_prompts([PromptFile(file)], tokenizer, max_prompt_tokens=99)
    assert text_of(tokenizer, file, template="plain") == text


def test_a_message_that_the_template_leaves_out_is_an_error(
    with_template: Callable[..., Tokenizer], write_rows: Callable[..., Path]
) -> None:
    chat = [{"role": "user", "content": "one"}, {"role": "tool", "content": "two"}]
    file = write_rows("a.jsonl", [{"prompt": chat, "answer": "1"}])
    with pytest.raises(DataError, match=r"^prompt a/1: the chat template leaves out message 2, whose role is tool; "):
        load_prompts([PromptFile(file)], with_template(ONLY_USERS), max_prompt_tokens=99)
    assert "two" in text_of(with_template(CHATML), file)
    plain = write_rows("b.jsonl", [{"prompt": "one", "answer": "1"}])
    with pytest.raises(DataError, match=r"message 1, whose role is system; change the messages, data\.system or"):
        load_prompts([PromptFile(plain)], with_template(ONLY_USERS), max_prompt_tokens=99, system="Be brief.")


def test_texts_and_ids_of_single_tokens(hugging_face_folder: Path, sentencepiece_bpe_folder: Path) -> None:
    vocabulary = json.loads((hugging_face_folder / "tokenizer.json").read_text())["model"]["vocab"]
    tokenizer = load_tokenizer(hugging_face_folder)
    assert tokenizer.special_ids == {0, 1, 2}
    for text, token in [("<|end|>", 2), ("a", vocabulary["a"]), ("\n", vocabulary["\u010a"])]:
        assert (tokenizer.token_id(text), tokenizer.token_text(token)) == (token, text)
    pieces = load_tokenizer(sentencepiece_bpe_folder)
    assert (pieces.token_id("</s>"), pieces.token_text(2), pieces.special_ids) == (2, "</s>", {1, 2})
    for each in (tokenizer, pieces):
        assert each.token_id("<|no such token|>") is None
