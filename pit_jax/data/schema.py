"""The one schema of preference data, and the four shapes of raw records that are read into it.

    1  explicit prompt     {"prompt": "...", "chosen": "reply", "rejected": "reply"}
    2  implicit prompt     {"chosen": "whole dialogue", "rejected": "whole dialogue"}           the HH form
    3  messages            {"prompt": [{role, content}, ...], "chosen": [message], "rejected": [message]}
    4  messages, implicit  {"chosen": [message, ...], "rejected": [message, ...]}

`id` and `group` are optional; further fields are ignored, but tools are refused. How prompts are written is a setting
(`text.chat.Chat`): a text is kept as it is, to the last space, or written by a model's chat template; replies are
stripped of white space at both ends, because sources differ there and a model would learn the difference.
A dialogue is cut at its *last* assistant turn, never where the two dialogues happen to part: replies often begin
alike.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Mapping, Sequence

from pit_jax.core.errors import DataError
from pit_jax.text.chat import Chat, ChatFormat, Message, as_plain, check_messages, render, render_prompt

_FIELDS = ("prompt", "chosen", "rejected", "id", "group")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One preference: `chosen` is the better answer to `prompt`, `rejected` the worse.

    `group` is what folds are cut by: records that share it never fall into different folds.
    """

    id: str
    group: str
    prompt: str
    chosen: str
    rejected: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """One text for language-model pre-training."""

    id: str
    group: str
    text: str


def content_hash(*texts: str) -> str:
    """Return 12 hexadecimal digits that depend on the texts and where they part."""
    digest = hashlib.blake2s(digest_size=6)
    for text in texts:
        data = text.encode("utf-8", errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def default_group(prompt: str, chat: ChatFormat) -> str:
    """Return the hash of a dialogue's first human turn, or of the whole prompt where there is none."""
    _, mark, rest = prompt.partition(chat.human_mark)
    first = rest.split(chat.cue, 1)[0].split(chat.human_mark, 1)[0] if mark else prompt
    return content_hash(first.strip())


def parse(raw: Mapping[str, object], chat: Chat = ChatFormat()) -> Record:  # noqa: B008 (frozen)
    """Return the record of one raw object of any of the four shapes.

    Args:
      raw: the object, for example a parsed line of JSON.
      chat: how prompts are written, and where a dialogue that is given as text is cut.
    Raises:
      DataError: a field is missing, empty or of the wrong type, or the two dialogues have different prompts.
    """
    for field in ("chosen", "rejected"):
        if raw.get(field) is None:
            hint = _misspelt(field, raw)
            raise DataError(f"field {field!r} is missing.{hint} A preference needs `chosen` and `rejected`.")
    if raw.get("tools"):
        raise DataError("field 'tools' is given, but tools are not supported. Remove the record.")
    if raw.get("prompt") is None:
        asked, chosen, rejected = _implicit(raw["chosen"], raw["rejected"], chat.text)
    else:
        asked = _prompt(raw["prompt"], chat.text)
        chosen, rejected = (_reply(raw[field], field) for field in ("chosen", "rejected"))
    texts = {"prompt": asked.written(chat), "chosen": chosen.strip(), "rejected": rejected.strip()}
    for field, text in texts.items():
        if not text.strip():
            raise DataError(f"field {field!r} is empty. Remove the record.")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(f"field {field!r} holds half a surrogate pair, which is no character. Mend its escapes.")
    return Record(
        id=_label(raw, "id") or content_hash(*texts.values()),
        group=_label(raw, "group") or default_group(asked.text, chat.text),
        **texts,
    )


def _misspelt(field: str, raw: Mapping[str, object]) -> str:
    """Return what to do if a field looks like a misspelt `field`, an empty string otherwise."""
    close = difflib.get_close_matches(field, [str(key) for key in raw if key not in _FIELDS], n=1)
    return f" Rename {close[0]!r} to {field!r}." if close else ""


def _label(raw: Mapping[str, object], field: str) -> str:
    value = raw.get(field, "")
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(
            f"field {field!r} must be a text or an integer, not {type(value).__name__}. Change or remove it."
        )
    return str(value)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A prompt before it is written: as text in the form of dialogues, and as the messages it was given by, if so."""

    text: str
    messages: Sequence[Message] | None = None

    def written(self, chat: Chat) -> str:
        """Return the prompt as a model is to read it."""
        if not self.text.strip():
            raise DataError("field 'prompt' is empty. Remove the record.")
        return chat.text_prompt(self.text) if self.messages is None else chat.prompt(self.messages)


def _prompt(value: object, form: ChatFormat) -> _Asked:
    if isinstance(value, str):
        return _Asked(value)
    if not isinstance(value, list):
        raise DataError(f"field 'prompt' must be a text or a list of messages, not {type(value).__name__}. Change it.")
    messages = check_messages(value, "prompt")
    if as_plain(messages[-1]["role"]) == "assistant":
        raise DataError("field 'prompt' ends with an assistant's message. Move it to `chosen` and `rejected`.")
    return _Asked(render_prompt(messages, form), messages)


def _reply(value: object, field: str) -> str:
    """Return the reply of a record with a prompt: a text, or one assistant message."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(f"field {field!r} must be a text or a list of messages, not {type(value).__name__}. Change it.")
    messages = check_messages(value, field)
    if len(messages) != 1 or messages[0]["role"] not in ("assistant", "gpt"):
        roles = [message["role"] for message in messages]
        raise DataError(
            f"field {field!r} has messages of {roles}, but beside a prompt it must be one assistant's message. "
            "Put the messages before it into `prompt`, or leave `prompt` out and give whole dialogues."
        )
    return messages[0]["content"]


def _implicit(chosen: object, rejected: object, form: ChatFormat) -> tuple[_Asked, str, str]:
    """Return (prompt, chosen reply, rejected reply) of two whole dialogues."""
    (asked, better), (second, worse) = (
        _cut_dialogue(value, field, form) for value, field in ((chosen, "chosen"), (rejected, "rejected"))
    )
    prompt, other = asked.text, second.text
    if prompt != other:
        at = next((n for n, pair in enumerate(zip(prompt, other, strict=False)) if pair[0] != pair[1]), 0)
        at = at or min(len(prompt), len(other))
        raise DataError(
            "the dialogues of `chosen` and `rejected` differ before their last assistant turn, at character "
            f"{at}: {prompt[at : at + 30]!r} against {other[at : at + 30]!r}. "
            "Give an explicit `prompt`, or remove the record."
        )
    return asked, better, worse


def _cut_dialogue(value: object, field: str, chat: ChatFormat) -> tuple[_Asked, str]:
    """Return a dialogue up to its last assistant turn (that turn's cue included), and that turn."""
    if isinstance(value, list):
        messages = check_messages(value, field)
        if len(messages) < 2 or messages[-1]["role"] not in ("assistant", "gpt"):
            raise DataError(
                f"field {field!r} must end with an assistant's message after at least one other. "
                "Give whole dialogues, or an explicit `prompt`."
            )
        before = messages[:-1]
        return _Asked(render(before, chat) + chat.cue, before), messages[-1]["content"]
    if not isinstance(value, str):
        raise DataError(f"field {field!r} must be a text or a list of messages, not {type(value).__name__}. Change it.")
    before, cue, reply = value.rpartition(chat.cue)
    if not cue:
        raise DataError(
            f"there is no `prompt`, and {field!r} is no dialogue: it has no {chat.cue!r}. "
            f"Give an explicit `prompt`, or dialogues in the form {chat.user + '...' + chat.assistant + '...'!r}."
        )
    return _Asked(before + cue), reply
