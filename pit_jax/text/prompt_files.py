"""What language models are told, as text files: those that come with pit_jax, and a user's own.

A prompt of two parts looks like this:

    ### system
    You are a strict and helpful critic. ...
    ### user
    {prompt} ... {response} ...

Its fields occur once each in the user's part; `{{` and `}}` are braces. A file that does not begin with these headings
is a user's message, for models that know no system's.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import pathlib
import re
from importlib.resources.abc import Traversable
from typing import NamedTuple

from pit_jax.core.errors import DataError, invalid, nearest
from pit_jax.text.chat import Message
from pit_jax.text.template import Literally, Piece, parse

_HEADINGS = re.compile(r"\s*^### system *\n(.*?)\n### user *\n(.*)", re.DOTALL | re.MULTILINE)


class PromptFile(NamedTuple):
    """A file's name without `.txt`, and its text."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shelf:
    """Prompt files of one kind.

    package, folder: where those that come with pit_jax are. setting: which names one of them, for errors.
    """

    package: str
    folder: str
    setting: str

    def shipped(self) -> list[str]:
        """Return the names of the files that come with pit_jax."""
        return sorted(entry.name.removesuffix(".txt") for entry in self._all().iterdir() if entry.name.endswith(".txt"))

    def read(self, name: str) -> PromptFile:
        """Return a file by its name, or a user's own by a path that ends in `.txt`.

        Raises:
          ConfigError: there is no such file.
          DataError: the file is not UTF-8.
        """
        path = pathlib.Path(name)
        if name in self.shipped():
            return PromptFile(name, (self._all() / f"{name}.txt").read_text("utf-8"))
        if path.suffix != ".txt" or not path.is_file():
            rule = f"be one of {self.shipped()}, or a .txt file that exists"
            raise invalid(self.setting, name, rule, f"Check the name.{nearest(name, self.shipped())}")
        try:
            return PromptFile(path.name.removesuffix(".txt"), path.read_text("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error

    def _all(self) -> Traversable:
        return importlib.resources.files(self.package) / self.folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoParts:
    """A prompt of two parts.

    name: of the file, for errors and reports. system: the system's message, empty for none. user: with the fields.
    fields: what the user's part must have.
    """

    name: str
    system: str
    user: str
    fields: tuple[str, ...]

    def __post_init__(self) -> None:
        """Parse both parts, so that a mistake shows at once."""
        parse(self.user, self.fields, f"the user's part of prompt {self.name}")
        parse(self.system, (), f"the system's part of prompt {self.name}")

    def messages(self, **texts: str) -> list[Message]:
        """Return the conversation to be answered; what looks like a field in a text stays as it is."""
        system = fill(parse(self.system, (), self.name))
        first = [{"role": "system", "content": system}] if system else []
        return [*first, {"role": "user", "content": fill(parse(self.user, self.fields, self.name), **texts)}]


def two_parts(file: PromptFile, fields: tuple[str, ...]) -> TwoParts:
    """Return a file as a prompt of two parts.

    Raises:
      ConfigError: its fields are wrong.
    """
    found = _HEADINGS.fullmatch(file.text)
    system, user = found.groups() if found else ("", file.text)
    return TwoParts(name=file.name, system=system.strip(), user=user.strip(), fields=fields)


def fill(pieces: tuple[Piece, ...], **texts: str) -> str:
    """Return a parsed template with its fields filled in."""
    return "".join(piece.text if isinstance(piece, Literally) else texts[piece.name] for piece in pieces)
