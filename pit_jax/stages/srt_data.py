"""SRT's data (arXiv 2406.07168): the base model responds, a critic gives feedback and refines."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from etils import epath

from pit_jax.core.errors import DataError, invalid
from pit_jax.data.folds import Fold
from pit_jax.data.views import DropReport
from pit_jax.decode.sampling import Sampling
from pit_jax.improve.loop import first_answers
from pit_jax.sharding import processes
from pit_jax.srt.critics import CriticConfig, Draft, EndpointCriticConfig, FunctionCriticConfig
from pit_jax.srt.critique import Drop
from pit_jax.srt.filters import UNANSWERED, Judged, judge
from pit_jax.stages import answering
from pit_jax.stages.artifact import RESPONSES
from pit_jax.stages.run import Run
from pit_jax.stages.srt_files import RECORDS, Row, SrtRecord, fold_prompts, kept, record_row, write_lines

_LOG = logging.getLogger(__name__)
DRAFTS = "drafts.jsonl"
CRITIC = "critic"
"""Directory of what a critic keeps, below the stage's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SrtData:
    """Stage: write `records.jsonl`, what SRT is trained on.

    model: the base model, a policy. critic: who gives feedback. prompts: at most so many, of a fold of the training
    data (None: of all). temperature: of the responses.
    most_unanswered: share of drafts that may stay without a reply of the critic. With more of them the stage is not
      finished: the same command asks for them again, and for nothing else.
    replies: directory of the critic's replies, for runs on storage that is not this machine's; None is the stage's.
    """

    verb: ClassVar[str] = "srt-data"
    name: str
    model: str
    critic: EndpointCriticConfig | FunctionCriticConfig
    prompts: int = 8000
    fold: Fold | None = "sft"
    temperature: float = 0.7
    batch_size: int = 256
    most_unanswered: float = 0.02
    replies: str | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        Sampling(temperature=self.temperature)
        if self.prompts < 2:
            raise invalid("SrtData.prompts", self.prompts, "be at least 2", "One record is held out.")
        if not 0 <= self.most_unanswered < 1:
            rule = "be at least 0 and less than 1"
            raise invalid("SrtData.most_unanswered", self.most_unanswered, rule, "0.02 is the default.")

    @property
    def role(self) -> str:
        """No role: its verb has one stage only."""
        return ""

    def inputs(self) -> list[str]:
        """Return the base model."""
        return [self.model]

    def run(self, run: Run) -> dict[str, Any]:
        """Write responses, have them criticised, filter; return how many are kept and why others are not."""
        directory = run.begin(self, run.lm, snapshots={})
        drafts = kept(directory / RESPONSES / DRAFTS, "drafts of SRT", functools.partial(self._drafts, run))
        # Only process 0 asks; the reply of an endpoint is on its disk before the next one is waited for.
        return processes.first("critiques of SRT", functools.partial(self._criticise, directory, drafts))

    def _drafts(self, run: Run) -> list[Row]:
        prompts = fold_prompts(run, self.fold, self.prompts)
        sampler = answering.sampler(run, "policy", Sampling(temperature=self.temperature), self.batch_size)
        answerer = functools.partial(sampler.answer, run.language_model(self.model, "policy"))
        responses = first_answers(answerer, run.codec, [prompt.ids for prompt in prompts], run.seed_for(self.name))
        return [
            {
                "group": prompt.group,
                "prompt": prompt.text,
                "response": run.codec.text(response.ids),
                "finished": response.finished,
            }
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    def _criticise(self, directory: epath.Path, rows: Sequence[Row]) -> dict[str, Any]:
        """Ask the critic, write the records, and return the counts; on process 0 alone."""
        report = DropReport()
        usable = [row for row in rows if _is_usable(row, report)]
        config: CriticConfig = self.critic
        critic = config.build(self.replies or directory / CRITIC)
        found = judge([Draft(row["prompt"], row["response"]) for row in usable], critic)
        examples = _count(found, report)
        _LOG.info("%s: critic %s, %s; %d tokens paid", self.name, critic.name, report.summary(), critic.tokens_spent)
        self._check_answered(report, len(usable), examples)
        judged = [(row, entry) for row, entry in zip(usable, found, strict=True) if isinstance(entry, Judged)]
        if not judged:
            raise DataError(
                f"{self.name}: no record is left ({report.summary()}). The first of each reason: "
                f"{json.dumps(examples)}. Look at what the critic writes."
            )
        lines = [
            record_row(
                SrtRecord(group=row["group"], prompt=row["prompt"], response=row["response"], critique=entry.critique),
                (entry.response_score, entry.refinement_score),
            )
            for row, entry in judged
        ]
        write_lines(directory / RECORDS, lines)
        return {"drafts": len(rows), "kept": report.kept, "dropped": dict(report.dropped), **_means(judged)}

    def _check_answered(self, report: DropReport, asked: int, examples: Mapping[str, str]) -> None:
        missing = report.dropped[UNANSWERED]
        if missing > self.most_unanswered * asked:
            raise DataError(
                f"{self.name}: {missing} of {asked} drafts have no reply of the critic, more than most_unanswered = "
                f"{self.most_unanswered:g} allows; the first: {examples[UNANSWERED]}. Run the same command again: the "
                "replies so far are kept, and only these drafts are asked about."
            )


def _is_usable(row: Row, report: DropReport) -> bool:
    """Return whether a draft is worth the critic's price: it came to its end and says something."""
    reason = "unfinished_response" if not row["finished"] else "" if row["response"].strip() else "empty_response"
    if reason:
        report.dropped[reason] += 1
    return not reason


def _count(found: Sequence[Judged | Drop], report: DropReport) -> dict[str, str]:
    """Count what was kept and dropped; return the first example of each reason."""
    examples: dict[str, str] = {}
    for entry in found:
        if isinstance(entry, Drop):
            report.dropped[entry.reason] += 1
            examples.setdefault(entry.reason, entry.detail)
        else:
            report.kept += 1
    return examples


def _means(judged: Sequence[tuple[Row, Judged]]) -> dict[str, float]:
    """Return the mean independent scores of the records that are kept."""
    entries = [entry for _, entry in judged]
    return {
        "response_score": sum(entry.response_score for entry in entries) / len(entries),
        "refinement_score": sum(entry.refinement_score for entry in entries) / len(entries),
    }
