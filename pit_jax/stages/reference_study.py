"""The gap model on references that models wrote, over improvement steps, against the dataset's references."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from pit_jax.core.errors import invalid
from pit_jax.decode.batches import Response
from pit_jax.evaluation import estimates, judges, reference_study
from pit_jax.evaluation.reference_study import GapBehaviour, Judged
from pit_jax.evaluation.study_report import StudyReport
from pit_jax.improve.accept import Improve
from pit_jax.improve.loop import Judge
from pit_jax.stages.answers import Answered, Answers
from pit_jax.stages.artifact import split_reference
from pit_jax.stages.gap_study import Pair, check_sizes, gaps_of, held_out_pairs, publish, scoring
from pit_jax.stages.reporting import rerun
from pit_jax.stages.run import Run

UP, DOWN, BOTH = "data: better, worse", "data: worse, better", "data: both directions"
"""The pairs of the data: candidate, then reference."""
_FEW = 20
"""Pairs that differ, below which agreement with the judge means little."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceStudy:
    """Stage: improve answers step after step without an accept rule, and compare what the gap says with the judge.

    original: the policy that writes y_0. improver: writes y_k from y_(k-1). gap: R_PIT.
    reward: R_P, which judges where the run has no exact judge.
    iterations: steps k = 1..K. prompts: held-out prompts, and held-out records of the data.
    """

    verb: ClassVar[str] = "study-references"
    name: str
    original: str
    improver: str
    gap: str
    reward: str
    iterations: int = 5
    prompts: int = 500
    temperature: float = 1.0
    batch_size: int = 256
    title: str = "What is the gap model worth on references that models wrote?"

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_sizes("ReferenceStudy", iterations=self.iterations, prompts=self.prompts, batch_size=self.batch_size)
        if not self.temperature > 0:
            raise invalid("ReferenceStudy.temperature", self.temperature, "be positive", "1.0 samples as in RL.")

    @property
    def role(self) -> str:
        """No role: its verb has one stage only."""
        return ""

    def inputs(self) -> list[str]:
        """Return every checkpoint that is read."""
        return list(dict.fromkeys([self.original, self.improver, self.gap, self.reward]))

    def run(self, run: Run) -> dict[str, Any]:
        """Sample, score, write the report; return its figures."""
        directory = run.begin(self, run.lm, snapshots={})
        answers = Answers.of_stage(run, self.name, self.prompts, self.batch_size)
        chain = self._chain(answers)
        scales = _Scales(run, self.gap, self.reward, self.batch_size)
        pairs = self._dataset(scales, held_out_pairs(run, self.prompts))
        steps = self._steps(scales, answers, chain)
        rows = [reference_study.behaviour(name, None, found, seed=run.seed) for name, found in pairs.items()]
        rows += [
            reference_study.behaviour(name, step, found, seed=run.seed)
            for step, (name, found) in enumerate(steps.items(), start=1)
        ]
        publish(run, self.name, self._report(run, rows, pairs | steps, scales.judge), directory)
        return {"judge": scales.judge, "pairs": estimates.as_json(rows)}

    def _chain(self, answers: Answers) -> list[Answered]:
        """Return y_0, y_1, ... y_K: every proposal is taken, for a rule would choose the pairs by the gap itself."""
        original = answers.originals("original", self.original, self.temperature)
        rule = Improve(iterations=self.iterations, accept="always")
        return [original, *answers.improved("improved", self.improver, self.gap, rule, original)]

    def _steps(self, scales: _Scales, answers: Answers, chain: Sequence[Answered]) -> dict[str, Judged]:
        prompts = [prompt.ids for prompt in answers.prompts]
        texts, groups = [prompt.text for prompt in answers.prompts], [prompt.group for prompt in answers.prompts]
        return {
            f"y_{k}, y_{k - 1}": scales.judged(prompts, texts, after.responses, before.responses, groups)
            for k, (before, after) in enumerate(zip(chain, chain[1:], strict=False), start=1)
        }

    def _dataset(self, scales: _Scales, pairs: Sequence[Pair]) -> dict[str, Judged]:
        prompts, texts = [pair.prompt for pair in pairs], [pair.record.prompt for pair in pairs]
        groups = [pair.record.group for pair in pairs]
        better, worse = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
        up = scales.judged(prompts, texts, better, worse, groups)
        down = scales.judged(prompts, texts, worse, better, groups)
        return {UP: up, DOWN: down, BOTH: up.and_also(down)}

    def _report(self, run: Run, rows: Sequence[GapBehaviour], pairs: dict[str, Judged], judge: str) -> StudyReport:
        exact, few = run.experiment.judge is not None, [row for row in rows if row.right.n < _FEW]
        shown = {name: found for name, found in pairs.items() if name != BOTH}
        warning = (
            f"The run has no exact judge, so differences of `{judge}`, the run's own R_P, stand for the truth: R_PIT "
            "was trained from the same records and may share its mistakes."
        )
        return StudyReport(
            title=self.title,
            question="Does r_gap still follow the judge where a model wrote the reference, and over how many "
            "improvement steps?",
            facts={
                "prompts": f"{rows[-1].n} held-out prompts, T = {self.temperature:g}, every proposal taken",
                "records": f"{rows[0].n} held-out records of the data",
                "models": f"`{self.original}` wrote y_0, `{self.improver}` improved, `{self.gap}` is r_gap",
                "judge": judge,
                "intervals": "95 %, bootstrap over prompt groups, for this one seed",
            },
            tables=[reference_study.table(rows)],
            plots=reference_study.pictures(rows, shown),
            warnings=[
                *([] if exact else [warning]),
                *(
                    f"The judge sees a difference in only {row.right.n} of {row.n} pairs of `{row.name}`: what is said "
                    "of agreement there means little."
                    for row in few
                ),
            ],
            notes=[
                "Pairs of the data go in both directions; over one direction alone neither side of a correlation has "
                "much spread. An unchanged answer has gap 0 and difference 0, and counts in means and correlations.",
                "`mean gap` is the reward of the improver's RL without the KL term. Where it stays above 0 while the "
                "judge's difference does not, the improver has found what the gap model takes for better.",
            ],
            rerun=rerun(run, self),
            data={"pairs": estimates.as_json(rows)},
        )


