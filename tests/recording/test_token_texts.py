"""Texts of tokens, joined, against the tokenizer's own decoding of the whole."""

from pathlib import Path

import pytest
import tiny
from tokenizers import ByteLevelBPETokenizer

from megatron_rlvr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_rlvr.recording.token_texts import TokenTexts

TEXT = "A caf\u00e9, \u05e9\u05dc\u05d5\u05dd, \U0001f469\u200d\U0001f52c and  two  spaces.\n\tEnd\ufffd"


@pytest.fixture(params=["bytes", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "sentencepiece":
        return load_tokenizer(tiny.write_sentencepiece(tmp_path / "pieces.model"))
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["a cafe, and two spaces"], vocab_size=300, special_tokens=["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<end>").save_pretrained(tmp_path)
    return load_tokenizer(tmp_path)


def test_joined_texts_are_the_decoded_response(tokenizer: Tokenizer):
    before = tokenizer.encode("a")  # inside a text: the first token of a text may lose its space
    ids = tokenizer.encode(TEXT)
    texts = TokenTexts(tokenizer)(ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]


def test_a_special_token_has_its_text_and_a_character_is_with_its_last_byte(tokenizer: Tokenizer):
    texts = TokenTexts(tokenizer)
    assert texts([tokenizer.eos_token_id]) == [tokenizer.token_text(tokenizer.eos_token_id)]
    ids = tokenizer.encode("\U0001f52c")
    found = [text for text in texts(ids) if text]
    assert found[-1].endswith("\U0001f52c") or len(ids) == 1  # a piece of its own, or unknown
