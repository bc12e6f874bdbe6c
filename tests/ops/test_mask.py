"""Attention masks against their definitions, entry by entry."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.ops import mask as masks

Q_POSITIONS = jnp.array([[0, 1, 2, 0], [3, 4, 5, 6]])
K_POSITIONS = jnp.array([[0, 1, 0, 1, 2], [2, 3, 4, 5, 6]])
Q_SEGMENTS = jnp.array([[1, 1, 2, 0], [1, 2, 2, 2]])
K_SEGMENTS = jnp.array([[1, 1, 2, 2, 0], [1, 1, 2, 0, 0]])


def _table(rule, queries, keys) -> np.ndarray:
    queries, keys = np.asarray(queries), np.asarray(keys)
    return np.array(
        [[[[rule(q, k) for k in row_k] for q in row_q]] for row_q, row_k in zip(queries, keys, strict=True)]
    )


def test_causal():
    want = _table(lambda q, k: k <= q, Q_POSITIONS, K_POSITIONS)
    np.testing.assert_array_equal(masks.causal(Q_POSITIONS, K_POSITIONS), want)


def test_same_segment_leaves_padding_out():
    want = _table(lambda q, k: q == k and k > 0, Q_SEGMENTS, K_SEGMENTS)
    np.testing.assert_array_equal(masks.same_segment(Q_SEGMENTS, K_SEGMENTS), want)
    assert not want[0, 0, 3].any()


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 0), (None, 1), (3, None), (None, None)])
def test_reach_bounds_either_side(before: int | None, after: int | None):
    def near(q: int, k: int) -> bool:
        return (before is None or q - k <= before) and (after is None or k - q <= after)

    want = _table(near, Q_POSITIONS, K_POSITIONS)
    np.testing.assert_array_equal(masks.reach(Q_POSITIONS, K_POSITIONS, before, after), want)


def test_prefix_joins_what_lies_in_it():
    queries, keys = Q_POSITIONS > 1, K_POSITIONS < 4
    want = _table(lambda q, k: bool(q and k), queries, keys)
    np.testing.assert_array_equal(masks.prefix(queries, keys), want)
