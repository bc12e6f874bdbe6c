"""Prompts that several responses share are computed once: as rows of their own, which the responses' rows continue.

Rows come in levels, the prompts first. Row r of B rows continues row r // (B / X) of the X rows of the level above: it
sees the keys of its ancestors and, causally, its own, and never its siblings. Nothing is wider than one prompt with
one response, so attention costs what the rows need, whatever its form: in one row `[prompt | response | response |
...]` all but a kernel that skips blocks would look at every sibling and hide it afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pit_jax.core.types import Conditional, Hidden
from pit_jax.models import layers
from pit_jax.models.attending import KeysValues
from pit_jax.ops.shared import joined, repeated
from pit_jax.ops.sight import Tokens


def levels(x: Conditional) -> tuple[layers.Row, ...]:
    """Return prompts, their rests if they have any, and responses as rows of their own; positions run on."""
    rows = [layers.prompt_row(x.prompt, x.prompt_segments, x.prompt_reference)]
    if x.rest is not None:
        rows.append(layers.prompt_row(x.rest.tokens, x.rest.segments, x.rest.reference))
    rows.append(layers.response_row(x.response, x.response_segments))
    lengths = jnp.zeros(x.prompt.shape[0], jnp.int32)
    for level, row in enumerate(rows):
        lengths = repeated(lengths, row.tokens.shape[0])
        rows[level] = row._replace(positions=row.positions + lengths[:, None])
        lengths = lengths + jnp.sum(row.segments > 0, axis=1, dtype=jnp.int32)
    return tuple(rows)


def hidden(states: Sequence[Float[Array, "B L D"]]) -> Hidden:
    """Return the states of levels as those of whole prompts, in the columns of `ops.shared.joined`, and responses."""
    *above, response = states
    rows = above[-1].shape[0]
    return Hidden(jnp.concatenate([repeated(part, rows) for part in above], axis=1), response)


def laid_out(found: Hidden, places: Int[Array, "Y S"] | None) -> Hidden:
    """Return the states of `ops.shared.whole` prompts in the columns of `joined`."""
    if places is None:
        return found
    return Hidden(layers.gather(found.prompt, repeated(places, found.prompt.shape[0])), found.response)


class Seen(NamedTuple):
    """What the queries of a level may look at: their ancestors' tokens, the eldest first, and their own."""

    tokens: Tokens
    above: int
    """Number of the ancestors' columns."""


def seen(rows: Sequence[layers.Row]) -> Seen:
    """Return what the last of some levels may look at."""
    own = rows[-1].tokens.shape
    known = [layers.tokens(row) for row in rows]
    joined = Tokens(
        *(jnp.concatenate([repeated(part, own[0]) for part in parts], axis=1) for parts in zip(*known, strict=True))
    )
    return Seen(joined, joined.segments.shape[1] - own[1])


def gathered(tokens: Tokens, rows: int) -> Tokens:
    """Return responses' tokens with all that share a prompt in one row, as queries of what the prompt's row holds."""
    if tokens.segments.shape[0] == rows:
        return tokens
    positions = jnp.broadcast_to(tokens.positions, tokens.segments.shape)
    return Tokens(tokens.segments.reshape(rows, -1), positions.reshape(rows, -1))


def lineage(known: Sequence[KeysValues]) -> KeysValues:
    """Return the keys and values of ancestors and own tokens, as `seen` has them."""
    rows = known[-1].keys.shape[0]
    parts = zip(*known, strict=True)
    return KeysValues(*(jnp.concatenate([repeated(part, rows) for part in each], axis=1) for each in parts))


def predictors(x: Conditional, found: Hidden) -> Float[Array, "B T D"]:
    """Return the states that the response tokens are predicted from: the last of the prompt, then their own but one.

    A first token without any prompt is predicted from 0.
    """
    there = joined(x).prompt_segments > 0
    last = jnp.max(jnp.where(there, jnp.arange(there.shape[1])[None, :], -1), axis=1, keepdims=True)
    first = repeated(layers.gather(found.prompt, last), found.response.shape[0])
    return jnp.concatenate([first, found.response[:, :-1]], axis=1)


def level_key(key: jax.Array | None, level: int) -> jax.Array | None:
    """Return the dropout key of a level in one layer; the first has the layer's own."""
    return key if key is None or level == 0 else jax.random.fold_in(key, level)
