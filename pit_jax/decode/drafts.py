"""Drafted tokens: what a row will probably say next, so that one pass of the model can check several tokens.

An improver repeats long parts of the reference y_ref in its prompt, so what follows there after the row's newest
tokens is a good guess, which costs no model (prompt lookup; Yang et al., Inference with Reference, arXiv 2304.04487).
It is kept as far as it is what would have been drawn anyway (`decode.passes`), so guesses decide how many passes a
sample takes and nothing else (Leviathan et al., arXiv 2211.17192, with drafts that are certain of themselves).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pit_jax.core.types import Prompts
from pit_jax.sharding.rules import constrain

MATCHED, NEAR = 3, 8
"""A place behind so many of a row's newest tokens is taken wherever it is; each of fewer makes up for `NEAR` columns.

Words repeat: of the places behind one word that is alike most are in other sentences.
"""
_NOTHING, _NO_TOKEN = -1, -2
"""What stands where a source has no token, and what a row has before its first one: they are never alike."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where each row's drafts come from: its prompt, then its own tokens.

    prompt: tokens of the prompt, and behind the reference, where an answer that repeats it ends, an end-of-sequence.
    place: column at which the row will go on if it goes on as before: in the reference, one column a token.
    """

    prompt: Int[Array, "B S+1"]
    place: Int[Array, " B"]


def source(prompts: Prompts, samples: int, eos_id: int) -> Source:
    """Return the source of `samples` rows a prompt, which are expected to begin as the reference does.

    Where a prompt marks no reference they are expected to begin as the prompt, which hurts nobody.
    """
    columns = jnp.arange(prompts.tokens.shape[1] + 1, dtype=jnp.int32)[None, :]
    reference = jnp.pad(prompts.reference & prompts.mask, ((0, 0), (0, 1)))
    end = jnp.max(jnp.where(reference, columns + 1, _NOTHING), axis=1, keepdims=True)
    text = jnp.pad(jnp.where(prompts.mask, prompts.tokens, _NOTHING), ((0, 0), (0, 1)), constant_values=_NOTHING)
    text = jnp.where(columns == end, eos_id, text)
    begin = jnp.min(jnp.where(reference, columns, columns.shape[1]), axis=1)
    begin = jnp.where(end[:, 0] >= 0, begin, 0)
    return Source(
        prompt=constrain(jnp.repeat(text, samples, axis=0), ("batch", None)),
        place=constrain(jnp.repeat(begin, samples, axis=0), ("batch",)),
    )


def propose(
    source: Source, tokens: Int[Array, "B T"], count: Int[Array, " B"], drafted: int, pad_id: int
) -> tuple[Int[Array, "B K"], Int[Array, " B"]]:
    """Return the K tokens that will probably follow, and the column where they were found.

    That is a column behind tokens like the row's newest, near to where the row is expected to go on. So a row that
    changes a word goes on behind it, and one that leaves words out or puts words in is found again a token later.

    Args:
      source: where to look; it expects the next token at `place`.
      tokens: what each row has said.
      count: how many tokens that are.
      drafted: K.
      pad_id: what is proposed where nothing is known.
    """
    text = jnp.concatenate([source.prompt, tokens], axis=1)
    length, own = text.shape[1], source.prompt.shape[1]
    columns = jnp.arange(length, dtype=jnp.int32)[None, :]
    known = jnp.where(columns < own, text != _NOTHING, columns - own < count[:, None])
    before = jnp.pad(text, ((0, 0), (MATCHED, 0)), constant_values=_NOTHING)
    alike, same = jnp.zeros_like(text), jnp.ones_like(known)
    for back in range(1, MATCHED + 1):
        newest = _at(tokens, (count - back)[:, None], _NO_TOKEN)
        same = same & (before[:, MATCHED - back : MATCHED - back + length] == newest)
        alike = alike + same
    score = jnp.where(alike == MATCHED, 2 * length, NEAR * alike) - jnp.abs(columns - source.place[:, None])
    score = jnp.where(known, score, jnp.iinfo(jnp.int32).min)
    best = jnp.max(score, axis=1, keepdims=True)
    found = jnp.min(jnp.where(score == best, columns, length), axis=1)
    ahead = found[:, None] + jnp.arange(drafted, dtype=jnp.int32)[None, :]
    return jnp.where(_at(known, ahead, False), _at(text, ahead, pad_id), pad_id), found


def _at(x: Array, index: Int[Array, "B K"], otherwise: int) -> Array:
    """Return each row's entries at the given columns, and `otherwise` where there is no such column."""
    inside = (index >= 0) & (index < x.shape[1])
    found = jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[1] - 1), axis=1)
    return jnp.where(inside, found, otherwise)
