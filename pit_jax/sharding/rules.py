"""Rules as data: which mesh axes an array's named axes are cut over."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from pit_jax.core.errors import invalid, nearest

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
ARRAY_AXES = (
    "batch", "length", "cache", "vocab", "heads", "kv_heads", "mlp", "embed", "head_dim", "layers", "lora", "norm",
    "positions", "roles", "buckets",
)  # fmt: skip
"""Names of array axes: of activations (length, and cache for keys and values of earlier tokens) and of parameters."""

Rules = tuple[tuple[str, str | tuple[str, ...]], ...]
"""Pairs (array axis, mesh axis or axes), most important first."""

DEFAULT_RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("batch", "data"),
    ("length", "sequence"),
    ("cache", "sequence"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", ("fsdp", "sequence")),
    ("embed", "fsdp"),
)
"""Megatron-style tensor parallelism, fully sharded width (over `sequence` too), and rows over data and fsdp.

Names without a rule (layers, norm, head_dim, positions, roles, buckets) are never cut.
"""


_IN_FORCE = jax.make_user_context(default_value=DEFAULT_RULES)
"""What `use` has set; jax traces a function anew where it differs."""


def in_force() -> Rules:
    """Return the rules that `use` has set, by default `DEFAULT_RULES`."""
    return _IN_FORCE.value


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Compute on a mesh by rules: what `constrain` cuts activations by, inside of a `with`."""
    with _IN_FORCE(rules), jax.set_mesh(mesh):
        yield


def check(rules: Rules) -> None:
    """Check that every name in rules exists: a misspelt one would never fit and so cut nothing.

    Raises:
      ConfigError: a rule is not a pair of an array axis and a mesh axis or axes.
    """
    for rule in rules:
        if len(rule) != 2:
            raise invalid("MeshConfig.rules", rule, "be pairs (array axis, mesh axis or axes)", "Mend this one.")
        name, target = rule
        targets = (target,) if isinstance(target, str) else tuple(target)
        for value, known in [(name, ARRAY_AXES), *((axis, MESH_AXES) for axis in targets)]:
            if value not in known:
                fix = f"A name that nothing has would cut nothing.{nearest(str(value), known)}"
                raise invalid("MeshConfig.rules", value, f"be one of {', '.join(known)}", fix)


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
                present = tuple(mesh_axis for mesh_axis in targets if sizes.get(mesh_axis, 1) > 1)
                chosen[index] = present[0] if len(present) == 1 else present
                used.update(targets)
    while chosen and chosen[-1] is None:
        chosen.pop()
    return PartitionSpec(*chosen)


def specs(axes: Any, shapes: Any, rules: Rules, mesh: Mesh | AbstractMesh) -> Any:
    """Return the tree of NamedShardings for a tree of axis names and the same tree of arrays or abstract shapes."""
    return jax.tree.map(
        lambda names, leaf: NamedSharding(mesh, spec(names, leaf.shape, mesh.shape, rules)),
        axes,
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Ask the compiler to cut an activation by the rules in force over the mesh of `use`, if there is one.

    Parameters cut along the width would otherwise tempt it into cutting activations there instead of along the batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh.shape, in_force()))
