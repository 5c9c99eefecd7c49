"""Text of each token of a response, such that the texts joined are the text of the response.

A tokenizer decodes a sequence and not a token: the bytes of a character may lie in several tokens, of which the last
one gets the character, and a space may depend on the token before. So each token is decoded behind another one, once
for each id.
"""

from collections.abc import Iterable

from megatron_rlvr.data.tokenizer import Tokenizer

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""In the text of a token that has a part of a character."""
# Bytes that are still no character after so many tokens are none: the joined texts may then have other U+FFFD.
_MOST_TOKENS = 16


class TokenTexts:
    """Texts of tokens, remembered by id."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        before = tokenizer.encode("a")
        self._before = before[-1:]
        self._length = len(tokenizer.decode(self._before))
        self._known: dict[int, str] = {}

    def __call__(self, ids: Iterable[int]) -> list[str]:
        """Return the text of each token; special tokens have their own text here, although `decode` omits them."""
        texts: list[str] = []
        part: list[int] = []  # tokens so far of characters that are not complete
        for token_id in map(int, ids):
            if part and (len(part) == _MOST_TOKENS or token_id in self._tokenizer.special_ids):
                texts[-1], part = self._behind(part), []
            if not part and INCOMPLETE not in self.one(token_id):
                texts.append(self.one(token_id))
                continue
            part.append(token_id)
            text = self._behind(part)
            if text.endswith(INCOMPLETE):
                texts.append("")
            else:
                texts.append(text)
                part = []
        if part:
            texts[-1] = self._behind(part)
        return texts

    def one(self, token_id: int) -> str:
        """Return the text of a token on its own, inside a text."""
        if token_id not in self._known:
            special = token_id in self._tokenizer.special_ids
            self._known[token_id] = self._tokenizer.token_text(token_id) if special else self._behind([token_id])
        return self._known[token_id]

    def _behind(self, ids: list[int]) -> str:
        return self._tokenizer.decode([*self._before, *ids])[self._length :]
