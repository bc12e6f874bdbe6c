"""SRT's inference: y, f and r in one go, and r is the answer; what does not parse falls back to y (and is counted)."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from jaxtyping import Array, Key

from pit_jax.core.types import Params
from pit_jax.decode.batches import Response
from pit_jax.srt.text import SrtCodec
from pit_jax.srt.writing import Temperatures, Writer
from pit_jax.text.codec import PromptRow

PARSED = "parsed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refined:
    """What a model has written for one prompt.

    response: y, as any response of the run: cut where it is longer than one may be.
    feedback: the ids of f, None where the text has none or never came to it.
    refinement: r, None where there is none to be used.
    outcome: "parsed", or why r is not used: no_marker (the text ends without r), unfinished, too_long, empty.
    """

    response: Response
    feedback: tuple[int, ...] | None
    refinement: Response | None
    outcome: str

    @property
    def final(self) -> Response:
        """The answer: r, or y where there is no r."""
        return self.response if self.refinement is None else self.refinement


def take_apart(codec: SrtCodec, text: Response) -> Refined:
    """Return the parts of a generated text."""
    response, feedback, refinement = codec.split(text.ids)
    room = codec.run.lengths.targets
    # y has ended if something follows it.
    ended = (text.finished or feedback is not None or refinement is not None) and len(response) < room
    outcome = PARSED
    if refinement is None:
        outcome = "no_marker"
    elif not text.finished:
        outcome = "unfinished"
    elif len(refinement) >= room:
        outcome = "too_long"
    elif not refinement:
        outcome = "empty"
    return Refined(
        response=Response(response[:room], ended),
        feedback=feedback,
        refinement=Response(refinement, True) if outcome == PARSED and refinement is not None else None,
        outcome=outcome,
    )


def write_refined(
    writer: Writer,
    params: Params,
    codec: SrtCodec,
    prompts: Sequence[PromptRow],
    keys: Key[Array, " N"],
    temperatures: Temperatures,
) -> list[Refined]:
    """Write y, f and r for every prompt."""
    texts = writer.write(params, prompts, [()] * len(prompts), keys, temperatures)
    return [take_apart(codec, text) for text in texts]


def outcomes(refined: Sequence[Refined]) -> dict[str, int]:
    """Return how often each outcome occurred, "parsed" among them."""
    counted = collections.Counter(entry.outcome for entry in refined)
    return {PARSED: counted[PARSED]} | {name: counted[name] for name in sorted(counted) if name != PARSED}
