"""What a report says of its judges: of what kind they are, whether they look at places, and what they cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pit_jax.evaluation.classifier_judge import ClassifierJudge
from pit_jax.evaluation.endpoint import Usage
from pit_jax.evaluation.endpoint_config import Budget
from pit_jax.evaluation.judges import FunctionJudge
from pit_jax.evaluation.llm_judge import LlmJudge
from pit_jax.evaluation.pairwise import BothOrders, PairJudge, PositionBias, ScoreJudge
from pit_jax.evaluation.people import People
from pit_jax.evaluation.reward_judge import GapJudge, RewardJudge

KINDS = {
    FunctionJudge: "program",
    ClassifierJudge: "reward model of Hugging Face",
    RewardJudge: "the run's own R_P",
    GapJudge: "the run's own R_PIT",
    LlmJudge: "language model at an endpoint",
    People: "people",
}
"""Kinds of judges, by class."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeFacts:
    """What is said of one judge.

    questions, unanswered: comparisons put to it, and those it gave no verdict on; None where nobody counted.
    position: what it said in both orders, None for a judge to whom both orders are one.
    requests, known: tries sent to its endpoint, and replies that were on disk. tokens: read and written that were paid
    for. cost: of these, in the currency of the prices; None where prices are not known. notes: further sentences.
    """

    name: str
    kind: str
    questions: int | None = None
    unanswered: int | None = None
    position: PositionBias | None = None
    requests: int | None = None
    known: int | None = None
    tokens: tuple[int, int] | None = None
    cost: float | None = None
    notes: Sequence[str] = ()

    def warnings(self) -> list[str]:
        """Return what makes its verdicts doubtful."""
        found = None if self.position is None else self.position.warning()
        return [] if found is None else [f"Judge {self.name}: {found}."]

    def sentences(self) -> list[str]:
        """Return what it said in both orders, and its notes."""
        said = [] if self.position is None else [f"{self.name}: {self.position.describe()}"]
        return [*said, *(f"{self.name}: {note}" for note in self.notes)]


def facts_of(
    judge: PairJudge, *, questions: int | None = None, unanswered: int | None = None, notes: Sequence[str] = ()
) -> JudgeFacts:
    """Return the facts of a judge after it was asked; its kind, position bias and cost are read off it.

    Args:
      judge: as it was asked, wrapped or not.
      questions: comparisons put to it.
      unanswered: those without a verdict.
      notes: further sentences for the report.
    """
    inner = judge.judge if isinstance(judge, BothOrders | ScoreJudge) else judge
    facts = JudgeFacts(
        name=judge.name,
        kind=next((name for kind, name in KINDS.items() if isinstance(inner, kind)), type(inner).__name__),
        questions=questions,
        unanswered=unanswered,
        position=judge.bias if isinstance(judge, BothOrders) else None,
        notes=tuple(notes),
    )
    if isinstance(inner, LlmJudge):
        return paid(facts, inner.endpoint.usage, inner.endpoint.config.budget)
    return facts


def paid(facts: JudgeFacts, usage: Usage, budget: Budget) -> JudgeFacts:
    """Return the facts with what an endpoint was asked and paid."""
    return dataclasses.replace(
        facts,
        requests=usage.requests,
        known=usage.known,
        tokens=(usage.spent.prompt, usage.spent.completion),
        cost=budget.price(usage.spent),
    )
