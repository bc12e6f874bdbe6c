"""The calls of cuDNN, which run as XLA without a GPU, against plain attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.ops import cudnn
from pit_jax.ops.attention import attend

B, H, KH, E = 2, 4, 2, 8


@pytest.mark.parametrize(("queries", "keys"), [(6, 8), (7, 5)])
def test_the_calls_equal_plain_attention(queries: int, keys: int):
    random = np.random.default_rng(0)
    shapes = (B, queries, H, E), (B, keys, KH, E), (B, keys, KH, E)
    arrays = tuple(jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)
    mask = jnp.asarray(random.random((B, 1, queries, keys)) < 0.6).at[0, 0, 2].set(False)

    def called(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = cudnn.attend(*arrays, mask, scale=0.4, on_gpu=False)
        return jnp.sum(jnp.sin(out)), out

    def plain(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(*arrays, mask=mask, bias=None, scale=0.4)
        return jnp.sum(jnp.sin(out)), out

    (grads, out), (want_grads, want) = (
        jax.jit(jax.grad(one, (0, 1, 2), has_aux=True))(*arrays) for one in (called, plain)
    )
    np.testing.assert_allclose(out, want, atol=1e-6)
    assert not np.any(out[0, 2]) and not np.any(grads[0][0, 2])
    for one, other in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-6)


def test_what_cudnn_takes():
    assert cudnn.takes("bfloat16", 64) and cudnn.takes("bfloat16", 128)
    assert not cudnn.takes("float32", 64)
    assert not cudnn.takes("bfloat16", 20)
    # Heads of 256 need a Hopper.
    assert not cudnn.takes("bfloat16", 256)
