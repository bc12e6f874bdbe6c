"""Supervised fine-tuning: M_P(y_w | x) and M_PIT(y_w | x, y_l) (PIT, arXiv 2310.00898, section 3.2)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax

from pit_jax.core.errors import invalid
from pit_jax.core.metric import Metric, Metrics
from pit_jax.core.types import Conditional, Params
from pit_jax.data.collate import TrainingView, all_batches
from pit_jax.losses.cross_entropy import cross_entropy, per_token
from pit_jax.models.api import ConditionalLM
from pit_jax.models.output import summed_loss
from pit_jax.stages.run import Run
from pit_jax.stages.supervised import Learning, Trainer, Training, collators, initial_params, mean_over, train
from pit_jax.text.codec import Codec
from pit_jax.train.loop import finished
from pit_jax.train.step import Objective

ROLES = ("policy", "improver")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft:
    """Stage: maximise log p(y_w | x) for the policy, log p(y_w | x, y_l) for the improver, on D_SFT.

    init_from: a stage of the run (such as "pretrain") or a path to start from; None starts from scratch.
    z_loss: weight of the softmax-normaliser penalty.
    """

    verb: ClassVar[str] = "sft"
    name: str
    role: Literal["policy", "improver"]
    training: Training
    init_from: str | None = None
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        """Check the role."""
        if self.role not in ROLES:
            raise invalid("Sft.role", self.role, f"be one of {ROLES}", "Choose one of them.")

    def inputs(self) -> list[str]:
        """Return what it starts from."""
        return [] if self.init_from is None else [self.init_from]

    @property
    def view(self) -> TrainingView:
        """The view of the records that is trained on."""
        return "sft_policy" if self.role == "policy" else "sft_improver"

    def learning(self, run: Run) -> Learning:
        """Return what is trained, and on batches of which form."""
        return likelihoods(run.lm_of(self), self.view, run.codec, self.training, self.z_loss)

    def run(self, run: Run) -> dict[str, Any]:
        """Train, or continue, or only report what is finished; return the last metrics."""
        learning = self.learning(run)
        directory = run.begin(self, learning.network, snapshots={})
        examples = run.examples(self.view, "validation", limit=self.training.evaluation_records)
        parts = list(all_batches(examples, learning.held_out))
        trainer = Trainer(
            run=run,
            name=self.name,
            learning=learning,
            source=run.source(self.view, "train", stream=self.name),
            evaluate=mean_over(parts, learning, run),
        )
        train(trainer, initial_params(run, self))
        return finished(directory) or {}


def likelihoods(lm: ConditionalLM, view: TrainingView, codec: Codec, training: Training, z_loss: float) -> Learning:
    """Return the learning of responses to prompts: of a view's examples, with a codec."""
    objective = likelihood(lm, z_loss)
    collator, held_out = collators(view, codec, training)
    return Learning(
        network=lm, objective=objective, measure=objective, training=training, collator=collator, held_out=held_out
    )


def likelihood(lm: ConditionalLM, z_loss: float) -> Objective:
    """Return the objective -log p(response | prompt) per response token."""

    def objective(params: Params, batch: Conditional, key: jax.Array | None) -> tuple[Metric, Metrics]:
        drop, mask = key if lm.config.dropout > 0 else None, batch.response_segments > 0
        total, scores = summed_loss(lm, params, batch, functools.partial(per_token, z_loss=z_loss), mask, drop)
        loss, metrics = cross_entropy(scores, mask, z_loss)
        return loss._replace(total=total), metrics

    return objective
