"""Dialogues as text: conversational messages `[{role, content}]`, by default in the Anthropic HH form."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from pit_jax.core.errors import DataError, nearest

Message = Mapping[str, str]
_PLAIN = {"human": "user", "gpt": "assistant"}
_TOOLS = ("tool_calls", "function_call", "tool_call_id")


class Chat(Protocol):
    """How prompts are written: `ChatFormat`, or a model's chat template (`chat_template.TemplateChat`)."""

    @property
    def text(self) -> ChatFormat:
        """How dialogues that are given as one text are marked."""
        ...

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return a conversation as a prompt that the assistant is to answer."""
        ...

    def text_prompt(self, text: str) -> str:
        """Return the prompt of a text."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of everything that decides how prompts are written."""
        ...


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
        role = as_plain(role)
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

    @property
    def text(self) -> ChatFormat:
        """This format itself."""
        return self

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return `render_prompt` of the messages."""
        return render_prompt(messages, self)

    def text_prompt(self, text: str) -> str:
        """Return the text as it is."""
        return text

    def fingerprint(self) -> str:
        """Return the words themselves."""
        return repr(dataclasses.astuple(self))

    def messages(self, text: str) -> list[Message] | None:
        """Return the messages of a dialogue written in this form, None if the text is none.

        A dialogue begins with a user's or the system's mark; white space around its turns is stripped, and the
        assistant's mark at its end, which asks for the next turn, is no message.
        """
        marks = {self.prefix(role).strip(): role for role in ("user", "assistant", "system")}
        first = [mark for mark, role in marks.items() if role != "assistant" and text.lstrip().startswith(mark)]
        if not first or not all(marks):
            return None
        # Inside of a text a mark counts only with the line breaks that belong to it.
        whole = {self.prefix(role).rstrip(): role for role in marks.values()}
        lead = next(mark for mark in whole if mark.strip() == first[0])
        cut = re.split("(" + "|".join(map(re.escape, whole)) + ")", lead + text.lstrip()[len(first[0]) :])
        turns = [(whole[mark], content.strip()) for mark, content in zip(cut[1::2], cut[2::2], strict=True)]
        if turns[-1] == ("assistant", ""):
            turns.pop()
        return [{"role": role, "content": content} for role, content in turns]


def as_plain(role: str) -> str:
    """Return "user" and "assistant" for their other names."""
    return _PLAIN.get(role, role)


def check_conversation(messages: Sequence[Message]) -> list[Message]:
    """Return messages with plain roles, if they are what an assistant can be asked to answer.

    Raises:
      DataError: they do not end with a user's message that says something.
    """
    plain = [{"role": as_plain(message["role"]), "content": message["content"]} for message in messages]
    roles = [message["role"] for message in plain]
    if not roles or roles[-1] != "user":
        raise DataError(
            f"a prompt must end with a user's message, but its roles are {roles}. Move the assistant's last message to "
            "the replies, or leave the record out."
        )
    if not plain[-1]["content"].strip():
        raise DataError("the last user's message of the prompt is empty. Remove the record.")
    return list(plain)


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
        tools = [key for key in _TOOLS if message.get(key)]
        if tools or message.get("role") in ("tool", "function"):
            raise DataError(
                f"{field}[{n}] uses tools ({', '.join(tools) or message['role']}), which are not supported. "
                "Remove the record."
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise DataError(f"{field}[{n}].{key} must be a text, not {_name(message.get(key))}. Set it.")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def _name(value: object) -> str:
    return "missing" if value is None else type(value).__name__
