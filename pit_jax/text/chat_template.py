"""Chat templates: a model's own way of writing a conversation, as its checkpoint ships it (Jinja, in a sandbox).

A rendered conversation is cut into what PIT needs:

    <bos> | prompt ................................ | cue ............................ | answer | close ...
          | <|user|> Hi <|assistant|> Hello <|user|> Bye | <|end|> <|assistant|> ......... | Ciao   | <|end|> ...

`prompt` reaches to the end of the last user's words; `cue` and `close` are the same in every conversation, which is
checked by rendering conversations of marks. So a reference can be put between prompt and cue, inside of the user's
turn; the loss is on the answer and the first token of `close`. BOS is left out here: `Codec` adds it.

Templates come from strangers: they are rendered by an immutable sandbox, and see only texts.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from etils import epath

from pit_jax.core.errors import DataError, invalid
from pit_jax.core.hub import is_hub_name, locate
from pit_jax.text.chat import ChatFormat, Message, as_plain, check_conversation
from pit_jax.text.special import CHAT_TEMPLATE, TOKENIZER_CONFIG, Facts, read_files
from pit_jax.text.template import Templates

_log = logging.getLogger(__name__)
DATE = "2024-07-26"
"""What a template that writes today's date is told while training: the day that Llama 3's falls back on.

