"""Pairs for SRT's second stage (arXiv 2406.07168): the tuned model prefers its own refinements."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any, ClassVar

from pit_jax.core.errors import DataError, invalid
from pit_jax.core.types import Params
from pit_jax.data.folds import Fold
from pit_jax.data.pairs import PAIRS
from pit_jax.data.views import DropReport
from pit_jax.decode.sampling import Sampling
from pit_jax.improve.loop import sample_keys
from pit_jax.srt.inference import PARSED, Refined, write_refined
from pit_jax.srt.text import SrtCodec
from pit_jax.srt.writing import Temperatures
from pit_jax.stages import together
from pit_jax.stages.artifact import RESPONSES
from pit_jax.stages.run import Run
from pit_jax.stages.srt_answers import text_of, writer
from pit_jax.stages.srt_files import Prompt, Row, fold_prompts, kept, write_lines

_LOG = logging.getLogger(__name__)
WRITTEN = "written.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SrtPairs:
    """Stage: write `pairs.jsonl` for DPO: chosen r', rejected y', where the model's own score improved.

    The score of y' is the one in f'. The score of r' is the one of fresh feedback, which the model writes as if r' were
    its response. Where the text has no score (an ablation), all pairs are kept.

    model: the tuned model. prompts: at most so many, of a fold of the training data other than SRT's own.
    temperature: of y'; feedback and refinement are greedy.
    """

    verb: ClassVar[str] = "srt-pairs"
    name: str
    model: str
    prompts: int = 5000
    fold: Fold | None = "rl"
    temperature: float = 0.7
    batch_size: int = 256

    def __post_init__(self) -> None:
        """Check the numbers."""
        Sampling(temperature=self.temperature)
        if self.prompts < 2:
            raise invalid("SrtPairs.prompts", self.prompts, "be at least 2", "One pair is held out.")

    @property
    def role(self) -> str:
        """No role: its verb has one stage only."""
        return ""

    def inputs(self) -> list[str]:
        """Return the tuned model."""
        return [self.model]

    def run(self, run: Run) -> dict[str, Any]:
        """Write, score, choose; return how many pairs there are, and why others are left out."""
        directory = run.begin(self, run.lm, snapshots={})
        codec = SrtCodec(text_of(run, self.model), run.codec)
        make = functools.partial(self._write, run, codec)
        rows = kept(directory / RESPONSES / WRITTEN, "texts of SRT", make)
        scored = "score" in codec.text.parts
        if not scored:
            _LOG.warning("%s: the text has no score, so every refinement is preferred to its response", self.name)
        pairs, report = choose_pairs(rows, scored=scored)
        _LOG.info("%s: %s", self.name, report.summary())
        if not pairs:
            raise DataError(
                f"{self.name}: no pair is left ({report.summary()}). Train {self.model!r} longer, or give more prompts."
            )
        path = directory / PAIRS
        together.write("pairs of SRT", lambda: write_lines(path, pairs), path)
        return {
            "texts": len(rows),
            "kept": report.kept,
            "dropped": dict(report.dropped),
            "chosen_by": "own score" if scored else "all",
        }

    def _write(self, run: Run, codec: SrtCodec) -> list[Row]:
        """Let the model write y', f', r', and fresh feedback on r'."""
        prompts = fold_prompts(run, self.fold, self.prompts)
        params = run.language_model(self.model, "policy")
        rows = [run.codec.policy_prompt(prompt.ids) for prompt in prompts]
        keys = sample_keys(run.seed_for(self.name), "srt", 0, range(len(prompts)), 1)
        author = writer(run, codec, self.batch_size)
        written = write_refined(author, params, codec, rows, keys, Temperatures(self.temperature, 0.0))
        fresh = self._fresh_scores(run, codec, params, prompts, written)
        return [
            {
                "group": prompt.group,
                "prompt": prompt.text,
                "response": run.codec.text(entry.response.ids),
                "finished": entry.response.finished,
                "feedback": None if entry.feedback is None else run.codec.text(entry.feedback),
                "refinement": None if entry.refinement is None else run.codec.text(entry.refinement.ids),
                "outcome": entry.outcome,
                "response_score": codec.own_score(entry.feedback),
                "refinement_score": score,
            }
            for prompt, entry, score in zip(prompts, written, fresh, strict=True)
        ]

    def _fresh_scores(
        self, run: Run, codec: SrtCodec, params: Params, prompts: Sequence[Prompt], written: Sequence[Refined]
    ) -> list[float | None]:
        """Return the scores that the model gives its refinements in fresh feedback, None where there is none."""
        found: list[float | None] = [None] * len(written)
        if "score" not in codec.text.parts:
            return found
        wanted = [number for number, entry in enumerate(written) if entry.refinement is not None]
        given = [codec.opened(entry.refinement.ids) for entry in written if entry.refinement is not None]
        texts = writer(run, codec, self.batch_size, stop=codec.markers[-1]).write(
            params,
            [run.codec.policy_prompt(prompts[number].ids) for number in wanted],
            given,
            sample_keys(run.seed_for(self.name), "srt", 1, wanted, 1),
            Temperatures(0.0, 0.0),
        )
        for number, text in zip(wanted, texts, strict=True):
            found[number] = codec.own_score(codec.split(text.ids).feedback)
        return found


def choose_pairs(rows: Sequence[Row], *, scored: bool) -> tuple[list[Row], DropReport]:
    """Return the pairs whose own score improved (all, where there are no scores), and why others are left out.

    The reasons are no_marker, unfinished, too_long, empty (the text gave no refinement), unfinished_response,
    empty_response, identical, no_own_score and not_improved.
    """
    pairs: list[Row] = []
    report = DropReport()
    for row in rows:
        reason = _why_not(row, scored)
        if reason:
            report.dropped[reason] += 1
            continue
        report.kept += 1
        pairs.append(
            {
                "group": row["group"],
                "prompt": row["prompt"],
                "chosen": row["refinement"],
                "rejected": row["response"],
            }
        )
    return pairs, report


def _why_not(row: Row, scored: bool) -> str:
    before, after = row["response_score"], row["refinement_score"]
    if row["outcome"] != PARSED:
        return row["outcome"]
    if not row["finished"]:
        return "unfinished_response"
    if not row["response"].strip():
        return "empty_response"
    if row["response"] == row["refinement"]:
        return "identical"
    if scored and (before is None or after is None):
        return "no_own_score"
    return "not_improved" if scored and not after > before else ""
