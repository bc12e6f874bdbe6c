"""The clipped value loss against a scalar reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pit_jax.losses.value import clipped_value_loss

CLIP = 0.3
MASK = np.arange(6)[None] < np.array([6, 4, 0])[:, None]


def _inputs() -> tuple[np.ndarray, ...]:
    return tuple(np.random.default_rng(0).normal(size=(3, *MASK.shape)).astype(np.float32))


def _reference(value: float, old: float, target: float) -> tuple[float, float]:
    """Return one token's loss and its derivative with respect to the value."""
    limited = min(max(value, old - CLIP), old + CLIP)
    if (limited - target) ** 2 > (value - target) ** 2:
        return 0.5 * (limited - target) ** 2, 0.0
    return 0.5 * (value - target) ** 2, value - target


def test_values_and_gradients():
    values, old, returns = _inputs()
    want = [_reference(values[i], old[i], returns[i]) for i in zip(*np.nonzero(MASK), strict=True)]
    broken = [jnp.asarray(np.where(MASK, x, np.nan)) for x in (values, old, returns)]

    def loss(values):
        found, metrics = clipped_value_loss(values, *broken[1:], jnp.asarray(MASK), CLIP)
        return found.value(), metrics

    (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(broken[0])
    np.testing.assert_allclose(value, np.mean([loss for loss, _ in want]), rtol=1e-5)
    # Where the value has not left the clip range both branches are equal and the gradient is the plain one.
    np.testing.assert_allclose(np.asarray(grad)[MASK], np.array([slope for _, slope in want]) / len(want), atol=1e-6)
    assert not np.asarray(grad)[~MASK].any()
    cut = np.mean([slope == 0 for _, slope in want])
    np.testing.assert_allclose(metrics["value/clip_fraction"].value(), cut, rtol=1e-6)
    assert 0 < cut < 1
    np.testing.assert_allclose(metrics["value/error"].value(), np.mean((values - returns)[MASK] ** 2), rtol=1e-5)
    np.testing.assert_allclose(metrics["value/mean"].value(), values[MASK].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["return/mean"].value(), returns[MASK].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["return/square"].value(), np.mean(returns[MASK] ** 2), rtol=1e-5)


def test_targets_are_constant():
    arrays = [jnp.asarray(x) for x in _inputs()]

    def total(*arrays):
        return clipped_value_loss(*arrays, jnp.asarray(MASK), CLIP)[0].total

    assert not any(jnp.any(grad) for grad in jax.grad(total, (1, 2))(*arrays))
