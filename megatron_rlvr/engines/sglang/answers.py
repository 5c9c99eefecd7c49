"""Answers of servers, read within bounds that follow from the request, so that no answer can exhaust the memory.

                                            of any answer     more for each requested token
    bytes of the body                       4 MiB             256
    bytes of its JSON without long strings  1 MiB             64
    arrays and objects                      20,000            1
    commas and strings                      40,000            10

A token of an honest answer takes about 45 bytes of JSON (its id, and an array of log-probability, id and null), and as
many bytes of text as the tokenizer has for it. The text is not needed and is dropped before parsing.
Bodies are never inflated: requests ask for plain ones, and an encoded one is an error.
"""

import asyncio
import json
import re
import reprlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

# A string; one without an end reaches to the end of the body, so that every byte is looked at once.
_STRING = re.compile(rb'"(?:[^"\\]++|\\(?:.|\Z))*+(?:"|\Z)', re.DOTALL)
_LONG_STRING = 1000
STALL_SECONDS, BODY_SECONDS = 10.0, 30.0
ON_TIME_SECONDS = 1.0
"""A wait during which this process was behind by more says nothing about the server."""

_SHOWN_CHARACTERS = 200
_REPR = reprlib.Repr()  # of the first values of the first levels
_REPR.maxstring = _SHOWN_CHARACTERS


class AnswerError(ValueError):
    """An answer that is too large, encoded, or no JSON object; the message is a part of a sentence."""


class Chunks(Protocol):
    """Body of a response, as `aiohttp.StreamReader` has it."""

    async def read(self, n: int) -> bytes:
        """Return at most ``n`` bytes; b"" at the end."""


@dataclass(frozen=True)
class AnswerLimit:
    """Largest answer to a request for ``tokens`` tokens; the module docstring has the numbers."""

    tokens: int = 0

    @property
    def body(self) -> int:
        """Bytes of the body."""
        return 2**22 + 256 * self.tokens

    @property
    def json(self) -> int:
        """Bytes of the JSON text without its long strings."""
        return 2**20 + 64 * self.tokens

    @property
    def containers(self) -> int:
        """Number of arrays and objects."""
        return 20_000 + self.tokens

    @property
    def values(self) -> int:
        """Number of commas and strings, which bounds the number of values."""
        return 40_000 + 10 * self.tokens


async def read_body(chunks: Chunks, limit: AnswerLimit, late: Callable[[], float] = lambda: 0.0) -> bytes:
    """Return the body of a response, which makes progress: a server has sampled all tokens before it sends the first.

    Args:
        late: Returns by how many seconds, in all, this thread has been behind (`EventLoopThread.late`); those do not
            count.

    Raises:
        AnswerError: It is longer than the limit, nothing arrives for 10 s, or it is not complete after 30 s; the rest
            has not been read.
    """
    body = bytearray()
    start = time.monotonic() - late()
    while True:
        late_before = late()
        try:
            async with asyncio.timeout(STALL_SECONDS):
                chunk = await chunks.read(2**16)
        except TimeoutError:
            if late() - late_before > ON_TIME_SECONDS:
                continue
            raise AnswerError(f"sent nothing more for {STALL_SECONDS:.0f} s after {len(body)} bytes") from None
        if not chunk:
            return bytes(body)
        body += chunk
        if len(body) > limit.body:
            raise AnswerError(f"answered more than {limit.body} bytes")
        if time.monotonic() - late() - start > BODY_SECONDS:
            raise AnswerError(f"sent only {len(body)} bytes in {BODY_SECONDS:.0f} s")


def parse_object(body: bytes, limit: AnswerLimit) -> dict[str, Any]:
    """Return the JSON object in the body of an answer; strings of more than 1,000 bytes are empty in it.

    Raises:
        AnswerError: The body is no JSON object, or a larger one than the limit.
    """
    text = _without_long_strings(body, limit)
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):  # ValueError: also bytes that are no UTF-8, and integers of 5,000 digits
        answer = None
    if not isinstance(answer, dict):
        raise AnswerError(f"answered no JSON object: {shown(body)}")
    return answer


def _without_long_strings(body: bytes, limit: AnswerLimit) -> bytes:
    """Return JSON with empty strings in place of long ones, after counting what is outside of strings."""
    too_large = AnswerError(f"answered larger JSON than {limit.tokens} tokens need")
    parts: list[bytes] = []
    strings = containers = commas = kept = position = 0

    def count(end: int) -> None:
        nonlocal containers, commas
        containers += body.count(b"[", position, end) + body.count(b"{", position, end)
        commas += body.count(b",", position, end)
        if containers > limit.containers or commas + strings > limit.values:
            raise too_large

    for found in _STRING.finditer(body):
        strings += 1
        count(found.start())
        if found.end() - found.start() > _LONG_STRING:
            parts += [body[kept : found.start()], b'""']
            kept = found.end()
        position = found.end()
    count(len(body))
    text = b"".join([*parts, body[kept:]])
    if len(text) > limit.json:
        raise too_large
    return text


def shown(value: object, *, quoted: bool = False) -> str:
    """Return what a server has sent as one printable line of at most 200 characters, for a message.

    Args:
        quoted: Put a str in quotes.
    """
    if isinstance(value, bytes):
        value = value[: 8 * _SHOWN_CHARACTERS].decode("utf-8", errors="replace")
    text = value if isinstance(value, str) and not quoted else _REPR.repr(value)
    text = " ".join(text[: 8 * _SHOWN_CHARACTERS].split())
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def is_int(value: object, low: int, high: int) -> bool:
    """Return whether a value is an int, and no bool, from ``low`` to ``high``."""
    return type(value) is int and low <= value <= high
