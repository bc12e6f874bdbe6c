"""SRT's first stage (arXiv 2406.07168): learn to respond, to criticise the response, and to refine it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from pit_jax.core.errors import DataError, invalid
from pit_jax.data.collate import TrainingView, all_batches
from pit_jax.data.folds import Folds
from pit_jax.data.source import ListBlocks, ShuffledSource, Source
from pit_jax.data.views import DropReport, Example
from pit_jax.srt.critique import Drop
from pit_jax.srt.text import SrtCodec, SrtText
from pit_jax.stages import together
from pit_jax.stages.run import Run
from pit_jax.stages.sft import likelihoods
from pit_jax.stages.srt_files import RECORDS, SrtRecord, read_records
from pit_jax.stages.supervised import Learning, Trainer, Training, initial_params, mean_over, train
from pit_jax.train.loop import finished

_LOG = logging.getLogger(__name__)
_VIEW: TrainingView = "sft_policy"
"""The form of the batches: a prompt of the policy, and what follows it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SrtTune:
    """Stage: minimise -log p(y, f, r | x) over SRT's records; only x is masked.

    The loss is the mean over the tokens of a batch, as in every supervised stage here; the paper's is the mean over
    records of the sum of their tokens, which weighs tokens alike as well.

    init_from: the base model, whose own responses y are. data: a stage of the run, or the path of one, whose directory
    has `records.jsonl`. text: the format, with the ablations. held_out: share of the prompts' groups for evaluation.
    """

    verb: ClassVar[str] = "srt"
    name: str
    init_from: str
    data: str
    text: SrtText
    training: Training
    held_out: float = 0.05
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0 < self.held_out < 1:
            raise invalid("SrtTune.held_out", self.held_out, "lie between 0 and 1", "0.05 is usual.")

    @property
    def role(self) -> str:
        """Its result answers prompts as any policy does."""
        return "policy"

    def inputs(self) -> list[str]:
        """Return what it starts from, and whose records it learns from."""
        return [self.init_from, self.data]

    def learning(self, run: Run) -> Learning:
        """Return what is trained, and on batches of which form."""
        codec = SrtCodec(self.text, run.codec).codec
        return likelihoods(run.lm_of(self), _VIEW, codec, self.training, self.z_loss)

    def run(self, run: Run) -> dict[str, Any]:
        """Train, or continue, or only report what is finished; return the last metrics, and the records' counts."""
        learning = self.learning(run)
        directory = run.begin(self, learning.network, snapshots={})
        examples = self.examples(run)
        parts = list(all_batches(examples.held_out[: self.training.evaluation_records], learning.held_out))
        trainer = Trainer(
            run=run,
            name=self.name,
            learning=learning,
            source=self._source(run, examples.train),
            evaluate=mean_over(parts, learning, run),
        )
        train(trainer, initial_params(run, self))
        report = examples.report
        return (finished(directory) or {}) | {"records": report.kept, "dropped": dict(report.dropped)}

    def examples(self, run: Run) -> SrtExamples:
        """Return the records as examples, those of held-out groups apart.

        Raises:
          DataError: the file of records is missing or damaged, or one of the two parts has no example.
        """
        path = run.artifact(self.data).directory / RECORDS
        found = make_examples(read_records(path), SrtCodec(self.text, run.codec), self.held_out)
        _LOG.info("%s: %s", self.name, found.report.summary())
        for part, examples in (("train on", found.train), ("hold out", found.held_out)):
            if not examples:
                raise DataError(
                    f"{path} has no record to {part} ({found.report.summary()}, held_out = {self.held_out:g}). Make "
                    "more records, raise SrtText.targets if they are too long, or change held_out."
                )
        return found

    def _source(self, run: Run, examples: Sequence[Example]) -> Source:
        """Return the stream of examples; its saved position holds a fingerprint of them all."""
        window, seed = run.experiment.data.window, run.seed_for(self.name)
        return together.same_everywhere(ShuffledSource(ListBlocks(examples), window=window, seed=seed), self.name)


class SrtExamples(NamedTuple):
    """Examples {inputs, targets} of both parts, and how many records gave one."""

    train: list[Example]
    held_out: list[Example]
    report: DropReport


def make_examples(records: Sequence[SrtRecord], codec: SrtCodec, held_out: float) -> SrtExamples:
    """Return records as examples x -> y f r; a hash of the group decides which are held out."""
    folds, report = Folds(validation_fraction=held_out, salt="srt"), DropReport()
    parts: dict[str, list[Example]] = {"train": [], "validation": []}
    for record in records:
        prompt = codec.run.prompt_ids(record.prompt)
        target = codec.target(record.response, record.critique) if prompt else Drop("empty_prompt")
        if isinstance(target, Drop):
            report.dropped[target.reason] += 1
            continue
        report.kept += 1
        inputs = codec.run.policy_prompt(prompt).ids
        parts[folds.split(record.group)].append(
            {"inputs": np.asarray(inputs, np.int32), "targets": np.asarray(target, np.int32)}
        )
    return SrtExamples(parts["train"], parts["validation"], report)
