"""Judges that compare two responses to a prompt: win, lose, tie or no answer, in both orders of the two."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float

from pit_jax.core.errors import DataError, invalid
from pit_jax.evaluation.bias import binomial_p
from pit_jax.evaluation.judges import Judge
from pit_jax.evaluation.winrate import Comparison, ResponseSet, compare

_LOG = logging.getLogger(__name__)
SIGNIFICANT = 0.01
"""Two-sided level below which contradictions that favour one place are called a position bias."""
ALWAYS = 0.9
"""Share of questions with the same place chosen in both orders from which a judge is said not to read the answers."""


class Question(NamedTuple):
    """Two responses to a prompt, in the order in which a judge is to read them."""

    prompt: str
    first: str
    second: str

    def swapped(self) -> Question:
        """Return the same question with the responses exchanged."""
        return Question(self.prompt, self.second, self.first)


class Verdict(NamedTuple):
    """What a judge says: +1 the first response wins, -1 the second, 0 a tie, nan no answer.

    reason: the judge's own words or numbers, or why there is no answer.
    """

    outcome: float
    reason: str = ""


NO_ANSWER = math.nan
IDENTICAL = Verdict(0.0, "the responses are identical")


class PairJudge(Protocol):
    """Anything that compares two responses to a prompt."""

    @property
    def name(self) -> str:
        """Name shown in tables and in report.json."""
        ...

    def verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        """Return one verdict for each question, in their order; identical responses are ties without asking."""
        ...


def unless_identical(
    questions: Sequence[Question], ask: Callable[[list[Question]], Sequence[Verdict]]
) -> list[Verdict]:
    """Return a verdict for each question; `ask` sees only those whose responses differ."""
    different = [question for question in questions if question.first != question.second]
    found = iter(ask(different) if different else [])
    return [IDENTICAL if question.first == question.second else next(found) for question in questions]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreJudge:
    """A judge that scores responses one by one: the higher score wins by more than `margin`, otherwise it is a tie.

    outcome = sign(s(x, a) - s(x, b)) where |s(x, a) - s(x, b)| > margin, else 0; nan where a score is nan.
    """

    judge: Judge
    margin: float = 0.0

    def __post_init__(self) -> None:
        """Check the margin."""
        if not self.margin >= 0:
            fix = "It is in units of the score; 0 makes only equal scores ties."
            raise invalid("ScoreJudge.margin", self.margin, "be >= 0", fix)

    @property
    def name(self) -> str:
        """The name of the scoring judge."""
        return self.judge.name

    def verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        """Return one verdict for each question; a response that occurs in several is scored once."""
        return unless_identical(questions, self._compare)

    def _compare(self, questions: list[Question]) -> list[Verdict]:
        sides = [(question.prompt, answer) for question in questions for answer in (question.first, question.second)]
        distinct = list(dict.fromkeys(sides))
        values = self.judge.scores([prompt for prompt, _ in distinct], [answer for _, answer in distinct])
        score = dict(zip(distinct, map(float, values), strict=True))
        return [self._verdict(score[a], score[b]) for a, b in zip(sides[::2], sides[1::2], strict=True)]

    def _verdict(self, first: float, second: float) -> Verdict:
        reason = f"{first:.6g} against {second:.6g}"
        # Compared before they are subtracted: the difference of equal infinities is no number.
        if first == second or abs(first - second) <= self.margin:
            return Verdict(0.0, reason)
        if math.isnan(first) or math.isnan(second):
            return Verdict(NO_ANSWER, reason)
        return Verdict(math.copysign(1.0, first - second), reason)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionBias:
    """What a judge said of questions it was asked in both orders.

    consistent: the same response, or a tie, in both; half: a tie in one order only.
    first, second: contradictions, where the response in that place won both times.
    unanswered: no answer in one order or both.
    """

    consistent: int = 0
    half: int = 0
    first: int = 0
    second: int = 0
    unanswered: int = 0

    @property
    def answered(self) -> int:
        """Questions answered in both orders."""
        return self.consistent + self.half + self.first + self.second

    @property
    def contradictory(self) -> float:
        """Share of the answered questions whose verdict depends on the order alone."""
        return (self.first + self.second) / self.answered if self.answered else 0.0

    @property
    def p_value(self) -> float:
        """Exact two-sided binomial test that contradictions favour both places alike."""
        return binomial_p(self.first, self.second)

    def plus(self, other: PositionBias) -> PositionBias:
        """Return the counts of both together."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return PositionBias(**{name: mine[name] + theirs[name] for name in mine})

    def describe(self) -> str:
        """Return the counts in a sentence, for reports."""
        return (
            f"{self.answered} questions were answered in both orders, {100 * self.contradictory:.1f} % of them with a "
            f"contradiction ({self.first} for the first place, {self.second} for the second, p = {self.p_value:.2g}); "
            f"{self.half} with a tie in one order only; {self.unanswered} were not answered in both."
        )

    def warning(self) -> str | None:
        """Return what is wrong with the judge, or None if nothing shows."""
        place, count = ("first", self.first) if self.first >= self.second else ("second", self.second)
        if self.p_value >= SIGNIFICANT:
            return None
        share = f"{count} of {self.answered} questions"
        if count >= ALWAYS * self.answered:
            return (
                f"it (nearly) always prefers the {place} answer, whatever it says ({share}): its verdicts are useless"
            )
        return (
            f"it is drawn to the {place} answer, which won in both orders in {share} (p = {self.p_value:.2g}); "
            "these count as ties"
        )


