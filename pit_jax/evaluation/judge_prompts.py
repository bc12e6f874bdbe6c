"""What a language model that judges is told: templates as text files, and how its verdict is read.

    ### system
    You are an impartial judge. ... "[[A]]" ... "[[B]]" ... "[[C]]" ...
    ### user
    {prompt} ... {first} ... {second}

`{prompt}`, `{first}` and `{second}` occur once each in the user's part; `{{` and `}}` are braces. A file without these
headings is a user's message, for models that know no system's.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import math
import pathlib
import re
from typing import Any

from pit_jax.core.errors import DataError, invalid, nearest
from pit_jax.evaluation.pairwise import Question
from pit_jax.text.chat import Message
from pit_jax.text.template import Literally, parse

FIELDS = ("prompt", "first", "second")
OUTCOMES = {"a": 1.0, "b": -1.0, "c": 0.0, "tie": 0.0}
VERDICT_SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "verdict",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {
                "explanation": {"type": "string"},
                "verdict": {"type": "string", "enum": ["A", "B", "C"]},
            },
            "required": ["explanation", "verdict"],
            "additionalProperties": False,
        },
    },
}
"""`response_format` of servers that bind their output to a schema; the explanation comes before the verdict."""
MOST_BRACES = 1000
"""Braces of a reply at which a JSON object is looked for."""
_HEADINGS = re.compile(r"\s*^### system *\n(.*?)\n### user *\n(.*)", re.DOTALL | re.MULTILINE)
_MARK = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgePrompt:
    """A template for questions about two responses.

    name: of the file, for errors and reports. system: the system's message, empty for none.
    user: with {prompt}, {first} and {second}.
    """

    name: str
    system: str
    user: str

    def __post_init__(self) -> None:
        """Parse both parts, so that a mistake shows at once."""
        parse(self.user, FIELDS, f"the user's part of judge prompt {self.name}")
        parse(self.system, (), f"the system's part of judge prompt {self.name}")

    def messages(self, question: Question) -> list[Message]:
        """Return the conversation to be answered; what looks like a field in a response stays as it is."""
        texts = question._asdict()
        pieces = parse(self.user, FIELDS, self.name)
        user = "".join(piece.text if isinstance(piece, Literally) else texts[piece.name] for piece in pieces)
        system = "".join(piece.text for piece in parse(self.system, (), self.name) if isinstance(piece, Literally))
        first = [{"role": "system", "content": system}] if system else []
        return [*first, {"role": "user", "content": user}]


def shipped() -> list[str]:
    """Return the names of the templates that come with pit_jax."""
    folder = importlib.resources.files("pit_jax.evaluation") / "prompts"
    return sorted(entry.name.removesuffix(".txt") for entry in folder.iterdir() if entry.name.endswith(".txt"))


def load(name: str) -> JudgePrompt:
    """Return a template by its name, or from a file ending in `.txt`.

    Raises:
      ConfigError: there is no such template, or its fields are wrong.
      DataError: the file is not UTF-8.
    """
    path = pathlib.Path(name)
    if name in shipped():
        text = (importlib.resources.files("pit_jax.evaluation") / "prompts" / f"{name}.txt").read_text("utf-8")
    elif path.suffix == ".txt" and path.is_file():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    else:
        rule = f"be one of {shipped()}, or a .txt file that exists"
        raise invalid("template", name, rule, f"Check the name.{nearest(name, shipped())}")
    found = _HEADINGS.fullmatch(text)
    system, user = found.groups() if found else ("", text)
    return JudgePrompt(name=path.name.removesuffix(".txt"), system=system.strip(), user=user.strip())


def read_verdict(text: str) -> float:
    """Return what a judge's reply says: +1 for A, -1 for B, 0 for C or a tie, nan if it says nothing of the kind.

    A JSON object with "verdict" counts before marks such as [[A]]; of several the last one, which follows the
    explanation. Reasoning and code fences around them do no harm.
    """
    words = [word for found in _objects(text) if (word := str(found.get("verdict")).strip(" []").lower()) in OUTCOMES]
    words = words or [word.lower() for word in _MARK.findall(text)]
    return OUTCOMES[words[-1]] if words else math.nan


def _objects(text: str) -> list[dict[str, Any]]:
    """Return the JSON objects in a text, those inside of others left out."""
    found, start = [], text.find("{")
    # Bounded, because each try may read to the end of what is no JSON at all.
    for _ in range(MOST_BRACES):
        if start < 0:
            break
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except RecursionError:
            break
        except ValueError:
            end = start + 1
        else:
            found.append(value)
        start = text.find("{", end)
    return found
