"""Putting parameters and batches where a mesh wants them, and fetching results from there.

Every process holds the same whole batch, and each device takes its own rows of it: the number of hosts never changes
what is trained on.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pit_jax.core.errors import invalid
from pit_jax.core.types import Comparisons, Params

ROW_AXES = ("data", "fsdp")
"""Mesh axes over which the rows of a batch are shared out."""


def init_sharded(init: Callable[[jax.Array], Params], key: jax.Array, shardings: Any) -> Params:
    """Return `init(key)` made where it belongs: no device ever holds more than its own part."""
    return jax.jit(init, out_shardings=shardings)(key)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that gives every device the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def row_parts(mesh: Mesh) -> int:
    """Return into how many parts the rows of a batch are cut."""
    return math.prod(mesh.shape.get(axis, 1) for axis in ROW_AXES)


def batch_shardings(batch: Any, mesh: Mesh, *, row_axis: int) -> Any:
    """Return the tree of shardings of a batch: rows over `data` and `fsdp`, everything else whole.

    The tables of `Comparisons` (index, weight, length) point into the scores of all rows, so every device has them.

    Args:
      batch: any tree of arrays; in `Comparisons` only `inputs` is cut.
      mesh: the mesh.
      row_axis: which axis is the rows: 0 for `[B, ...]`, 1 for micro-batches `[A, B, ...]`.
    """
    rows = tuple(axis for axis in ROW_AXES if axis in mesh.shape)
    cut = NamedSharding(mesh, PartitionSpec(*[None] * row_axis, rows))
    if isinstance(batch, Comparisons):
        whole = jax.tree.map(lambda leaf: replicated(mesh), batch)
        return dataclasses.replace(whole, inputs=jax.tree.map(lambda leaf: cut, batch.inputs))
    return jax.tree.map(lambda leaf: cut, batch)


def put_batch(batch: Any, mesh: Mesh, *, row_axis: int) -> Any:
    """Return a batch on the mesh's devices, its rows shared out; each process passes the same whole batch.

    Args:
      batch: a tree of NumPy arrays, of arrays of this process's devices, or of random keys.
      mesh: the mesh.
      row_axis: see `batch_shardings`.

    Raises:
      ConfigError: the rows cannot be shared out evenly.
    """
    rows = batch.inputs if isinstance(batch, Comparisons) else batch
    for leaf in jax.tree.leaves(rows):
        check_rows(leaf.shape[row_axis], mesh)
    return jax.tree.map(_put, batch, batch_shardings(batch, mesh, row_axis=row_axis))


def check_rows(rows: int, mesh: Mesh) -> None:
    """Check that the devices can share so many rows evenly.

    Raises:
      ConfigError: they cannot.
    """
    parts = row_parts(mesh)
    if rows % parts:
        rule = f"be divisible by data x fsdp = {parts} of the mesh"
        raise invalid("batch size", rows, rule, "Change the batch size, the packing, or the mesh.")


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    whole = fetch(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def in_turn(tree: Any) -> Any:
    """Return a tree of arrays as it is, computed or not; on several CPU devices, once it is computed.

    Programs that run ahead on several fake devices can wait for each other for ever on few cores.
    """
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    if jax.default_backend() == "cpu" and any(array.sharding.num_devices > 1 for array in arrays):
        jax.block_until_ready(arrays)
    return tree


def fetch(tree: Any) -> Any:
    """Return a tree of arrays as NumPy arrays of the whole, on every process; all of them have to take part.

    What lies on devices of several processes is first copied to all of them.
    """
    leaves, structure = jax.tree.flatten(tree)
    apart = [index for index, leaf in enumerate(leaves) if _is_apart(leaf)]
    if apart:
        copy = _copy_to_all(tuple(replicated(leaves[index].sharding.mesh) for index in apart))
        for index, leaf in zip(apart, copy(tuple(leaves[index] for index in apart)), strict=True):
            leaves[index] = leaf
    return jax.tree.unflatten(structure, [np.asarray(leaf) for leaf in jax.device_get(leaves)])


def _is_apart(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)


@functools.lru_cache(maxsize=64)
def _copy_to_all(shardings: tuple[NamedSharding, ...]) -> Callable[[tuple[jax.Array, ...]], tuple[jax.Array, ...]]:
    """Return the program that gives every device the whole of so many arrays."""
    return jax.jit(lambda arrays: arrays, out_shardings=shardings)
