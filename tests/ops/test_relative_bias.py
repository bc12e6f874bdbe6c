"""T5's buckets against the formula of the paper's code, evaluated in float64."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.ops.relative_bias import bucket


def _reference(relative: int, bidirectional: bool, buckets: int, max_distance: int) -> int:
    start = 0
    if bidirectional:
        buckets //= 2
        start = buckets if relative > 0 else 0
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    exact = buckets // 2
    if distance < exact:
        return start + distance
    steps = math.log(distance / exact + 1e-9) / math.log(max_distance / exact) * (buckets - exact)
    return start + min(exact + int(steps), buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (4, 100)])
def test_bucket(bidirectional: bool, buckets: int, max_distance: int):
    relative = np.arange(-300, 301)
    want = [_reference(int(r), bidirectional, buckets, max_distance) for r in relative]
    got = bucket(jnp.asarray(relative, jnp.int32)[None], bidirectional, buckets, max_distance)
    np.testing.assert_array_equal(got[0], want)
    assert set(want) == set(range(buckets)) - ({buckets // 2} if bidirectional else set())
    assert got.dtype == jnp.int32


def test_leading_axes_are_kept():
    relative = jnp.arange(-12, 12).reshape(2, 3, 4)
    flat = bucket(relative.reshape(6, 4), True, 8, 16)
    np.testing.assert_array_equal(bucket(relative, True, 8, 16).reshape(6, 4), flat)
