"""Tokenizer of the quickstart's task: 111 words, as token ids and as a Hugging Face tokenizer folder.

Text consists of words separated by single spaces and each word is a token, so token t of a response is its word t.
``encode`` needs only the standard library, so that data can be written without importing transformers.
"""

from pathlib import Path

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn")
ITEMS = ("apples", "beads", "cards", "coins", "pens", "shells")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
GAINS = ("buys", "finds", "wins")
LOSSES = ("loses", "sells", "gives")
STEP_CONNECTIVES = ("since", "as", "because")
END_CONNECTIVES = ("so", "thus", "hence")
LARGEST_NUMBER = 40

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
_PROBLEM_WORDS = ("has", "some", ".", "a", "pack", "packs", "singles", "now", "how", "many", "at", "first", "?")
_PLAN_WORDS = ("let", "us", "go", "forward", "back", "guess", ",", "start", "with")
_STEP_WORDS = ("undo", "it", "times", ":", "*", "=", "add", "take", "+", "-", "wait")
_END_WORDS = ("the", "answer", "is", "\\boxed{", "}")
_NUMBERS = tuple(str(number) for number in range(LARGEST_NUMBER + 1))

VOCABULARY = (
    (PAD, EOS, UNKNOWN)
    + (_NUMBERS + NAMES + ITEMS + DAYS + GAINS + LOSSES)
    + (_PROBLEM_WORDS + _PLAN_WORDS + _STEP_WORDS + _END_WORDS + STEP_CONNECTIVES + END_CONNECTIVES)
)
_ID_OF = {word: token_id for token_id, word in enumerate(VOCABULARY)}
PAD_ID, EOS_ID = _ID_OF[PAD], _ID_OF[EOS]


def encode(text: str) -> list[int]:
    """Return the token ids of space-separated words; KeyError for a word outside the vocabulary."""
    return [_ID_OF[word] for word in text.split()]


def write_tokenizer(folder: str | Path) -> None:
    """Write a tokenizer that ``AutoTokenizer.from_pretrained(folder)`` loads, with the ids of ``encode``.

    The tokenizer has an end and a padding token, but no chat template: a prompt is the text of the problem.
    """
    # Imported here because transformers takes seconds to import, and only this function needs it.
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel(_ID_OF, unk_token=UNKNOWN))
    words.pre_tokenizer = WhitespaceSplit()  # without a decoder, decoding joins the words with spaces
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,  # "now ?" must not be decoded as "now?"
    )
    tokenizer.save_pretrained(str(folder))
