"""Rotary position embedding in the half-split layout of Llama, Qwen and Gemma."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def table(
    positions: Int[Array, "B L"], width: int, base: float
) -> tuple[Float[Array, "B L half"], Float[Array, "B L half"]]:
    """Return (cosine, sine) of the angles position * base ** (-2 i / width), i < width / 2, in float32."""
    exponents = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    angles = positions.astype(jnp.float32)[:, :, None] * (base**-exponents)[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply(
    x: Float[Array, "B L H E"], cosine: Float[Array, "B L half"], sine: Float[Array, "B L half"]
) -> Float[Array, "B L H E"]:
    """Turn each pair (x[i], x[i + E/2]) by the angle whose cosine and sine `table` gave; the dtype stays."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = cosine[:, :, None, :], sine[:, :, None, :]
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)


def rotate(x: Float[Array, "B L H E"], positions: Int[Array, "B L"], base: float) -> Float[Array, "B L H E"]:
    """Return `x` with each head's vector turned by angles proportional to its position.

    Products <rotate(q, m), rotate(k, n)> depend on m - n alone. E must be even. Where several calls share
    positions (queries and keys, all layers), `table` once and `apply` often saves the trigonometry.

    Source: Su et al. 2021 (arXiv 2104.09864).
    """
    return apply(x, *table(positions, x.shape[-1], base))
