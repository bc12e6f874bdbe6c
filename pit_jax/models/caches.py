"""What a decoder remembers while it decodes: keys and values of the prompts, and of its rows' own tokens.

The two lie apart, because the samples of one prompt share its keys and values: they are computed, kept and read once.

A row's own tokens stand in a ring of slots. All rows write the same slot at a time, so that one slice is written in
place, and how many of the slots before it are a row's own is a number a row: rows can begin at different times. Where
several tokens are tried at once (`decode.drafts`), of which each row keeps as many as it likes, every row has a slot of
its own to go on from.
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
from pit_jax.ops.cached import Numbers, Small, Turned, shrink
from pit_jax.sharding.rules import constrain

NEVER = 2**30
"""Position of a slot that no query reaches."""

Stored = KeysValues | tuple[KeysValues, ...]
"""Keys and values of all layers: `[N, B, Kh, C, E]`, or one `[B, Kh, C, E]` a layer where layers are unrolled.

A layer's keys must be an array of their own there: a slice of a larger one would be copied for every product.
"""
StoredPrompts = Turned | tuple[Turned, ...]
"""The same of prompts, with the keys turned: `[N, X, Kh, E, S]`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """X prompts and B rows of tokens, of which row b answers prompt b // (B / X).

    prompt: keys and values of S slots. own: of a ring of T slots. places: position of each of a prompt's slots, `NEVER`
    at padding. first: position of the first token of a prompt's rows. count: tokens of each row. slot: the next slot
    to be written, of all rows or, where they do not keep step, of each.
    """

    prompt: StoredPrompts
    own: Stored
    places: Int[Array, "X S"]
    first: Int[Array, " X"]
    count: Int[Array, " B"]
    slot: Int[Array, "*B"]

    def here(self, new: int) -> Int[Array, "B Q"]:
        """Return the positions of each row's `new` next tokens."""
        return (self._per_row(self.first) + self.count)[:, None] + jnp.arange(new, dtype=jnp.int32)[None, :]

    def ahead(self, new: int) -> Int[Array, "#B T"]:
        """Return how far each slot is ahead of the next token's, once `new` tokens are written: 0 is that token's."""
        slots = _slots(self.own)
        steps = jnp.arange(slots, dtype=jnp.int32)[None, :] - jnp.atleast_1d(self.slot)[:, None]
        return (steps - new) % slots - (slots - new)

    def known(self, new: int) -> Bool[Array, "B T"]:
        """Return which slots hold tokens of the row, the new ones included; others are empty, or a former row's."""
        return -self.ahead(new) <= self.count[:, None]

    @property
    def prompt_places(self) -> Int[Array, "B S"]:
        """Positions of the slots of each row's prompt."""
        return self._per_row(self.places)

    def own_places(self, new: int) -> Int[Array, "B T"]:
        """Return the positions of each row's own slots, the new tokens' included."""
        return jnp.where(self.known(new), self.here(1) + self.ahead(new), NEVER)

    def layers(self, windowed: np.ndarray) -> list[tuple] | tuple:
        """Return what each layer needs: its number, whether it has the window, and its part of the prompts."""
        index = np.arange(len(windowed), dtype=np.int32)
        if isinstance(self.prompt, Turned):
            return index, windowed, self.prompt
        return list(zip(index, windowed, self.prompt, strict=True))

    def keep(self, kept: Int[Array, " B"] | int) -> Cache:
        """Return the cache that goes on after so many of the tokens which `remember` has written last.

        Where all rows write the same slot they keep as many.
        """
        slots = _slots(self.own)
        # A row that goes on for longer than the ring, because nobody has replaced it, forgets its first tokens.
        count = jnp.minimum(self.count + kept, slots - 1)
        return dataclasses.replace(self, count=count, slot=(self.slot + kept) % slots)

    def _per_row(self, x: Int[Array, "X ..."]) -> Int[Array, "B ..."]:
        return jnp.repeat(x, self.count.shape[0] // x.shape[0], axis=0)


def begin(
    known: KeysValues,
    places: Int[Array, "X S"],
    first: Int[Array, " X"],
    *,
    samples: int,
    slots: int,
    tried: int,
    config: ModelConfig,
) -> Cache:
    """Return a cache of prompts, each with `samples` rows that have no token yet.

    Args:
      known: keys and values of the prompts, `[N, X, S, Kh, E]`.
      places: position of each of their slots.
      first: position of the first token after each.
      samples: rows a prompt.
      slots: tokens a row.
      tried: tokens that rows try beyond those they keep; with any, each has a slot of its own to go on from.
      config: whether a layer's keys and values are arrays of their own, and integers.
    """
    prompts, unused = places.shape[0], attending.slots(places.shape[1]) - places.shape[1]
    number, _, _, heads, width = known.keys.shape
    shape = (prompts * samples, heads, attending.slots(slots + tried), width)
    apart, small = not config.scan_layers, config.cache_dtype == "int8"
    empty = jax.tree.map(_cut, _held(jnp.zeros(shape if apart else (number, *shape), known.keys.dtype), small))
    own = KeysValues(empty, empty)
    return Cache(
        prompt=_prompts(known, unused, apart, small),
        own=(own,) * number if apart else own,
        places=jnp.pad(places, ((0, 0), (0, unused)), constant_values=NEVER),
        first=first,
        count=jnp.zeros(prompts * samples, jnp.int32),
        slot=jnp.zeros((prompts * samples,) if tried else (), jnp.int32),
    )


def remember(own: Stored, new: KeysValues, layer: Int[Array, ""], slot: Int[Array, "*B"]) -> tuple[Stored, KeysValues]:
    """Return the rows' own keys and values with the next slots of one layer written, and that layer's part.

    They are written in place in a loop that carries them.

    Args:
      own: what is known of all layers.
      new: keys and values of Q tokens a row, `[B, Q, Kh, E]`; Q is 1 where all rows write the same slot.
      layer: number of the layer; a concrete one where layers are apart.
      slot: the first slot, of all rows or of each.
    """
    stacked = isinstance(own, KeysValues)
    parts = own if isinstance(own, KeysValues) else own[layer]
    token = KeysValues(*(_held(part.swapaxes(1, 2), isinstance(parts.keys, Small)) for part in new))

    def write(old: Array, one: Array) -> Array:
        if slot.ndim:
            return _cut(_write_rows(old, one, layer if stacked else None, slot))
        at = (layer, 0, 0, slot, 0) if stacked else (0, 0, slot, 0)
        return _cut(jax.lax.dynamic_update_slice(old, one[None] if stacked else one, at))

    written = jax.tree.map(write, parts, token)
    if isinstance(own, KeysValues):
        return written, jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, layer, keepdims=False), written)
    return (*own[: int(layer)], written, *own[int(layer) + 1 :]), written


