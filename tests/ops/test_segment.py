"""Segment sums against loops; packed rows against one example a row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pit_jax.ops import segment

SEGMENTS = jnp.array([[1, 1, 1, 2, 3, 3, 0, 0], [1, 2, 2, 2, 2, 0, 0, 0], [0] * 8, [1] * 8])
COUNT = 4


def test_positions():
    want = [[0, 1, 2, 0, 0, 1, 0, 1], [0, 0, 1, 2, 3, 0, 1, 2], list(range(8)), list(range(8))]
    np.testing.assert_array_equal(jax.jit(segment.positions)(SEGMENTS), want)
    assert segment.positions(SEGMENTS).dtype == jnp.int32


def test_counts():
    want = [[(np.asarray(row) == m).sum() for m in range(1, COUNT + 1)] for row in SEGMENTS]
    np.testing.assert_array_equal(jax.jit(segment.counts, static_argnums=1)(SEGMENTS, COUNT), want)


def _loop(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    out = np.zeros((len(values), COUNT, *values.shape[2:]))
    for row, m in np.ndindex(len(values), COUNT):
        members = (np.asarray(SEGMENTS[row]) == m + 1) & (weights[row] > 0)
        if members.any():
            out[row, m] = np.average(values[row, members], axis=0, weights=weights[row, members])
    return out


def test_means():
    rng = np.random.default_rng(0)
    weights = rng.random(SEGMENTS.shape) * (rng.random(SEGMENTS.shape) < 0.7)
    means = jax.jit(segment.means, static_argnums=3)
    for shape in ((), (3,), (2, 3)):
        values = rng.normal(size=(*SEGMENTS.shape, *shape)).astype(np.float32)
        got = means(jnp.asarray(values), SEGMENTS, jnp.asarray(weights, jnp.float32), COUNT)
        np.testing.assert_allclose(got, _loop(values, weights), atol=1e-6)


def test_sums_are_those_of_a_loop_whatever_padding_holds():
    rng = np.random.default_rng(3)
    values = rng.normal(size=SEGMENTS.shape).astype(np.float32)
    want = [
        [row[np.asarray(ids) == m].sum() for m in range(1, COUNT + 1)]
        for row, ids in zip(values, SEGMENTS, strict=True)
    ]
    broken = jnp.where(SEGMENTS > 0, jnp.asarray(values), jnp.nan)
    got, gradient = jax.value_and_grad(lambda v: jnp.sum(segment.sums(v, SEGMENTS, COUNT)))(broken)
    np.testing.assert_allclose(segment.sums(broken, SEGMENTS, COUNT), want, atol=1e-6)
    np.testing.assert_allclose(got, np.sum(want), atol=1e-5)
    np.testing.assert_array_equal(gradient, SEGMENTS > 0)


def test_values_without_weight_do_not_count_even_if_not_finite():
    values = jnp.asarray(np.random.default_rng(1).normal(size=(*SEGMENTS.shape, 2)), jnp.float32)
    mask = jnp.asarray(np.random.default_rng(2).random(SEGMENTS.shape) < 0.6)
    used = (mask & (SEGMENTS > 0))[..., None]
    broken = jnp.where(used, values, jnp.nan)

    def total(values):
        return jnp.sum(jnp.square(segment.means(values, SEGMENTS, mask, COUNT)))

    np.testing.assert_array_equal(total(broken), total(values))
    grad = jax.grad(total)(broken)
    np.testing.assert_array_equal(grad, jax.grad(total)(values))
    assert jnp.all(jnp.where(used, True, grad == 0))


def test_packed_equals_unpacked():
    values = jnp.asarray(np.random.default_rng(3).normal(size=(1, 8, 2)), jnp.float32)
    packed = segment.means(values, SEGMENTS[:1], jnp.ones((1, 8)), 3)
    alone = [values[:, 0:3], values[:, 3:4], values[:, 4:6]]
    for m, part in enumerate(alone):
        ones = jnp.ones(part.shape[:2], jnp.int32)
        np.testing.assert_allclose(
            packed[:, m], segment.means(part, ones, jnp.ones(part.shape[:2]), 1)[:, 0], atol=1e-6
        )
