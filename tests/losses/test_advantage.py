"""Advantages against loops; padding, constants and refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.losses import advantage

RNG = np.random.default_rng(0)
REWARDS = RNG.normal(size=(3, 4)).astype(np.float32)
LENGTHS = np.array([5, 3, 1, 0])
MASK = np.arange(5)[None] < LENGTHS[:, None]


def _tokens(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=MASK.shape).astype(np.float32)


def test_rloo_leaves_one_out():
    want = [[row[i] - np.delete(row, i).mean() for i in range(4)] for row in REWARDS]
    np.testing.assert_allclose(advantage.rloo(jnp.asarray(REWARDS)), want, atol=1e-6)


def test_group_normalised():
    want = (REWARDS - REWARDS.mean(1, keepdims=True)) / (REWARDS.std(1, keepdims=True) + 0.1)
    np.testing.assert_allclose(advantage.group_normalised(jnp.asarray(REWARDS), 0.1), want, atol=1e-6)
    np.testing.assert_array_equal(advantage.group_normalised(jnp.ones((2, 3)), 1e-6), np.zeros((2, 3)))


def test_reinforce():
    np.testing.assert_allclose(advantage.reinforce(jnp.asarray(REWARDS), 0.5), REWARDS - 0.5, atol=1e-7)
    np.testing.assert_allclose(advantage.reinforce(jnp.asarray(REWARDS), jnp.float32(0.5)), REWARDS - 0.5, atol=1e-7)


@pytest.mark.parametrize("estimator", [advantage.rloo, lambda rewards: advantage.group_normalised(rewards, 1e-6)])
def test_groups_of_one_are_refused(estimator):
    with pytest.raises(ConfigError, match="samples per prompt = 1 must be at least 2"):
        estimator(jnp.zeros((3, 1)))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.7), (0.5, 0.0), (0.0, 0.9)])
def test_gae_equals_a_loop(gamma: float, lam: float):
    rewards, values = _tokens(1), _tokens(2)
    want = np.zeros(MASK.shape)
    for b, length in enumerate(LENGTHS):
        later = 0.0
        for t in reversed(range(length)):
            following = values[b, t + 1] if t + 1 < length else 0.0
            later = rewards[b, t] + gamma * following - values[b, t] + gamma * lam * later
            want[b, t] = later
    broken = [jnp.asarray(np.where(MASK, x, np.nan)) for x in (rewards, values)]
    got, returns = advantage.gae(*broken, jnp.asarray(MASK), gamma, lam)
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_allclose(returns, np.where(MASK, want + values, 0.0), atol=1e-6)


def test_gae_without_discount_returns_the_rewards_to_go():
    rewards = np.where(MASK, _tokens(1), 0.0)
    _, returns = advantage.gae(jnp.asarray(rewards), jnp.asarray(_tokens(2)), jnp.asarray(MASK), 1.0, 1.0)
    want = np.where(MASK, rewards[:, ::-1].cumsum(1)[:, ::-1], 0.0)
    np.testing.assert_allclose(returns, want, atol=1e-5)


def test_whiten():
    values = 3.0 + 7.0 * _tokens(3)
    got = np.asarray(advantage.whiten(jnp.asarray(np.where(MASK, values, np.nan)), jnp.asarray(MASK), 1e-8))
    used = values[MASK]
    np.testing.assert_allclose(got[MASK], (used - used.mean()) / used.std(), atol=1e-5)
    assert not got[~MASK].any()
    assert not jnp.any(advantage.whiten(jnp.asarray(values), jnp.zeros(MASK.shape, bool), 1e-8))


def test_penalise():
    logp, anchor = _tokens(4), _tokens(5)
    reward = RNG.normal(size=4).astype(np.float32)
    want = np.zeros(MASK.shape)
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            want[b, t] = -0.3 * (logp[b, t] - anchor[b, t]) + (reward[b] if t == length - 1 else 0.0)
    broken = [jnp.asarray(np.where(MASK, x, np.nan)) for x in (logp, anchor)]
    got = jax.jit(advantage.penalise)(jnp.asarray(reward), *broken, jnp.asarray(MASK), 0.3)
    np.testing.assert_allclose(got.token, want, atol=1e-6)
    np.testing.assert_allclose(got.sequence, want.sum(1), atol=1e-6)


def test_penalise_is_constant():
    def total(*arrays):
        return jnp.sum(advantage.penalise(*arrays, jnp.asarray(MASK), 0.3).token)

    arrays = jnp.ones(4), jnp.asarray(_tokens(4)), jnp.asarray(_tokens(5))
    assert not any(jnp.any(grad) for grad in jax.grad(total, (0, 1, 2))(*arrays))
