"""One interface for the two kinds of tokenizer: a Hugging Face folder, and a bare sentencepiece model.

Text becomes ids without special tokens added, and ids become text with special tokens left out; only a chat template
writes special tokens, as text. What a model expects in front of *plain* text (Llama's <s>) is kept apart, in
`start_ids`, because a template writes it itself and a second one would be a prompt the model has never seen.

transformers, which takes seconds to import, is imported when a folder is opened, not before.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_rlvr.data.records import Message
from megatron_rlvr.errors import InputError

SENTENCEPIECE_FILE = "tokenizer.model"


class TokenizerError(InputError):
    """A tokenizer that cannot be read or used; one sentence with the place and the remedy."""


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        vocab_size: the largest id plus 1, added tokens included. A model's padded vocabulary may be larger.
        eos_token_id: ends a response.
        pad_token_id: fills a batch; eos_token_id where the tokenizer has none.
        start_ids: what the model expects before plain text; empty for most.
        chat_template: the Jinja template, or None.
    """

    vocab_size: int
    eos_token_id: int
    pad_token_id: int
    start_ids: list[int]
    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, no special token added."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same as ``encode`` of each, on all cores."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special tokens, and ids from vocab_size on, are left out."""

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The text of a chat up to where the assistant's answer begins. Raises TokenizerError if it cannot be."""

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        """The ids of ``render_chat``."""

    def save(self, folder: str | Path) -> None:
        """Writes files that ``load_tokenizer`` reads back to the same tokenizer."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Opens a tokenizer from the disk; nothing is downloaded and no code from the folder is run.

    Args:
        path: a Hugging Face folder (tokenizer.json or tokenizer_config.json), a folder with only a sentencepiece
            `tokenizer.model`, or a sentencepiece .model file.

    Raises: TokenizerError if there is none, it cannot be read, holds no vocabulary, or has no end-of-sequence token.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix == ".model":
            return SentencePieceTokenizer(path)
        raise TokenizerError(f"{path} is not a sentencepiece .model file; give the folder that holds the tokenizer")
    if not path.is_dir():
        raise TokenizerError(f"{path} is no folder on this machine; download the model and give its folder")
    if (path / "tokenizer.json").is_file() or (path / "tokenizer_config.json").is_file():
        return HuggingFaceTokenizer(path)
    if (path / SENTENCEPIECE_FILE).is_file():
        return SentencePieceTokenizer(path / SENTENCEPIECE_FILE)
    raise TokenizerError(
        f"{path} has no tokenizer.json, tokenizer_config.json or {SENTENCEPIECE_FILE}; copy the model's tokenizer there"
    )


class HuggingFaceTokenizer:
    """A tokenizer of the transformers library."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._backend: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a bad file is an OSError, ValueError, KeyError or tokenizers' own bare Exception
            reason = f"{type(error).__name__} {error}".strip().splitlines()[0]
            raise TokenizerError(f"the tokenizer in {folder} cannot be read ({reason}); copy it again") from error
        ids = set(self._backend.get_vocab().values())
        if ids <= set(self._backend.all_special_ids):
            # transformers 5 makes an empty tokenizer of a lone tokenizer_config.json, without a word.
            raise TokenizerError(f"the tokenizer in {folder} has no vocabulary; copy its tokenizer.json too")
        if self._backend.eos_token_id is None:
            raise TokenizerError(f"the tokenizer in {folder} has no eos token; set it in tokenizer_config.json")
        self._folder = folder
        self.vocab_size = max(ids) + 1
        self.eos_token_id: int = self._backend.eos_token_id
        pad = self._backend.pad_token_id
        self.pad_token_id: int = self.eos_token_id if pad is None else pad
        self.start_ids = self._find_start_ids()
        template = self._backend.chat_template
        # A tokenizer may carry several templates by name; the others are for tools and retrieval.
        self.chat_template: str | None = template.get("default") if isinstance(template, dict) else template

    def _find_start_ids(self) -> list[int]:
        around_nothing: list[int] = self._ids("", add_special_tokens=True)
        ends_with_eos = around_nothing[-1:] == [self.eos_token_id] and self.eos_token_id != self._backend.bos_token_id
        return around_nothing[:-1] if ends_with_eos else around_nothing

    def _ids(self, text: Any, add_special_tokens: bool) -> Any:
        # Not verbose: a prompt over the model's length is dropped and counted later, not warned about.
        encoding = self._backend(
            text, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
        )
        return encoding["input_ids"]

    def encode(self, text: str) -> list[int]:
        return self._ids(text, add_special_tokens=False)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._ids(list(texts), add_special_tokens=False) if texts else []

    def decode(self, ids: Iterable[int]) -> str:
        known = [int(i) for i in ids if i < self.vocab_size]
        # The clean-up would move blanks around punctuation: the text would not be what was sampled.
        return self._backend.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def render_chat(self, messages: Sequence[Message]) -> str:
        from jinja2 import TemplateError

        if self.chat_template is None:
            raise TokenizerError(f"the tokenizer in {self._folder} has no chat template; set data.template to plain")
        try:
            return self._backend.apply_chat_template(
                list(messages), chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise TokenizerError(
                f"the chat template in {self._folder} refuses the messages ({error}); change them or the template"
            ) from error

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        return self.encode(self.render_chat(messages))

    def save(self, folder: str | Path) -> None:
        self._backend.save_pretrained(folder)


class SentencePieceTokenizer:
    """A sentencepiece model by itself. It knows no chat template and no start token of the model it belongs to.

    A chat is rendered in a plain form: each message as its role, capitalized, a colon and its content; a blank line
    between messages; "Assistant:" at the end:

        System: Be brief.

        User: What is 1 + 1?

        Assistant:
    """

    def __init__(self, file: Path) -> None:
        import sentencepiece

        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise TokenizerError(f"{file} cannot be read as a sentencepiece model; copy it again ({error})") from error
        if self._processor.eos_id() < 0:
            raise TokenizerError(f"{file} has no eos token; train the sentencepiece model with an eos_id")
        self.vocab_size: int = self._processor.get_piece_size()
        self.eos_token_id: int = self._processor.eos_id()
        pad = self._processor.pad_id()
        self.pad_token_id: int = self.eos_token_id if pad < 0 else pad
        self.start_ids: list[int] = []
        self.chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        # sentencepiece leaves out control pieces itself, but raises on an id that it does not have.
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size])

    def render_chat(self, messages: Sequence[Message]) -> str:
        turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
        return "\n\n".join([*turns, "Assistant:"])

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        return self.encode(self.render_chat(messages))

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SENTENCEPIECE_FILE).write_bytes(self._processor.serialized_model_proto())
