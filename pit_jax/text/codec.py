"""From texts to the ids of prompts and responses: the one place where templates and lengths are applied."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from pit_jax.core.errors import DataError, invalid
from pit_jax.core.types import Prompts
from pit_jax.text.hf_tokenizer import HuggingFaceTokenizer
from pit_jax.text.template import Literally, PromptKind, Templates
from pit_jax.text.tokenizer import Tokenizer


class ResponseTooLong(DataError):
    """A response or reference has more tokens than `Lengths.targets` allows; it is never cut."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """Room in tokens.

    Attributes:
      inputs: for the policy's prompt, its template and BOS included; a longer prompt loses its beginning.
      targets: for a response, its EOS included; a longer one is dropped from training and refused in serving.
    """

    inputs: int
    targets: int

    def __post_init__(self) -> None:
        """Check that there is room for something."""
        if self.inputs < 1:
            raise invalid("Lengths.inputs", self.inputs, "be at least 1", "Give the longest prompt's tokens.")
        if self.targets < 2:
            rule = "be at least 2 (a token and the end-of-sequence token)"
            raise invalid("Lengths.targets", self.targets, rule, "Give the longest response's tokens plus 1.")


class PromptRow(NamedTuple):
    """The ids of one assembled prompt, and the half-open span of the reference in them (empty if none)."""

    ids: tuple[int, ...]
    reference: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Codec:
    """Turns prompts, responses and references into ids and back, alike for training, sampling and serving.

    Prompts and references pass through here as ids, so that sampled references never go through text. The room
    for the prompt itself is the same for all kinds of prompt: all models see the same part of a long dialogue.

    Raises:
      ConfigError: the policy's template leaves no room for one token of the prompt.
    """

    tokenizer: Tokenizer
    templates: Templates
    lengths: Lengths

    def __post_init__(self) -> None:
        """Check that a prompt fits."""
        if self.prompt_room < 1:
            raise invalid(
                "Lengths.inputs",
                self.lengths.inputs,
                f"be more than the {self._overhead('policy')} tokens of the policy's template and BOS",
                "Raise it, or shorten Templates.policy.",
            )

    @functools.cached_property
    def prompt_room(self) -> int:
        """Number of tokens left for the prompt itself."""
        return self.lengths.inputs - self._overhead("policy")

    @property
    def pad_id(self) -> int:
        """Id that fills arrays."""
        return self.tokenizer.pad_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a response."""
        return self.tokenizer.eos_ids

    def prompt_ids(self, text: str) -> tuple[int, ...]:
        """Return the last `prompt_room` ids of a prompt, without template."""
        return self._fit(self.tokenizer.encode(text))

    def response_ids(self, text: str) -> tuple[int, ...]:
        """Return the ids of a response, ending with EOS.

        Raises:
          ResponseTooLong: they are more than `lengths.targets`.
        """
        ids = (*self.tokenizer.encode(text), self.eos_ids[0])
        if len(ids) > self.lengths.targets:
            raise ResponseTooLong(
                f"A response has {len(ids)} tokens with its end-of-sequence token, but Lengths.targets = "
                f"{self.lengths.targets}. Responses are never cut: raise it, or shorten the response."
            )
        return ids

    def without_eos(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Return what stands before the first EOS: a response as a reference."""
        plain = tuple(map(int, ids))
        return plain[: min((plain.index(eos) for eos in self.eos_ids if eos in plain), default=len(plain))]

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of ids up to the first EOS."""
        return self.tokenizer.decode(self.without_eos(ids))

    def policy_prompt(self, prompt_ids: Sequence[int]) -> PromptRow:
        """Return the policy's prompt."""
        return self._assemble("policy", {"prompt": self._fit(prompt_ids)})

    def improver_prompt(self, prompt_ids: Sequence[int], reference_ids: Sequence[int]) -> PromptRow:
        """Return the improver's prompt; a reference may end with EOS or not, it is put in without.

        Raises:
          ResponseTooLong: the reference has more than `lengths.targets - 1` ids.
        """
        return self._assemble(
            "improver", {"prompt": self._fit(prompt_ids), "reference": self._reference(reference_ids)}
        )

    def gap_prompt(self, prompt_ids: Sequence[int], reference_ids: Sequence[int]) -> PromptRow:
        """Return the gap reward's prompt, whose response is the candidate; errors as of `improver_prompt`."""
        return self._assemble("gap", {"prompt": self._fit(prompt_ids), "reference": self._reference(reference_ids)})

    def width(self, kind: PromptKind) -> int:
        """Return the largest number of ids of a kind of prompt: `lengths.inputs` for the policy."""
        reference = 0 if kind == "policy" else self.lengths.targets - 1
        return self.prompt_room + reference + self._overhead(kind)

    def beginning_width(self, kind: Literal["improver", "gap"]) -> int:
        """Return the largest number of ids before the reference of a kind of prompt."""
        parts = self._parts[kind]
        before = parts[: parts.index("reference")]
        return sum(self.prompt_room if isinstance(part, str) else len(part) for part in before)

    def _literal(self, text: str, *, first: bool) -> tuple[int, ...]:
        tokenizer = self.tokenizer
        # A piece that follows another must not get the space that some tokenizers put before the first word of a text.
        if not first and isinstance(tokenizer, HuggingFaceTokenizer):
            return tuple(tokenizer.encode_rest(text))
        return tuple(tokenizer.encode(text))

    @functools.cached_property
    def _parts(self) -> dict[str, tuple[tuple[int, ...] | str, ...]]:
        """For each kind, what an assembled prompt consists of: ids, or the name of a field."""
        bos = self.tokenizer.bos_id
        start = ((bos,),) if self.templates.bos and bos is not None else ()
        return {
            kind: start
            + tuple(
                self._literal(piece.text, first=n == 0) if isinstance(piece, Literally) else piece.name
                for n, piece in enumerate(self.templates.pieces(kind))
            )
            for kind in ("policy", "improver", "gap")
        }

    def _overhead(self, kind: PromptKind) -> int:
        return sum(len(part) for part in self._parts[kind] if not isinstance(part, str))

    def _assemble(self, kind: PromptKind, texts: dict[str, tuple[int, ...]]) -> PromptRow:
        ids: list[int] = []
        reference = (0, 0)
        for part in self._parts[kind]:
            if part == "reference":
                reference = (len(ids), len(ids) + len(texts["reference"]))
            ids += texts[part] if isinstance(part, str) else part
        bos = self.tokenizer.bos_id
        if bos is not None and (count := self._leading_bos(ids)) != int(self.templates.bos):
            raise DataError(
                f"A {kind} prompt begins with the beginning-of-sequence token {bos} {count} times, but must do so "
                f"{int(self.templates.bos)} times. Give prompts without it: Templates.bos adds it."
            )
        return PromptRow(tuple(ids), reference)

    def _fit(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        ids = tuple(map(int, prompt_ids[-self.prompt_room :]))
        # Some chat templates write BOS before every user's turn; where the cut falls there, it is no second one.
        return ids if len(prompt_ids) <= self.prompt_room else ids[self._leading_bos(ids) :]

    def _leading_bos(self, ids: Sequence[int]) -> int:
        return next((n for n, i in enumerate(ids) if i != self.tokenizer.bos_id), len(ids))

    def _reference(self, reference_ids: Sequence[int]) -> tuple[int, ...]:
        ids = self.without_eos(reference_ids)
        if len(ids) >= self.lengths.targets:
            raise ResponseTooLong(
                f"A reference has {len(ids)} tokens, but at most {self.lengths.targets - 1} fit with Lengths.targets = "
                f"{self.lengths.targets}. References are never cut: raise it, or shorten the reference."
            )
        return ids


def rows_to_prompts(rows: Sequence[PromptRow], width: int, pad_id: int) -> Prompts:
    """Return prompts padded on the right to [B, width], as NumPy arrays.

    Raises:
      DataError: a row has more than `width` ids.
    """
    tokens = np.full((len(rows), width), pad_id, np.int32)
    mask = np.zeros((len(rows), width), bool)
    reference = np.zeros((len(rows), width), bool)
    for b, row in enumerate(rows):
        if len(row.ids) > width:
            raise DataError(
                f"Prompt {b} has {len(row.ids)} tokens, more than the width {width}. Use Codec.width(kind)."
            )
        tokens[b, : len(row.ids)] = row.ids
        mask[b, : len(row.ids)] = True
        reference[b, slice(*row.reference)] = True
    return Prompts(tokens=tokens, mask=mask, reference=reference)  # pyright: ignore[reportArgumentType]
