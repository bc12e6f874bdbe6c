"""Rotary embedding against complex multiplication, and what makes it relative."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pit_jax.ops import rotary

B, L, H, E, BASE = 2, 6, 3, 8, 100.0


def _vectors(seed: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, L, H, E)), jnp.float32)


def test_rotate_is_multiplication_by_a_phase():
    x, positions = _vectors(0), np.random.default_rng(1).integers(0, 40, (B, L))
    pairs = np.asarray(x[..., : E // 2], np.float64) + 1j * np.asarray(x[..., E // 2 :], np.float64)
    phases = np.exp(1j * positions[..., None] * BASE ** (-np.arange(E // 2) * 2 / E))
    turned = pairs * phases[:, :, None]
    got = rotary.rotate(x, jnp.asarray(positions), BASE)
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=2e-5)


def test_products_depend_on_the_difference_alone():
    query, key = _vectors(2), _vectors(3)
    positions = jnp.broadcast_to(jnp.arange(L)[None], (B, L))

    def products(shift: int) -> jnp.ndarray:
        turned = [rotary.rotate(x, positions + shift, BASE) for x in (query, key)]
        return jnp.einsum("bqhe,bkhe->bhqk", *turned)

    np.testing.assert_allclose(products(0), products(17), atol=2e-5)
    assert jnp.max(jnp.abs(products(0) - jnp.einsum("bqhe,bkhe->bhqk", query, key))) > 0.1


def test_a_shared_table_gives_the_same_and_dtype_stays():
    x, positions = _vectors(4), jnp.broadcast_to(jnp.arange(L)[None], (B, L))
    shared = rotary.apply(x, *rotary.table(positions, E, BASE))
    np.testing.assert_array_equal(shared, rotary.rotate(x, positions, BASE))
    np.testing.assert_array_equal(shared[:, 0], x[:, 0])
    assert rotary.rotate(x.astype(jnp.bfloat16), positions, BASE).dtype == jnp.bfloat16
