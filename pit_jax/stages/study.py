"""A study: some systems, answered once, compared in pairs, with a table and pictures of its own (gin/studies)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from pit_jax.core.errors import invalid, nearest
from pit_jax.evaluation import report, report_writer
from pit_jax.evaluation.winrate import Comparison
from pit_jax.stages import together
from pit_jax.stages.answers import Answered, Answers
from pit_jax.stages.jury import Bench, ByGap, Jury, check_bench
from pit_jax.stages.reporting import facts_of_run, rerun
from pit_jax.stages.run import Run
from pit_jax.stages.systems import ORIGINAL, System, answer_all, check_systems

_LOG = logging.getLogger(__name__)
Sets = Mapping[tuple[str, float], Answered]
Key = tuple[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Stage: answer held-out prompts with some systems, compare them, and write a report of its own.

    question: what is asked, in one sentence. systems: who answers, in order; `systems` has them.
    pairs: (candidate, baseline) response sets that are compared at each temperature; None compares every set with
      `original`.
    reward: R_P, a judge. gap: R_PIT, a judge if it is given; both favour what was trained on them. bench: others.
    temperatures: of sampling, alike for both sides of a pair.
    rated: rate all response sets of the first temperature, from all pairs of them (ELO and Bradley-Terry).
    lengths: say what length explains of each pair.
    prompts: distinct held-out prompts; intervals are clustered by their groups.
    """

    verb: ClassVar[str] = "study"
    name: str
    title: str
    question: str
    systems: tuple[System, ...]
    reward: str
    gap: str | None = None
    pairs: tuple[Key, ...] | None = None
    bench: tuple[Bench, ...] = ()
    temperatures: tuple[float, ...] = (1.0,)
    rated: bool = False
    lengths: bool = False
    prompts: int = 1000
    batch_size: int = 256

    def __post_init__(self) -> None:
        """Check the settings; make lists from gin tuples."""
        for name in ("systems", "bench", "temperatures"):
            object.__setattr__(self, name, tuple(vars(self)[name]))
        if self.pairs is not None:
            object.__setattr__(self, "pairs", tuple((first, second) for first, second in self.pairs))
        if self.prompts < 2:
            raise invalid("Study.prompts", self.prompts, "be at least 2", "1000 gives intervals of about 3 points.")
        if not self.temperatures:
            raise invalid("Study.temperatures", self.temperatures, "have at least one entry", "Use (1.0,).")
        check_systems("Study.systems", self.systems)
        made = [name for system in self.systems for name in system.names()]
        for name in (name for pair in self._pairs() for name in pair):
            if name not in made:
                rule = f"name response sets of the study.{nearest(name, made)}"
                raise invalid("Study.pairs", name, rule, f"There are {', '.join(made)}.")
        if not self._pairs():
            raise invalid("Study.systems", made, "make at least two response sets", "Add what is to be compared.")
        check_bench(self.bench, made)

    def _pairs(self) -> tuple[Key, ...]:
        if self.pairs is not None:
            return self.pairs
        made = [name for system in self.systems for name in system.names()]
        return tuple((name, ORIGINAL) for name in made if name != ORIGINAL)

    @property
    def role(self) -> str:
        """No role: its verb has one stage only."""
        return ""

    def inputs(self) -> list[str]:
        """Return every checkpoint that is read."""
        named = [reference for system in self.systems for reference in system.inputs()]
        return list(dict.fromkeys([*named, self.reward, *([] if self.gap is None else [self.gap])]))

    def run(self, run: Run) -> dict[str, Any]:
        """Sample, compare, write the report; return its rows."""
        directory = run.begin(self, run.lm, snapshots={})
        answers = Answers.of_stage(run, self.name, self.prompts, self.batch_size)
        own = None if self.gap is None else ByGap(gap=self.gap, pairs=self._pairs())
        jury = Jury(answers, directory, reward=self.reward, gap=own, bench=self.bench)
        sets: dict[tuple[str, float], Answered] = {}
        for temperature in self.temperatures:
            made = answer_all(self.systems, answers, temperature)
            sets |= {(name, temperature): entry for name, entry in made.items()}
        rows = self._rows(jury, sets)
        found = self._report(jury, sets, rows)
        pages = directory / "report"
        together.write(f"report of {self.name}", lambda: report_writer.write(found, pages), pages)
        for warning in found.all_warnings():
            _LOG.warning("%s", warning)
        _LOG.info("%s: %s", self.name, pages / "report.html")
        return {"comparisons": [dataclasses.asdict(row) for row in rows]}

    def _rows(self, jury: Jury, sets: Sets) -> list[Comparison]:
        """Return the pairs by every judge: those that score at all temperatures, the others at the first."""
        rows = [
            jury.compare(sets[first, temperature], sets[second, temperature], judge)
            for judge in jury.scoring
            for temperature in self.temperatures
            for first, second in self._pairs()
        ]
        top = self.temperatures[0]
        asked = [(judge, pair) for judge in jury.comparing for pair in jury.pairs(judge)]
        return rows + [jury.compare(sets[first, top], sets[second, top], judge) for judge, (first, second) in asked]

    def _report(self, jury: Jury, sets: Sets, rows: list[Comparison]) -> report.Report:
        run, top = jury.run, self.temperatures[0]
        pairs = [(sets[first, top], sets[second, top]) for first, second in self._pairs()]
        made = [entry for (_, temperature), entry in sets.items() if temperature == top]
        originals = [entry for entry in made if entry.name == ORIGINAL]
        others = [entry for entry in made if entry.name != ORIGINAL]
        return report.Report(
            title=self.title,
            seed=run.seed,
            facts={"question": self.question, **facts_of_run(run, self.name)},
            notes=[
                f"Intervals are bootstrapped over {len(set(jury.groups))} prompt groups ({len(jury.groups)} prompts), "
                "one sample a prompt, for this one seed.",
                *jury.notes(),
            ],
            comparisons=rows,
            policy_curve=[],
            original_steps=None,
            quality={},
            reward_models={},
            supervised={},
            reinforced={},
            examples=[example for original in originals for example in jury.examples(original, others, most=20)],
            ratings=[jury.rated(made, originals[0].name if originals else None)] if self.rated else [],
            lengths=jury.lengths(pairs) if self.lengths else [],
            judges=jury.facts(),
            agreement=jury.agreement(pairs),
            dropped=jury.answers.left_out(),
            rerun=rerun(run, self),
        )
