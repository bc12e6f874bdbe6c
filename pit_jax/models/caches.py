"""What a decoder remembers while it decodes: keys and values of the prompts, and of its rows' own tokens.

The two lie apart, because the samples of one prompt share its keys and values: they are computed, kept and read once.

A row's own tokens stand in a ring of slots. All rows write the same slot at a time, so that one slice is written in
place, and how many of the slots before it are a row's own is a number a row: rows can begin at different times.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pit_jax.models import attending
from pit_jax.models.attending import KeysValues
from pit_jax.models.config import ModelConfig
from pit_jax.ops.cached import Numbers, Small, shrink
from pit_jax.sharding.rules import constrain

NEVER = 2**30
"""Position of a slot that no query reaches."""

Stored = KeysValues | tuple[KeysValues, ...]
"""Keys and values of all layers: `[N, B, Kh, C, E]`, or one `[B, Kh, C, E]` a layer where layers are unrolled.

A layer's keys must be an array of their own there: a slice of a larger one would be copied for every product.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """X prompts and B rows of tokens, of which row b answers prompt b // (B / X).

    prompt: keys and values of S slots. own: of a ring of T slots. places: position of each of a prompt's slots, `NEVER`
    at padding. first: position of the first token of a prompt's rows. count: tokens of each row. slot: the next slot
    to be written, of all rows.
    """

    prompt: Stored
    own: Stored
    places: Int[Array, "X S"]
    first: Int[Array, " X"]
    count: Int[Array, " B"]
    slot: Int[Array, ""]

    @property
    def here(self) -> Int[Array, "B 1"]:
        """Position of each row's next token."""
        return (self._per_row(self.first) + self.count)[:, None]

    @property
    def ages(self) -> Int[Array, "1 T"]:
        """How many tokens ago each slot is written, once the next token is in its own."""
        slots = _slots(self.own)
        return ((self.slot - jnp.arange(slots, dtype=jnp.int32)) % slots)[None, :]

    @property
    def known(self) -> Bool[Array, "B T"]:
        """Which slots hold tokens of the row, the next one included; others are empty, or a former row's."""
        return self.ages <= self.count[:, None]

    @property
    def prompt_places(self) -> Int[Array, "B S"]:
        """Positions of the slots of each row's prompt."""
        return self._per_row(self.places)

    @property
    def own_places(self) -> Int[Array, "B T"]:
        """Positions of each row's own slots."""
        return jnp.where(self.known, self.here - self.ages, NEVER)

    def layers(self, windowed: np.ndarray) -> list[tuple] | tuple:
        """Return what each layer needs: its number, whether it has the window, and its part of the prompts."""
        index = np.arange(len(windowed), dtype=np.int32)
        if isinstance(self.prompt, KeysValues):
            return index, windowed, self.prompt
        return list(zip(index, windowed, self.prompt, strict=True))

    def after(self, own: Stored) -> Cache:
        """Return the cache with the next token's keys and values written, which `remember` has done."""
        slots = _slots(own)
        # A row that goes on for longer than the ring, because nobody has replaced it, forgets its first tokens.
        count = jnp.minimum(self.count + 1, slots - 1)
        return dataclasses.replace(self, own=own, count=count, slot=(self.slot + 1) % slots)

    def _per_row(self, x: Int[Array, "X ..."]) -> Int[Array, "B ..."]:
        return jnp.repeat(x, self.count.shape[0] // x.shape[0], axis=0)


def begin(
    known: KeysValues,
    places: Int[Array, "X S"],
    first: Int[Array, " X"],
    *,
    samples: int,
    slots: int,
    config: ModelConfig,
) -> Cache:
    """Return a cache of prompts, each with `samples` rows that have no token yet.

    Args:
      known: keys and values of the prompts, `[N, X, S, Kh, E]`.
      places: position of each of their slots.
      first: position of the first token after each.
      samples: rows a prompt.
      slots: tokens a row.
      config: whether a layer's keys and values are arrays of their own, and integers.
    """
    prompts, unused = places.shape[0], attending.slots(places.shape[1]) - places.shape[1]
    number, _, _, heads, width = known.keys.shape
    shape = (prompts * samples, heads, attending.slots(slots), width)
    apart, small = not config.scan_layers, config.cache_dtype == "int8"
    empty = jax.tree.map(_cut, _held(jnp.zeros(shape if apart else (number, *shape), known.keys.dtype), small))
    own = KeysValues(empty, empty)
    return Cache(
        prompt=_stored(known, unused, apart, small),
        own=(own,) * number if apart else own,
        places=jnp.pad(places, ((0, 0), (0, unused)), constant_values=NEVER),
        first=first,
        count=jnp.zeros(prompts * samples, jnp.int32),
        slot=jnp.zeros((), jnp.int32),
    )


def remember(own: Stored, new: KeysValues, layer: Int[Array, ""], slot: Int[Array, ""]) -> tuple[Stored, KeysValues]:
    """Return the rows' own keys and values with one slot of one layer written, and that layer's part.

    It is written in place in a loop that carries it.

    Args:
      own: what is known of all layers.
      new: keys and values of a token a row, `[B, 1, Kh, E]`.
      layer: number of the layer; a concrete one where layers are apart.
      slot: the slot.
    """
    stacked = isinstance(own, KeysValues)
    parts = own if isinstance(own, KeysValues) else own[layer]
    token = KeysValues(*(_held(part.swapaxes(1, 2), isinstance(parts.keys, Small)) for part in new))

    def write(old: Array, one: Array) -> Array:
        at = (layer, 0, 0, slot, 0) if stacked else (0, 0, slot, 0)
        return _cut(jax.lax.dynamic_update_slice(old, one[None] if stacked else one, at))

    written = jax.tree.map(write, parts, token)
    if isinstance(own, KeysValues):
        return written, jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, layer, keepdims=False), written)
    return (*own[: int(layer)], written, *own[int(layer) + 1 :]), written


