"""Rotary embedding against complex multiplication, and what makes it relative."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.ops import rotary
from pit_jax.ops.rotary import RopeScaling

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


def reference(width: int, base: float, scaling: RopeScaling) -> list[float]:
    """Return the frequencies one by one, from wavelengths, in float64."""
    out = []
    most = scaling.original_max_positions or 1
    for i in range(width // 2):
        wavelength = 2 * math.pi * base ** (2 * i / width)
        stretched = wavelength * scaling.factor
        if scaling.kind == "linear":
            kept = 0.0
        elif scaling.kind == "llama3":
            long, short = most / scaling.low_freq_factor, most / scaling.high_freq_factor
            kept = (1 / wavelength - 1 / long) / (1 / short - 1 / long)
        else:
            # The pair, as a real number, that turns so many times: base ** (2 i / width) = most / (2 pi turns).
            first, last = (
                math.log(most / (2 * math.pi * turns), base) * width / 2
                for turns in (scaling.beta_fast, scaling.beta_slow)
            )
            first, last = max(math.floor(first), 0), min(math.ceil(last), width - 1)
            kept = 1 - (i - first) / (last - first)
        kept = min(max(kept, 0.0), 1.0)
        out.append(2 * math.pi * (kept / wavelength + (1 - kept) / stretched))
    return out


SCALINGS = {
    "linear": RopeScaling(kind="linear", factor=8.0),
    "llama3": RopeScaling(kind="llama3", factor=32.0, original_max_positions=8192),
    "llama3 other": RopeScaling(
        kind="llama3", factor=4.0, low_freq_factor=2.0, high_freq_factor=16.0, original_max_positions=500
    ),
    "yarn": RopeScaling(kind="yarn", factor=4.0, original_max_positions=32_768),
    "yarn other": RopeScaling(
        kind="yarn", factor=2.5, original_max_positions=200, beta_fast=8.0, beta_slow=0.5, attention_factor=1.3
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("width", "base"), [(128, 500_000.0), (80, 10_000.0)])
def test_stretched_frequencies_are_those_of_the_definitions(name: str, width: int, base: float) -> None:
    scaling = SCALINGS[name]
    found = rotary.frequencies(width, base, scaling)
    assert found.dtype == np.float32 and found.shape == (width // 2,)
    np.testing.assert_allclose(found, reference(width, base, scaling), rtol=2e-6)
    plain = rotary.frequencies(width, base, None)
    np.testing.assert_allclose(plain, base ** -(np.arange(0, width, 2) / width), rtol=1e-6)
    # Each kind but the linear one keeps the fastest pairs, and all divide the slowest by the factor.
    assert (found[0] == plain[0]) == (scaling.kind != "linear")
    np.testing.assert_allclose(found[-1], plain[-1] / scaling.factor, rtol=1e-6)


def test_the_amplitude_multiplies_cosine_and_sine() -> None:
    positions = jnp.arange(9, dtype=jnp.int32)[None]
    amplitudes = {"linear": 1.0, "llama3": 1.0, "yarn": 0.1 * math.log(4) + 1, "yarn other": 1.3}
    for name, amplitude in amplitudes.items():
        cosine, sine = rotary.table(positions, E, BASE, SCALINGS[name])
        np.testing.assert_allclose(cosine**2 + sine**2, amplitude**2, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "yarm"}, "Did you mean 'yarn'"),
        ({"kind": "linear", "factor": 0.5}, "factor = 0.5 must be at least 1"),
        ({"kind": "llama3"}, "original_max_positions = None must be at least 1 for llama3"),
        ({"kind": "linear", "high_freq_factor": 1.0}, "more than low_freq_factor = 1.0"),
        ({"kind": "yarn", "original_max_positions": 8, "beta_slow": 40.0}, "more than beta_slow = 40.0"),
        ({"kind": "linear", "attention_factor": 1.5}, "given for yarn only"),
    ],
)
def test_bad_scalings_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RopeScaling(**({"factor": 2.0} | fields))
