"""What queries see, described by segments and static order instead of a mask `[B, 1, Q, K]`.

A mask grows with the square of the length. Flash kernels need none of it: they compare segments, and know from the
places of a query and a key alone whether order and windows let the one see the other.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pit_jax.core.errors import invalid
from pit_jax.ops import mask


class Tokens(NamedTuple):
    """Queries or keys: segments, 0 at padding, and positions, which count within a segment."""

    segments: Int[Array, "B L"]
    positions: Int[Array, "#B L"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """Which keys of its segment a query sees by its place; hashable, static under jit.

    causal: keys at its own place and before.
    prefix: of a causal order, the first so many columns, which see each other in both directions.
    before, after: most places that a key may be before or after the query; None sets no bound.
    memory: so many keys come before those of the queries' own row, and are seen whatever their place.
    """

    causal: bool
    prefix: int = 0
    before: int | None = None
    after: int | None = None
    memory: int = 0

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
          ConfigError: a number is negative.
        """
        for name, value in vars(self).items():
            if value is not None and value < 0:
                raise invalid(f"Order.{name}", value, "be at least 0", "Count columns.")

    @property
    def everything(self) -> bool:
        """Whether places hide nothing."""
        return not self.causal and self.before is None and self.after is None

    def within(self, queries: int, keys: int) -> Order:
        """Return the same order without bounds that hide nothing in a row of so many columns."""
        before = None if self.before is None or self.before >= queries - 1 else self.before
        after = None if self.after is None or self.causal or self.after >= keys - self.memory - 1 else self.after
        return dataclasses.replace(self, before=before, after=after)

    def shows(self, query: Any, key: Any) -> Any:
        """Return whether the query in one column sees the key in another, for integer arrays that broadcast.

        Places are columns here, so each segment must be a run of columns where there are windows.
        """
        own = key - self.memory
        seen = own <= query if self.causal else own == own
        if self.prefix:
            seen = seen | ((query < self.prefix) & (own < self.prefix))
        if self.before is not None:
            seen = seen & (query - own <= self.before)
        if self.after is not None:
            seen = seen & (own - query <= self.after)
        return seen | (key < self.memory) if self.memory else seen


def dense(order: Order, queries: Tokens, keys: Tokens) -> Bool[Array, "B 1 Q K"]:
    """Return the mask: same segment, and what the order shows, places being positions within the segment."""
    beyond = order.memory
    own = Tokens(keys.segments[:, beyond:], keys.positions[:, beyond:])
    seen = mask.same_segment(queries.segments, own.segments)
    if order.causal:
        causal = mask.causal(queries.positions, own.positions)
        if order.prefix:
            first, other = (jnp.arange(part.segments.shape[1])[None, :] < order.prefix for part in (queries, own))
            causal = causal | mask.prefix(first, other)
        seen = seen & causal
    if order.before is not None or order.after is not None:
        seen = seen & mask.reach(queries.positions, own.positions, order.before, order.after)
    if not beyond:
        return seen
    return jnp.concatenate([mask.same_segment(queries.segments, keys.segments[:, :beyond]), seen], axis=3)


def sighted(queries: Int[Array, "B Q"], keys: Int[Array, "B K"]) -> Bool[Array, "B Q"]:
    """Return which queries have any key of their segment."""
    return jnp.any((queries[:, :, None] == keys[:, None, :]) & (keys != 0)[:, None, :], axis=2)
