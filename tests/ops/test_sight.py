"""Static orders and segments say what dense masks say."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.ops.sight import Order, Tokens, dense, sighted

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 2]], np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7, 0]], np.int32)
ROW = Tokens(jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS))

ORDERS = [
    Order(causal=True),
    Order(causal=False),
    Order(causal=True, prefix=4),
    Order(causal=True, before=2),
    Order(causal=False, before=1, after=3),
    Order(causal=True, before=1, after=1),
]


@pytest.mark.parametrize("order", ORDERS, ids=repr)
def test_columns_say_what_positions_say(order: Order):
    columns = np.arange(SEGMENTS.shape[1])
    same = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & (SEGMENTS > 0)[:, None, :]
    want = same & order.shows(columns[:, None], columns[None, :])
    got = np.asarray(dense(order, ROW, ROW))[:, 0]
    np.testing.assert_array_equal(got, want)
    assert order.everything == bool(np.all(order.shows(columns[:, None], columns[None, :])))


def test_padding_inside_of_a_segment_is_jumped_over():
    segments, positions = jnp.array([[1, 1, 0, 0, 1, 1]]), jnp.array([[0, 1, 0, 0, 2, 3]])
    row = Tokens(segments, positions)
    got = dense(Order(causal=True, before=1), row, row)[0, 0]
    np.testing.assert_array_equal(np.flatnonzero(got[4]), [1, 4])
    np.testing.assert_array_equal(np.flatnonzero(got[5]), [4, 5])


def test_memory_is_seen_whatever_its_place():
    prompt = Tokens(jnp.array([[1, 2, 0], [2, 2, 1]]), jnp.array([[0, 0, 0], [0, 1, 0]]))
    known = Tokens(*(jnp.concatenate(parts, axis=1) for parts in zip(prompt, ROW, strict=True)))
    order = Order(causal=True, before=1, memory=3)
    got = np.asarray(dense(order, ROW, known))[:, 0]
    np.testing.assert_array_equal(got[:, :, 3:], np.asarray(dense(Order(causal=True, before=1), ROW, ROW))[:, 0])
    np.testing.assert_array_equal(
        got[:, :, :3], SEGMENTS[:, :, None] == np.where(prompt.segments > 0, prompt.segments, -1)[:, None]
    )
    columns = np.arange(9)
    assert np.all(order.shows(columns[:, None], np.arange(3)[None, :]))
    np.testing.assert_array_equal(sighted(ROW.segments, prompt.segments), [[1, 1, 1, 1, 1, 1, 1, 0, 0], [1] * 9])
    np.testing.assert_array_equal(sighted(ROW.segments, jnp.array([[2, 0], [0, 0]]))[:, 2:4], [[0, 1], [0, 0]])


def test_bounds_that_hide_nothing_fall_away():
    assert Order(causal=False, before=8, after=8).within(9, 9).everything
    assert Order(causal=False, before=7, after=8).within(9, 9) == Order(causal=False, before=7)
    assert Order(causal=True, before=7, after=0).within(9, 9) == Order(causal=True, before=7)
    assert Order(causal=False, after=5, memory=3).within(9, 9).everything


def test_negative_numbers_are_refused():
    with pytest.raises(ConfigError, match=r"Order.before = -1 must be at least 0"):
        Order(causal=True, before=-1)
