"""Fixtures: tokenizers small enough to be trained within a test, and prompt files written from literals."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.data.records import Message

CORPUS = [
    "What is one plus one? Two, of course, as everyone knows.",
    "What is two times three? Six: three and three, or two and two and two.",
    "A train leaves at 9 and arrives at 12. How many hours does it travel?",
    "Put the final answer within \\boxed{}.",
]

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'judge' %}{{ raise_exception('no judge here') }}{% endif %}"
    "<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


class WordTokenizer:
    """Tokenizer whose ids are words in order of appearance, so that a reader can check which words ids stand for."""

    def __init__(self, chat_template: str | None = None, start_ids: Sequence[int] = ()) -> None:
        self.words = ["<eos>", "<start>"]
        self.eos_token_id = self.pad_token_id = 0
        self.special_ids = frozenset({0, 1})
        self.start_ids = list(start_ids)
        self.chat_template = chat_template
        self.batches: list[int] = []

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in text.split()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        self.batches.append(len(texts))
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self.words[i] for i in ids)

    def token_id(self, text: str) -> int | None:
        return self.words.index(text) if text in self.words else None

    def token_text(self, token_id: int) -> str:
        return self.words[token_id]

    def render_chats(
        self,
        chats: Sequence[Sequence[Message]],
        variables: Mapping[str, Any] | None = None,
        *,
        answer_follows: bool = True,
    ) -> Iterator[str]:
        for messages in chats:
            turns = [f"[{message['role']}] {message['content']}" for message in messages]
            yield " ".join([*turns, "[assistant]"] if answer_follows else turns)

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        return self.encode(next(self.render_chats([messages])))

    def save(self, folder: str | Path) -> None:
        raise NotImplementedError


@pytest.fixture
def word_tokenizer() -> type[WordTokenizer]:
    return WordTokenizer


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes rows as JSON lines or parquet, by the extension of the file."""

    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / name
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def hugging_face_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a byte-level BPE tokenizer with 3 special tokens: <|pad|> 0, <|start|> 1, <|end|> 2 (eos)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("hugging_face")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_tokenizer_config(folder, eos_token="<|end|>", pad_token="<|pad|>", chat_template=TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a sentencepiece model alone: <unk> 0, <s> 1, </s> 2, no padding."""
    return train_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session")
def sentencepiece_bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a sentencepiece model such as Llama's: byte pairs, with spaces and unknown characters kept."""
    return train_sentencepiece(
        tmp_path_factory.mktemp("sentencepiece_bpe"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )


@pytest.fixture(scope="session")
def no_eos_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a sentencepiece model without an end-of-sequence piece."""
    return train_sentencepiece(tmp_path_factory.mktemp("no_eos"), eos_id=-1)


@pytest.fixture
def write_config() -> Callable[..., None]:
    return write_tokenizer_config


def train_sentencepiece(folder: Path, **settings: int | str) -> Path:
    import sentencepiece

    with (folder / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=model,
            **{"vocab_size": 60, "num_threads": 1, "minloglevel": 2, **settings},
        )
    return folder


def write_tokenizer_config(folder: Path, **settings: object) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
