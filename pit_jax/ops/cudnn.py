"""Flash attention of NVIDIA's cuDNN, by `jax.nn.dot_product_attention`.

It takes 16-bit numbers, and hides keys by a mask `[B, 1, Q, K]`: segments have no shorter description there. The mask
is the same for all heads and layers, so it is a small part of the scores it saves.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_WIDEST, _WIDEST_HOPPER = 128, 256


def takes(dtype: str, width: int) -> bool:
    """Return whether the kernel takes numbers of a dtype and heads of a width: 16 bits, and a multiple of 8."""
    return dtype == "bfloat16" and width % 8 == 0 and width <= _widest()


def _widest() -> int:
    if jax.default_backend() != "gpu":
        return _WIDEST
    hopper = float(jax.local_devices()[0].compute_capability) >= 9
    return _WIDEST_HOPPER if hopper else _WIDEST


def attend(
    query: Float[Array, "B Q H E"],
    key: Float[Array, "B K Kh E"],
    value: Float[Array, "B K Kh E"],
    mask: Bool[Array, "B 1 Q K"],
    *,
    scale: float,
    on_gpu: bool,
) -> Float[Array, "B Q H E"]:
    """Return what `ops.attention.attend` returns, by cuDNN, or by the same function's plain form where it is not.

    Args:
      query: `[B, Q, H, E]`.
      key: `[B, K, Kh, E]`, where H is a multiple of Kh.
      value: `[B, K, Kh, E]`.
      mask: `[B, 1, Q, K]`, true where the query may look.
      scale: factor of the dot products.
      on_gpu: whether the program is for a GPU.
    """
    queries, keys = query.shape[1], key.shape[1]
    # With a mask, the backward pass takes even lengths only.
    room, more = queries % 2, keys % 2
    query = jnp.pad(query, ((0, 0), (0, room), (0, 0), (0, 0)))
    key, value = (jnp.pad(part, ((0, 0), (0, more), (0, 0), (0, 0))) for part in (key, value))
    padded = jnp.pad(mask, ((0, 0), (0, 0), (0, room), (0, more)))
    kind = "cudnn" if on_gpu else "xla"
    out = jax.nn.dot_product_attention(query, key, value, mask=padded, scale=scale, implementation=kind)
    # A query that sees nothing gets the mean of all values from cuDNN.
    shown = jnp.any(mask[:, 0], axis=-1)
    return jnp.where(shown[:, :, None, None], out[:, :queries], jnp.zeros((), out.dtype))
