"""Direct preference optimisation: a policy from comparisons, without a reward model (Rafailov et al. 2023)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pit_jax.core import metric
from pit_jax.core.errors import invalid
from pit_jax.core.metric import Metric, Metrics
from pit_jax.core.types import Comparisons, Params
from pit_jax.data.collate import TrainingView, all_batches
from pit_jax.data.pairs import PAIRS, SplitPairs, split_pairs
from pit_jax.data.source import ListBlocks, ShuffledSource, Source
from pit_jax.data.views import Example
from pit_jax.evaluation import implicit_reward
from pit_jax.losses import preference
from pit_jax.models.api import ConditionalLM
from pit_jax.ops import segment
from pit_jax.sharding.place import put_batch
from pit_jax.stages import together
from pit_jax.stages.reward import clean
from pit_jax.stages.run import Run
from pit_jax.stages.supervised import Learning, Trainer, Training, collators, everywhere, mean_over, train
from pit_jax.train.step import Objective

REFERENCE = "reference_model"
"""Name under which the frozen reference stands beside the policy's own parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpo:
    """Stage: minimise -log s(beta [log pi(y_w|x) / pi_ref(y_w|x) - log pi(y_l|x) / pi_ref(y_l|x)]).

    Log-probabilities are sums over a response's tokens, its EOS included. (Rafailov et al. 2023, arXiv 2305.18290,
    equation 7; in PIT's comparison an alternative to RLHF, in SRT, arXiv 2406.07168, the second stage.)

    init_from: the policy it starts from, frozen as pi_ref.
    beta: strength of the implied KL penalty; SRT uses 0.01.
    pairs: a stage of the run, or the path of one, whose directory has `pairs.jsonl`; None trains on the run's own
      records, those of D_RM.
    held_out_pairs: share of the prompts of `pairs` that are kept for the report; the run's own records are held out
      by its folds.
    report_records: held-out records of the report.
    """

    verb: ClassVar[str] = "dpo"
    name: str
    training: Training
    init_from: str
    beta: float = 0.1
    pairs: str | None = None
    held_out_pairs: float = 0.05
    report_records: int = 2000

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 < self.beta < math.inf:
            raise invalid("Dpo.beta", self.beta, "be positive", "0.1 is usual, 0.01 keeps the policy less close.")
        if not 0 < self.held_out_pairs < 1:
            raise invalid("Dpo.held_out_pairs", self.held_out_pairs, "lie between 0 and 1", "0.05 is usual.")
        if self.report_records < 1:
            raise invalid("Dpo.report_records", self.report_records, "be at least 1", "2000 gives errors of 2 %.")

    @property
    def role(self) -> Literal["policy"]:
        """Its result answers prompts as any policy does."""
        return "policy"

    @property
    def view(self) -> TrainingView:
        """The view of the records that is trained on: the one of the reward model that DPO does without."""
        return "reward_bt"

    def inputs(self) -> list[str]:
        """Return what it starts from, and whose pairs it learns from."""
        return [self.init_from, *([] if self.pairs is None else [self.pairs])]

    def reference(self, run: Run) -> Params:
        """Return the parameters of pi_ref, which are also those that training starts from."""
        return run.language_model(self.init_from, self.role, run.lm_of(self))

    def learning(self, run: Run) -> Learning:
        """Return what is trained, and on batches of which form."""
        lm, training = run.lm_of(self), self.training
        segments = 1 if training.packing is None else training.packing.segments
        collator, held_out = collators(self.view, run.codec, training, sharing=run.mesh)
        return Learning(
            network=lm,
            objective=preference_objective(lm, self.beta, segments),
            measure=preference_objective(lm, self.beta, 1),
            training=training,
            collator=collator,
            held_out=held_out,
        )

    def run(self, run: Run) -> dict[str, Any]:
        """Train, or continue, and return the held-out report."""
        lm, training = run.lm_of(self), self.training
        run.begin(self, lm, snapshots={})
        learning = self.learning(run)
        split = self._split(run)
        examples = self._held_out(run, split)
        parts = list(all_batches(examples[: training.evaluation_records], learning.held_out))
        reference = self.reference(run)
        trainer = Trainer(
            run=run,
            name=self.name,
            learning=learning,
            source=self._source(run, split),
            evaluate=mean_over(parts, learning, run),
        )
        params = train(trainer, reference, {REFERENCE: reference})
        examples = examples[: self.report_records]
        return self._report(run, params, list(all_batches(examples, learning.held_out)), examples)

    def _split(self, run: Run) -> SplitPairs | None:
        if self.pairs is None:
            return None
        path = run.artifact(self.pairs).directory / PAIRS
        return split_pairs(path, run.codec, held_out=self.held_out_pairs)

    def _source(self, run: Run, split: SplitPairs | None) -> Source:
        """Return the stream of training pairs; its saved position holds a fingerprint of them all."""
        if split is None:
            return run.source(self.view, "train", stream=self.name)
        window, seed = run.experiment.data.window, run.seed_for(self.name)
        return together.same_everywhere(ShuffledSource(ListBlocks(split.train), window=window, seed=seed), self.name)

    def _held_out(self, run: Run, split: SplitPairs | None) -> Sequence[Example]:
        limit = max(self.training.evaluation_records, self.report_records)
        return run.examples(self.view, "validation", limit=limit) if split is None else split.held_out[:limit]

    def _report(
        self, run: Run, params: Params, parts: Sequence[Comparisons], examples: Sequence[Example]
    ) -> dict[str, Any]:
        compiled = everywhere(log_ratios(run.lm_of(self), 1), run.mesh)
        found = [np.asarray(compiled(params, put_batch(part, run.mesh, row_axis=0)), np.float64) for part in parts]
        lengths = [np.asarray(part.length, np.float64) for part in parts]
        ratios, lengths = (np.concatenate(tables, axis=1)[:, : len(examples)] for tables in (found, lengths))
        # Records of one prompt are not independent.
        prompts = [example["prompt"].tobytes().hex() for example in examples]
        return implicit_reward.report(ratios, lengths, prompts, clean(run, examples), beta=self.beta, seed=run.seed)


