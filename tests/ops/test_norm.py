"""RMS norm against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pit_jax.ops.norm import rms_norm


def test_rms_norm():
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(2, 3, 8)), rng.normal(size=8)
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * scale
    got = rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32), 0.1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_statistics_are_float32_in_bfloat16():
    x = 300.0 * jnp.ones((4, 512), jnp.bfloat16)
    got = rms_norm(x, jnp.ones(512, jnp.bfloat16), 1e-6)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(jnp.float32), np.ones((4, 512)))


def test_zeros_have_a_finite_gradient():
    grad = jax.grad(lambda x: jnp.sum(rms_norm(x, jnp.ones(4), 1e-6)))(jnp.zeros((2, 4)))
    assert jnp.all(jnp.isfinite(grad))
