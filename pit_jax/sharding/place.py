"""Putting parameters and batches where a mesh wants them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
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


def batch_shardings(batch: Any, mesh: Mesh, *, row_axis: int) -> Any:
    """Return the tree of shardings of a batch: rows over `data` and `fsdp`, everything else whole.

    The tables of `Comparisons` (index, weight, length) point into the scores of all rows, so every device has them
    (and every process must pass the same).

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
    """Return a batch on the mesh's devices, its rows shared out; each process passes its own rows.

    Raises:
      ConfigError: the rows of all processes cannot be shared out evenly.
    """
    parts = math.prod(mesh.shape.get(axis, 1) for axis in ROW_AXES)
    rows = batch.inputs if isinstance(batch, Comparisons) else batch
    for leaf in jax.tree.leaves(rows):
        total = leaf.shape[row_axis] * jax.process_count()
        if total % parts:
            rule = f"be divisible by data x fsdp = {parts} of the mesh"
            raise invalid("batch size", total, rule, "Change the batch size, the packing, or the mesh.")
    return jax.tree.map(_put, batch, batch_shardings(batch, mesh, row_axis=row_axis))


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if jax.process_count() == 1:
        return jax.device_put(leaf, sharding)
    return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))
