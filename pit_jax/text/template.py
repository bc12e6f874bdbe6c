"""Prompt templates as data: how a prompt and a reference response become one longer prompt."""

from __future__ import annotations

import dataclasses
import string
from typing import Literal, NamedTuple

from pit_jax.core.errors import ConfigError, invalid, nearest

PromptKind = Literal["policy", "improver", "gap"]
FIELDS: dict[str, tuple[str, ...]] = {
    "policy": ("prompt",),
    "improver": ("prompt", "reference"),
    "gap": ("prompt", "reference"),
}


class Literally(NamedTuple):
    """A piece of a template that is the same in every prompt."""

    text: str


class Field(NamedTuple):
    """A place in a template where a text of the example goes."""

    name: str


Piece = Literally | Field


def parse(template: str, fields: tuple[str, ...], name: str) -> tuple[Piece, ...]:
    """Cut a template into literal pieces and fields; `{{` and `}}` are braces.

    Args:
      template: the text, for example "{prompt}\\n\\nReference answer:{reference}".
      fields: the names that must occur, each exactly once.
      name: of the setting, for errors.
    Raises:
      ConfigError: a field is unknown, missing, there twice or has a format, or the braces do not match.
    """
    pieces: list[Piece] = []
    try:
        for text, field, spec, conversion in string.Formatter().parse(template):
            if text:
                pieces.append(Literally(text))
            if field is None:
                continue
            if field not in fields:
                known = ", ".join(f"{{{known}}}" for known in fields)
                raise invalid(name, template, f"use only {known}", f"Remove {{{field}}}.{nearest(field, fields)}")
            if spec or conversion:
                raise invalid(name, template, "use fields without formats", f"Write plain {{{field}}}.")
            if Field(field) in pieces:
                raise invalid(name, template, "use each field once", f"Remove one {{{field}}}.")
            pieces.append(Field(field))
    except ValueError as error:
        fix = "Write {{ and }} for braces that are text."
        raise invalid(name, template, f"have matching braces ({error})", fix) from error
    for field in fields:
        if Field(field) not in pieces:
            raise invalid(name, template, f"contain {{{field}}}", "Add it where that text belongs.")
    return _merge_literals(pieces)


def _merge_literals(pieces: list[Piece]) -> tuple[Piece, ...]:
    """Join neighbouring literals: an escaped brace ends one in `string.Formatter`, but tokens must not split there."""
    merged: list[Piece] = []
    for piece in pieces:
        if merged and isinstance(piece, Literally) and isinstance(merged[-1], Literally):
            merged[-1] = Literally(merged[-1].text + piece.text)
        else:
            merged.append(piece)
    return tuple(merged)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Templates:
    """The prompts of the policy M_P(y | x), the improver M_PIT(y | x, y_ref) and the gap reward r_gap(y, y_ref | x).

    The response follows the prompt directly. Pieces are tokenised one by one, so a token never straddles a
    field's border: write every space and line break the model is to see.

    Attributes:
      policy: contains {prompt}.
      improver: contains {prompt} and {reference}.
      gap: the same; what follows it is the candidate.
      bos: start every prompt with the tokenizer's BOS if it has one.
    """

    policy: str = "{prompt}"
    improver: str = "{prompt}\n\nReference answer:{reference}\n\nImproved answer:"
    gap: str = "{prompt}\n\nReference answer:{reference}\n\nCandidate answer:"
    bos: bool = True

    def __post_init__(self) -> None:
        """Parse all three, so that a mistake shows where it was made."""
        for kind in FIELDS:
            self.pieces(kind)

    def pieces(self, kind: str) -> tuple[Piece, ...]:
        """Return the parsed template of "policy", "improver" or "gap"."""
        templates = {"policy": self.policy, "improver": self.improver, "gap": self.gap}
        if kind not in templates:
            raise ConfigError(f"There is no template {kind!r}.{nearest(kind, templates)} Use one of {list(templates)}.")
        return parse(templates[kind], FIELDS[kind], f"Templates.{kind}")