def _write_rows(
    old: Float[Array, "*N B Kh T E"],
    new: Float[Array, "B Kh Q E"],
    layer: Int[Array, ""] | None,
    slot: Int[Array, " B"],
) -> Float[Array, "*N B Kh T E"]:
    """Return keys or values with Q slots of each row written, from its own slot on.

    A scatter whose rows are a batch stays on each device, and in place; `vmap` would move the layers' axis for it.
    """
    stacked = layer is not None
    index = slot[:, None] if layer is None else jnp.stack([jnp.broadcast_to(layer, slot.shape), slot], axis=1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3),
        inserted_window_dims=(0,) if stacked else (),
        scatter_dims_to_operand_dims=(0, 3) if stacked else (2,),
        operand_batching_dims=(1,) if stacked else (0,),
        scatter_indices_batching_dims=(0,),
    )
    # Rows have room for all that they try (`begin`).
    mode = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return jax.lax.scatter(old, index, new, numbers, unique_indices=True, mode=mode)


def admit(cache: Cache, new: Cache, rows: Int[Array, " R"]) -> Cache:
    """Return the cache with the rows of another in the place of some of its own.

    Args:
      cache: of as many prompts as rows.
      new: of prompts of the same width, and of the same number of slots; it has R rows.
      rows: where each of them goes, a different number each; those beyond the last row are dropped.
    """
    samples, in_step = new.count.shape[0] // new.first.shape[0], cache.slot.ndim == 0

    def put(old: Array, value: Array) -> Array:
        axis = old.ndim - 4 if old.ndim >= 4 else 0
        return old.at[(slice(None),) * axis + (rows,)].set(value, mode="drop")

    def prompt(old: Array, value: Array) -> Array:
        return put(old, jnp.repeat(value, samples, axis=value.ndim - 4))

    def own(old: Array, value: Array) -> Array:
        # Where rows keep step, the newest token of every row stands one slot before the next.
        return _cut(put(old, jnp.roll(value, cache.slot - new.slot, axis=-2) if in_step else value))

    return Cache(
        prompt=_cut_prompts(jax.tree.map(prompt, cache.prompt, new.prompt)),
        own=jax.tree.map(own, cache.own, new.own),
        places=put(cache.places, jnp.repeat(new.places, samples, axis=0)),
        first=put(cache.first, jnp.repeat(new.first, samples, axis=0)),
        count=put(cache.count, new.count),
        slot=cache.slot if in_step else put(cache.slot, new.slot),
    )


def _prompts(known: KeysValues, unused: int, apart: bool, small: bool) -> StoredPrompts:
    """Return keys and values of prompts in all layers as a cache holds them, with so many empty slots more."""

    def held(keys: Float[Array, "*N X S Kh E"], values: Float[Array, "*N X S Kh E"]) -> Turned:
        keys, values = (
            jnp.pad(part.swapaxes(-3, -2), ((0, 0),) * (part.ndim - 2) + ((0, unused), (0, 0)))
            for part in (keys, values)
        )
        return Turned(_held(keys.swapaxes(-2, -1), small, axis=-2), _held(values, small))

    if not apart:
        return _cut_prompts(held(*known))
    return _cut_prompts(tuple(held(*layer) for layer in zip(*map(jnp.unstack, known), strict=True)))


def _cut_prompts(prompts: StoredPrompts) -> StoredPrompts:
    if not isinstance(prompts, Turned):
        return tuple(_cut_turned(one) for one in prompts)
    return _cut_turned(prompts)


def _cut_turned(prompts: Turned) -> Turned:
    keys = jax.tree.map(lambda part: constrain(part, attending.TURNED[-part.ndim :]), prompts.keys)
    return Turned(keys, jax.tree.map(_cut, prompts.values))


def _held(part: Float[Array, "*N B Kh C E"], small: bool, axis: int = -1) -> Numbers:
    return shrink(part, axis) if small else part


def _cut(part: Float[Array, "*N B Kh C E"]) -> Float[Array, "*N B Kh C E"]:
    return constrain(part, attending.CACHE[-part.ndim :])


def _slots(stored: Stored) -> int:
    return (stored if isinstance(stored, KeysValues) else stored[0]).keys.shape[-2]
