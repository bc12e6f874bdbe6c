"""Plain language-model training on text: what a dialogue model trained from scratch needs before SFT."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from pit_jax.core.errors import DataError, invalid
from pit_jax.data.collate import all_batches
from pit_jax.data.open import DataSpec, open_examples, open_source
from pit_jax.stages import together
from pit_jax.stages.run import Run
from pit_jax.stages.sft import likelihoods
from pit_jax.stages.supervised import Learning, Trainer, Training, initial_params, mean_over, train
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.train.loop import finished


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """Stage: minimise -log p(text) on documents.

    data: documents: `DataSpec.path` of JSON Lines with a `text` field, or of plain text files. Its folds decide
      what is held out.
    length: tokens of a training sequence.
    """

    verb: ClassVar[str] = "lm"
    name: str
    data: DataSpec
    length: int
    training: Training
    z_loss: float = 0.0
    init_from: str | None = None

    def __post_init__(self) -> None:
        """Check the length."""
        if self.length < 2:
            raise invalid("LanguageModel.length", self.length, "be at least 2", "256 is usual for small models.")

    @property
    def role(self) -> str:
        """No role: its verb has one stage only."""
        return ""

    def inputs(self) -> list[str]:
        """Return what it starts from."""
        return [] if self.init_from is None else [self.init_from]

    def codec(self, run: Run) -> Codec:
        """Return how documents become rows: one token of context before the first target, and no template."""
        lengths = Lengths(inputs=1, targets=self.length)
        return Codec(tokenizer=run.tokenizer, templates=Templates(policy="{prompt}", bos=False), lengths=lengths)

    def learning(self, run: Run) -> Learning:
        """Return what is trained, and on batches of which form."""
        return likelihoods(run.whole, "lm", self.codec(run), self.training, self.z_loss)

    def run(self, run: Run) -> dict[str, Any]:
        """Train, or continue, and return the last metrics."""
        directory = run.begin(self, run.whole, snapshots={})
        codec, learning = self.codec(run), self.learning(run)
        limit = self.training.evaluation_records
        examples = open_examples(self.data, view="lm", split="validation", codec=codec, limit=limit)
        if not examples:
            raise DataError(
                f"The stage {self.name!r} holds out no document. Raise Folds.validation_fraction of its data, or give "
                "DataSpec.validation_path."
            )
        parts = list(all_batches(examples, learning.held_out))
        trainer = Trainer(
            run=run,
            name=self.name,
            learning=learning,
            source=together.same_everywhere(
                open_source(self.data, view="lm", split="train", codec=codec, seed=run.seed_for(self.name)), self.name
            ),
            evaluate=mean_over(parts, learning, run),
        )
        train(trainer, initial_params(run, self))
        return finished(directory) or {}
