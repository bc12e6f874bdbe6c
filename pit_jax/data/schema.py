"""The one schema of preference data, and the four shapes of raw records that are read into it.

    1  explicit prompt     {"prompt": "...", "chosen": "reply", "rejected": "reply"}
    2  implicit prompt     {"chosen": "whole dialogue", "rejected": "whole dialogue"}           the HH form
    3  messages            {"prompt": [{role, content}, ...], "chosen": [message], "rejected": [message]}
    4  messages, implicit  {"chosen": [message, ...], "rejected": [message, ...]}

`id` and `group` are optional; further fields are ignored. Prompts are kept as they are, to the last space; replies
are stripped of white space at both ends, because sources differ there and a model would learn the difference.
A dialogue is cut at its *last* assistant turn, never where the two dialogues happen to part: replies often begin
alike.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Mapping

from pit_jax.core.errors import DataError
from pit_jax.text.chat import ChatFormat, check_messages, render, render_prompt

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


def parse(raw: Mapping[str, object], chat: ChatFormat = ChatFormat()) -> Record:  # noqa: B008 (frozen)
    """Return the record of one raw object of any of the four shapes.

    Args:
      raw: the object, for example a parsed line of JSON.
      chat: how messages are written as text, and where a dialogue is cut.
    Raises:
      DataError: a field is missing, empty or of the wrong type, or the two dialogues have different prompts.
    """
    for field in ("chosen", "rejected"):
        if raw.get(field) is None:
            hint = _misspelt(field, raw)
            raise DataError(f"field {field!r} is missing.{hint} A preference needs `chosen` and `rejected`.")
    if raw.get("prompt") is None:
        prompt, chosen, rejected = _implicit(raw["chosen"], raw["rejected"], chat)
    else:
        prompt = _prompt(raw["prompt"], chat)
        chosen, rejected = (_reply(raw[field], field) for field in ("chosen", "rejected"))
    texts = {"prompt": prompt, "chosen": chosen.strip(), "rejected": rejected.strip()}
    for field, text in texts.items():
        if not text.strip():
            raise DataError(f"field {field!r} is empty. Remove the record.")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(f"field {field!r} holds half a surrogate pair, which is no character. Mend its escapes.")
    return Record(
        id=_label(raw, "id") or content_hash(*texts.values()),
        group=_label(raw, "group") or default_group(prompt, chat),
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


def _prompt(value: object, chat: ChatFormat) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(f"field 'prompt' must be a text or a list of messages, not {type(value).__name__}. Change it.")
    messages = check_messages(value, "prompt")
    if chat.prefix(messages[-1]["role"]) == chat.assistant:
        raise DataError("field 'prompt' ends with an assistant's message. Move it to `chosen` and `rejected`.")
    return render_prompt(messages, chat)


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


def _implicit(chosen: object, rejected: object, chat: ChatFormat) -> tuple[str, str, str]:
    """Return (prompt, chosen reply, rejected reply) of two whole dialogues."""
    (prompt, better), (other, worse) = (
        _cut_dialogue(value, field, chat) for value, field in ((chosen, "chosen"), (rejected, "rejected"))
    )
    if prompt != other:
        at = next((n for n, pair in enumerate(zip(prompt, other, strict=False)) if pair[0] != pair[1]), 0)
        at = at or min(len(prompt), len(other))
        raise DataError(
            "the dialogues of `chosen` and `rejected` differ before their last assistant turn, at character "
            f"{at}: {prompt[at : at + 30]!r} against {other[at : at + 30]!r}. "
            "Give an explicit `prompt`, or remove the record."
        )
    return prompt, better, worse


def _cut_dialogue(value: object, field: str, chat: ChatFormat) -> tuple[str, str]:
    """Return a dialogue up to its last assistant turn (that turn's cue included), and that turn."""
    if isinstance(value, list):
        messages = check_messages(value, field)
        if len(messages) < 2 or messages[-1]["role"] not in ("assistant", "gpt"):
            raise DataError(
                f"field {field!r} must end with an assistant's message after at least one other. "
                "Give whole dialogues, or an explicit `prompt`."
            )
        return render(messages[:-1], chat) + chat.cue, messages[-1]["content"]
    if not isinstance(value, str):
        raise DataError(f"field {field!r} must be a text or a list of messages, not {type(value).__name__}. Change it.")
    before, cue, reply = value.rpartition(chat.cue)
    if not cue:
        raise DataError(
            f"there is no `prompt`, and {field!r} is no dialogue: it has no {chat.cue!r}. "
            f"Give an explicit `prompt`, or dialogues in the form {chat.user + '...' + chat.assistant + '...'!r}."
        )
    return before + cue, reply
