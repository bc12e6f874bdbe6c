"""Int8 kernels against qwix, which stores an array as integers and scales in the same shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.models.quantised import product, quantise_kernel

pytestmark = pytest.mark.parity
qwix = pytest.importorskip("qwix")


@pytest.mark.parametrize(("shape", "axes"), [((16, 2, 8), (0,)), ((2, 8, 16), (0, 1)), ((24, 16), (0,))])
def test_products_are_those_of_qwix_with_our_integers(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    kernel = jnp.asarray(random.normal(size=shape), jnp.float32)
    x = jnp.asarray(random.normal(size=(3, 5, *shape[: len(axes)])), jnp.float32)
    ours = quantise_kernel(kernel, axes)
    contracted = (tuple(range(2, x.ndim)), axes)

    def theirs(x: jax.Array) -> jax.Array:
        array = qwix.QArray(qvalue=ours.values, scale=ours.scale)
        return qwix.dot_general(x, array, (contracted, ((), ())))

    np.testing.assert_allclose(product(x, ours, len(axes)), theirs(x), atol=1e-5)
    grads = [
        jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(x) for f in (theirs, lambda x: product(x, ours, len(axes)))
    ]
    np.testing.assert_allclose(*grads, atol=1e-5)


def test_errors_are_those_of_qwix() -> None:
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(512, 64)), jnp.float32)
    ours = quantise_kernel(kernel, (0,))
    theirs = qwix.dequantize(qwix.quantize(kernel, jnp.int8, channelwise_axes=(1,)))
    errors = [np.sqrt(np.mean((np.asarray(kernel) - found) ** 2)) for found in (ours.values * ours.scale, theirs)]
    assert 0.9 < errors[0] / errors[1] < 1.1
