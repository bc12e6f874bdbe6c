"""Training on batches from a source: what language-model, SFT and reward stages have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pit_jax.core.errors import invalid
from pit_jax.core.metric import Metric, Metrics
from pit_jax.core.rng import key_for
from pit_jax.core.types import Comparisons, Params
from pit_jax.data.collate import Collator, take_batch
from pit_jax.data.pack import Packing
from pit_jax.data.source import Source
from pit_jax.models.trained import Network, divide, whole
from pit_jax.sharding.place import init_sharded, put_batch, replicated
from pit_jax.stages.run import Run
from pit_jax.train import state as train_state
from pit_jax.train.loop import TOKENS, Loop, RunFiles, fit
from pit_jax.train.optim import Optimizer, build, learning_rate
from pit_jax.train.state import TrainState
from pit_jax.train.step import Objective, Step, make_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How a stage is trained.

    batch_size: records of one update (of all devices together); with packing the most there may be.
    micro_batches: parts a batch is cut into to save memory; the update is the same.
    packing: rows that hold several examples, or None for one example a row.
    evaluation_records: held-out records per evaluation.
    """

    batch_size: int
    loop: Loop
    optimizer: Optimizer
    micro_batches: int = 1
    packing: Packing | None = None
    evaluation_records: int = 512

    def __post_init__(self) -> None:
        """Check what no other class does, and that the schedule fits the steps."""
        learning_rate(self.optimizer, self.loop.steps)
        if self.evaluation_records < 1:
            raise invalid(
                "Training.evaluation_records",
                self.evaluation_records,
                "be at least 1",
                "512 gives errors of about 2 %.",
            )


class SupervisedProgram:
    """A program for `train.loop.fit`: batches from a source, one update each.

    Its whole state is the source's position; dropout keys depend on the step alone.
    """

    def __init__(
        self,
        *,
        source: Source,
        collator: Collator[Any],
        step: Step,
        evaluate: Callable[[Params], dict[str, float]],
        key_stream: tuple[int, str],
        mesh: Mesh,
        frozen: Params | None,
    ) -> None:
        self._source, self._collator, self._step = source, collator, step
        self._evaluate, self._key_stream, self._mesh = evaluate, key_stream, mesh
        self._frozen = frozen

    def advance(self, state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        """Take the next batch and do one update."""
        batch = take_batch(self._source, self._collator)
        tokens = Metric(np.float32(count_tokens(batch)), np.float32(1))
        seed, stream = self._key_stream
        placed, key = put_batch(batch, self._mesh, row_axis=1), key_for(seed, stream, step)
        state, metrics = self._step(state, placed, key, self._frozen)
        return state, metrics | {TOKENS: tokens}

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Return held-out metrics."""
        return self._evaluate(whole(self._frozen, state.params))

    def snapshot(self) -> dict[str, Any]:
        """Return the data position."""
        return {"source": self._source.state()}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go to a data position."""
        self._source.restore(snapshot["source"])


def count_tokens(batch: Any) -> int:
    """Return the number of tokens, prompts included, that a batch puts through the model."""
    inputs = batch.inputs if isinstance(batch, Comparisons) else batch
    return int((inputs.prompt_segments > 0).sum() + (inputs.response_segments > 0).sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """The pieces of one supervised stage, put together by `train`."""

    run: Run
    name: str
    network: Network
    objective: Objective
    training: Training
    collator: Collator[Any]
    source: Source
    evaluate: Callable[[Params], dict[str, float]]


def train(trainer: Trainer, params: Params) -> Params:
    """Train `params` as the trainer says, and return them trained; resume if there is something to resume."""
    run, training = trainer.run, trainer.training
    frozen, trained = divide(trainer.network, params)
    state, shardings = initial_state(run, trainer.network, trained, training.optimizer, training.loop.steps)
    step = make_step(trainer.objective, training.optimizer, steps=training.loop.steps, shardings=shardings)
    program = SupervisedProgram(
        source=trainer.source,
        collator=trainer.collator,
        step=step,
        evaluate=trainer.evaluate,
        key_stream=(run.seed, f"{trainer.name}/dropout"),
        mesh=run.mesh,
        frozen=frozen,
    )
    state = fit(program, state, training.loop, run_files(run, trainer.name))
    return whole(frozen, state.params)


def run_files(run: Run, name: str) -> RunFiles:
    """Return where a stage of a run writes."""
    experiment = run.experiment
    return RunFiles(
        directory=run.stage_directory(name),
        name=name,
        tensorboard=experiment.tensorboard,
        wandb_project=experiment.wandb_project,
    )


def initial_state(
    run: Run, network: Network, trained: Params, optimizer: Optimizer, steps: int
) -> tuple[TrainState, TrainState]:
    """Return the state before the first update and its shardings, both on the run's mesh.

    Args:
      run: the run.
      network: what is trained.
      trained: the trained part of its parameters (`models.trained.divide`).
      optimizer: how it is trained.
      steps: number of updates.
    """
    _, shapes = divide(network, run.shapes(network))
    places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    transform = build(optimizer, steps)
    shardings = train_state.shardings(train_state.abstract(shapes, transform), places, transform)
    return train_state.create(jax.device_put(trained, places), transform, shardings), shardings


def fresh_params(run: Run, network: Network, name: str) -> Params:
    """Return newly drawn parameters, made where they belong."""
    places = jax.tree.map(lambda leaf: leaf.sharding, run.shapes(network))
    return init_sharded(network.init, key_for(run.seed, f"{name}/init"), places)


def initial_params(run: Run, stage: Any) -> Params:
    """Return what a language-model stage starts from: `init_from`, else the base of its adapters, else fresh ones."""
    lm = run.lm_of(stage)
    start = stage.init_from or (None if run.experiment.is_whole(stage) else run.experiment.base)
    return fresh_params(run, lm, stage.name) if start is None else run.language_model(start, lm=lm)


def mean_over(
    parts: Sequence[Any], measure: Callable[[Params, Any], Metrics], mesh: Mesh
) -> Callable[[Params], dict[str, float]]:
    """Return a function of parameters: the metrics of all held-out batches together, divided once."""
    compiled = jax.jit(measure, out_shardings=replicated(mesh))

    def evaluate(params: Params) -> dict[str, float]:
        sums: dict[str, tuple[float, float]] = {}
        for part in parts:
            fetched: Mapping[str, Metric] = jax.device_get(compiled(params, put_batch(part, mesh, row_axis=0)))
            for name, (total, weight) in fetched.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + float(total), before[1] + float(weight))
        return {name: total / weight if weight else 0.0 for name, (total, weight) in sums.items()}

    return evaluate


def with_loss(result: tuple[Metric, Metrics]) -> Metrics:
    """Return an objective's metrics with its loss among them."""
    loss, metrics = result
    return metrics | {"loss": loss}
