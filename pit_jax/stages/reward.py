"""Reward models: Bradley-Terry R_P(x, y) and the gap model R_PIT(x, y1, y2) (PIT, arXiv 2310.00898, section 3.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pit_jax.core.errors import invalid
from pit_jax.core.metric import Metric, Metrics
from pit_jax.core.rng import key_for
from pit_jax.core.types import Comparisons, Params
from pit_jax.data.collate import TrainingView, all_batches
from pit_jax.data.views import Example
from pit_jax.evaluation import judges, rewards
from pit_jax.losses import preference
from pit_jax.models.heads import ScalarModel
from pit_jax.sharding.place import put_batch
from pit_jax.stages.run import Run
from pit_jax.stages.supervised import Learning, Trainer, Training, collators, everywhere, mean_over, train
from pit_jax.train.step import Objective

ROLES = ("bt", "gap")
GAP_PASSES = ("wl", "ww", "ll", "lw")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
    """Stage: train R_P (role "bt") or R_PIT (role "gap") on D_RM, and report what it is worth on held-out records.

    init_from: the stage whose trunk (and head, if it is a reward model) it starts from. A gap model is best
      started from R_P: it then needs about half the steps.
    readout, attention: of the scalar head, see `models.heads.ScalarModel`. R_P has no reference in its prompt,
      so "mean_difference" is there the mean over the response.
    terms: comparisons of the gap loss to train, for ablations; all five by default.
    """

    verb: ClassVar[str] = "reward"
    name: str
    role: Literal["bt", "gap"]
    training: Training
    init_from: str
    readout: Literal["mean_difference", "mean", "last"] = "mean_difference"
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    terms: tuple[str, ...] = preference.COMPARISONS
    report_records: int = 2000

    def __post_init__(self) -> None:
        """Check the role; make lists from gin hashable."""
        object.__setattr__(self, "terms", tuple(self.terms))
        if self.role not in ROLES:
            raise invalid("Reward.role", self.role, f"be one of {ROLES}", "Choose one of them.")

    def inputs(self) -> list[str]:
        """Return what it starts from."""
        return [self.init_from]

    @property
    def view(self) -> TrainingView:
        """The view of the records that is trained on."""
        return "reward_bt" if self.role == "bt" else "reward_gap"

    def model(self, run: Run) -> ScalarModel:
        """Return the network that is trained."""
        return ScalarModel(run.lm_of(self), self.readout, self.attention)

    def learning(self, run: Run) -> Learning:
        """Return what is trained, and on batches of which form."""
        model, training = self.model(run), self.training
        segments = 1 if training.packing is None else training.packing.segments
        sharing = run.mesh if self.attention == "causal" else None
        collator, held_out = collators(self.view, run.codec, training, sharing)
        return Learning(
            network=model,
            objective=comparison_objective(model, self.role, self.terms, segments),
            measure=comparison_objective(model, self.role, self.terms, 1),
            training=training,
            collator=collator,
            held_out=held_out,
        )

    def run(self, run: Run) -> dict[str, Any]:
        """Train, or continue, and return the held-out report."""
        model, training = self.model(run), self.training
        run.begin(self, model, snapshots={})
        learning = self.learning(run)
        examples = run.examples(self.view, "validation", limit=max(training.evaluation_records, self.report_records))
        parts = list(all_batches(examples[: training.evaluation_records], learning.held_out))
        params = train(
            Trainer(
                run=run,
                name=self.name,
                learning=learning,
                source=run.source(self.view, "train", stream=self.name),
                evaluate=mean_over(parts, learning, run),
            ),
            self._initial(run, model),
        )
        examples = examples[: self.report_records]
        scores, lengths = _scores(run, model, params, list(all_batches(examples, learning.held_out)), len(examples))
        agreed = clean(run, examples)
        if self.role == "bt":
            return rewards.bradley_terry(scores[0], scores[1], lengths, agreed)
        # The lengths of passes wl and ll are those of y_w and y_l.
        return rewards.gap(dict(zip(GAP_PASSES, scores, strict=True)), lengths[[0, 2]], agreed)

    def _initial(self, run: Run, model: ScalarModel) -> Params:
        artifact = run.artifact(self.init_from)
        if isinstance(artifact.network, ScalarModel):
            return run.params(self.init_from)
        return model.with_trunk(run.trunk(self.init_from), key_for(run.seed, f"{self.name}/head"))


def comparison_objective(model: ScalarModel, role: str, terms: Sequence[str], segments: int) -> Objective:
    """Return the Bradley-Terry or the gap loss on `Comparisons` with at most `segments` examples a row."""

    def objective(params: Params, batch: Comparisons, key: jax.Array | None) -> tuple[Metric, Metrics]:
        drop = key if model.lm.config.dropout > 0 else None
        table = model.scores(params, batch.inputs, segments, drop).reshape(-1)
        passes = jnp.take(table, batch.index)
        if role == "bt":
            return preference.bradley_terry(passes[0], passes[1], batch.weight)
        return preference.gap(passes[0], passes[1], passes[2], passes[3], batch.weight, terms)

    return objective


def pass_scores(model: ScalarModel) -> Callable[[Params, Comparisons], Float[Array, "P n"]]:
    """Return the function of parameters and a batch of one example a row: the score of every pass."""

    def scores(params: Params, batch: Comparisons) -> Float[Array, "P n"]:
        return jnp.take(model.scores(params, batch.inputs, 1).reshape(-1), batch.index)

    return scores


def _scores(
    run: Run, model: ScalarModel, params: Params, parts: Sequence[Comparisons], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores and the response lengths of every pass, [P, count] each."""
    compiled = everywhere(pass_scores(model), run.mesh)
    scores = [np.asarray(compiled(params, put_batch(part, run.mesh, row_axis=0))) for part in parts]
    lengths = [np.asarray(part.length, np.float64) for part in parts]
    return np.concatenate(scores, axis=1)[:, :count], np.concatenate(lengths, axis=1)[:, :count]


def clean(run: Run, examples: Sequence[Example]) -> Bool[np.ndarray, " n"] | None:
    """Return where the exact judge, if there is one, prefers the chosen reply; equal quality is not clean."""
    if run.experiment.judge is None:
        return None
    quality = judges.import_function(run.experiment.judge)
    text = run.codec.text
    return np.array(
        [
            quality(text(example["prompt"]), text(example["chosen"]))
            > quality(text(example["prompt"]), text(example["rejected"]))
            for example in examples
        ]
    )
