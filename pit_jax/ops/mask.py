"""Attention masks: true where a query may look at a key; `[B, 1, Q, K]`, the 1 standing for all heads."""

from __future__ import annotations

import functools
import operator

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def causal(q_positions: Int[Array, "#B Q"], k_positions: Int[Array, "#B K"]) -> Bool[Array, "#B 1 Q K"]:
    """Let a query see the keys at its own position and before."""
    return k_positions[:, None, None, :] <= q_positions[:, None, :, None]


def same_segment(q_segments: Int[Array, "B Q"], k_segments: Int[Array, "B K"]) -> Bool[Array, "B 1 Q K"]:
    """Let a query see the keys of its own segment; segment 0 is padding, which neither sees nor is seen."""
    queries, keys = q_segments[:, None, :, None], k_segments[:, None, None, :]
    return (queries == keys) & (keys != 0)


def reach(
    q_positions: Int[Array, "#B Q"], k_positions: Int[Array, "#B K"], before: int | None, after: int | None
) -> Bool[Array, "#B 1 Q K"]:
    """Let a query see the keys at most `before` positions before its own and `after` behind it; None sets no bound."""
    distance = q_positions[:, None, :, None] - k_positions[:, None, None, :]
    bounds = ([] if before is None else [distance <= before]) + ([] if after is None else [-distance <= after])
    return functools.reduce(operator.and_, bounds, jnp.ones_like(distance, bool))


def prefix(q_prefix: Bool[Array, "B Q"], k_prefix: Bool[Array, "B K"]) -> Bool[Array, "B 1 Q K"]:
    """Let the queries of a prefix see all of its keys, those after them too (join to `causal` by |)."""
    return q_prefix[:, None, :, None] & k_prefix[:, None, None, :]
