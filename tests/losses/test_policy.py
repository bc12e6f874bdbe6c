"""The policy gradient against exact gradients by enumeration, and PPO's clip against a scalar reference."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.core.types import Conditional, Experience
from pit_jax.losses import advantage
from pit_jax.losses.policy import PolicyLoss, policy_gradient

REINFORCE = PolicyLoss()
PPO = PolicyLoss(kind="ppo_clip", clip_range=0.2)
BETA = 0.7


def _experience(mask: np.ndarray, **fields: np.ndarray | jax.Array) -> Experience:
    """Return an experience whose missing arrays are zeros."""
    segments = jnp.asarray(mask, jnp.int32)
    none = jnp.zeros((len(mask), 1), jnp.int32)
    inputs = Conditional(
        prompt=none, prompt_segments=none, prompt_reference=none > 0, response=segments, response_segments=segments
    )
    names = ("logp_sampler", "logp_old", "logp_anchor", "advantage", "returns", "values_old")
    arrays = {name: jnp.asarray(fields.get(name, np.zeros(mask.shape)), jnp.float32) for name in names}
    return Experience(inputs=inputs, **arrays)


# A toy language: token 0 ends a sequence, at most three tokens; the policy is a table of logits per prefix.
SEQUENCES = [(0,), *((a, 0) for a in (1, 2)), *itertools.product((1, 2), (1, 2), (0, 1, 2))]
TOKENS = np.array([list(y) + [0] * (3 - len(y)) for y in SEQUENCES])
TOY_MASK = np.array([[t < len(y) for t in range(3)] for y in SEQUENCES])
PREFIXES = {prefix: row for row, prefix in enumerate([(), (1,), (2,), (1, 1), (1, 2), (2, 1), (2, 2)])}
STATES = np.array([[PREFIXES.get(tuple(y[:t]), 0) if t < len(y) else 0 for t in range(3)] for y in SEQUENCES])
REWARD = np.random.default_rng(1).normal(size=len(SEQUENCES)).astype(np.float32)
LOGITS, ANCHOR = (jnp.asarray(np.random.default_rng(seed).normal(size=(7, 3)), jnp.float32) for seed in (2, 3))


def _logp(logits: jax.Array) -> jax.Array:
    """Return the log-probability of every token of every sequence, NaN at padding."""
    table = jax.nn.log_softmax(logits)
    return jnp.where(TOY_MASK, table[STATES, TOKENS], jnp.nan)


def _sequence_logp(logits: jax.Array) -> jax.Array:
    table = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.where(TOY_MASK, table[STATES, TOKENS], 0.0), axis=1)


def _objective(logits: jax.Array, beta: float) -> jax.Array:
    """Return E[r] - beta KL(policy || anchor), summed over all sequences."""
    logp = _sequence_logp(logits)
    return jnp.sum(jnp.exp(logp) * (REWARD - beta * (logp - _sequence_logp(ANCHOR))))


PROBABILITY = np.exp(np.asarray(_sequence_logp(LOGITS), np.float64))


def _estimate(rows: np.ndarray, weighted: np.ndarray, config: PolicyLoss) -> jax.Array:
    """Return the gradient of the loss on the given sequences with one weighted advantage each."""
    per_token = np.where(TOY_MASK[rows], weighted[:, None], np.nan)
    experience = _experience(TOY_MASK[rows], advantage=per_token, logp_old=_logp(LOGITS)[rows])
    return jax.grad(lambda logits: policy_gradient(_logp(logits)[rows], experience, config)[0].value())(LOGITS)


def _penalised(beta: float) -> np.ndarray:
    found = advantage.penalise(jnp.asarray(REWARD), _logp(LOGITS), _logp(ANCHOR), jnp.asarray(TOY_MASK), beta)
    return np.asarray(found.sequence)


def test_the_toy_language_is_complete():
    np.testing.assert_allclose(PROBABILITY.sum(), 1.0, rtol=1e-6)


@pytest.mark.parametrize("config", [REINFORCE, PPO], ids=["reinforce", "ppo_clip"])
@pytest.mark.parametrize("beta", [0.0, BETA])
def test_expected_gradient_is_exact(beta: float, config: PolicyLoss):
    """E[grad loss] = -grad (E[r] - beta KL): the KL in the reward counts once and has the right sign."""
    rows = np.arange(len(SEQUENCES))
    got = _estimate(rows, len(rows) * PROBABILITY * _penalised(beta), config)
    np.testing.assert_allclose(-got, jax.grad(_objective)(LOGITS, beta), atol=2e-6)


def _off_policy(truncation: float) -> tuple[jax.Array, dict[str, np.ndarray]]:
    """Return the expected gradient of samples of `ANCHOR` at other parameters, and the metrics."""
    rows, chance = np.arange(len(SEQUENCES)), np.exp(np.asarray(_sequence_logp(ANCHOR), np.float64))
    per_token = np.where(TOY_MASK, (len(rows) * chance * _penalised(0.0))[:, None], np.nan)
    experience = _experience(TOY_MASK, advantage=per_token, logp_old=_logp(ANCHOR))
    config = PolicyLoss(truncation=truncation)
    loss = lambda logits: policy_gradient(_logp(logits), experience, config, off_policy=True)  # noqa: E731
    found = {name: np.asarray(value.value()) for name, value in loss(LOGITS)[1].items()}
    return -jax.grad(lambda logits: loss(logits)[0].value())(LOGITS), found


def test_samples_of_older_parameters_have_the_exact_expected_gradient():
    exact = jax.grad(_objective)(LOGITS, 0.0)
    got, found = _off_policy(np.inf)
    np.testing.assert_allclose(got, exact, atol=2e-6)
    ratio = PROBABILITY / np.exp(np.asarray(_sequence_logp(ANCHOR), np.float64))
    np.testing.assert_allclose(found["weight/mean"], ratio.mean(), rtol=1e-5)
    assert found["weight/truncated"] == 0
    cut, found = _off_policy(1.0)
    np.testing.assert_allclose(found["weight/mean"], np.minimum(ratio, 1.0).mean(), rtol=1e-5)
    np.testing.assert_allclose(found["weight/truncated"], (ratio > 1.0).mean())
    assert 0 < found["weight/truncated"] < 1 and jnp.max(jnp.abs(cut - exact)) > 1e-3


def test_the_kl_term_matters_and_pulls_to_the_anchor():
    rows = np.arange(len(SEQUENCES))
    kl_part = _estimate(rows, len(rows) * PROBABILITY * (_penalised(BETA) - _penalised(0.0)), REINFORCE)
    divergence = jax.grad(lambda logits: -_objective(logits, 1.0) + _objective(logits, 0.0))(LOGITS)
    np.testing.assert_allclose(kl_part, BETA * divergence, atol=2e-6)
    assert jnp.max(jnp.abs(kl_part)) > 0.05


def test_a_constant_baseline_does_not_change_the_expected_gradient():
    rows = np.arange(len(SEQUENCES))
    shifted = np.asarray(advantage.reinforce(jnp.asarray(_penalised(BETA))[:, None], 3.7))[:, 0]
    got = _estimate(rows, len(rows) * PROBABILITY * shifted, REINFORCE)
    np.testing.assert_allclose(-got, jax.grad(_objective)(LOGITS, BETA), atol=1e-5)


def test_rloo_is_unbiased_and_a_group_mean_baseline_is_not():
    pairs = np.array(list(itertools.product(range(len(SEQUENCES)), repeat=2)))
    chance = PROBABILITY[pairs].prod(1)
    rewards = _penalised(BETA)[pairs]
    exact = jax.grad(_objective)(LOGITS, BETA)

    def expected(advantages: np.ndarray) -> jax.Array:
        return -_estimate(pairs.reshape(-1), (len(pairs) * chance[:, None] * advantages).reshape(-1), REINFORCE)

    np.testing.assert_allclose(expected(np.asarray(advantage.rloo(jnp.asarray(rewards)))), exact, atol=5e-6)
    np.testing.assert_allclose(expected(rewards - rewards.mean(1, keepdims=True)), 0.5 * exact, atol=5e-6)


def _random_batch() -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(4)
    mask = np.arange(6)[None] < np.array([6, 3, 1, 0])[:, None]
    names = ("logp", "logp_old", "logp_sampler", "advantage")
    arrays = {name: rng.normal(size=mask.shape).astype(np.float32) for name in names}
    arrays["logp_old"] = arrays["logp"] + 0.3 * arrays["logp_old"]
    logp = arrays.pop("logp")
    return mask, arrays, logp


def _ppo_reference(logp: float, old: float, gain: float, clip: float) -> tuple[float, float]:
    """Return one token's loss and its derivative with respect to the log-probability."""
    ratio = np.exp(logp - old)
    if (gain > 0 and ratio > 1 + clip) or (gain < 0 and ratio < 1 - clip):
        return -(1 + clip if gain > 0 else 1 - clip) * gain, 0.0
    return -ratio * gain, -ratio * gain


