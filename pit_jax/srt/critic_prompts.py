"""What a critic that is a language model is told: templates as text files.

    ### system
    You are a strict and helpful critic. ...
    ### user
    {prompt} ... {response} ...

`{prompt}` and `{response}` occur once each in the user's part; `{{` and `}}` are braces. A file that does not begin
with these headings is a user's message, for models that know no system's.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import pathlib
import re

from pit_jax.core.errors import DataError, invalid, nearest
from pit_jax.text.chat import Message
from pit_jax.text.template import Literally, parse

FIELDS = ("prompt", "response")
_HEADINGS = re.compile(r"\s*^### system *\n(.*?)\n### user *\n(.*)", re.DOTALL | re.MULTILINE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticPrompt:
    """A template for questions about one response.

    name: of the file, for errors. system: the system's message, empty for none. user: with {prompt} and {response}.
    """

    name: str
    system: str
    user: str

    def __post_init__(self) -> None:
        """Parse both parts, so that a mistake shows at once."""
        parse(self.user, FIELDS, f"the user's part of critic prompt {self.name}")
        parse(self.system, (), f"the system's part of critic prompt {self.name}")

    def messages(self, prompt: str, response: str) -> list[Message]:
        """Return the conversation to be answered; what looks like a field in a response stays as it is."""
        texts = {"prompt": prompt, "response": response}
        pieces = parse(self.user, FIELDS, self.name)
        user = "".join(piece.text if isinstance(piece, Literally) else texts[piece.name] for piece in pieces)
        system = "".join(piece.text for piece in parse(self.system, (), self.name) if isinstance(piece, Literally))
        first = [{"role": "system", "content": system}] if system else []
        return [*first, {"role": "user", "content": user}]


def shipped() -> list[str]:
    """Return the names of the templates that come with pit_jax."""
    folder = importlib.resources.files("pit_jax.srt") / "prompts"
    return sorted(entry.name.removesuffix(".txt") for entry in folder.iterdir() if entry.name.endswith(".txt"))


def load(name: str) -> CriticPrompt:
    """Return a template by its name, or from a file ending in `.txt`.

    Raises:
      ConfigError: there is no such template, or its fields are wrong.
      DataError: the file is not UTF-8.
    """
    path = pathlib.Path(name)
    if name in shipped():
        text = (importlib.resources.files("pit_jax.srt") / "prompts" / f"{name}.txt").read_text("utf-8")
    elif path.suffix == ".txt" and path.is_file():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    else:
        rule = f"be one of {shipped()}, or a .txt file that exists"
        raise invalid("critic prompt", name, rule, f"Check the name.{nearest(name, shipped())}")
    found = _HEADINGS.fullmatch(text)
    system, user = found.groups() if found else ("", text)
    return CriticPrompt(name=path.name.removesuffix(".txt"), system=system.strip(), user=user.strip())
