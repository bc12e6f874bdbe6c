"""Attention of new tokens over a cache that lies in pieces: keys of prompts that several rows share, and the rows' own.

Decoding is bound by reading the cache. Rows that answer one prompt become rows of one product with its keys, so that
they are read once, not once a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int8

# As in `ops.attention`: finite, and below every real score.
_MASKED = -1e30
_FLOOR = -1e29

_LARGEST = 127
"""Of the integers of a `Small`."""


class Small(NamedTuple):
    """Keys or values as integers, with the size of 1 for each head and position."""

    values: Int8[Array, "*shape"]
    scale: Float[Array, "*sizes"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole numbers."""
        return self.values.shape


def shrink(x: Float[Array, "*shape"], axis: int = -1) -> Small:
    """Return the nearest integers q = round(x / s) with s = max |x| / 127 over the axis of a head; 1 where x is 0.

    An error is at most s / 2: half a percent of the largest entry of a head's key or value.
    """
    numbers = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(numbers), axis=axis, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / _LARGEST)
    return Small(jnp.round(numbers / scale).astype(jnp.int8), scale)


Numbers = Float[Array, "*N _ Kh _ _"] | Small


class Turned(NamedTuple):
    """Keys `[X, Kh, E, K]` and values `[X, Kh, K, E]`, of one layer or of all: for what is read only.

    In the product with queries numbers that stand next to each other then go to different scores. On a CPU, where few
    rows share a key, that takes a third of the time.
    """

    keys: Numbers
    values: Numbers


Piece = tuple[Numbers, Numbers] | Turned
"""Keys and values `[X, Kh, K, E]`, or turned; X divides the rows B, and row b looks at number b // (B / X)."""


def attend(
    query: Float[Array, "B Q H E"],
    pieces: Sequence[Piece],
    *,
    mask: Bool[Array, "#B 1 #Q K"],
    bias: Float[Array, "#B H Q K"] | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B Q H E"]:
    """Return what `ops.attention.attend` returns of all pieces' keys one after the other: one softmax over all of them.

    Each piece gives its scores, and the three sums over them (peak, total, weighted values) are joined; nothing as
    large as the cache is made.

    Args:
      query: `[B, Q, H, E]`.
      pieces: keys and values; their numbers of keys add up to K.
      mask: `[B | 1, 1, Q | 1, K]`, true where the query may look; where it may not look anywhere, it finds zeros.
      bias: `[B | 1, H, Q, K]`, added after the soft-cap.
      scale: factor of the dot products.
      softcap: bound of the scores' magnitude.
    """
    ends = list(itertools.accumulate(values.shape[2] for _, values in pieces))
    stretches = [slice(end - values.shape[2], end) for end, (_, values) in zip(ends, pieces, strict=True)]
    scores = []
    for piece, stretch in zip(pieces, stretches, strict=True):
        score = scale * _scores(query, piece)
        if softcap is not None:
            score = softcap * jnp.tanh(score / softcap)
        if bias is not None:
            part = bias[..., stretch]
            score = score + part.reshape(part.shape[0], score.shape[1], -1, *part.shape[2:])
        scores.append(jnp.where(mask[:, :, None, :, stretch], score, _MASKED))
    peaks = [jnp.max(score, axis=-1, keepdims=True) for score in scores]
    peak = jax.lax.stop_gradient(jnp.maximum(_joined(jnp.maximum, peaks), _FLOOR))
    weights = [jnp.exp(score - peak) for score in scores]
    total = _joined(jnp.add, [jnp.sum(weight, axis=-1, keepdims=True) for weight in weights])
    found = [_values(weight, values, query.dtype) for weight, (_, values) in zip(weights, pieces, strict=True)]
    out = _joined(jnp.add, found) / jnp.where(total > 0, total, 1.0)
    return out.transpose(0, 3, 1, 2, 4).reshape(query.shape).astype(query.dtype)


def _joined(operation, parts):
    first, *others = parts
    for other in others:
        first = operation(first, other)
    return first


def _scores(query: Float[Array, "B Q H E"], piece: Piece) -> Float[Array, "B Kh G Q K"]:
    (keys, values), turned = piece, isinstance(piece, Turned)
    (rows, queries, heads, width), (prompts, kv_heads, slots, _) = query.shape, values.shape
    shape = (prompts, rows // prompts, queries, kv_heads, heads // kv_heads, width)
    # Rows of one product: all queries of all samples of a prompt that share a key head.
    wide = query.reshape(shape).transpose(0, 3, 1, 4, 2, 5).reshape(prompts, kv_heads, -1, width)
    numbers, scale = (keys.values.astype(query.dtype), keys.scale) if isinstance(keys, Small) else (keys, None)
    axes = "xhqe,xhek->xhqk" if turned else "xhqe,xhke->xhqk"
    scores = jnp.einsum(axes, wide, numbers, preferred_element_type=jnp.float32)
    if scale is not None:
        scores = scores * (scale if turned else scale.swapaxes(2, 3))
    scores = scores.reshape(prompts, kv_heads, shape[1], shape[4], queries, slots).swapaxes(1, 2)
    return scores.reshape(rows, kv_heads, shape[4], queries, slots)


def _values(weights: Float[Array, "B Kh G Q K"], values: Numbers, dtype: DTypeLike) -> Float[Array, "B Kh G Q E"]:
    (rows, kv_heads, groups, queries, slots), (prompts, _, _, width) = weights.shape, values.shape
    samples = rows // prompts
    wide = weights.reshape(prompts, samples, kv_heads, groups, queries, slots).swapaxes(1, 2)
    wide, numbers = wide.reshape(prompts, kv_heads, samples * groups * queries, slots), values
    if isinstance(values, Small):
        # A position's size goes to its weight, so that the product is with the integers themselves.
        wide, numbers = wide * values.scale.swapaxes(2, 3), values.values.astype(dtype)
    found = jnp.einsum("xhqk,xhke->xhqe", wide.astype(dtype), numbers, preferred_element_type=jnp.float32)
    found = found.reshape(prompts, kv_heads, samples, groups, queries, width).swapaxes(1, 2)
    return found.reshape(rows, kv_heads, groups, queries, width)
