"""Dialogues as text: conversational messages `[{role, content}]` in the Anthropic HH form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from pit_jax.core.errors import DataError, nearest

Message = Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """What is written before each turn; the defaults give "\\n\\nHuman: hi\\n\\nAssistant: hello".

    The cue of a prompt is `assistant` without trailing space: the reply's first token brings its own.
    """

    user: str = "\n\nHuman: "
    assistant: str = "\n\nAssistant: "
    system: str = "\n\nSystem: "

    def prefix(self, role: str) -> str:
        """Return what is written before a turn of `role`: user (human), assistant (gpt) or system."""
        prefixes = {"user": self.user, "assistant": self.assistant, "system": self.system}
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
        if role not in prefixes:
            raise DataError(f"role = {role!r} must be user, assistant or system.{nearest(role, prefixes)} Rename it.")
        return prefixes[role]

    @property
    def cue(self) -> str:
        """What ends a prompt: the next words are the assistant's."""
        return self.assistant.rstrip()

    @property
    def human_mark(self) -> str:
        """What starts a human turn, spaces aside."""
        return self.user.rstrip()


def render(messages: Sequence[Message], chat: ChatFormat) -> str:
    """Return a dialogue as text; contents are stripped, as HH's own turns are."""
    return "".join(chat.prefix(message["role"]) + message["content"].strip() for message in messages)


def render_prompt(messages: Sequence[Message], chat: ChatFormat) -> str:
    """Return a dialogue as a prompt that the assistant is to answer."""
    return render(messages, chat) + chat.cue


def check_messages(value: object, field: str) -> list[dict[str, str]]:
    """Return `value` as a list of messages.

    Raises:
      DataError: it is not a list of `{"role": str, "content": str}`, or it is empty.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f'{field} must be a list of messages {{"role": ..., "content": ...}} that is not empty.')
    messages = []
    for n, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise DataError(f'{field}[{n}] must be an object {{"role": ..., "content": ...}}, not {_name(message)}.')
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise DataError(f"{field}[{n}].{key} must be a text, not {_name(message.get(key))}. Set it.")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def _name(value: object) -> str:
    return "missing" if value is None else type(value).__name__
