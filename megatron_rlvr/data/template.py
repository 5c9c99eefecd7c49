"""How a problem becomes the text of a prompt, and which token ends the response to it.

The text of a prompt is made of messages = [system message, if set] + the row's messages (plain text is one user
message), with `suffix` appended to the last content. The template decides how messages become text:

    chat    the tokenizer's chat template, up to where the assistant's answer starts
    plain   the contents joined by blank lines, after the start tokens that the model expects (Llama's <s>)
    auto    chat if the tokenizer has a chat template, else plain

A chat template also shows how a turn ends: the first special token after the content of an assistant's message. A base
model's folder often has a chat template that ends turns with <|im_end|> and names <|endoftext|> as eos.

A template that reads the clock (today's date in the system message) is given one moment for all prompts.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from megatron_rlvr.data.records import Message, Record
from megatron_rlvr.data.rows import DataError
from megatron_rlvr.data.tokenizer import Tokenizer, TokenizerError

Template = Literal["auto", "chat", "plain"]

_CLOCK = "strftime_now"
"""Function by which a chat template reads the clock, by convention of transformers."""

_SYSTEM, _PROBLEM, _ANSWER = "SYSTEM-MESSAGE", "PROBLEM-OF-A-USER", "ANSWER-OF-A-MODEL"
_NEXT_PROBLEM = "NEXT-PROBLEM-OF-A-USER"


@dataclass(frozen=True, slots=True)
class EndOfTurn:
    """Text that a chat template writes after the content of an assistant's message.

    Attributes:
        text: The special token that ends the turn; without one, the text up to the next turn.
        token_id: Id of that token; None if no special token follows.
    """

    text: str
    token_id: int | None


class PromptTemplate:
    """Turns records into text, as the module docstring describes.

    Args:
        tokenizer: Tokenizer of the model.
        template: "auto", "chat" or "plain".
        system: System message for every prompt, or None.
        suffix: Text appended to every problem.
        variables: Variables of the chat template (`data.template_kwargs`).
        now: Moment that a template sees which reads the clock; None for the clock itself.

    Attributes:
        chat: True if the chat template is used.
        reads_clock: True if the chat template is used and reads the clock.

    Raises:
        DataError: If the template is unknown, or does not read one of the variables.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template = "auto",
        *,
        system: str | None = None,
        suffix: str = "",
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> None:
        if template not in ("auto", "chat", "plain"):
            raise DataError(f"data.template={template}: unknown template; choose auto, chat or plain")
        source = tokenizer.chat_template or ""
        self.chat = template == "chat" or (template == "auto" and tokenizer.chat_template is not None)
        self.reads_clock = self.chat and _CLOCK in source
        self._tokenizer = tokenizer
        self._system = system
        self._suffix = suffix
        self._variables = dict(variables or {})
        for name in self._variables:
            if not self.chat or not re.search(rf"\b{re.escape(name)}\b", source):
                where = "the chat template never reads it" if self.chat else "the tokenizer has no chat template"
                raise DataError(f"data.template_kwargs.{name}: has no effect, as {where}; correct or remove it")
        if self.reads_clock and now is not None:
            self._variables[_CLOCK] = now.strftime
        self._openings = self._find_openings() if self.chat else ()

    def texts(self, records: Sequence[Record]) -> Iterator[str]:
        """Yield the text of the prompt of each record.

        Raises:
            DataError: If the row has its own system message although ``system`` is set, the chat template rejects the
                messages or leaves one out, or the problem is already rendered.
        """
        chats = [self._messages(record) for record in records]
        if not self.chat:
            yield from ("\n\n".join(message["content"] for message in chat) for chat in chats)
            return
        texts = self._tokenizer.render_chats(chats, self._variables)
        for record, chat in zip(records, chats, strict=True):
            try:
                text = next(texts)
            except TokenizerError as error:
                raise DataError(f"prompt {record.id}: {error}") from error
            self._check(chat, text, record.id)
            yield text

    def _messages(self, record: Record) -> list[Message]:
        """Return the messages of a prompt, with those of the settings."""
        messages: list[Message] = (
            [{"role": "user", "content": record.prompt}] if isinstance(record.prompt, str) else record.prompt
        )
        if self._system is not None:
            if any(message["role"] == "system" for message in messages):
                raise DataError(
                    f"prompt {record.id} has its own system message; unset data.system or remove the message"
                )
            messages = [{"role": "system", "content": self._system}, *messages]
        return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + self._suffix}]

    def with_start(self, ids: list[int]) -> list[int]:
        """Return the token ids of a text after the start tokens of the model, unless the text begins with them."""
        start = [] if self.chat else self._tokenizer.start_ids
        return ids if start and ids[:1] == start[:1] else start + ids

    def end_of_turn(self) -> EndOfTurn | None:
        """Return how the tokenizer's chat template ends an answer, in use or not; None without a chat template.

        Some templates write the end of a turn only where another turn follows.
        """
        if self._tokenizer.chat_template is None:
            return None
        answered = [{"role": "user", "content": _PROBLEM}, {"role": "assistant", "content": _ANSWER}]
        after = ""
        for chat in (answered, [*answered, {"role": "user", "content": _NEXT_PROBLEM}]):
            text = self._render_probe(chat, answer_follows=False)
            if _ANSWER not in text:
                continue
            after = text.rpartition(_ANSWER)[2].partition(_NEXT_PROBLEM)[0]
            for token in self._special(after):
                return EndOfTurn(self._tokenizer.token_text(token), token)
        return EndOfTurn(after.strip(), None)

    def _render(self, messages: list[Message], *, answer_follows: bool = True) -> str:
        return next(self._tokenizer.render_chats([messages], self._variables, answer_follows=answer_follows))

    def _render_probe(self, messages: list[Message], *, answer_follows: bool = True) -> str:
        """Return the text of messages of this module; empty if the template rejects them in any form.

        Some templates demand a system message and others refuse it. One that rejects both is an error of the first
        row, which names its id.
        """
        system: Message = {"role": "system", "content": self._system or _SYSTEM}
        for chat in (messages, [system, *messages]):
            try:
                return self._render(chat, answer_follows=answer_follows)
            except TokenizerError:
                continue
        return ""

    def _special(self, text: str) -> list[int]:
        return [token for token in self._tokenizer.encode(text) if token in self._tokenizer.special_ids]

    def _find_openings(self) -> tuple[str, ...]:
        """Return the special tokens that the chat template writes before the problem."""
        text = self._render_probe([{"role": "user", "content": _PROBLEM}])
        return tuple(dict.fromkeys(map(self._tokenizer.token_text, self._special(text.partition(_PROBLEM)[0]))))

    def _check(self, messages: list[Message], text: str, prompt_id: str) -> None:
        """Raise DataError if a message begins as the template's own text does, or is not in the rendered text.

        Templates may shorten what a model has said earlier, such as its thoughts, but not what it was asked.
        """
        for number, message in enumerate(messages, start=1):
            content = message["content"].strip()
            if message["role"] == "assistant":
                continue
            if self._openings and content.startswith(self._openings):
                opening = next(opening for opening in self._openings if content.startswith(opening))
                raise DataError(
                    f"prompt {prompt_id} begins with {opening}, which the chat template writes itself; set "
                    "data.template to plain for prompts that are already rendered"
                )
            if content not in text:
                raise DataError(
                    f"prompt {prompt_id}: the chat template leaves out message {number}, whose role is "
                    f"{message['role']}; change the messages, data.system or the template"
                )