def admit(cache: Cache, new: Cache, rows: Int[Array, " R"]) -> Cache:
    """Return the cache with the rows of another in the place of some of its own.

    Args:
      cache: of as many prompts as rows.
      new: of prompts of the same width, and of the same number of slots; it has R rows.
      rows: where each of them goes, a different number each; those beyond the last row are dropped.
    """
    samples = new.count.shape[0] // new.first.shape[0]
    # The newest token of every row stands one slot before the next.
    shift = cache.slot - new.slot

    def put(old: Array, value: Array) -> Array:
        axis = old.ndim - 4 if old.ndim >= 4 else 0
        return old.at[(slice(None),) * axis + (rows,)].set(value, mode="drop")

    def prompt(old: Array, value: Array) -> Array:
        return _cut(put(old, jnp.repeat(value, samples, axis=value.ndim - 4)))

    def own(old: Array, value: Array) -> Array:
        return _cut(put(old, jnp.roll(value, shift, axis=-2)))

    return Cache(
        prompt=jax.tree.map(prompt, cache.prompt, new.prompt),
        own=jax.tree.map(own, cache.own, new.own),
        places=put(cache.places, jnp.repeat(new.places, samples, axis=0)),
        first=put(cache.first, jnp.repeat(new.first, samples, axis=0)),
        count=put(cache.count, new.count),
        slot=cache.slot,
    )


def _stored(known: KeysValues, unused: int, apart: bool, small: bool) -> Stored:
    """Return keys and values of all layers as a cache holds them, with so many empty slots more."""

    def held(part: Float[Array, "*N B C Kh E"]) -> Numbers:
        room = jnp.pad(part.swapaxes(-3, -2), ((0, 0),) * (part.ndim - 2) + ((0, unused), (0, 0)))
        return jax.tree.map(_cut, _held(room, small))

    if not apart:
        return KeysValues(*map(held, known))
    return tuple(KeysValues(*map(held, layer)) for layer in zip(*map(jnp.unstack, known), strict=True))


def _held(part: Float[Array, "*N B Kh C E"], small: bool) -> Numbers:
    return shrink(part) if small else part


def _cut(part: Float[Array, "*N B Kh C E"]) -> Float[Array, "*N B Kh C E"]:
    return constrain(part, attending.CACHE[-part.ndim :])


def _slots(stored: Stored) -> int:
    return (stored if isinstance(stored, KeysValues) else stored[0]).keys.shape[-2]
