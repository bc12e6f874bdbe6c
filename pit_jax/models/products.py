"""Products of activations with the kernels of linear maps, in the form that the devices at hand compute fastest."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def undivided() -> bool:
    """Return whether activations lie on one device, so that axes may be joined without moving anything."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def product(x: Float[Array, "B L *ins"], kernel: Float[Array, "*shape"], inputs: int) -> Float[Array, "B L *outs"]:
    """Return x W, the last `inputs` axes of `x` contracted with the first of the kernel.

    On one device both are matrices in it. The gradient of W contracts over rows and columns of tokens, and for two
    axes XLA writes transposed copies of the activations on CPUs, which took a third of a training step; the gradient
    of a product of two matrices needs none. Over several devices rows and columns may be cut, and stay apart.
    """
    if not undivided():
        return jnp.tensordot(x, kernel, inputs)
    width = math.prod(kernel.shape[:inputs])
    y = x.reshape(-1, width) @ kernel.reshape(width, -1)
    return y.reshape(*x.shape[: x.ndim - inputs], *kernel.shape[inputs:])
