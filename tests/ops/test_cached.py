"""Attention over a cache in pieces equals attention over whole rows of keys."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.ops import attention, cached

B, X, H, KH, E = 6, 3, 4, 2, 8


def _random(*shape: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("turned", [False, True])
def test_pieces_are_one_softmax(queries: int, softcap: float | None, turned: bool) -> None:
    query, prompt, own = _random(B, queries, H, E), _random(2, X, KH, 5, E), _random(2, B, KH, 4, E)
    mask = jnp.asarray(np.random.default_rng(0).random((B, 1, queries, 9)) < 0.5)
    # One query sees the first piece alone, one the second, one neither.
    mask = mask.at[0, :, :, 5:].set(False).at[1, :, :, :5].set(False).at[2].set(False)
    bias = _random(1, H, queries, 9)
    first = cached.Turned(prompt[0].swapaxes(2, 3), prompt[1]) if turned else tuple(prompt)
    found = cached.attend(query, [first, tuple(own)], mask=mask, bias=bias, scale=0.3, softcap=softcap)
    whole = jnp.concatenate([jnp.repeat(prompt, B // X, axis=1), own], axis=3).swapaxes(2, 3)
    expected = attention.attend(query, *whole, mask=mask, bias=bias, scale=0.3, softcap=softcap)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not np.any(np.asarray(found[2]))


def test_magnitudes_of_pieces_may_differ_without_overflow() -> None:
    query, piece = 100 * _random(2, 1, H, E), _random(2, 2, KH, 3, E)
    mask = jnp.ones((2, 1, 1, 6), bool)
    pieces = [(100 * piece[0], piece[1]), (piece[0] / 100, 2 * piece[1])]
    found = cached.attend(query, pieces, mask=mask, bias=None, scale=1.0, softcap=None)
    whole = [jnp.concatenate(parts, axis=2).swapaxes(1, 2) for parts in zip(*pieces, strict=True)]
    expected = attention.attend(query, *whole, mask=mask, bias=None, scale=1.0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_integers_are_as_near_as_they_can_be() -> None:
    x = _random(2, 3, 5, 8).at[0, 0, 0].set(0.0)
    small = cached.shrink(x)
    step = np.max(np.abs(np.asarray(x)), axis=-1, keepdims=True) / 127
    assert np.all(np.abs(np.asarray(small.values * small.scale - x)) <= step / 2 + 1e-7)
    query, mask = _random(2, 1, 6, 8), jnp.ones((2, 1, 1, 5), bool)
    settings = dict(mask=mask, bias=None, scale=0.4, softcap=None)
    wide = small.values * small.scale
    found = cached.attend(query, [(small, small)], **settings)
    np.testing.assert_allclose(found, cached.attend(query, [(wide, wide)], **settings), atol=1e-6)
    turned = cached.Turned(cached.shrink(x.swapaxes(2, 3), axis=2), small)
    np.testing.assert_allclose(found, cached.attend(query, [turned], **settings), atol=1e-6)
