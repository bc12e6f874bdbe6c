"""Rules as data: which mesh axes an array's named axes are cut over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = tuple[tuple[str, str | tuple[str, ...]], ...]
"""Pairs (array axis, mesh axis or axes), most important first."""

DEFAULT_RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("batch", "data"),
    ("length", "sequence"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", "fsdp"),
)
"""Megatron-style tensor parallelism, fully sharded width, and rows over data and fsdp.

Names without a rule (layers, norm, head_dim, positions, roles, buckets) are never cut.
"""


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], sizes: Mapping[str, int], rules: Rules) -> PartitionSpec:
    """Return how one array is cut: rules are tried in their order, and the first that fits an axis wins.

    A rule fits where the axis has its name and is not cut yet, none of its mesh axes is used by another axis of
    the array, they are more than one device together, and their number divides the axis.

    Args:
      axes: the name of every axis of the array; None is never cut.
      shape: the array's shape.
      sizes: number of devices along each mesh axis; rules of mesh axes that are not there do not fit.
      rules: the rules.
    """
    chosen: list[str | tuple[str, ...] | None] = [None] * len(axes)
    used: set[str] = set()
    for name, target in rules:
        targets = (target,) if isinstance(target, str) else tuple(target)
        parts = math.prod(sizes.get(mesh_axis, 1) for mesh_axis in targets)
        for index, axis in enumerate(axes):
            fits = chosen[index] is None and used.isdisjoint(targets) and shape[index] % parts == 0
            if axis == name and parts > 1 and fits:
                present = tuple(mesh_axis for mesh_axis in targets if mesh_axis in sizes)
                chosen[index] = present[0] if len(present) == 1 else present
                used.update(targets)
    while chosen and chosen[-1] is None:
        chosen.pop()
    return PartitionSpec(*chosen)


def specs(axes: Any, shapes: Any, rules: Rules, mesh: Mesh) -> Any:
    """Return the tree of NamedShardings for a tree of axis names and the same tree of arrays or abstract shapes."""
    return jax.tree.map(
        lambda names, leaf: NamedSharding(mesh, spec(names, leaf.shape, mesh.shape, rules)),
        axes,
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Ask the compiler to cut an activation by `DEFAULT_RULES` over the mesh of `jax.set_mesh`, if there is one.

    Parameters cut along the width would otherwise tempt it into cutting activations there instead of along the batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh.shape, DEFAULT_RULES))