@pytest.mark.parametrize("normalisation", ["sequence", "token"])
def test_ppo_equals_a_scalar_reference(normalisation: str):
    mask, arrays, logp = _random_batch()
    config = dataclasses.replace(PPO, normalisation=normalisation)
    cells = list(zip(*np.nonzero(mask), strict=True))
    want = {i: _ppo_reference(logp[i], arrays["logp_old"][i], arrays["advantage"][i], 0.2) for i in cells}
    units = 3 if normalisation == "sequence" else len(cells)

    def loss(logp):
        found, metrics = policy_gradient(logp, _experience(mask, **arrays), config)
        return found.value(), (found, metrics)

    (value, (found, metrics)), grad = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logp))
    assert found.weight == units
    np.testing.assert_allclose(value, sum(loss for loss, _ in want.values()) / units, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(grad)[mask], [slope / units for _, slope in want.values()], atol=1e-6)
    assert not np.asarray(grad)[~mask].any()
    cut = np.mean([slope == 0 for _, slope in want.values()])
    assert 0 < cut < 1
    np.testing.assert_allclose(metrics["clip_fraction"].value(), cut, rtol=1e-6)


@pytest.mark.parametrize("normalisation", ["sequence", "token"])
def test_reinforce_value_and_weight(normalisation: str):
    mask, arrays, logp = _random_batch()
    config = dataclasses.replace(REINFORCE, normalisation=normalisation)
    found, metrics = policy_gradient(jnp.asarray(logp), _experience(mask, **arrays), config)
    units = 3 if normalisation == "sequence" else mask.sum()
    np.testing.assert_allclose(found.value(), -(arrays["advantage"] * logp)[mask].sum() / units, rtol=1e-5)
    assert "clip_fraction" not in metrics and "entropy" not in metrics


