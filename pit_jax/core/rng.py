"""Random keys that depend only on (seed, stream, step), so that a restarted run draws the same numbers."""

from __future__ import annotations

import hashlib

import jax


def stream_id(name: str) -> int:
    """Return a stable 31-bit number for a stream's name (Python's own `hash` is salted per process)."""
    return int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "little") >> 1


def key_for(seed: int, stream: str, step: int = 0) -> jax.Array:
    """Return the key of one stream at one step.

    Streams are names such as "init", "dropout" or "rollout"; two streams of one seed are independent.
    """
    key = jax.random.fold_in(jax.random.key(seed), stream_id(stream))
    return jax.random.fold_in(key, step)
