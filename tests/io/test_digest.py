"""Digests notice any changed bit and do not depend on how an array is cut."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pit_jax.io.digest import digest, digests


def by_hand(x):
    """Return the digest from its definition, in Python's own integers."""
    total = 0
    words = np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}").ravel().tolist()
    for place, word in enumerate(words):
        mixed = place * 0x9E3779B1 % (1 << 32)
        mixed = (mixed ^ mixed >> 15) * 0x85EBCA6B % (1 << 32)
        total += word * ((mixed ^ mixed >> 13) | 1)
    return total % (1 << 32)


def arrays():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 5, 2)).astype(np.float32)
    return {
        "float32": x, "bfloat16": x.astype(jnp.bfloat16), "float16": x.astype(np.float16),
        "int32": rng.integers(-9, 9, (7,)).astype(np.int32), "int8": rng.integers(-9, 9, (4, 4)).astype(np.int8),
        "bool": x > 0, "scalar": np.float32(1.5), "empty": np.zeros((0, 3), np.float32),
        "odd": np.array([np.nan, -0.0, 0.0, np.inf, 1e-42], np.float32),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(arrays()))
def test_it_is_the_sum_that_the_docstring_gives(name):
    x = np.asarray(arrays()[name])
    assert digests({"x": jnp.asarray(x)}) == {"x": by_hand(x)}


def test_every_single_bit_counts():
    x = np.random.default_rng(1).normal(size=24).astype(np.float32)
    flips = np.eye(24 * 32, dtype=np.uint32).reshape(-1, 24, 32) * (np.uint32(1) << np.arange(32, dtype=np.uint32))
    spoilt = (x.view(np.uint32) ^ flips.sum(axis=-1, dtype=np.uint32)).view(np.float32)
    found = np.asarray(jax.jit(jax.vmap(digest))(spoilt))
    assert found.shape == (24 * 32,) and not np.any(found == np.asarray(digest(jnp.asarray(x))))


def test_order_and_sign_of_zero_count():
    x = jnp.arange(6, dtype=jnp.float32)
    assert digests({"x": x}) != digests({"x": x[::-1]})
    assert digests({"x": jnp.zeros(3)}) != digests({"x": -jnp.zeros(3)})


@pytest.mark.parametrize("spec", [(), ("a",), ("b", "a"), (None, ("a", "b"))])
def test_how_an_array_is_cut_does_not_count(spec):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x = np.random.default_rng(2).normal(size=(8, 4)).astype(np.float32)
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    assert digests({"deep": {"x": placed}}) == {"deep/x": by_hand(x)}
