"""The report of a study: a question, how it was answered, tables, pictures, and how to run it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from pit_jax.core.errors import invalid
from pit_jax.evaluation import document
from pit_jax.evaluation.document import Block, Bullets, Facts, Plot, Prose, Rerun, Section, Table, Warnings


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyReport:
    """Everything the report of a study shows.

    question: what the study asks, in one sentence. answer: what came out, in a sentence or two, or nothing.
    facts: how it was answered: name -> value (data, prompts, judge, what was compared).
    tables: the figures, cells as text, numbers or `document.Estimate` (a number with its interval).
    plots: pictures drawn by functions of `plots` (see `document.Plot`); each is shown below the tables.
    warnings: what makes the figures doubtful, shown first. notes: what else a reader has to know.
    data: further figures for report.json alone, such as those of pictures.
    """

    title: str
    question: str
    facts: Mapping[str, str]
    tables: Sequence[Table]
    plots: Sequence[Plot] = ()
    answer: str = ""
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    rerun: Rerun | None = None
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that pictures have names of their own, and that the figures have a place in report.json."""
        names = [plot.name for plot in self.plots]
        if len(set(names)) < len(names):
            raise invalid("StudyReport.plots", names, "have different names", "Rename the files.")
        if not self.tables:
            raise invalid("StudyReport.tables", self.tables, "have at least one table", "Say what came out in figures.")

    def sections(self) -> list[Section]:
        """Return the parts of the page, in their order."""
        head: list[Block] = [Prose(text=text) for text in (self.question, self.answer) if text]
        if self.warnings:
            head.append(Warnings(items=self.warnings))
        head.append(Facts(items=self.facts))
        found = [Section(title="Question", blocks=head), Section(title="Figures", blocks=self.tables)]
        if self.plots:
            found.append(Section(title="Pictures", blocks=self.plots))
        if self.notes:
            found.append(Section(title="Notes", blocks=[Bullets(items=self.notes)]))
        if self.rerun is not None:
            found.append(Section(title="Run it again", blocks=[self.rerun]))
        return found

    def as_json(self) -> dict[str, Any]:
        """Return what report.json holds."""
        return {
            "title": self.title,
            "question": self.question,
            "answer": self.answer,
            "facts": dict(self.facts),
            "tables": [table.as_json() for table in self.tables],
            "pictures": {plot.name: plot.caption for plot in self.plots},
            "data": dict(self.data),
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "rerun": None if self.rerun is None else self.rerun.as_json(),
        }


def write_study(report: StudyReport, directory: epath.Path) -> epath.Path:
    """Write the pictures, report.md, report.html and, last, report.json; return the page's path."""
    return document.write(report.title, report.sections(), report.as_json(), directory)
