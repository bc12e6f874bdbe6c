"""KL estimators: expectations and gradients by summing over a whole distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.losses import kl

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(size=7), jnp.float32)
ANCHOR = jax.nn.log_softmax(jnp.asarray(RNG.normal(size=7), jnp.float32))


def _exact(logits: jax.Array, anchor: jax.Array) -> jax.Array:
    logp = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(logp) * (logp - anchor))


def _expected(estimator, logits: jax.Array) -> jax.Array:
    """Return the estimator's mean over samples of the policy; samples carry no gradient, as in training."""
    logp = jax.nn.log_softmax(logits)
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(logp)) * estimator(logp, ANCHOR))


@pytest.mark.parametrize("estimator", [kl.k1, kl.k3])
def test_k1_and_k3_are_unbiased(estimator):
    np.testing.assert_allclose(_expected(estimator, LOGITS), _exact(LOGITS, ANCHOR), rtol=1e-5)


def test_k2_agrees_to_leading_order():
    for size in (0.1, 0.01):
        anchor = jax.nn.log_softmax(LOGITS + size * jnp.asarray(np.random.default_rng(1).normal(size=7), jnp.float32))
        logp = jax.nn.log_softmax(LOGITS)
        estimate = jnp.sum(jnp.exp(logp) * kl.k2(logp, anchor))
        np.testing.assert_allclose(estimate, _exact(LOGITS, anchor), rtol=2 * size, atol=1e-7)


def test_k2_and_k3_are_never_negative_and_k1_is():
    logp = jax.nn.log_softmax(LOGITS)
    assert jnp.all(kl.k2(logp, ANCHOR) >= 0) and jnp.all(kl.k3(logp, ANCHOR) >= 0)
    assert jnp.any(kl.k1(logp, ANCHOR) < 0)


def test_gradients_of_the_estimators():
    """Differentiated on samples, k1 gives nothing, k2 the KL's gradient, and k3 that of the reverse KL."""
    exact = jax.grad(_exact)(LOGITS, ANCHOR)
    reverse = jax.grad(lambda logits: jnp.sum(jnp.exp(ANCHOR) * (ANCHOR - jax.nn.log_softmax(logits))))(LOGITS)
    got = {
        name: jax.grad(lambda logits, e=e: _expected(e, logits))(LOGITS)
        for name, e in vars(kl).items()
        if name[0] == "k"
    }
    assert got.keys() == {"k1", "k2", "k3"}
    np.testing.assert_allclose(got["k1"], np.zeros(7), atol=1e-6)
    np.testing.assert_allclose(got["k2"], exact, atol=1e-6)
    np.testing.assert_allclose(got["k3"], reverse, atol=1e-6)
    assert jnp.max(jnp.abs(exact - reverse)) > 0.01


def test_k3_keeps_digits_near_zero():
    np.testing.assert_allclose(kl.k3(jnp.float32(-1.0), jnp.float32(-1.0 + 2**-10)), 0.5 * 2.0**-20, rtol=1e-3)
