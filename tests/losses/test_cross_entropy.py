"""Cross-entropy against NumPy, and its independence of padding and of how a batch is cut."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pit_jax.core.types import TokenScores
from pit_jax.losses.cross_entropy import cross_entropy

MASK = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)


def _scores() -> TokenScores:
    rng = np.random.default_rng(0)
    logp, log_z, entropy = jnp.asarray(rng.normal(size=(3, *MASK.shape)), jnp.float32)
    return TokenScores(logp, log_z, entropy, jnp.asarray(rng.random(MASK.shape) < 0.5, jnp.float32))


def test_values():
    scores, mask = _scores(), np.asarray(MASK)
    loss, metrics = cross_entropy(scores, MASK, 0.1)
    logp, log_z, entropy, correct = (np.asarray(field)[mask] for field in scores)
    assert loss.weight == 4
    np.testing.assert_allclose(loss.value(), np.mean(-logp + 0.1 * log_z**2), rtol=1e-6)
    want = {"nll": -logp.mean(), "log_z": log_z.mean(), "entropy": entropy.mean(), "token_accuracy": correct.mean()}
    assert metrics.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name].value(), value, rtol=1e-6)


def test_padding_may_hold_nan():
    clean = _scores()
    broken = TokenScores(*(jnp.where(MASK, field, jnp.nan) for field in clean))

    def total(scores):
        return cross_entropy(scores, MASK, 0.1)[0].total

    np.testing.assert_array_equal(total(broken), total(clean))
    for ours, theirs in zip(jax.grad(total)(broken), jax.grad(total)(clean), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for name, metric in cross_entropy(broken, MASK, 0.1)[1].items():
        assert jnp.isfinite(metric.value()), name


def test_parts_add_up_to_the_whole():
    scores = _scores()
    whole, metrics = cross_entropy(scores, MASK, 0.1)
    parts = [
        cross_entropy(TokenScores(*(x[rows] for x in scores)), MASK[rows], 0.1) for rows in (slice(1), slice(1, 3))
    ]
    merged = parts[0][0].merge(parts[1][0])
    np.testing.assert_allclose(merged.value(), whole.value(), rtol=1e-6)
    for name, metric in metrics.items():
        np.testing.assert_allclose(parts[0][1][name].merge(parts[1][1][name]).value(), metric.value(), rtol=1e-6)
