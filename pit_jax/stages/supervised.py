"""Training on batches from a source: what language-model, SFT and reward stages have in common."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pit_jax.core.errors import invalid
from pit_jax.core.metric import Metric, Metrics
from pit_jax.core.rng import key_for
from pit_jax.core.types import Comparisons, Params
from pit_jax.data.collate import Collator, ComparisonCollator, TrainingView, collator_for, take_batch
from pit_jax.data.pack import Packing
from pit_jax.data.shared import with_shared_prompts
from pit_jax.data.source import Source
from pit_jax.models.trained import Network, divide, whole
from pit_jax.sharding.place import init_sharded, put_batch, replicated, row_parts
from pit_jax.stages.run import Run
from pit_jax.text.codec import Codec
from pit_jax.train import state as train_state
from pit_jax.train.loop import TOKENS, Loop, RunFiles, fit
from pit_jax.train.optim import Optimizer, build, learning_rate
from pit_jax.train.state import TrainState
from pit_jax.train.step import Objective, Step, make_step
from pit_jax.train.window import Phases


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How a stage is trained.

    batch_size: records of one update (of all devices together); with packing the most there may be.
    micro_batches: parts a batch is cut into to save memory; the update is the same.
    packing: rows that hold several examples, or None for one example a row.
    share_prompts: whether the passes of a preference record share what their prompts have in common, which is then
      computed once. It changes no result but by rounding (and which units are dropped, with dropout), takes effect for
      DPO and for reward models of `attention` "causal", and not with packing or where records cannot be cut evenly
      over the mesh.
    evaluation_records: held-out records per evaluation.
    """

    batch_size: int
    loop: Loop
    optimizer: Optimizer
    micro_batches: int = 1
    packing: Packing | None = None
    share_prompts: bool = True
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

    Its whole state is the source's position; dropout keys depend on the step alone. Its phases are "data" (the host
    makes a batch, while the device is at work on earlier ones) and "update".
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
        self.phases = Phases()

    def advance(self, state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        """Take the next batch and do one update, without waiting for it."""
        self.phases.enter("data")
        batch = take_batch(self._source, self._collator)
        tokens = Metric(np.float32(count_tokens(batch)), np.float32(1))
        seed, stream = self._key_stream
        placed, key = put_batch(batch, self._mesh, row_axis=1), key_for(seed, stream, step)
        self.phases.enter("update")
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
    """Return the number of tokens, prompts included, that a batch puts through the model.

    A prompt that responses share counts for each: what is shared saves work, and is the same batch.
    """
    inputs = batch.inputs if isinstance(batch, Comparisons) else batch
    rests = [] if inputs.rest is None else [inputs.rest.segments]
    levels, rows = [inputs.prompt_segments, *rests, inputs.response_segments], inputs.response.shape[-2]
    return sum(int((level > 0).sum()) * (rows // level.shape[-2]) for level in levels)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Learning:
    """What a supervised stage compiles: a network, its loss, and the form of the batches.

    objective, collator: of training. measure, held_out: of held-out records, one example a row.
    """

    network: Network
    objective: Objective
    measure: Objective
    training: Training
    collator: Collator[Any]
    held_out: Collator[Any]

    def measured(self, params: Params, batch: Any) -> Metrics:
        """Return the metrics of a held-out batch, its loss among them; without dropout."""
        loss, metrics = self.measure(params, batch, None)  # type: ignore[arg-type]
        return metrics | {"loss": loss}

    def step(self, run: Run, shardings: TrainState) -> Step:
        """Return the update of the stage."""
        optimizer, steps = self.training.optimizer, self.training.loop.steps
        make = functools.partial(make_step, self.objective, optimizer, steps=steps, shardings=shardings)
        return run.compiling.once("step", make)

    def measurer(self, run: Run) -> Callable[[Params, Any], Metrics]:
        """Return the compiled function of parameters and a held-out batch: its metrics."""
        return run.compiling.once("held-out loss", functools.partial(everywhere, self.measured, run.mesh))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """The pieces of one supervised stage, put together by `train`."""

    run: Run
    name: str
    learning: Learning
    source: Source
    evaluate: Callable[[Params], dict[str, float]]


def train(trainer: Trainer, params: Params, beside: Params | None = None) -> Params:
    """Train `params` as the trainer says, and return them trained; resume if there is something to resume.

    Args:
      trainer: what is trained, and on what.
      params: the network's parameters to start from.
      beside: further parameters that the objective reads and nothing changes, such as a reference model's. They are
        found in the objective's parameters, and in what is returned, under names of their own.
    """
    run, learning, training = trainer.run, trainer.learning, trainer.learning.training
    frozen, trained = divide(learning.network, params)
    frozen = with_more(frozen, beside)
    state, shardings = initial_state(run, learning.network, trained, training.optimizer, training.loop.steps)
    del params, trained  # the state has a copy: a second set of parameters must not lie about while training
    program = SupervisedProgram(
        source=trainer.source,
        collator=learning.collator,
        step=learning.step(run, shardings),
        evaluate=trainer.evaluate,
        key_stream=(run.seed, f"{trainer.name}/dropout"),
        mesh=run.mesh,
        frozen=frozen,
    )
    state = fit(program, state, training.loop, run_files(run, trainer.name))
    return whole(frozen, state.params)


def with_more(frozen: Params | None, beside: Params | None) -> Params | None:
    """Return the frozen part of a network's parameters together with what the objective reads beside them."""
    return frozen if beside is None else (frozen or {}) | beside


def run_files(run: Run, name: str) -> RunFiles:
    """Return where a stage of a run writes."""
    experiment = run.experiment
    return RunFiles(
        directory=run.stage_directory(name),
        name=name,
        tensorboard=experiment.tensorboard,
        wandb_project=experiment.wandb_project,
        began=run.began,
        compiling=run.compiling,
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
    shardings = state_shardings(run, network, optimizer, steps)
    placed = jax.device_put(trained, shardings.params)
    return train_state.create(placed, build(optimizer, steps), shardings), shardings


def state_shardings(run: Run, network: Network, optimizer: Optimizer, steps: int) -> TrainState:
    """Return where every array of a stage's state lives; arguments as of `initial_state`."""
    _, shapes = divide(network, run.shapes(network))
    places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    transform = build(optimizer, steps)
    return train_state.shardings(train_state.abstract(shapes, transform), places, transform)


def fresh_params(run: Run, network: Network, name: str) -> Params:
    """Return newly drawn parameters, made where they belong."""
    places = jax.tree.map(lambda leaf: leaf.sharding, run.shapes(network))
    return init_sharded(network.init, key_for(run.seed, f"{name}/init"), places)


def initial_params(run: Run, stage: Any) -> Params:
    """Return what a language-model stage starts from: `init_from`, else the base of its adapters, else fresh ones."""
    lm = run.lm_of(stage)
    start = stage.init_from or (None if run.experiment.is_whole(stage) else run.experiment.base)
    return fresh_params(run, lm, stage.name) if start is None else run.language_model(start, lm=lm)


def collators(
    view: TrainingView, codec: Codec, training: Training, sharing: Mesh | None = None
) -> tuple[Collator[Any], Collator[Any]]:
    """Return what makes the batches of training, and those of held-out records, one example a row.

    Args:
      view: what the batches are made of.
      codec: gives the widths.
      training: gives the sizes.
      sharing: the mesh, where passes of a record may share their prompts; None where they cannot.
    """
    size = training.batch_size
    made = (
        collator_for(view, codec, batch_size=size, micro_batches=training.micro_batches, packing=training.packing),
        collator_for(view, codec, batch_size=size, micro_batches=None, packing=None),
    )
    if sharing is None or not training.share_prompts:
        return made
    parts = row_parts(sharing)
    first, second = (with_shared_prompts(one, parts) if isinstance(one, ComparisonCollator) else one for one in made)
    return first, second


def mean_over(parts: Sequence[Any], learning: Learning, run: Run) -> Callable[[Params], dict[str, float]]:
    """Return a function of parameters: the metrics of all held-out batches together, divided once."""
    compiled, mesh = learning.measurer(run), run.mesh

    def evaluate(params: Params) -> dict[str, float]:
        sums: dict[str, tuple[float, float]] = {}
        for part in parts:
            fetched: Mapping[str, Metric] = jax.device_get(compiled(params, put_batch(part, mesh, row_axis=0)))
            for name, (total, weight) in fetched.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + float(total), before[1] + float(weight))
        return {name: total / weight if weight else 0.0 for name, (total, weight) in sums.items()}

    return evaluate


def everywhere(function: Callable[[Params, Any], Any], mesh: Mesh) -> Callable[[Params, Any], Any]:
    """Return the compiled function of parameters and a batch, whose result every device has."""
    return jax.jit(function, out_shardings=replicated(mesh))
