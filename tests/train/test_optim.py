"""Optimiser configs: schedules, the decay mask, and messages for bad settings."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.train import state as states
from pit_jax.train.optim import Optimizer, build, decayed, learning_rate


def rates(steps, **settings):
    schedule = learning_rate(Optimizer(learning_rate=2.0, **settings), steps)
    return np.array([schedule(step) for step in range(steps + 1)])


def test_constant_after_a_warmup_that_starts_above_zero():
    np.testing.assert_allclose(rates(6, warmup_steps=4), [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0])


def test_linear_ends_at_the_end_fraction():
    np.testing.assert_allclose(rates(4, schedule="linear", end_fraction=0.5), [2.0, 1.75, 1.5, 1.25, 1.0], rtol=1e-6)


def test_cosine_is_half_way_in_the_middle():
    got = rates(12, schedule="cosine", warmup_steps=2, end_fraction=0.1)
    assert got[1] == got[2] == pytest.approx(2.0)
    assert got[7] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert got[12] == pytest.approx(0.2)


def test_rsqrt_is_t5x_rate_over_the_root_of_the_warmup():
    got = rates(400, schedule="rsqrt", warmup_steps=100)
    for step in (100, 225, 400):
        assert got[step - 1] == pytest.approx(2.0 * math.sqrt(100) / math.sqrt(step), rel=1e-6)


def test_only_matrices_are_decayed_and_the_layer_axis_does_not_count():
    leaf = jax.ShapeDtypeStruct
    tree = {
        "embedding": leaf((5, 4), jnp.float32),
        "final_norm": {"scale": leaf((4,), jnp.float32)},
        "decoder": {
            "layers": {
                "norm": {"scale": leaf((3, 4), jnp.float32)},
                "wi": {"kernel": leaf((3, 4, 8), jnp.float32), "bias": leaf((3, 8), jnp.float32)},
                "gate": leaf((3, 8), jnp.float32),
            }
        },
    }
    assert decayed(tree) == {
        "embedding": True,
        "final_norm": {"scale": False},
        "decoder": {"layers": {"norm": {"scale": False}, "wi": {"kernel": True, "bias": False}, "gate": False}},
    }


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "sgd"])
def test_every_kind_descends(kind):
    optimizer = Optimizer(kind=kind, learning_rate=0.05, weight_decay=1e-3)
    transform = build(optimizer, 50)
    state = states.create({"kernel": jnp.full((3, 3), 2.0)}, transform)
    params, opt_state = state.params, state.opt_state
    for _ in range(50):
        updates, opt_state = transform.update(jax.tree.map(lambda leaf: 2 * leaf, params), opt_state, params)
        params = jax.tree.map(jnp.add, params, updates)
    assert float(jnp.max(jnp.abs(params["kernel"]))) < 1.0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kind": "adamv"}, "Did you mean 'adamw'"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"learning_rate": 0.0}, r"Optimizer.learning_rate = 0.0 must be above 0"),
        ({"warmup_steps": -1}, "Optimizer.warmup_steps"),
        ({"b2": 1.0}, "Optimizer.b2"),
        ({"clip_norm": 0.0}, "Optimizer.clip_norm"),
        ({"end_fraction": 1.5}, "Optimizer.end_fraction"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ConfigError, match=named):
        Optimizer(**({"learning_rate": 1e-3} | settings))


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match=r"Optimizer.warmup_steps = 10 must be below the 10 steps"):
        build(Optimizer(learning_rate=1e-3, schedule="linear", warmup_steps=10), 10)
