"""T5's buckets of relative positions."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Int


def bucket(
    relative: Int[Array, "*B Q K"], bidirectional: bool, buckets: int, max_distance: int
) -> Int[Array, "*B Q K"]:
    """Return the bucket, in [0, buckets), of each relative position = key position - query position.

    Half of the buckets are exact (distances 0, 1, 2, ...), the other half cover distances up to `max_distance`
    in logarithmic steps, and everything farther shares the last one. Bidirectional attention spends half of
    all buckets on keys after the query; otherwise those fall into bucket 0.

    Source: Raffel et al. 2019 (arXiv 1910.10683), section 2.1.
    """
    if bidirectional:
        buckets //= 2
        offset = jnp.where(relative > 0, buckets, 0)
        distance = jnp.abs(relative)
    else:
        offset = jnp.zeros_like(relative)
        distance = jnp.maximum(-relative, 0)
    exact = buckets // 2
    bounds = jnp.asarray(_logarithmic_bounds(exact, buckets, max_distance), relative.dtype)
    far = exact + jnp.sum(distance[..., None] >= bounds.reshape((1,) * relative.ndim + (-1,)), axis=-1)
    return (offset + jnp.where(distance < exact, distance, far)).astype(relative.dtype)


def _logarithmic_bounds(exact: int, buckets: int, max_distance: int) -> list[int]:
    """Return the least distances of buckets exact + 1, ..., buckets - 1.

    Integers made once, because a float32 logarithm on the device rounds distances that lie exactly on a bound (16,
    32 and 64 with T5's settings) up on one backend and down on another.
    """
    steps = buckets - exact
    bounds = (exact * (max_distance / exact) ** (step / steps) for step in range(1, steps))
    return [math.ceil(bound - 1e-6) for bound in bounds]
