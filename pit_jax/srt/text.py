"""How response, feedback and refinement become one text that a model can learn and a program can take apart again.

    y MARKER f MARKER r EOS

The markers are data: headings for ordinary tokenizers, special pieces where a tokenizer has some. The pieces are
tokenised one by one, so that a token never straddles a marker's border, and y and r as responses that stand alone are:
what is cut out of generated ids is what any other model of the run would read.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from pit_jax.core.errors import invalid
from pit_jax.srt.critique import HIGHEST, LOWEST, Critique, Drop, in_range
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.hf_tokenizer import HuggingFaceTokenizer
from pit_jax.text.template import Literally, parse

PARTS = ("weakness", "suggestion", "score")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SrtText:
    """The text that SRT trains on, for one tokenizer.

    targets: most tokens of y, f, r, both markers and EOS together; longer records are left out.
    parts: what the feedback has, of "weakness", "suggestion" and "score", in their order. Leaving one out is the
      paper's ablation; () leaves the feedback out, so that r follows y.
    feedback, refinement: the markers before f and before r.
    weakness, suggestion, score: templates of the parts, each with the field of its name.
    """

    targets: int
    parts: tuple[str, ...] = PARTS
    feedback: str = "\n\n### Feedback\n"
    refinement: str = "\n\n### Improved Response\n"
    weakness: str = "Weaknesses: {weakness}\n"
    suggestion: str = "Suggestions: {suggestion}\n"
    score: str = "Overall Score: [[{score}]]"

    def __post_init__(self) -> None:
        """Check parts, templates and markers."""
        object.__setattr__(self, "parts", tuple(self.parts))
        if tuple(part for part in PARTS if part in self.parts) != self.parts:
            raise invalid("SrtText.parts", self.parts, f"be some of {PARTS}, in this order", "Mend the list.")
        for part in PARTS:
            parse(vars(self)[part], (part,), f"SrtText.{part}")
        if not self.feedback.strip() or not self.refinement.strip():
            given = (self.feedback, self.refinement)
            raise invalid("SrtText.feedback, .refinement", given, "not be empty", "Use headings or special pieces.")
        if self.feedback in self.refinement or self.refinement in self.feedback:
            given = (self.feedback, self.refinement)
            raise invalid("SrtText.feedback, .refinement", given, "not hold each other", "Use different markers.")

    def write_feedback(self, critique: Critique) -> str:
        """Return f: the parts that are trained on, by their templates."""
        written = {
            "weakness": self._write("weakness", critique.weaknesses),
            "suggestion": self._write("suggestion", critique.suggestions),
            "score": self.write_score(critique.score),
        }
        return "".join(written[part] for part in self.parts)

    def write_score(self, score: float) -> str:
        """Return a score by its template."""
        return self._write("score", f"{score:g}")

    def read_score(self, feedback: str) -> float | None:
        """Return the score that a feedback states, None where it states none from 1 to 10."""
        found = self._score_pattern.findall(feedback)
        return in_range(found[-1]) if "score" in self.parts and found else None

    def _write(self, part: str, said: str) -> str:
        pieces = parse(vars(self)[part], (part,), f"SrtText.{part}")
        return "".join(piece.text if isinstance(piece, Literally) else said for piece in pieces)

    @functools.cached_property
    def _score_pattern(self) -> re.Pattern[str]:
        pieces = parse(self.score, ("score",), "SrtText.score")
        # White space around literals is the tokenizer's business.
        return re.compile(
            r"\s*".join(
                re.escape(piece.text.strip()) if isinstance(piece, Literally) else r"(\d+(?:\.\d+)?)"
                for piece in pieces
                if not isinstance(piece, Literally) or piece.text.strip()
            )
        )


class Pieces(NamedTuple):
    """Generated ids, taken apart; None is a piece that they do not come to. EOS belongs to none of them."""

    response: tuple[int, ...]
    feedback: tuple[int, ...] | None
    refinement: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class SrtCodec:
    """SRT's text as ids of a run's tokenizer, and back.

    Args:
      text: the format.
      run: the codec of the run, whose prompts are those of its policy.

    Raises:
      ConfigError: the tokenizer cannot write a marker or a score, or there is no room.
    """

    text: SrtText
    run: Codec

    def __post_init__(self) -> None:
        """Check that the tokenizer has pieces for what the format needs."""
        for name in ("feedback", "refinement"):
            self._check_marker(name, vars(self.text)[name])
        least = self.run.lengths.targets + sum(map(len, self.markers))
        if self.text.targets <= least:
            rule = f"be more than {least}, the tokens of a response of the run and of the markers"
            raise invalid("SrtText.targets", self.text.targets, rule, "Give room for y, f and r together.")
        if "score" in self.text.parts:
            for score in range(int(LOWEST), int(HIGHEST) + 1):
                self._check_score(score)

    def _check_marker(self, name: str, marker: str) -> None:
        ids = self._literal(marker)
        back = self.run.tokenizer.decode(ids).strip()
        # The text of a special token may be empty; a text of its own must be the marker's.
        if not ids or (back and back != marker.strip()):
            fix = "Add it to the tokenizer's special pieces, or choose a marker that the tokenizer knows."
            raise invalid(f"SrtText.{name}", marker, f"be a text the tokenizer can write (it reads {back!r})", fix)

    def _check_score(self, score: int) -> None:
        written = self.text.write_score(score)
        back = self.run.tokenizer.decode(self.run.tokenizer.encode(written))
        if self.text.read_score(back) != score:
            fix = "Add pieces for the scores 1 to 10, change SrtText.score, or leave it out of SrtText.parts."
            raise invalid("SrtText.score", self.text.score, f"survive the tokenizer ({written!r} is {back!r})", fix)

    @functools.cached_property
    def codec(self) -> Codec:
        """The run's codec with room for the whole text in the place of a response."""
        lengths = Lengths(inputs=self.run.lengths.inputs, targets=self.text.targets)
        return dataclasses.replace(self.run, lengths=lengths)

    @functools.cached_property
    def markers(self) -> tuple[tuple[int, ...], ...]:
        """The ids of the markers in their order: one for f and one for r, or one for r alone."""
        texts = (self.text.feedback, self.text.refinement) if self.text.parts else (self.text.refinement,)
        return tuple(self._literal(text) for text in texts)

    def target(self, response: str, critique: Critique) -> tuple[int, ...] | Drop:
        """Return what is trained on, y f r and EOS, or why it is not: marker_inside, too_long or too_long_refinement.

        A refinement that is longer than a response of the run may be is none that the run's models could give.
        """
        encode = self.run.tokenizer.encode
        bodies = [encode(response)]
        bodies += [encode(self.text.write_feedback(critique))] if self.text.parts else []
        bodies += [encode(critique.refinement)]
        if any(_find(body, marker) is not None for body in bodies for marker in self.markers):
            return Drop("marker_inside")
        if max(len(bodies[0]), len(bodies[-1])) >= self.run.lengths.targets:
            return Drop("too_long_refinement" if len(bodies[-1]) >= self.run.lengths.targets else "too_long_response")
        ids = list(bodies[0])
        for marker, body in zip(self.markers, bodies[1:], strict=True):
            ids += [*marker, *body]
        ids.append(self.run.eos_ids[0])
        return tuple(ids) if len(ids) <= self.text.targets else Drop("too_long")

    def opened(self, response: Sequence[int]) -> tuple[int, ...]:
        """Return a response and the first marker: what feedback on it follows."""
        return (*response, *self.markers[0])

    def split(self, ids: Sequence[int]) -> Pieces:
        """Take generated ids apart at the markers, or at their text where a model has spelt one in other tokens."""
        ids = self.run.without_eos(ids)
        bodies = _cut(ids, self.markers)
        if len(bodies) <= len(self.markers):
            spelt = self._cut_text(self.run.tokenizer.decode(ids))
            bodies = spelt if len(spelt) > len(bodies) else bodies
        response, *rest = bodies
        refinement = rest[-1] if len(rest) == len(self.markers) else None
        return Pieces(response, rest[0] if rest and len(self.markers) == 2 else None, refinement)

    def own_score(self, feedback: Sequence[int] | None) -> float | None:
        """Return the score that a feedback states."""
        return None if feedback is None else self.text.read_score(self.run.tokenizer.decode(list(feedback)))

    def _cut_text(self, text: str) -> list[tuple[int, ...]]:
        markers = (self.text.feedback, self.text.refinement) if self.text.parts else (self.text.refinement,)
        bodies: list[str] = []
        for marker in markers:
            before, found, after = text.partition(marker.strip())
            if not found:
                break
            bodies.append(before)
            text = after
        return [tuple(self.run.tokenizer.encode(body.strip())) for body in (*bodies, text)]

    def _literal(self, text: str) -> tuple[int, ...]:
        tokenizer = self.run.tokenizer
        # A marker follows a text: it must not get the space that some tokenizers put before the first word.
        return tuple(
            tokenizer.encode_rest(text) if isinstance(tokenizer, HuggingFaceTokenizer) else tokenizer.encode(text)
        )


def _find(ids: Sequence[int], marker: Sequence[int]) -> int | None:
    """Return where a marker begins in ids."""
    size = len(marker)
    places = (start for start in range(len(ids) - size + 1) if tuple(ids[start : start + size]) == tuple(marker))
    return next(places, None)


def _cut(ids: Sequence[int], markers: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Cut ids at the markers, each looked for after the one before it; those from a missing one on cut nothing."""
    bodies: list[tuple[int, ...]] = []
    rest = tuple(ids)
    for marker in markers:
        place = _find(rest, marker)
        if place is None:
            break
        bodies.append(rest[:place])
        rest = rest[place + len(marker) :]
    return [*bodies, rest]
