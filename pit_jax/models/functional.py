"""The one place where Flax modules and plain parameter trees meet.

Modules are `flax.nnx` objects that hold `nnx.Param(value, axes=...)` and settings, nothing else. They live while a
function is traced; every other part of the project sees nested dictionaries of arrays.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from pit_jax.core.types import Params

Module = TypeVar("Module", bound=nnx.Module)
Build = Callable[[jax.Array], nnx.Module]
_IN_PRODUCTS = frozenset({"kernel", "bias", "lora_a", "lora_b"})
"""Parameters of linear maps, which are cast to the dtype of activations wherever they are used."""


@dataclasses.dataclass(frozen=True)
class Definition:
    """A module without its arrays: Flax's graph, the parameters' shapes, and their axis names."""

    graph: Any
    shapes: Params
    axes: Params


@functools.cache
def definition(module: Callable[[jax.Array, Any], nnx.Module], config: Any) -> Definition:
    """Return the definition of `module(key, config)`; nothing is allocated."""
    graph, state = nnx.split(nnx.eval_shape(lambda: module(jax.random.key(0), config)))
    axes = {path: variable.get_metadata()["axes"] for path, variable in nnx.to_flat_state(state)}
    # Shapes made under `jax.set_mesh` name its mesh; what is kept for the whole process must not.
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), nnx.to_pure_dict(state))
    return Definition(graph, shapes, traverse_util.unflatten_dict(axes))


def initialise(module: Callable[[jax.Array, Any], nnx.Module], config: Any, key: jax.Array) -> Params:
    """Return fresh parameters of `module(key, config)`."""
    return nnx.to_pure_dict(nnx.state(module(key, config)))


def bind(module: Callable[[jax.Array, Any], Module], config: Any, params: Params) -> Module:
    """Return the module with the given parameters."""
    return nnx.merge(definition(module, config).graph, params)


def stacked(build: Callable[[jax.Array], Module], key: jax.Array, count: int) -> Module:
    """Return `count` modules as one, whose parameters have a leading axis "layers"; use it with `run_layers`."""
    keys = jax.random.split(key, count)
    values = jax.vmap(lambda one: nnx.to_pure_dict(nnx.state(build(one))))(keys)
    graph, state = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))
    for _, variable in nnx.to_flat_state(state):
        variable.set_metadata(axes=("layers", *variable.get_metadata()["axes"]))
    return nnx.merge(nnx.split(nnx.merge(graph, state))[0], values)


def run_layers(
    stack: nnx.Module,
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    inputs: Any,
    *,
    scan: bool,
    remat: str,
    final: Callable[[Any, Any, Any], tuple[Any, Any]] | None = None,
) -> tuple[Any, Any]:
    """Call `body(layer, carry, input) -> (carry, output)` for each layer of a `stacked` module.

    Args:
      stack: the layers.
      body: what one layer does.
      carry: what goes from layer to layer.
      inputs: tree of arrays with a leading axis of layers; each layer gets its slice.
      scan: one compiled layer in a loop, or unrolled.
      remat: name of the rematerialisation policy (`ModelConfig.remat`).
      final: what the last of unrolled layers does instead.

    Returns:
      The last carry and the outputs, stacked along a leading axis.
    """
    graph, state = nnx.split(stack)

    def step_of(body: Callable[[Any, Any, Any], tuple[Any, Any]]) -> Callable[[Any, tuple[Params, Any]], Any]:
        def step(carry: Any, layer: tuple[Params, Any]) -> tuple[Any, Any]:
            return body(nnx.merge(graph, layer[0]), carry, layer[1])

        # Inside a scan the loop already keeps the two computations apart.
        return step if remat == "none" else jax.checkpoint(step, policy=_policy(remat), prevent_cse=not scan)

    layers = (nnx.to_pure_dict(state), inputs)
    if scan:
        return jax.lax.scan(step_of(body), carry, layers)
    # `unstack` splits once: the gradient is one concatenation, where that of indexing pads once per layer.
    leaves, structure = jax.tree.flatten(layers)
    each = list(zip(*(jnp.unstack(leaf) for leaf in leaves), strict=True))
    steps = [step_of(body)] * (len(each) - 1) + [step_of(final or body)]
    outputs = []
    for step, layer in zip(steps, each, strict=True):
        carry, output = step(carry, jax.tree.unflatten(structure, layer))
        outputs.append(output)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apart:
    """A parameter of all layers, cut into those of each."""

    layers: tuple[Any, ...]


def ready(params: Params, *, dtype: str, scan: bool) -> Params:
    """Return parameters as a loop of `walk_layers` reads them fastest; made once, before the loop.

    Linear maps are in the dtype of products. Without `scan` each layer's are arrays of their own: on a CPU the compiler
    cuts them out of the stack again in every turn of a loop, which costs more than reading them.
    """

    def prepared(path: tuple[Any, ...], leaf: Any) -> Any:
        names = [entry.key for entry in path]
        if "layers" not in names:
            return leaf
        if names[-1] in _IN_PRODUCTS and jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = leaf.astype(dtype)
        return leaf if scan else Apart(tuple(jnp.unstack(leaf)))

    return jax.tree_util.tree_map_with_path(prepared, params)


def walk_layers(stack: nnx.Module, body: Callable[[Any, Any, Any], Any], carry: Any, inputs: Any, *, scan: bool) -> Any:
    """Call `body(layer, carry, input) -> carry` for each layer of a `stacked` or `ready` module, as decoding does.

    Args:
      stack: the layers.
      body: what one layer does.
      carry: what goes from layer to layer.
      inputs: with `scan`, a tree of arrays with a leading axis of layers; else a sequence of one input a layer.
      scan: one compiled layer in a loop, or unrolled.
    """
    graph, state = nnx.split(stack)
    parts = nnx.to_pure_dict(state)
    if scan:
        return jax.lax.scan(
            lambda carry, one: (body(nnx.merge(graph, one[0]), carry, one[1]), None), carry, (parts, inputs)
        )[0]
    leaves, structure = jax.tree.flatten(parts, is_leaf=lambda leaf: isinstance(leaf, Apart))
    pieces = [leaf.layers if isinstance(leaf, Apart) else jnp.unstack(leaf) for leaf in leaves]
    for leaf, given in zip(zip(*pieces, strict=True), inputs, strict=True):
        carry = body(nnx.merge(graph, jax.tree.unflatten(structure, leaf)), carry, given)
    return carry


def _policy(remat: str) -> Callable[..., bool] | None:
    policies = jax.checkpoint_policies
    return {
        "full": policies.nothing_saveable,
        "dots": policies.dots_saveable,
        "dots_with_no_batch_dims": policies.dots_with_no_batch_dims_saveable,
    }[remat]
