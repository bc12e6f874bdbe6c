"""Sums over the segments of packed rows: segment ids are 1..M in contiguous runs, 0 is padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def positions(segments: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Return each token's index inside its run of equal segment ids, starting at 0."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32)[None, :], segments.shape)
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def _membership(segments: Int[Array, "B L"], count: int) -> Bool[Array, "B L M"]:
    return segments[:, :, None] == jnp.arange(1, count + 1, dtype=segments.dtype)[None, None, :]


def counts(segments: Int[Array, "B L"], count: int) -> Int[Array, "B M"]:
    """Return the number of tokens of segments 1..count (`count`, the M of the result, is static)."""
    return jnp.sum(_membership(segments, count), axis=1, dtype=jnp.int32)


def sums(values: Float[Array, "B L"], segments: Int[Array, "B L"], count: int) -> Float[Array, "B M"]:
    """Return the sum of the values of each segment 1..count, in float32; padding does not count, whatever it holds.

        out[b, m] = sum_l [segments[b, l] = m + 1] values[b, l]

    Args:
      values: `[B, L]`, such as log-probabilities of tokens.
      segments: `[B, L]`, 0 at padding.
      count: M, static.
    """
    used = jnp.where(segments != 0, values.astype(jnp.float32), 0.0)
    member = _membership(segments, count).astype(jnp.float32)
    return jnp.einsum("blm,bl->bm", member, used, precision=jax.lax.Precision.HIGHEST)


def means(
    values: Float[Array, "B L *R"],
    segments: Int[Array, "B L"],
    weights: Float[Array, "B L"] | Bool[Array, "B L"],
    count: int,
) -> Float[Array, "B M *R"]:
    """Return the weighted mean of the values of each segment 1..count, in float32.

        out[b, m] = sum_l [segments[b, l] = m + 1] weights[b, l] values[b, l] / (the same sum of weights)

    It is 0 where a segment has no weight. Values of weight 0, or outside of every segment, do not count even
    when they are not finite.

    Args:
      values: `[B, L, ...]`.
      segments: `[B, L]`, 0 at padding.
      weights: `[B, L]`, at least 0; a boolean mask will do.
      count: M, static.
    """
    rows, length = segments.shape
    weights = weights.astype(jnp.float32)
    used = (weights != 0) & (segments != 0)
    flat = jnp.where(used[:, :, None], values.astype(jnp.float32).reshape(rows, length, -1), 0.0)
    share = jnp.where(_membership(segments, count), weights[:, :, None], 0.0)
    total = jnp.sum(share, axis=1)
    share = share / jnp.where(total > 0, total, 1.0)[:, None, :]
    # A product with a one-hot matrix: no scatter, hence fast everywhere and differentiable in both directions.
    out = jnp.einsum("blm,blr->bmr", share, flat, precision=jax.lax.Precision.HIGHEST)
    return out.reshape(rows, count, *values.shape[2:])
