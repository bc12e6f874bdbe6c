"""The training step: one update from a batch cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Scalar

from pit_jax.core import metric
from pit_jax.core.metric import Metric, Metrics
from pit_jax.core.types import Params
from pit_jax.models.trained import whole
from pit_jax.train.optim import Optimizer, build, learning_rate
from pit_jax.train.state import TrainState

Batch = Any
Objective = Callable[[Params, Batch, jax.Array], tuple[Metric, Metrics]]


class Step(Protocol):
    """One update; see `make_step`."""

    def __call__(
        self, state: TrainState, batch: Batch, key: jax.Array, frozen: Params | None = None
    ) -> tuple[TrainState, Metrics]:
        """Return the new state and the metrics; `state` is donated, `frozen` is not."""
        ...


def make_step(objective: Objective, optimizer: Optimizer, *, steps: int, shardings: TrainState | None = None) -> Step:
    """Return the jitted step `(state, batch, key, frozen=None) -> (state, metrics)`; `state` is donated.

    With micro-batches a = 1..A, each giving a total L_a and a weight w_a, the update follows

        g = (sum_a d L_a / d params) / (sum_a w_a)

    so cutting a batch differently, packing it, or spreading it over devices changes nothing but rounding.
    If the loss or the norm of g is not finite, the state is returned as it was, and `loss_is_finite` is 0.

    `state.params` may be a part of the objective's parameters, such as adapters: `frozen` then holds the others,
    which get no gradient, no optimiser state and no copy.

    Every leaf of `batch` has a leading axis A of micro-batches (1 for none). Micro-batch a gets
    `fold_in(key, a)`.

    Metrics are the objective's, summed over micro-batches, and `loss`, `loss_is_finite`, `grad_norm` (before
    clipping), `param_norm` (before the update) and `learning_rate`.

    Args:
      objective: `(params, micro_batch, key) -> (Metric, Metrics)`; differentiated in its first argument.
      optimizer: how gradients become updates.
      steps: number of updates of the whole run, for the schedule.
      shardings: where the new state is to be (`state.shardings`); None lets XLA choose, for one device.
    """
    transform, rate = build(optimizer, steps), learning_rate(optimizer, steps)

    def step(
        state: TrainState, batch: Batch, key: jax.Array, frozen: Params | None = None
    ) -> tuple[TrainState, Metrics]:
        def of_trained(params: Params, part: Batch, key: jax.Array) -> tuple[Metric, Metrics]:
            return objective(whole(frozen, params), part, key)

        loss, metrics, summed = _accumulate(of_trained, state.params, batch, key)
        if shardings is not None:
            summed = jax.lax.with_sharding_constraint(summed, shardings.params)
        divisor = jnp.where(loss.weight > 0, loss.weight, 1.0)
        grads = jax.tree.map(lambda leaf: leaf / divisor.astype(leaf.dtype), summed)
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss.total) & jnp.isfinite(grad_norm)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        new = TrainState(params=params, opt_state=opt_state, step=state.step + 1)
        kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        return kept, metrics | {
            "loss": loss,
            "loss_is_finite": metric.scalar(finite),
            "grad_norm": metric.scalar(grad_norm),
            "param_norm": metric.scalar(optax.global_norm(state.params)),
            "learning_rate": metric.scalar(rate(state.step)),
        }

    return jax.jit(step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))


def _accumulate(objective: Objective, params: Params, batch: Batch, key: jax.Array) -> tuple[Metric, Metrics, Params]:
    """Return the loss, the metrics and the gradient of the total, each summed over the micro-batches."""
    count = _micro_batches(batch)

    def total(params: Params, part: Batch, key: jax.Array) -> tuple[Scalar, tuple[Metric, Metrics]]:
        loss, metrics = objective(params, part, key)
        return loss.total, (loss, metrics)

    gradient = jax.grad(total, has_aux=True)
    if count == 1:  # a scan of one would only hide the body from the compiler
        grads, (loss, metrics) = gradient(params, jax.tree.map(lambda leaf: leaf[0], batch), jax.random.fold_in(key, 0))
        return loss, metrics, grads

    def add(grads: Params, inputs: tuple[Array, Batch]) -> tuple[Params, tuple[Metric, Metrics]]:
        index, part = inputs
        more, aux = gradient(params, part, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, grads, more), aux

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, stacked = jax.lax.scan(add, zeros, (jnp.arange(count), batch))
    loss, metrics = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), stacked)
    return loss, metrics, grads


def _micro_batches(batch: Batch) -> int:
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1:
        raise ValueError(f"batch leaves must share their leading axis of micro-batches, found sizes {sorted(sizes)}")
    return sizes.pop()