Prompts would otherwise change from one day to the next, and no run could be resumed after midnight.
"""
_USER, _ANSWER, _SYSTEM = "usrMARK{}", "ansMARK{}", "sysMARK"


class _Generation(jinja2.ext.Extension):
    """Accepts `{% generation %}`, by which templates mark what the assistant wrote; it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 reads it from the class)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the block's body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Write JSON as it is: jinja2's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _environment(day: datetime.datetime | None) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    now: Callable[[str], str] = lambda form: (day or datetime.datetime.now()).strftime(form)  # noqa: E731
    environment.globals |= {"raise_exception": _refuse, "strftime_now": now}
    return environment


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the special tokens it may write.

    Attributes:
      source: Jinja.
      tokens: (role, token) of the special tokens, such as ("bos_token", "<s>"), which the template reads by role.
      where: the file, for errors.
      date: what `strftime_now` is told, as YYYY-MM-DD; None is now.
    Raises:
      DataError: the source is no Jinja, named with its line.
    """

    source: str
    tokens: tuple[tuple[str, str], ...] = ()
    where: str = dataclasses.field(default="the chat template", compare=False)
    date: str | None = DATE

    def __post_init__(self) -> None:
        """Compile, so that a mistake shows where it was made."""
        _ = self._compiled

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            day = None if self.date is None else datetime.datetime.fromisoformat(self.date)
        except ValueError as error:
            raise invalid("date", self.date, "be written YYYY-MM-DD", f"{DATE!r} is usual.") from error
        try:
            return _environment(day).from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"{self.where}: line {error.lineno} of the chat template is no Jinja: {error.message}. Mend it."
            ) from error

    def render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """Return a conversation as the template writes it, BOS included; `ask` opens the assistant's next turn.

        Raises:
          DataError: the template refuses the conversation, for example a role it does not know.
        """
        plain = [{"role": as_plain(message["role"]), "content": message["content"]} for message in messages]
        try:
            return self._compiled.render(
                messages=plain, add_generation_prompt=ask, tools=None, documents=None, **dict(self.tokens)
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise DataError(f"{self.where}: the chat template refuses a conversation: {error}") from error

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return a conversation up to the end of the last user's content, without BOS.

        Raises:
          DataError: it does not end with a user's turn that says something, or the template refuses it or rewrites the
            user's words.
        """
        plain = check_conversation(messages)
        text = self._without_bos(self.render(plain, ask=True))
        opening, content = self._parts.opening, plain[-1]["content"].strip()
        before = text.removesuffix(opening)
        if not text.endswith(opening) or not before.rstrip().endswith(content):
            raise DataError(
                f"{self.where}: the chat template writes something else than {opening!r} after the last "
                f"user's turn, or changes its words: {text[-80:]!r}. Use another template."
            )
        return before

    @property
    def cue(self) -> str:
        """What stands between the last user's words and the assistant's first one."""
        return self._parts.cue

    @property
    def close(self) -> str:
        """What follows the assistant's words; its first token ends the answer. Empty if the template writes nothing."""
        return self._parts.close

    @property
    def opens_with_bos(self) -> bool:
        """Whether a rendered conversation begins with BOS."""
        return self._parts.bos

    def matches(self, templates: Templates) -> bool:
        """Return whether `templates` go on where this template's prompts end: all end with its cue, and BOS agrees."""
        texts = (templates.policy, templates.improver, templates.gap)
        return templates.bos == self.opens_with_bos and all(text.endswith(_escaped(self.cue)) for text in texts)

    def fingerprint(self) -> str:
        """Return a hash of everything that decides what is rendered."""
        content = json.dumps([self.source, sorted(self.tokens), self.date])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def _bos(self) -> str:
        return dict(self.tokens).get("bos_token", "")

    def _without_bos(self, text: str) -> str:
        if not self._parts.bos:
            return text
        rest = text.removeprefix(self._bos)
        if rest == text or rest.startswith(self._bos):
            raise DataError(
                f"{self.where}: a rendered conversation must begin with {self._bos!r} once, but begins {text[:40]!r}. "
                "Correct the template."
            )
        return rest

    @functools.cached_property
    def _parts(self) -> _Parts:
        return _find_parts(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts:
    """What rendering marks has shown: `opening` is what `ask` writes after the user's words."""

    bos: bool
    opening: str
    cue: str
    close: str


def _conversations(template: ChatTemplate) -> list[list[Message]]:
    """Return conversations of marks that end with the assistant: one turn, three turns, with a system's if allowed."""
    turns = [{"role": role, "content": mark.format(n)} for n in range(3) for role, mark in _ROLES]
    talks: list[list[Message]] = [[*turns[: 2 * n]] for n in (1, 3)]
    system = {"role": "system", "content": _SYSTEM}
    try:
        template.render([system, *talks[0]])
    except DataError:
        return talks
    return [*talks, *([system, *talk] for talk in talks)]


_ROLES = (("user", _USER), ("assistant", _ANSWER))


def _find_parts(template: ChatTemplate) -> _Parts:
    found: dict[_Parts, None] = {}
    for talk in _conversations(template):
        found[_parts_of(template, talk)] = None
    first, *others = found
    if others:
        raise DataError(
            f"{template.where}: the chat template must write the same around every answer, but writes {first} and "
            f"{others[0]}. Use another template."
        )
    return first


def _parts_of(template: ChatTemplate, talk: Sequence[Message]) -> _Parts:
    """Return what a template writes around the last answer of a conversation of marks."""
    where, user, answer = template.where, talk[-2]["content"], talk[-1]["content"]
    whole, asked = template.render(talk), template.render(talk[:-1], ask=True)
    if asked.count(user) != 1 or whole.count(user) != 1:
        raise DataError(f"{where}: the chat template must write the user's words once, as they are. Use another one.")
    if whole.count(answer) != 1:
        raise DataError(
            f"{where}: the chat template must write the assistant's words once, as they are, but writes them "
            f"{whole.count(answer)} times: there would be nothing to train on. Use another template."
        )
    bos = dict(template.tokens).get("bos_token", "")
    opens = bool(bos) and asked.startswith(bos)
    if opens and asked.startswith(bos + bos):
        raise DataError(f"{where}: the chat template begins with {bos!r} twice. Correct it.")
    opening = asked.partition(user)[2]
    between, close = whole.partition(user)[2].split(answer)
    return _Parts(bos=opens, opening=opening, cue=_cue(opening, between, where), close=close)


def _cue(opening: str, between: str, where: str) -> str:
    """Return what comes before an answer: what `ask` writes, and what stands before the words of a whole turn.

    They differ where a template opens a thinking block for one of them, or writes a space before the answer: the first
    is decided by what whole turns show, which is what is trained on; the space is what the tokenizer puts there.
    """
    if between.rstrip(" ") == opening.rstrip(" "):
        return opening
    if not between or not (between.startswith(opening) or opening.startswith(between)):
        raise DataError(
            f"{where}: the chat template asks for an answer by {opening!r}, but writes {between!r} before one. "
            "Use another template."
        )
    return between


def find_chat_template(files: Mapping[str, bytes], where: str, *, date: str | None = DATE) -> ChatTemplate | None:
    """Return the chat template of a tokenizer's files, None where they have none.

    `chat_template.jinja` wins over `chat_template` of `tokenizer_config.json`, a text or several named ones, of which
    "default" is taken.

    Raises:
      DataError: the template is no Jinja, or none of several is named "default".
    """
    facts = Facts(files, where)
    source = facts.config.get("chat_template")
    if CHAT_TEMPLATE in files:
        source = files[CHAT_TEMPLATE].decode("utf-8", errors="replace")
        where = f"{where}/{CHAT_TEMPLATE}"
    elif isinstance(source, list | Mapping):
        pairs = [(item.get("name"), item.get("template")) for item in source if isinstance(item, Mapping)]
        named = dict(source.items() if isinstance(source, Mapping) else pairs)
        if "default" not in named:
            raise DataError(
                f"{where}: chat_template of {TOKENIZER_CONFIG} names {sorted(map(str, named))}, but none of them "
                "'default'. Write the one to be used into a .jinja file and name that."
            )
        source = named["default"]
    if source is None:
        return None
    if not isinstance(source, str):
        raise DataError(f"{where}: chat_template of {TOKENIZER_CONFIG} must be a text, not {type(source).__name__}.")
    return ChatTemplate(source, tuple(facts.named().items()), where, date)


def turn_end(template: ChatTemplate | None, where: str) -> tuple[str, bool]:
    """Return what a tokenizer needs of its template: what ends an assistant's turn, and whether BOS is written.

    A template that PIT cannot use leaves the tokenizer usable: the log says why, and so does an error to whoever asks
    for the template itself.
    """
    if template is None:
        return "", False
    try:
        return template.close.lstrip(), template.opens_with_bos
    except DataError as error:
        _log.warning("%s: the chat template is left aside: %s", where, error)
        return "", False


def load_chat_template(path: epath.PathLike, *, date: str | None = DATE) -> ChatTemplate:
    """Return the chat template of a tokenizer's directory, or of a .jinja file.

    A file is given the special tokens of the tokenizer files beside it, if there are any.

    Raises:
      DataError: there is none, or it is no Jinja.
    """
    place = locate(path) if is_hub_name(os.fspath(path)) else epath.Path(path)
    if place.is_dir():
        template = find_chat_template(read_files(place), str(place), date=date)
        if template is None:
            raise DataError(
                f"{place}: the tokenizer has no chat template ({CHAT_TEMPLATE}, or chat_template in "
                f"{TOKENIZER_CONFIG}). Name a .jinja file, or leave the chat template out: prompts are then plain text."
            )
        return template
    if not place.exists():
        raise DataError(f"{place}: there is no such chat template. Name a tokenizer's directory or a .jinja file.")
    tokens = Facts(read_files(place.parent), str(place.parent)).named()
    source = place.read_text()
    for role in ("bos_token", "eos_token"):
        if role in source and role not in tokens and not (place.parent / TOKENIZER_CONFIG).exists():
            raise DataError(
                f"{place}: the chat template writes {role}, but no {TOKENIZER_CONFIG} beside it says what that is. "
                "Put the file into the tokenizer's directory."
            )
    return ChatTemplate(source, tuple(tokens.items()), str(place), date)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplateChat:
    """Dialogues written by a model's chat template: a setting of `ReadConfig.chat`.

    Messages are rendered. A plain text is the one message of a user, unless it is a dialogue in the form of `text`,
    which is taken apart into messages first.

    Attributes:
      path: a tokenizer's directory, or a .jinja file.
      date: what a template that writes today's date is told, as YYYY-MM-DD.
      text: how dialogues are written in texts.
    """

    path: str
    date: str = DATE
    text: ChatFormat = ChatFormat()

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The template, read on first use; DataError if there is none, or it cannot be used."""
        return load_chat_template(self.path, date=self.date)

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return `ChatTemplate.prompt`."""
        return self.template.prompt(messages)

    def check(self, templates: Templates) -> None:
        """Check that prompts written by the template meet templates that go on where they end.

        Raises:
          ConfigError: they do not, so that a model would never be asked for an answer, or BOS would be wrong.
        """
        template = self.template
        if not template.matches(templates):
            raise invalid(
                "Experiment.templates",
                templates,
                f"end with {template.cue!r} and have bos = {template.opens_with_bos}, as the chat template of "
                f"ReadConfig.chat ({self.path}) has it",
                "Bind run.Experiment.templates = @chat_template.chat_templates() with the same path.",
            )

    def text_prompt(self, text: str) -> str:
        """Return the prompt of a text: a dialogue, or else one user's message."""
        return self.prompt(self.text.messages(text) or [{"role": "user", "content": text}])

    def fingerprint(self) -> str:
        """Return a hash of the template's content, wherever it is stored."""
        return self.template.fingerprint()


IMPROVE = "\n\nReference answer:\n{reference}\n\nWrite a better answer than the reference answer. Reply with it only."


def chat_templates(path: epath.PathLike, improver: str = IMPROVE, gap: str = IMPROVE) -> Templates:
    """Return the prompts of the policy, the improver and the gap reward for a model with a chat template.

    The reference stands in the last user's turn, after the user's own words; every prompt ends with the template's cue.

    Args:
      path: a tokenizer's directory, or a .jinja file.
      improver: what the user adds for the improver; contains {reference}.
      gap: the same for the gap reward, whose candidate stands where the improver's answer does.
    Raises:
      DataError: there is no template, or it cannot be used.
      ConfigError: a text has no {reference}.
    """
    template = load_chat_template(path)
    cue = _escaped(template.cue)
    return Templates(
        policy="{prompt}" + cue,
        improver="{prompt}" + improver + cue,
        gap="{prompt}" + gap + cue,
        bos=template.opens_with_bos,
    )


def _escaped(text: str) -> str:
    """Return a text as a literal of `Templates`."""
    return text.replace("{", "{{").replace("}", "}}")