def test_diagnostics():
    mask, arrays, logp = _random_batch()
    entropy = jnp.asarray(np.where(mask, 2.0 + logp, np.nan))
    metrics = policy_gradient(jnp.asarray(logp), _experience(mask, **arrays), REINFORCE, entropy)[1]
    change = (logp - arrays["logp_old"])[mask]
    delta = np.abs(arrays["logp_sampler"] - arrays["logp_old"])[mask]
    want = {
        "kl_old": (np.exp(change) - 1 - change).mean(),
        "ratio/mean": np.exp(change).mean(),
        "ratio/square": np.exp(2 * change).mean(),
        "sampler_delta/mean": delta.mean(),
        "sampler_delta/max": delta.max(),
        "entropy": 2.0 + logp[mask].mean(),
    }
    assert metrics.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name].value(), value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("config", [REINFORCE, PPO, dataclasses.replace(PPO, normalisation="token")])
def test_padding_may_hold_nan(config: PolicyLoss):
    mask, arrays, logp = _random_batch()

    def gradient(logp, arrays):
        def loss(logp):
            found, metrics = policy_gradient(logp, _experience(mask, **arrays), config)
            return found.total, (found, metrics)

        return jax.value_and_grad(loss, has_aux=True)(logp)

    broken = {name: np.where(mask, array, np.nan) for name, array in arrays.items()}
    got = gradient(jnp.asarray(np.where(mask, logp, np.nan)), broken)
    jax.tree.map(np.testing.assert_array_equal, got, gradient(jnp.asarray(logp), arrays))


@pytest.mark.parametrize("config", [REINFORCE, dataclasses.replace(PPO, normalisation="token")])
def test_parts_add_up_to_the_whole(config: PolicyLoss):
    mask, arrays, logp = _random_batch()

    def loss(rows: slice):
        fields = {name: array[rows] for name, array in arrays.items()}
        return policy_gradient(jnp.asarray(logp[rows]), _experience(mask[rows], **fields), config)[0]

    whole = loss(slice(None))
    np.testing.assert_allclose(loss(slice(1)).merge(loss(slice(1, 4))).value(), whole.value(), rtol=1e-6)


def test_experience_is_constant():
    mask, arrays, logp = _random_batch()

    def loss(experience):
        return policy_gradient(jnp.asarray(logp), experience, PPO)[0].total

    grads = jax.grad(loss, allow_int=True)(_experience(mask, **arrays))
    for name in ("logp_old", "logp_sampler", "logp_anchor", "advantage"):
        assert not jnp.any(vars(grads)[name]), name


@pytest.mark.parametrize(
    ("field", "value"), [("kind", "ppo"), ("normalisation", "batch"), ("clip_range", 0.0), ("clip_range", 1.5)]
)
def test_wrong_settings_are_refused(field: str, value: object):
    with pytest.raises(ConfigError, match=f"PolicyLoss.{field} = "):
        PolicyLoss(**{field: value})