class BothOrders:
    """Asks a judge that reads two responses in both orders; only a verdict that survives the exchange counts.

    The same winner in both orders is a win. A contradiction, or a tie in one order, is a tie, as in MT-bench
    (arXiv 2306.05685, section 3.4). No answer in one order is no answer. What the contradictions say about the judge
    is collected in `bias` over all calls; a bias is also logged as a warning.
    """

    def __init__(self, judge: PairJudge) -> None:
        self.judge = judge
        self.bias = PositionBias()

    @property
    def name(self) -> str:
        """The name of the judge that is asked."""
        return self.judge.name

    def verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        """Return one verdict for each question; both orders of all of them are asked in one call."""
        return unless_identical(questions, self._both)

    def _both(self, questions: list[Question]) -> list[Verdict]:
        found = self.judge.verdicts([*questions, *(question.swapped() for question in questions)])
        given, swapped = found[: len(questions)], found[len(questions) :]
        bias = PositionBias(**collections.Counter(map(_agreement, given, swapped)))
        self.bias = self.bias.plus(bias)
        if warning := self.bias.warning():
            _LOG.warning("judge %s: %s. %s", self.name, warning, self.bias.describe())
        return [_combined(a, b) for a, b in zip(given, swapped, strict=True)]


def _agreement(given: Verdict, swapped: Verdict) -> str:
    """Return the field of PositionBias that counts these two verdicts of one question."""
    if math.isnan(given.outcome) or math.isnan(swapped.outcome):
        return "unanswered"
    if given.outcome == -swapped.outcome:
        return "consistent"
    if given.outcome != swapped.outcome:
        return "half"
    return "first" if given.outcome > 0 else "second"


def _combined(given: Verdict, swapped: Verdict) -> Verdict:
    reason = f"[in this order] {given.reason}\n[exchanged] {swapped.reason}"
    agreement = _agreement(given, swapped)
    if agreement == "unanswered":
        return Verdict(NO_ANSWER, reason)
    return Verdict(given.outcome if agreement == "consistent" else 0.0, reason)


def pair_up(
    first: Sequence[tuple[str, str]], second: Sequence[tuple[str, str]], *, names: tuple[str, str]
) -> list[Question]:
    """Return the questions of two response sets given as (prompt, response), in the first one's order.

    A prompt may occur several times if it occurs as often in both: its responses are paired in their order.

    Raises:
      DataError: a prompt is missing in one set, or occurs more often in one than in the other.
    """
    counts = [collections.Counter(prompt for prompt, _ in rows) for rows in (first, second)]
    for prompt in dict.fromkeys([*counts[0], *counts[1]]):
        here, there = counts[0][prompt], counts[1][prompt]
        if here != there:
            raise DataError(
                f"The prompt {_shortened(prompt)} occurs {here} times in {names[0]} and {there} times in {names[1]}. "
                "Give both sets the same prompts: remove doubled rows, and add or leave out missing ones."
            )
    rest: dict[str, collections.deque[str]] = collections.defaultdict(collections.deque)
    for prompt, response in second:
        rest[prompt].append(response)
    return [Question(prompt, response, rest[prompt].popleft()) for prompt, response in first]


def _shortened(text: str, most: int = 80) -> str:
    return repr(text if len(text) <= most else text[: most - 3] + "...")


def outcomes(verdicts: Sequence[Verdict]) -> Float[np.ndarray, " n"]:
    """Return the outcomes as an array: +1, -1, 0, and nan where there is no answer."""
    return np.array([verdict.outcome for verdict in verdicts], np.float64)


def comparison(
    candidate: ResponseSet,
    baseline: ResponseSet,
    verdicts: Sequence[Verdict],
    *,
    groups: Sequence[str],
    judge: str,
    seed: int,
) -> Comparison:
    """Return the win / lose / tie / Delta row of two response sets from verdicts (first = the candidate's response).

    Questions without an answer are left out of every figure of the row, so `n` may be smaller than the sets. The mean
    scores are points: 1 for a win, 1/2 for a tie, 0 for a loss.

    Args:
      candidate, baseline: the response sets, over the same prompts in the same order.
      verdicts: one for each pair of responses.
      groups: the prompt (or prompt group) of each row, for the clustered interval.
      judge: name of the judge.
      seed: of the run; also of the bootstrap.
    Raises:
      DataError: no question has an answer.
    """
    results = outcomes(verdicts)
    if not len(results) == len(candidate.lengths) == len(baseline.lengths) == len(groups):
        sizes = (len(results), len(candidate.lengths), len(baseline.lengths), len(groups))
        fix = "Compare response sets over the same prompts."
        raise invalid("verdicts", sizes, "have one entry per prompt", fix)
    kept = np.flatnonzero(~np.isnan(results)).tolist()
    if not kept:
        why = next((verdict.reason for verdict in verdicts if verdict.reason), "no reason given")
        raise DataError(
            f"Judge {judge} answered none of {len(results)} questions about {candidate.name} against {baseline.name}; "
            f"the first reason: {why}. Correct the cause, then run again."
        )
    points = (results[kept] + 1) / 2
    return compare(
        _only(candidate, kept), _only(baseline, kept), (points, 1 - points),
        groups=[groups[i] for i in kept], judge=judge, seed=seed,
    )  # fmt: skip


def _only(entry: ResponseSet, kept: Sequence[int]) -> ResponseSet:
    return dataclasses.replace(
        entry,
        responses=tuple(entry.responses[i] for i in kept),
        lengths=tuple(entry.lengths[i] for i in kept),
    )
