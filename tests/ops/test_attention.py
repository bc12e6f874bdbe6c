"""Attention against a NumPy loop, and its invariances."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.ops import mask as masks
from pit_jax.ops.attention import attend

B, Q, K, H, KH, E, EV = 2, 5, 6, 4, 2, 3, 7


def _inputs(seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    draw = np.random.default_rng(seed).normal
    shapes = (B, Q, H, E), (B, K, KH, E), (B, K, KH, EV)
    return tuple(jnp.asarray(draw(size=shape), jnp.float32) for shape in shapes)


def _reference(query, key, value, mask, bias, scale, softcap) -> np.ndarray:
    """Attend one query, one head and one key at a time, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros((B, Q, H, EV))
    for b, q, h in np.ndindex(B, Q, H):
        shared = h // (H // KH)
        seen = [k for k in range(K) if mask is None or mask[b, 0, q, k]]
        scores = np.array([scale * query[b, q, h] @ key[b, k, shared] for k in seen])
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        if bias is not None:
            scores = scores + np.array([bias[b % len(bias), h, q, k] for k in seen])
        weights = np.exp(scores)
        for weight, k in zip(weights / weights.sum(), seen, strict=True):
            out[b, q, h] += weight * value[b, k, shared]
    return out


@pytest.mark.parametrize("bias_rows", [None, 1, B])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_attend_equals_a_loop(bias_rows: int | None, softcap: float | None):
    rng = np.random.default_rng(1)
    mask = rng.random((B, 1, Q, K)) < 0.6
    mask[..., 0] = True
    bias = None if bias_rows is None else rng.normal(size=(bias_rows, H, Q, K)).astype(np.float32)
    inputs = _inputs()
    options = {"scale": 0.6, "softcap": softcap}
    got = attend(*inputs, mask=jnp.asarray(mask), bias=None if bias is None else jnp.asarray(bias), **options)
    np.testing.assert_allclose(got, _reference(*inputs, mask, bias, **options), atol=2e-6)


def test_no_mask_is_a_mask_of_ones():
    inputs = _inputs()
    ones = jnp.ones((1, 1, Q, K), bool)
    shown = attend(*inputs, mask=ones, bias=None, scale=1.0)
    np.testing.assert_array_equal(attend(*inputs, mask=None, bias=None, scale=1.0), shown)
    np.testing.assert_allclose(shown, _reference(*inputs, None, None, 1.0, None), atol=2e-6)


def test_query_without_keys_gets_zeros_and_no_gradient():
    mask = jnp.ones((B, 1, Q, K), bool).at[0, 0, 2].set(False)

    def total(query, key, value):
        out = attend(query, key, value, mask=mask, bias=None, scale=1.0)
        return jnp.sum(jnp.square(out)), out

    grads, out = jax.grad(total, (0, 1, 2), has_aux=True)(*_inputs())
    assert jnp.all(out[0, 2] == 0) and jnp.all(jnp.any(out[1] != 0, axis=-1))
    assert jnp.all(grads[0][0, 2] == 0)
    assert all(bool(jnp.all(jnp.isfinite(grad))) for grad in grads)


def test_masked_equals_deleted():
    query, key, value = _inputs()
    mask = jnp.ones((B, 1, Q, K), bool).at[..., 4:].set(False)
    got = attend(query, key.at[:, 4:].set(50.0), value.at[:, 4:].set(-9.0), mask=mask, bias=None, scale=1.0)
    want = attend(query, key[:, :4], value[:, :4], mask=None, bias=None, scale=1.0)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_gradient_respects_causality():
    query, key, value = _inputs()
    positions = jnp.broadcast_to(jnp.arange(Q)[None], (B, Q))
    mask = masks.causal(positions, positions)

    def at(q: int):
        def output(key, value):
            return jnp.sum(attend(query, key, value, mask=mask, bias=None, scale=1.0)[:, q])

        return output

    for q in range(Q):
        for grad in jax.grad(at(q), (0, 1))(key[:, :Q], value[:, :Q]):
            touched = jnp.any(grad != 0, axis=(0, 2, 3))
            # With one visible key its weight is 1 whatever the key says, so only the value has a gradient.
            assert not jnp.any(touched[q + 1 :]) and (q == 0 or jnp.all(touched[: q + 1]))


def test_large_scores_and_bfloat16():
    query, key, value = _inputs()
    out = attend(100 * query, 100 * key, value, mask=None, bias=None, scale=1.0)
    assert jnp.all(jnp.isfinite(out))
    halves = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    half = attend(*halves, mask=None, bias=None, scale=1.0)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), _reference(*halves, None, None, 1.0, None), atol=0.03)


def test_uneven_heads_are_refused():
    query, key, value = _inputs()
    with pytest.raises(ConfigError, match="multiple of the 2"):
        attend(query[:, :, :3], key, value, mask=None, bias=None, scale=1.0)
