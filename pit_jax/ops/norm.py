"""Normalisation of activations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """Return x / sqrt(mean(x ** 2) + eps) * scale over the last axis, computed in float32, in x's dtype.

    Gemma, which stores scale - 1, passes scale + 1. Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
    """
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    weight = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + scale.shape)
    return (wide * inverse * weight).astype(x.dtype)
