"""Scaled dot-product attention with grouped key/value heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pit_jax.core.errors import invalid

# Finite, because -inf - -inf is NaN. `_FLOOR` lies between every real score and `_MASKED`: subtracting it from a
# row without a visible key leaves exp(-huge) = 0 instead of exp(0) = 1.
_MASKED = -1e30
_FLOOR = -1e29


def attend(
    query: Float[Array, "B Q H E"],
    key: Float[Array, "B K Kh E"],
    value: Float[Array, "B K Kh Ev"],
    *,
    mask: Bool[Array, "#B 1 Q K"] | None,
    bias: Float[Array, "#B H Q K"] | None,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B Q H Ev"]:
    """Return the attention of every query over the keys its mask shows, softmax in float32.

        out[b, q, h] = sum_k softmax_k(cap(scale <query[b, q, h], key[b, k, c]>) + bias[b, h, q, k]) value[b, k, c]

    with c = h // G, G = H / Kh query heads per key head, and cap(s) = softcap tanh(s / softcap), or s without a
    soft-cap. A query that sees no key gets zeros, with zero gradient. The result has the query's dtype.

    Args:
      query: `[B, Q, H, E]`.
      key: `[B, K, Kh, E]`, where H is a multiple of Kh; query heads h with the same h // G share a key head.
      value: `[B, K, Kh, Ev]`.
      mask: `[B | 1, 1, Q, K]`, true where the query may look; None shows everything.
      bias: `[B | 1, H, Q, K]`, added after the soft-cap.
      scale: factor of the dot products, commonly E ** -0.5 (T5: 1).
      softcap: bound of the scores' magnitude.

    Raises:
      ConfigError: the query heads cannot be shared out evenly.

    Source: Vaswani et al. 2017 (arXiv 1706.03762); grouped heads: Ainslie et al. 2023 (arXiv 2305.13245).
    """
    batch, queries, heads, width = query.shape
    keys, kv_heads = key.shape[1:3]
    if heads % kv_heads:
        raise invalid("heads", heads, f"be a multiple of the {kv_heads} key/value heads", "Change either number.")
    groups = heads // kv_heads
    # The queries that share a key head become rows of one product: fewer and larger matrix products than one a head.
    # Columns come before groups in them, so that queries cut along the length over devices stay so.
    rows = query.reshape(batch, queries, kv_heads, groups, width).transpose(0, 2, 1, 3, 4)
    rows = rows.reshape(batch, kv_heads, queries * groups, width)
    scores = scale * jnp.einsum("bhqe,bkhe->bhqk", rows, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, queries, groups, keys)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.reshape(bias.shape[0], kv_heads, groups, queries, keys).swapaxes(2, 3)
    if mask is not None:
        scores = jnp.where(mask[:, :, :, None], scores, _MASKED)
    peak = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), _FLOOR))
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(value.dtype).reshape(batch, kv_heads, queries * groups, keys)
    out = jnp.einsum("bhqk,bkhe->bhqe", weights, value, preferred_element_type=jnp.float32)
    # Dividing after the product touches [Q, Ev] numbers instead of [Q, K].
    out = out.reshape(batch, kv_heads, queries, groups, -1) / jnp.where(total > 0, total, 1.0)
    return out.transpose(0, 2, 1, 3, 4).reshape(batch, queries, heads, -1).astype(query.dtype)