def preference_objective(lm: ConditionalLM, beta: float, segments: int) -> Objective:
    """Return DPO's loss on `Comparisons` of at most `segments` examples a row; `params` hold pi_ref as `REFERENCE`."""
    sums = _pass_logps(lm, segments)

    def objective(params: Params, batch: Comparisons, key: jax.Array | None) -> tuple[Metric, Metrics]:
        policy, reference = sums(params, batch, key if lm.config.dropout > 0 else None)
        loss, metrics = preference.dpo((policy[0], policy[1]), (reference[0], reference[1]), batch.weight, beta)
        still = jax.lax.stop_gradient(policy - reference)
        return loss, metrics | {
            "log_ratio/chosen": metric.mean(still[0], batch.weight),
            "log_ratio/rejected": metric.mean(still[1], batch.weight),
        }

    return objective


def log_ratios(lm: ConditionalLM, segments: int) -> Callable[[Params, Comparisons], Float[Array, "P n"]]:
    """Return the function of parameters and a batch: log pi(y|x) - log pi_ref(y|x) of (chosen, rejected)."""
    sums = _pass_logps(lm, segments)

    def ratios(params: Params, batch: Comparisons) -> Float[Array, "P n"]:
        policy, reference = sums(params, batch, None)
        return policy - reference

    return ratios


def _pass_logps(
    lm: ConditionalLM, segments: int
) -> Callable[[Params, Comparisons, jax.Array | None], tuple[Float[Array, "P n"], Float[Array, "P n"]]]:
    """Return the function that sums log-probabilities over every pass's response: under pi, and under pi_ref."""

    def of_passes(params: Params, batch: Comparisons, key: jax.Array | None) -> Float[Array, "P n"]:
        logp = lm.logprobs(params, batch.inputs, key).logp
        return jnp.take(segment.sums(logp, batch.inputs.response_segments, segments).reshape(-1), batch.index)

    def both(
        params: Params, batch: Comparisons, key: jax.Array | None
    ) -> tuple[Float[Array, "P n"], Float[Array, "P n"]]:
        own = {name: value for name, value in params.items() if name != REFERENCE}
        return of_passes(own, batch, key), of_passes(params[REFERENCE], batch, None)

    return both
