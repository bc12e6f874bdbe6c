"""Attention masks: true where a query may look at a key; `[B, 1, Q, K]`, the 1 standing for all heads."""

from __future__ import annotations

import functools
import operator

from jaxtyping import Array, Bool, Int


def causal(q_positions: Int[Array, "B Q"], k_positions: Int[Array, "B K"]) -> Bool[Array, "B 1 Q K"]:
    """Let a query see the keys at its own position and before."""
    return k_positions[:, None, None, :] <= q_positions[:, None, :, None]


def same_segment(q_segments: Int[Array, "B Q"], k_segments: Int[Array, "B K"]) -> Bool[Array, "B 1 Q K"]:
    """Let a query see the keys of its own segment; segment 0 is padding, which neither sees nor is seen."""
    queries, keys = q_segments[:, None, :, None], k_segments[:, None, None, :]
    return (queries == keys) & (keys != 0)


def window(q_positions: Int[Array, "B Q"], k_positions: Int[Array, "B K"], size: int) -> Bool[Array, "B 1 Q K"]:
    """Let a query see the keys less than `size` positions away, on both sides (combine with `causal` for one)."""
    return abs(q_positions[:, None, :, None] - k_positions[:, None, None, :]) < size


def reach(
    q_positions: Int[Array, "B Q"], k_positions: Int[Array, "B K"], before: int, after: int
) -> Bool[Array, "B 1 Q K"]:
    """Let a query see the keys at most `before` positions before its own and `after` behind it."""
    distance = q_positions[:, None, :, None] - k_positions[:, None, None, :]
    return (distance <= before) & (-distance <= after)


def prefix(q_prefix: Bool[Array, "B Q"], k_prefix: Bool[Array, "B K"]) -> Bool[Array, "B 1 Q K"]:
    """Let the queries of a prefix see all of its keys, those after them too (join to `causal` by |)."""
    return q_prefix[:, None, :, None] & k_prefix[:, None, None, :]


def both(*masks: Bool[Array, "#B 1 #Q #K"] | None) -> Bool[Array, "#B 1 #Q #K"] | None:
    """Let a query see what every given mask lets it see; None shows everything and so falls out."""
    given = [mask for mask in masks if mask is not None]
    return functools.reduce(operator.and_, given) if given else None
