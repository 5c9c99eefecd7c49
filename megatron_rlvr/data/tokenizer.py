"""Common interface of two kinds of tokenizer: a Hugging Face folder, and a sentencepiece model without a folder.

Encoding adds no special tokens, and decoding omits them; only a chat template writes special tokens, as text. Tokens
that a model expects before *plain* text (Llama's <s>) are separate, in `start_ids`, because a chat template writes
them itself, and a prompt with two of them would be unlike any that the model was trained on.

transformers takes seconds to import, so it is imported only when a folder is opened.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_rlvr.data.bounded import BoundedError, bounded_texts
from megatron_rlvr.data.records import Message
from megatron_rlvr.errors import InputError
from megatron_rlvr.input_files import BadFileError, is_file, is_folder, parse_json, read_text

SENTENCEPIECE_FILE = "tokenizer.model"
_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
TOKENIZER_FILES = (
    *("tokenizer.json", SENTENCEPIECE_FILE, _CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", _TEMPLATE),
)
"""Names of the files of a tokenizer in a Hugging Face folder, as far as the folder has them."""

Chat = Sequence[Message]

# Ids beyond make tokenizers allocate a table up to the largest.
_MAX_TOKEN_ID = 2**24
_MAX_TOKENIZER_BYTES = 2**28


class TokenizerError(InputError):
    """Unusable tokenizer; the message names the file or folder, the problem and the remedy."""


class Tokenizer(Protocol):
    """Conversion between text and token ids.

    Attributes:
        vocab_size: Largest id plus 1, added tokens included. A model's padded vocabulary may be larger.
        eos_token_id: End-of-sequence token.
        pad_token_id: Token that pads a batch; eos_token_id if the tokenizer has no padding token.
        special_ids: Special and added tokens, which mark turns, thoughts and the like.
        start_ids: Tokens that the model expects before plain text; empty for most models.
        chat_template: Jinja template for chats, or None.
    """

    vocab_size: int
    eos_token_id: int
    pad_token_id: int
    special_ids: frozenset[int]
    start_ids: list[int]
    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` without adding special tokens."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, as `encode` does, using all cores."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``, omitting special tokens and ids >= vocab_size."""

    def decode_all(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids`` with special tokens, for people to read; ids >= vocab_size are omitted."""

    def token_id(self, text: str) -> int | None:
        """Return the id of the token whose text is ``text``, special or not; None if there is no such token."""

    def token_text(self, token_id: int) -> str:
        """Return the text of one token, special or not."""

    def render_chats(
        self, chats: Sequence[Chat], variables: Mapping[str, Any] | None = None, *, answer_follows: bool = True
    ) -> Iterator[str]:
        """Yield the text of each chat.

        Args:
            chats: Messages of each chat.
            variables: Variables of the chat template, besides its own.
            answer_follows: True to end where the assistant's answer starts; False to end after the last message.

        Raises:
            TokenizerError: If there is no chat template, or it rejects the messages of the chat that was to be next,
                fails in any other way, or takes too long (see `bounded`).
        """

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the text of a chat."""

    def save(self, folder: str | Path) -> None:
        """Write files from which `load_tokenizer` loads the same tokenizer."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from disk; nothing is downloaded and no code from the folder is run.

    Args:
        path: A Hugging Face folder (tokenizer.json or tokenizer_config.json), a folder with only a sentencepiece
            `tokenizer.model`, or a sentencepiece .model file.

    Raises:
        TokenizerError: If the tokenizer does not exist, cannot be read, or has no vocabulary or no end-of-sequence
            token.
    """
    path = Path(path)
    if is_file(path):
        if path.suffix == ".model":
            return SentencePieceTokenizer(path)
        raise TokenizerError(f"{path} is not a sentencepiece .model file; give the folder of the tokenizer")
    if not is_folder(path):
        raise TokenizerError(f"{path} is not a folder on this machine; download the model and give its folder")
    if is_file(path / "tokenizer.json") or is_file(path / "tokenizer_config.json"):
        return HuggingFaceTokenizer(path)
    if is_file(path / SENTENCEPIECE_FILE):
        return SentencePieceTokenizer(path / SENTENCEPIECE_FILE)
    raise TokenizerError(
        f"{path} has no tokenizer.json, tokenizer_config.json or {SENTENCEPIECE_FILE}; copy the model's tokenizer there"
    )


def tokenizer_digest(path: str | Path) -> str:
    """Return a digest of the files of a tokenizer, except its chat template, which is an attribute of the tokenizer.

    Args:
        path: File or folder of a tokenizer that has been loaded by `load_tokenizer`.
    """
    path = Path(path)
    names = [name for name in TOKENIZER_FILES if name != _TEMPLATE and (path / name).is_file()]
    whole = hashlib.blake2b(digest_size=16)
    for file in [path / name for name in names] if path.is_dir() else [path]:
        content = file.read_bytes()
        if file.name == _CONFIG:
            values = json.loads(content)
            content = json.dumps({key: values[key] for key in sorted(values) if key != "chat_template"}).encode()
        whole.update(f"{file.name} {len(content)}\n".encode() + content)
    return whole.hexdigest()


class HuggingFaceTokenizer:
    """Tokenizer of the transformers library."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        _check_files(folder)
        try:
            self._backend: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a bad file is an OSError, ValueError, KeyError or tokenizers' own bare Exception
            raise TokenizerError(_why_unreadable(folder, error)) from error
        if not isinstance(self._backend.model_max_length, int | float):
            raise TokenizerError(f"model_max_length of tokenizer_config.json in {folder} is no number; copy it again")
        ids = set(self._backend.get_vocab().values())
        if ids <= set(self._backend.all_special_ids):
            # transformers 5 silently creates an empty tokenizer if there is only a tokenizer_config.json.
            raise TokenizerError(f"the tokenizer in {folder} has no vocabulary; copy its tokenizer.json too")
        if self._backend.eos_token_id is None:
            raise TokenizerError(f"the tokenizer in {folder} has no eos_token; set it in tokenizer_config.json")
        self._folder = folder
        self.vocab_size = max(ids) + 1
        self.eos_token_id: int = self._backend.eos_token_id
        pad = self._backend.pad_token_id
        self.pad_token_id: int = self.eos_token_id if pad is None else pad
        self.special_ids = frozenset(self._backend.all_special_ids) | frozenset(self._backend.added_tokens_decoder)
        self.start_ids = self._find_start_ids()
        template = self._backend.chat_template
        # A tokenizer may have several templates by name; those other than the default are for tools and retrieval.
        template = template.get("default") if isinstance(template, dict) else template
        if template is not None and not isinstance(template, str):
            raise TokenizerError(f"the chat template in {folder} is no text; copy the tokenizer again")
        self.chat_template: str | None = template

    def _find_start_ids(self) -> list[int]:
        around_nothing: list[int] = self._ids("", add_special_tokens=True)
        ends_with_eos = around_nothing[-1:] == [self.eos_token_id] and self.eos_token_id != self._backend.bos_token_id
        return around_nothing[:-1] if ends_with_eos else around_nothing

    def _ids(self, text: Any, add_special_tokens: bool) -> Any:
        # verbose=False: no warning for a prompt over the model's length, which is dropped and counted later.
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
        # The clean-up would change spaces around punctuation, so that the text would differ from what was sampled.
        return self._backend.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decode_all(self, ids: Iterable[int]) -> str:
        known = [int(i) for i in ids if i < self.vocab_size]
        return self._backend.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def token_id(self, text: str) -> int | None:
        known: int | None = self._backend.get_vocab().get(text)
        ids = [known] if known is not None else self.encode(text)
        return ids[0] if len(ids) == 1 else None

    def token_text(self, token_id: int) -> str:
        return self._backend.decode([token_id], clean_up_tokenization_spaces=False)

    def render_chats(
        self, chats: Sequence[Chat], variables: Mapping[str, Any] | None = None, *, answer_follows: bool = True
    ) -> Iterator[str]:
        if self.chat_template is None:
            raise TokenizerError(f"the tokenizer in {self._folder} has no chat template; set data.template=plain")

        def render(messages: Chat) -> str:
            return self._backend.apply_chat_template(
                list(messages),
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=answer_follows,
                **(variables or {}),
            )

        try:
            yield from bounded_texts(render, chats)
        except BoundedError as error:
            raise TokenizerError(
                f"the chat template in {self._folder} rejects the messages ({error}); change them or the template"
            ) from error

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        return self.encode(next(self.render_chats([messages])))

    def save(self, folder: str | Path) -> None:
        self._backend.save_pretrained(folder)


def _why_unreadable(folder: Path, error: Exception) -> str:
    """Return why transformers cannot open a folder, whose config.json it reads before the tokenizer."""
    from transformers import AutoConfig

    at_fault = f"the tokenizer in {folder}"
    if is_file(folder / "config.json"):
        try:
            AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as of_config:  # of the same kinds as those of the tokenizer
            at_fault, error = f"{folder}/config.json", of_config
    reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
    return f"{at_fault} cannot be read by transformers ({reason}); copy the model's own"


def _check_files(folder: Path) -> None:
    """Raise TokenizerError if a file of the tokenizer is no JSON object, or has an added token of an impossible id."""
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        if not (folder / name).exists():
            continue
        try:
            content = parse_json(read_text(folder / name, _MAX_TOKENIZER_BYTES))
        except BadFileError as error:
            raise TokenizerError(f"{folder / name} cannot be read: {error}; copy it again") from None
        if not isinstance(content, dict):
            raise TokenizerError(f"{folder / name} holds no JSON object; copy it again")
        for token in _token_ids(name, content):
            if type(token) is not int or not 0 <= token < _MAX_TOKEN_ID:
                raise TokenizerError(f"{folder / name}: {token!r} is no token id below {_MAX_TOKEN_ID}; copy it again")


def _token_ids(name: str, content: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the ids in a file of a tokenizer; other tokens than added ones are numbered by their position."""
    if name == "added_tokens.json":
        yield from content.values()
    for entry in content.get("added_tokens") or () if name == "tokenizer.json" else ():
        yield entry.get("id") if isinstance(entry, dict) else entry
    decoder = content.get("added_tokens_decoder")
    for text in decoder if isinstance(decoder, dict) else ():
        yield int(text) if text.isdecimal() and len(text) < 20 else text
    vocabulary = content.get("model", {}).get("vocab") if isinstance(content.get("model"), dict) else None
    if isinstance(vocabulary, dict):
        yield from vocabulary.values()


class SentencePieceTokenizer:
    """Tokenizer from a sentencepiece model alone, which has neither a chat template nor the model's start tokens.

    A chat is rendered in a plain form: each message as its capitalized role, a colon and its content, separated by
    blank lines, with "Assistant:" at the end:

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
            raise TokenizerError(f"{file} has no eos_id; train the sentencepiece model with one")
        self.vocab_size: int = self._processor.get_piece_size()
        self.eos_token_id: int = self._processor.eos_id()
        pad = self._processor.pad_id()
        self.pad_token_id: int = self.eos_token_id if pad < 0 else pad
        self.special_ids = frozenset(i for i in range(self.vocab_size) if self._processor.is_control(i))
        self.start_ids: list[int] = []
        self.chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        # sentencepiece omits control pieces itself, but raises for an id outside its vocabulary.
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size])

    def decode_all(self, ids: Iterable[int]) -> str:
        pieces: list[str] = []
        plain: list[int] = []
        for i in (int(i) for i in ids if i < self.vocab_size):
            if i in self.special_ids:
                pieces += [self._processor.decode(plain), self.token_text(i)]
                plain = []
            else:
                plain.append(i)
        return "".join([*pieces, self._processor.decode(plain)])

    def token_id(self, text: str) -> int | None:
        piece: int = self._processor.piece_to_id(text)
        ids = [piece] if piece != self._processor.unk_id() else self.encode(text)
        return ids[0] if len(ids) == 1 and ids[0] != self._processor.unk_id() else None

    def token_text(self, token_id: int) -> str:
        return self._processor.id_to_piece(token_id)

    def render_chats(
        self, chats: Sequence[Chat], variables: Mapping[str, Any] | None = None, *, answer_follows: bool = True
    ) -> Iterator[str]:
        for messages in chats:
            turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
            yield "\n\n".join([*turns, "Assistant:"] if answer_follows else turns)

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        return self.encode(next(self.render_chats([messages])))

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SENTENCEPIECE_FILE).write_bytes(self._processor.serialized_model_proto())
