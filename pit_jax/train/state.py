"""What a training step reads and writes: parameters, optimiser state and the number of updates done."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from pit_jax.core.types import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """One training state; a tree that is donated to every step and saved in every checkpoint.

    params: nested dictionaries of arrays. opt_state: optax's. step: i32, updates done.
    The same class holds trees of shapes (`abstract`) and of shardings (`shardings`).
    """

    params: Params
    opt_state: Any
    step: Any


def create(params: Params, transform: optax.GradientTransformation, placement: TrainState | None = None) -> TrainState:
    """Return the state before the first update, placed as `placement` (see `shardings`) says.

    The parameters are copied: a step donates its state, and what it started from (an SFT model that stays
    the KL anchor, say) must live on.
    """
    return jax.jit(_new, static_argnums=1, out_shardings=placement)(params, transform)


def _new(params: Params, transform: optax.GradientTransformation) -> TrainState:
    return TrainState(
        params=jax.tree.map(jnp.copy, params), opt_state=transform.init(params), step=jnp.zeros((), jnp.int32)
    )


def abstract(params: Params, transform: optax.GradientTransformation) -> TrainState:
    """Return the state's shapes and dtypes for parameters given as arrays or shapes; allocates nothing."""
    return jax.eval_shape(lambda tree: _new(tree, transform), params)


def shardings(state: TrainState, params: Params, transform: optax.GradientTransformation) -> TrainState:
    """Return where every array of a state lives, given where the parameters do.

    Optimiser leaves with the shape of their parameter (momenta) live where it does; all others (counters,
    Adafactor's rows and columns) are on every device.

    Args:
      state: `abstract(...)` or a state.
      params: the parameters' tree of `NamedSharding`, all of one mesh.
      transform: the optimiser that made `state.opt_state`.
    """
    replicated = NamedSharding(jax.tree.leaves(params)[0].mesh, PartitionSpec())
    opt_state = optax.tree.map_params(
        transform,
        lambda leaf, param, sharding: sharding if leaf.shape == param.shape else replicated,
        state.opt_state,
        state.params,
        params,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(params=params, opt_state=opt_state, step=replicated)
