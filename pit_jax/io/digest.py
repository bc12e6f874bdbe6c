"""Digests of arrays, by which a changed bit in a checkpoint is noticed.

TensorStore notices damage to its own tables, but not to the numbers: a bit that flips in a data file is read as
another number. A digest is computed where the array lies, costs no reading of files, and is the same however the
array is cut over devices and processes, for integers add up modulo 2^32 in any order.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped, UInt32

from pit_jax.core.tree import named_leaves

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_GOLDEN, _MURMUR = 0x9E3779B1, 0x85EBCA6B


def digests(tree: Any) -> dict[str, int]:
    """Return the digest of every array of a tree by its name; all processes together, each gets all of them."""
    # One after the other: sums that run ahead on several fake devices can wait for each other for ever on few cores.
    return {name: int(_compiled(_whole(leaf))(leaf)) for name, leaf in named_leaves(tree)}


def digest(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """Return sum_i bits(x_i) * w_i modulo 2^32, with odd w_i that depend on the place i in the array.

    A single bit that differs changes it always (2^b w is not 0 modulo 2^32); anything else, values in another order
    included, is missed once in about 4 billion times.
    """
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride % (1 << 32))
        stride *= x.shape[axis]
    mixed = place * np.uint32(_GOLDEN)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(_MURMUR)
    weight = (mixed ^ (mixed >> 13)) | np.uint32(1)
    return jnp.sum(_bits(x) * weight, dtype=jnp.uint32)


def _bits(x: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)


def _whole(leaf: jax.Array | np.ndarray) -> NamedSharding | None:
    """Return where the digest is to be: on every device of a mesh, so that each process can read it."""
    place = leaf.sharding if isinstance(leaf, jax.Array) else None
    return NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else None


@functools.cache
def _compiled(place: NamedSharding | None) -> Any:
    return jax.jit(digest, out_shardings=place)
