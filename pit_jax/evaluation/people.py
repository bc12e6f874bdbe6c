"""What people said: verdicts by majority, agreement, and what shows of their side of the screen."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from pit_jax.evaluation import agreement, bias
from pit_jax.evaluation.pairwise import NO_ANSWER, Question, Verdict, unless_identical


@dataclasses.dataclass(frozen=True, kw_only=True)
class People:
    """A number of annotators as one judge.

    asked: who was asked what. sides: +1 left, -1 right, 0 tie, NaN no vote. outcomes: the same for the question's
    first and second response. seconds: that a vote took, NaN where it is not known. repeated: votes given twice.
    """

    questions: tuple[Question, ...]
    annotators: tuple[str, ...]
    asked: Bool[np.ndarray, "questions people"]
    sides: Float[np.ndarray, "questions people"]
    outcomes: Float[np.ndarray, "questions people"]
    seconds: Float[np.ndarray, "questions people"]
    repeated: int

    @property
    def name(self) -> str:
        """Name shown in tables and in report.json."""
        return "people"

    def verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        """Return the majority's verdict on each question; no answer where nobody voted.

        What most voted for (first, second or tie) is the verdict; where two lead, it is a tie.
        """
        given: dict[Question, list[Float[np.ndarray, " people"]]] = collections.defaultdict(list)
        for question, row in zip(self.questions, self.outcomes, strict=True):
            given[question].append(row)
            given[question.swapped()].append(-row)
        return unless_identical(questions, lambda asked: [_majority(given.get(question, [])) for question in asked])

    def agreement(self, groups: Sequence[str], *, seed: int) -> agreement.Agreement | None:
        """Return how far the annotators agree, or None where there is one only.

        Args:
          groups: the prompt (or prompt group) of each of `questions`.
          seed: of the bootstrap.
        """
        if len(self.annotators) < 2:
            return None
        return agreement.agreement(self.annotators, self.outcomes, groups, seed=seed)

    def left_shares(self, *, seed: int) -> dict[str, bias.Share]:
        """Return how often each annotator chose the left response; sides were drawn, so 50 % is expected."""
        each = [str(i) for i in range(len(self.questions))]
        return {
            name: bias.left_share(self.sides[:, column], each, seed=seed) for column, name in enumerate(self.annotators)
        }

    def gaps(self) -> list[str]:
        """Return a sentence for each annotator who left questions open, and one if votes were given twice."""
        given = ~np.isnan(self.sides)
        lines = [
            f"{name} has voted on {int(given[:, column].sum())} of {int(self.asked[:, column].sum())} questions"
            for column, name in enumerate(self.annotators)
            if (self.asked[:, column] & ~given[:, column]).any()
        ]
        return lines + ([f"{self.repeated} votes were given twice, alike; they count once"] if self.repeated else [])

    def describe(self, *, seed: int) -> list[str]:
        """Return the facts about the annotators in sentences, for a report."""
        lines = []
        for column, (name, share) in enumerate(self.left_shares(seed=seed).items()):
            known = self.seconds[~np.isnan(self.seconds[:, column]), column]
            time = f", {np.median(known):.1f} s each (median)" if len(known) else ""
            side = f", {share.percent:.0f} % for the left (p = {share.p:.2g})" if share.n else ""
            lines.append(f"{name}: {share.n} votes{time}{side}.")
        return lines + [line + "." for line in self.gaps()]


def _majority(rows: Sequence[Float[np.ndarray, " people"]]) -> Verdict:
    first, second, tie = (sum(int(np.sum(row == outcome)) for row in rows) for outcome in (1.0, -1.0, 0.0))
    most = max(first, second, tie)
    if most == 0:
        return Verdict(NO_ANSWER, "nobody voted on this question")
    reason = f"{first} for the first, {second} for the second, {tie} for a tie"
    if [first, second, tie].count(most) > 1 or tie == most:
        return Verdict(0.0, reason)
    return Verdict(1.0 if first == most else -1.0, reason)
