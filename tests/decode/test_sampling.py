"""The distribution of one draw."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.decode.sampling import Sampling, draw, first_largest, invert, keep_top_k, keep_top_p

LOGITS = np.array([1.0, 3.0, -0.5, 2.0, 0.0], np.float32)
ROWS = 40_000


def _frequencies(sampling: Sampling) -> np.ndarray:
    logits = jnp.tile(jnp.asarray(LOGITS)[None, :], (ROWS, 1))
    keys = jax.random.split(jax.random.key(0), ROWS)
    token, logp = draw(logits, keys, 3, sampling.temperature, sampling.top_k, sampling.top_p, sampling.draws)
    exact = LOGITS - np.log(np.exp(LOGITS).sum())
    np.testing.assert_allclose(logp, exact[np.asarray(token)], atol=1e-6)
    return np.bincount(np.asarray(token), minlength=len(LOGITS)) / ROWS


def _expected(sampling: Sampling) -> np.ndarray:
    """Softmax of the kept tokens, kept by an independent loop over them in falling order."""
    probability = np.exp(LOGITS / sampling.temperature)
    order = np.argsort(-probability)
    if sampling.top_k:
        probability[order[sampling.top_k :]] = 0.0
    probability /= probability.sum()
    total, kept = 0.0, np.zeros_like(probability)
    for token in order:
        if total >= sampling.top_p:
            break
        kept[token] = probability[token]
        total += probability[token]
    return kept / kept.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0),
        Sampling(top_k=2),
        Sampling(top_p=0.7),
        Sampling(temperature=1.5, top_k=4, top_p=0.8),
        Sampling(draws="inverse"),
        Sampling(temperature=1.5, top_k=4, top_p=0.8, draws="inverse"),
    ],
)
def test_frequencies_match_the_exact_distribution(sampling: Sampling) -> None:
    expected = _expected(sampling)
    error = 5.0 * np.sqrt(expected * (1.0 - expected) / ROWS)
    assert np.all(np.abs(_frequencies(sampling) - expected) <= error)


def test_temperature_zero_is_the_most_likely_token() -> None:
    for draws in ("gumbel", "inverse"):
        np.testing.assert_array_equal(_frequencies(Sampling(temperature=0.0, draws=draws)), np.eye(5)[1])


def test_one_program_serves_all_temperatures() -> None:
    traces = []

    @jax.jit
    def program(temperature: jax.Array) -> jax.Array:
        traces.append(1)
        return draw(jnp.zeros((2, 4)), jax.random.split(jax.random.key(0), 2), 0, temperature, 0, 1.0, "gumbel")[0]

    for temperature in (0.0, 0.4, 1.0):
        program(jnp.float32(temperature))
    assert len(traces) == 1


def test_filters_keep_everything_when_off_and_the_best_when_tight() -> None:
    logits = jnp.asarray(LOGITS)[None, :]
    np.testing.assert_array_equal(keep_top_k(logits, 0), logits)
    np.testing.assert_array_equal(keep_top_k(logits, 9), logits)
    np.testing.assert_array_equal(keep_top_p(logits, 1.0), logits)
    for kept in (keep_top_k(logits, 1), keep_top_p(logits, 1e-6)):
        np.testing.assert_array_equal(np.isfinite(kept), (LOGITS.max() == LOGITS)[None, :])


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}])
def test_bad_settings_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"Sampling.{next(iter(bad))}"):
        Sampling(**bad)


def test_inversion_over_many_blocks_draws_every_token_as_often_as_it_should() -> None:
    random = np.random.default_rng(0)
    logits = np.asarray(3.0 * random.normal(size=300), np.float32)
    # A whole block, and the end of the vocabulary, cannot be drawn.
    logits[128:256], logits[290:] = -np.inf, -np.inf
    keys = jax.random.split(jax.random.key(1), ROWS)
    token = invert(jnp.tile(logits[None, :], (ROWS, 1)), keys, 0, 1.0)
    frequency = np.bincount(np.asarray(token), minlength=300) / ROWS
    expected = np.exp(logits) / np.exp(logits).sum()
    assert np.all(np.abs(frequency - expected) <= 5.0 * np.sqrt(expected * (1.0 - expected) / ROWS) + 1.0 / ROWS)
    assert not frequency[expected == 0.0].any()


def test_the_first_of_equal_numbers_is_taken_and_nan_stays_a_token() -> None:
    rows = jnp.asarray([[1.0, 3.0, 3.0], [-jnp.inf, -jnp.inf, -2.0], [0.0, jnp.nan, 1.0]])
    assert first_largest(rows).tolist() == [1, 2, 2]
