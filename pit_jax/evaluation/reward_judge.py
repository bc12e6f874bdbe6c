"""The project's own reward models R_P and R_PIT as judges of texts."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from pit_jax.core.errors import invalid
from pit_jax.decode.batches import Response, as_reference
from pit_jax.evaluation.pairwise import NO_ANSWER, Question, Verdict, unless_identical
from pit_jax.improve.loop import Judge as Score
from pit_jax.text.codec import Codec, PromptRow, ResponseTooLong

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardJudge:
    """R_P(x, y) as a judge that scores responses; `pairwise.ScoreJudge` makes verdicts of its scores.

    score: the model, `functools.partial(scorer.score, params)`. A response that the model has no room for has the
    score nan: it is not cut, because its end may be what is wrong with it.
    """

    name: str
    codec: Codec
    score: Score

    def scores(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[np.ndarray, " n"]:
        """Return one score per (prompt, response)."""
        answers = [_response(self.codec, text) for text in responses]
        rows = [self.codec.policy_prompt(self.codec.prompt_ids(prompt)) for prompt in prompts]
        found = np.full(len(rows), math.nan)
        fits = [i for i, answer in enumerate(answers) if answer is not None]
        _say_left_out(self.name, len(rows) - len(fits), len(rows), self.codec)
        found[fits] = self.score([rows[i] for i in fits], [answer for answer in answers if answer is not None])
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class GapJudge:
    """R_PIT as a judge of two responses: a wins if r_gap(a, b | x) - r_gap(b, a | x) > margin, b if < -margin.

    This is g_wl - g_lw, the widest of the five comparisons that r_gap is trained on (arXiv 2310.00898, section 3.3).
    Nothing fixes the zero of r_gap, so one direction alone would say nothing; both together favour no place.

    score: the model, `functools.partial(scorer.score, params)`. margin: in units of the gap.
    """

    name: str
    codec: Codec
    score: Score
    margin: float = 0.0

    def __post_init__(self) -> None:
        """Check the margin."""
        if not self.margin >= 0:
            raise invalid("GapJudge.margin", self.margin, "be >= 0", "0 makes only equal gaps ties.")

    def verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        """Return one verdict for each question; a response that does not fit into the model has none."""
        return unless_identical(questions, self._compare)

    def _compare(self, questions: list[Question]) -> list[Verdict]:
        rows: list[PromptRow] = []
        answers: list[Response] = []
        fits: list[bool] = []
        for question in questions:
            pair = [_response(self.codec, text) for text in (question.first, question.second)]
            first, second = pair
            fits.append(first is not None and second is not None)
            if first is not None and second is not None:
                prompt = self.codec.prompt_ids(question.prompt)
                rows += [self.codec.gap_prompt(prompt, as_reference(self.codec, other)) for other in (second, first)]
                answers += [first, second]
        _say_left_out(self.name, fits.count(False), len(fits), self.codec)
        gaps = np.asarray(self.score(rows, answers), np.float64).reshape(-1, 2) if rows else np.zeros((0, 2))
        found = iter(gaps)
        return [self._verdict(*next(found)) if fit else Verdict(NO_ANSWER, "a response is too long") for fit in fits]

    def _verdict(self, forward: float, backward: float) -> Verdict:
        difference = forward - backward
        reason = f"gap {forward:.6g}, exchanged {backward:.6g}"
        if math.isnan(difference):
            return Verdict(NO_ANSWER, reason)
        return Verdict(0.0 if abs(difference) <= self.margin else math.copysign(1.0, difference), reason)


def _response(codec: Codec, text: str) -> Response | None:
    """Return a text as a finished response, or None if it is too long for the codec."""
    try:
        return Response(codec.response_ids(text)[:-1], finished=True)
    except ResponseTooLong:
        return None


def _say_left_out(name: str, count: int, total: int, codec: Codec) -> None:
    if count:
        _LOG.warning(
            "judge %s: %d of %d have a response of more than Lengths.targets = %d tokens and are not judged",
            name, count, total, codec.lengths.targets,
        )  # fmt: skip
