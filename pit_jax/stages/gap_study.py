"""The ablation of the gap loss: reward models trained on different terms of it, side by side on held-out records."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from pit_jax.core.errors import DataError, invalid
from pit_jax.data.open import open_records
from pit_jax.data.schema import Record
from pit_jax.data.views import Drop, comparison
from pit_jax.decode.batches import Response, as_reference
from pit_jax.evaluation import estimates, gap_study, judges
from pit_jax.evaluation.gap_study import GapQuality, Gaps, Labelled
from pit_jax.evaluation.study_report import StudyReport, write_study
from pit_jax.improve.loop import Judge
from pit_jax.stages import answering, together
from pit_jax.stages.artifact import split_reference
from pit_jax.stages.reporting import rerun
from pit_jax.stages.run import Run
from pit_jax.text.codec import Codec

_LOG = logging.getLogger(__name__)
REPORT = "report"
"""Directory of a study's report in its stage's own."""


class Pair(NamedTuple):
    """A held-out record as its text and as the ids of its prompt and replies."""

    record: Record
    prompt: tuple[int, ...]
    chosen: Response
    rejected: Response


@dataclasses.dataclass(frozen=True, kw_only=True)
class GapStudy:
    """Stage: score held-out records by several gap models and by the difference of R_P, and write a report.

    gaps: name in tables -> reward stage of role "gap", such as one trained on all five terms and one on "wl_lw" alone.
    reward: R_P, whose difference R_P(x, y1) - R_P(x, y2) is shown beside them.
    records: held-out records; intervals are clustered by their prompts' groups.
    """

    verb: ClassVar[str] = "study-gap"
    name: str
    gaps: Mapping[str, str]
    reward: str
    records: int = 2000
    batch_size: int = 256
    title: str = "Which terms does the gap loss need?"

    def __post_init__(self) -> None:
        """Check the names and the numbers."""
        if not self.gaps:
            raise invalid("GapStudy.gaps", self.gaps, "name at least one gap model", "Such as {'five': 'reward_gap'}.")
        if DIFFERENCE in self.gaps:
            raise invalid("GapStudy.gaps", list(self.gaps), f"leave the name {DIFFERENCE!r} to R_P", "Rename it.")
        check_sizes("GapStudy", records=self.records, batch_size=self.batch_size)

    @property
    def role(self) -> str:
        """No role: its verb has one stage only."""
        return ""

    def inputs(self) -> list[str]:
        """Return every checkpoint that is read."""
        return list(dict.fromkeys([*self.gaps.values(), self.reward]))

    def run(self, run: Run) -> dict[str, Any]:
        """Score, compute, write the report; return its figures."""
        directory = run.begin(self, run.lm, snapshots={})
        pairs = held_out_pairs(run, self.records)
        known = labelled(run, pairs)
        found: dict[str, Gaps] = {
            name: passes(scoring(run, reference, "gap", self.batch_size), run.codec, pairs)
            for name, reference in self.gaps.items()
        }
        found[DIFFERENCE] = gap_study.from_rewards(
            *reward_scores(scoring(run, self.reward, "policy", self.batch_size), run.codec, pairs)
        )
        rows = [gap_study.gap_quality(name, gaps, known, seed=run.seed) for name, gaps in found.items()]
        self._write(run, directory, rows, found, known)
        return {"models": estimates.as_json(rows)}

    def _write(
        self, run: Run, directory: epath.Path, rows: Sequence[GapQuality], found: Mapping[str, Gaps], known: Labelled
    ) -> None:
        judge = run.experiment.judge
        report = StudyReport(
            title=self.title,
            question="Which of the five comparisons of the gap loss are needed, and is a gap model better than the "
            "difference of two ordinary rewards?",
            facts={
                "records": f"{len(known.groups)} held-out records of {len(set(known.groups))} prompt groups",
                **{name: f"stage `{reference}`" for name, reference in self.gaps.items()},
                DIFFERENCE: f"stage `{self.reward}`",
                "quality": "no exact judge in this run" if judge is None else f"by `{judge}`",
                "intervals": "95 %, bootstrap over prompt groups, for this one seed",
            },
            tables=gap_study.tables(rows),
            plots=gap_study.pictures(rows, {name: found[name] for name in self.gaps}),
            notes=[
                "All models were scored on the same records, on which none was trained. Labels have noise: where the "
                "judge disagrees with a label, a model that is right counts as wrong.",
                f"For `{DIFFERENCE}` all five comparisons are one and the same question, and its zero is 0.",
            ],
            rerun=rerun(run, self),
            data={"models": estimates.as_json(rows)},
        )
        publish(run, self.name, report, directory)


DIFFERENCE = "R_P(y1) - R_P(y2)"
"""Name of the gap that is made of two rewards."""


def publish(run: Run, name: str, report: StudyReport, directory: epath.Path) -> None:
    """Write a study's report into its stage's directory, and say where it is."""
    pages = directory / REPORT
    together.write(f"report of {name}", lambda: write_study(report, pages), pages)
    _LOG.info("%s: %s", name, pages / "report.html")


def check_sizes(owner: str, **sizes: int) -> None:
    """Check that numbers of records, prompts and rows are positive.

    Raises:
      ConfigError: one is not.
    """
    for field, value in sizes.items():
        if value < 1:
            raise invalid(f"{owner}.{field}", value, "be at least 1", "500 to 2000 give useful intervals.")


def held_out_pairs(run: Run, limit: int) -> list[Pair]:
    """Return the first `limit` held-out records whose replies fit and differ, in the data's own order.

    Raises:
      DataError: there are none.
    """
    codec = run.codec
    made = ((record, comparison(record, codec)) for record in open_records(run.experiment.data, split="validation"))
    kept = (
        Pair(
            record=record,
            prompt=tuple(example["prompt"].tolist()),
            chosen=Response(codec.without_eos(example["chosen"].tolist()), finished=True),
            rejected=Response(codec.without_eos(example["rejected"].tolist()), finished=True),
        )
        for record, example in made
        if not isinstance(example, Drop)
    )
    found = list(itertools.islice(kept, limit))
    if not found:
        raise DataError(
            "The validation split has no record whose replies fit and differ. Give more data, raise "
            "TASK_FEATURE_LENGTHS, or raise Folds.validation_fraction."
        )
    return found


def labelled(run: Run, pairs: Sequence[Pair]) -> Labelled:
    """Return what is known of each pair besides the gaps."""
    path = run.experiment.judge
    quality = None
    if path is not None:
        score = judges.import_function(path)
        quality = np.array(
            [score(r.prompt, r.chosen) - score(r.prompt, r.rejected) for r in (pair.record for pair in pairs)],
            np.float64,
        )
    lengths = [len(pair.chosen.ids) - len(pair.rejected.ids) for pair in pairs]
    return Labelled(
        groups=[pair.record.group for pair in pairs], length=np.asarray(lengths, np.float64), quality=quality
    )


def scoring(run: Run, reference: str, kind: Literal["policy", "gap"], batch_size: int) -> Judge:
    """Return the scoring function of a reward stage, and say which it is: scores take a while."""
    _LOG.info("scores by %s", split_reference(reference)[0])
    return answering.scores_by(run, reference, kind, batch_size)


def gaps_of(
    score: Judge,
    codec: Codec,
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[Response],
    references: Sequence[Response],
) -> Float[np.ndarray, " n"]:
    """Return r_gap(candidate, reference | x) of each prompt."""
    rows = [codec.gap_prompt(x, as_reference(codec, y)) for x, y in zip(prompts, references, strict=True)]
    return np.asarray(score(rows, candidates), np.float64)


def passes(score: Judge, codec: Codec, pairs: Sequence[Pair]) -> Gaps:
    """Return the four gaps wl, ww, ll, lw of every pair."""
    prompts = [pair.prompt for pair in pairs]
    replies = {"w": [pair.chosen for pair in pairs], "l": [pair.rejected for pair in pairs]}
    return {a + b: gaps_of(score, codec, prompts, replies[a], replies[b]) for a, b in gap_study.PASSES}


def reward_scores(
    score: Judge, codec: Codec, pairs: Sequence[Pair]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return R_P of the better and of the worse reply of every pair."""
    rows = [codec.policy_prompt(pair.prompt) for pair in pairs]
    chosen, rejected = (
        np.asarray(score(rows, answers), np.float64)
        for answers in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
    )
    return chosen, rejected