class _Scales:
    """The gap model and the judge, each of which weighs candidates against references."""

    def __init__(self, run: Run, gap: str, reward: str, batch_size: int) -> None:
        self._run, self._gap = run, scoring(run, gap, "gap", batch_size)
        path = run.experiment.judge
        self._exact = None if path is None else judges.import_function(path)
        self._reward: Judge | None = None if path is not None else scoring(run, reward, "policy", batch_size)
        self.judge = split_reference(reward)[0] if path is None else path

    def judged(
        self,
        prompts: Sequence[tuple[int, ...]],
        texts: Sequence[str],
        candidates: Sequence[Response],
        references: Sequence[Response],
        groups: Sequence[str],
    ) -> Judged:
        """Return both opinions on every candidate and its reference."""
        codec = self._run.codec
        gap, zero = (gaps_of(self._gap, codec, prompts, answers, references) for answers in (candidates, references))
        lengths = [len(y.ids) - len(other.ids) for y, other in zip(candidates, references, strict=True)]
        return Judged(
            gap=gap - zero,
            truth=self._quality(prompts, texts, candidates) - self._quality(prompts, texts, references),
            length=np.asarray(lengths, np.float64),
            same=np.array([y == other for y, other in zip(candidates, references, strict=True)]),
            groups=groups,
        )

    def _quality(
        self, prompts: Sequence[tuple[int, ...]], texts: Sequence[str], answers: Sequence[Response]
    ) -> Float[np.ndarray, " n"]:
        codec = self._run.codec
        if self._exact is None:
            assert self._reward is not None
            return np.asarray(self._reward([codec.policy_prompt(x) for x in prompts], answers), np.float64)
        words = [codec.text(answer.ids) for answer in answers]
        return np.array([self._exact(x, y) for x, y in zip(texts, words, strict=True)], np.float64)
