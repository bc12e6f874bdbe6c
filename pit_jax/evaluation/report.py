"""What the report of an evaluation shows, and the rows that its main table consists of."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pit_jax.evaluation import plots
from pit_jax.evaluation.agreement import Agreement
from pit_jax.evaluation.cards import Example, Opinion
from pit_jax.evaluation.document import Rerun
from pit_jax.evaluation.judge_facts import JudgeFacts
from pit_jax.evaluation.report_parts import Dropped, LengthRow, Rated
from pit_jax.evaluation.winrate import Comparison

__all__ = ["BASELINE", "Dropped", "Example", "JudgeFacts", "LengthRow", "Opinion", "Rated", "Report", "Rerun"]
BASELINE = "original"
"""The system that the main table compares with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Everything the report shows.

    comparisons: all win-rate rows, those against the Original first.
    policy_curve: (RLHF steps, rows against the policy stopped there); original_steps is where it was stopped.
    quality: system -> temperature -> (mean score, low, high).
    reward_models: stage -> its held-out evaluation (accuracies with intervals, histograms).
    supervised, reinforced: stage -> metric records of its training, for the curves.
    ratings: a set for each judge. lengths: what length explains, for those comparisons where it was asked.
    judges: facts, the first judge first. agreement: of all judges on the same questions.
    dropped: what could not be used. warnings: what makes figures doubtful, beside what the judges' facts show.
    rerun: what is needed to make the figures again.
    """

    title: str
    seed: int
    facts: Mapping[str, str]
    notes: Sequence[str]
    comparisons: Sequence[Comparison]
    policy_curve: Sequence[tuple[int, Sequence[Comparison]]]
    original_steps: int | None
    quality: Mapping[str, Mapping[float, tuple[float, float, float]]]
    reward_models: Mapping[str, Mapping[str, Any]]
    supervised: Mapping[str, plots.Records]
    reinforced: Mapping[str, plots.Records]
    examples: Sequence[Example]
    ratings: Sequence[Rated] = ()
    lengths: Sequence[LengthRow] = ()
    judges: Sequence[JudgeFacts] = ()
    agreement: Agreement | None = None
    dropped: Sequence[Dropped] = ()
    warnings: Sequence[str] = ()
    rerun: Rerun | None = None

    def all_warnings(self) -> list[str]:
        """Return the warnings, those about judges last."""
        return [*self.warnings, *(line for judge in self.judges for line in judge.warnings())]


def against_baseline(report: Report) -> list[Comparison]:
    """Return the rows against the Original with both sides at one temperature: that with most rows, or the highest."""
    rows = [row for row in report.comparisons if row.baseline == BASELINE]
    rows = [row for row in rows if row.temperature_candidate == row.temperature_baseline]
    if not rows:
        return []
    counts = collections.Counter(row.temperature_baseline for row in rows if row.judge == rows[0].judge)
    chosen = max(counts, key=lambda temperature: (counts[temperature], temperature))
    return [row for row in rows if row.temperature_baseline == chosen]


def main_rows(report: Report) -> list[Comparison]:
    """Return those rows against the Original that are the first judge's."""
    rows = against_baseline(report)
    return [row for row in rows if row.judge == rows[0].judge]


def length_of(report: Report, row: Comparison) -> LengthRow | None:
    """Return what length explains of a comparison, if it was asked."""
    names = ("candidate", "baseline", "judge", "temperature_candidate", "temperature_baseline")
    key = [vars(row)[name] for name in names]
    return next((found for found in report.lengths if [vars(found)[name] for name in names] == key), None)
