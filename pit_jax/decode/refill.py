"""Continuous batching: rows that have ended leave the batch, and prompts that wait take their places.

A batch of `decode.loop` goes on until its longest row ends. Here the loop halts as soon as a portion of the rows has
ended; the next prompts are read in a batch of that size, and their keys and values put in the place of the others'.
(Yu et al., Orca, OSDI 2022.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from pit_jax.core.types import Params, Prompts, Samples
from pit_jax.decode import drafts, passes
from pit_jax.decode.passes import Alike, Rows, SampledProgram
from pit_jax.sharding.place import fetch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program(SampledProgram):
    """Everything that decides which programs are compiled. rows: of the batch."""

    rows: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """The rows between two portions, with the keys of their samples; those that are over are replaced by others."""

    rows: Rows
    keys: Key[Array, " B"]


def sample(
    params: Params,
    prompts: Prompts,
    keys: Key[Array, " N"],
    temperature: float,
    program: Program,
    portion: int,
    place: Callable[[Any], Any],
) -> Samples:
    """Return a sample for each of N keys, as NumPy arrays: those of `decode.loop.generate`, in the order of the keys.

    Args:
      params: the parameters.
      prompts: X of them, each with N / X successive keys; X is a multiple of `portion`, or at least as large.
      keys: one for each sample.
      temperature: of `Sampling`.
      program: the shapes and settings.
      portion: prompts that are read at a time.
      place: puts a batch onto the devices.
    """
    samples, heat = len(keys) // len(prompts.tokens), jnp.float32(temperature)
    keys, size = keys.reshape(-1, samples), portion * samples
    ready, slots = _ready(params, program), _empty(params, jax.tree.map(lambda leaf: leaf[:1], prompts), keys, program)
    found = _Found(len(keys) * samples, program)
    owner = np.full(program.rows, -1)
    waiting = 0
    while True:
        over = fetch(slots.rows.over)
        found.take(slots.rows, owner, over)
        owner[over] = -1
        free = np.flatnonzero(over)
        while waiting < len(keys) and len(free) >= size:
            index = np.arange(waiting, waiting + portion)
            real = index < len(keys)
            # A filler's rows are none: what is put there is dropped.
            rows = np.where(np.repeat(real, samples), free[:size], program.rows).astype(np.int32)
            owner[rows[rows < program.rows]] = np.arange(waiting * samples, min(waiting + portion, len(keys)) * samples)
            index = np.where(real, index, waiting)
            batch = place((jax.tree.map(lambda leaf, index=index: leaf[index], prompts), keys[index].reshape(-1)))
            slots = _admit(params, slots, *batch, jnp.asarray(rows), heat, program)
            free, waiting = free[size:], waiting + portion
        if not np.any(owner >= 0):
            return found.samples
        enough = size if waiting < len(keys) else program.rows
        slots = _advance(ready, slots, heat, jnp.int32(enough), program)


def calls(
    params: Params, prompts: Prompts, keys: Key[Array, " R"], temperature: float, program: Program
) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Return what `sample` compiles, as jitted functions with their arguments: shapes in the place of arrays will do.

    "prompts" reads a portion and puts it into the batch; "tokens" goes on until rows are over, and makes the parameters
    ready, which `sample` does once. The batch is given without places: the functions cut it as they always do.

    Args:
      params: the parameters.
      prompts: of one portion.
      keys: one for each of their samples.
      temperature: of `Sampling`.
      program: the shapes and settings.
    """
    samples, heat = keys.shape[0] // prompts.tokens.shape[0], jnp.float32(temperature)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), prompts)
    streams = jax.ShapeDtypeStruct((1, samples), keys.dtype)
    slots = jax.eval_shape(functools.partial(_empty, program=program), params, one, streams)
    rows = jax.ShapeDtypeStruct(keys.shape, jnp.int32)

    def tokens(params: Params, slots: Slots, heat: Array, enough: Array) -> Slots:
        return _advance(program.lm.ready(params), slots, heat, enough, program)

    return {
        "prompts": (_admit, (params, slots, prompts, keys, rows, heat, program)),
        "tokens": (jax.jit(tokens, donate_argnums=1), (params, slots, heat, jnp.int32(program.rows))),
    }


class _Found:
    """The samples that are there."""

    def __init__(self, count: int, program: Program) -> None:
        shape = (count, program.max_new)
        self.samples = Samples(
            tokens=np.full(shape, program.pad_id, np.int32),  # pyright: ignore[reportArgumentType]
            mask=np.zeros(shape, bool),  # pyright: ignore[reportArgumentType]
            logp=np.zeros(shape, np.float32),  # pyright: ignore[reportArgumentType]
            finished=np.zeros(count, bool),  # pyright: ignore[reportArgumentType]
            passes=np.zeros(count, np.int32) if program.draft_tokens else None,  # pyright: ignore[reportArgumentType]
        )

    def take(self, under_way: Rows, owner: Int[np.ndarray, " B"], over: Bool[np.ndarray, " B"]) -> None:
        """Write down the rows that are over, for the samples that they were."""
        rows = np.flatnonzero(over & (owner >= 0))
        if not len(rows):
            return
        tokens, logp, lengths, finished = fetch((under_way.tokens, under_way.logp, under_way.t, under_way.finished))
        at, there = owner[rows], self.samples
        there.tokens[at], there.logp[at], there.finished[at] = tokens[rows], logp[rows], finished[rows]
        there.mask[at] = np.arange(tokens.shape[1])[None, :] < lengths[rows, None]
        if there.passes is not None:
            there.passes[at] = fetch(under_way.passes)[rows]


@functools.partial(jax.jit, static_argnames="program")
def _ready(params: Params, program: Program) -> Params:
    return program.lm.ready(params)


@functools.partial(jax.jit, static_argnames="program")
def _empty(params: Params, one: Prompts, keys: Key[Array, "X G"], program: Program) -> Slots:
    """Return rows of which none is anyone's; what their caches hold is of no importance."""
    prompts = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (program.rows, *leaf.shape[1:])), one)
    cache = jax.eval_shape(lambda: program.lm.prefill(params, prompts, program.max_new, 1, program.draft_tokens)[1])
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cache)
    source = drafts.source(prompts, 1, program.eos_ids[0]) if program.draft_tokens else None
    rows = passes.empty(cache, program.rows, source, program)
    return Slots(rows=rows, keys=jnp.broadcast_to(keys[0, 0], (program.rows,)))


@functools.partial(jax.jit, static_argnames="program", donate_argnames="slots")
def _admit(
    params: Params,
    slots: Slots,
    prompts: Prompts,
    keys: Key[Array, " R"],
    places: Int[Array, " R"],
    temperature: Float[Array, ""],
    program: Program,
) -> Slots:
    """Read prompts, draw the first token of each of their samples, and put these in the given places."""
    new, old = passes.begin(params, prompts, Alike(keys, temperature, program), program), slots.rows

    def put(old: Array, value: Array) -> Array:
        return old.at[places].set(value, mode="drop")

    cache = program.lm.admit(old.cache, new.cache, places)
    others = (dataclasses.replace(rows, cache=None) for rows in (old, new))
    rows = passes.cut(dataclasses.replace(jax.tree.map(put, *others), cache=cache))
    return Slots(rows=rows, keys=put(slots.keys, keys))


@functools.partial(jax.jit, static_argnames="program", donate_argnames="slots")
def _advance(
    ready: Params, slots: Slots, temperature: Float[Array, ""], enough: Int[Array, ""], program: Program
) -> Slots:
    """Draw tokens until `enough` rows are over."""
    draws = Alike(slots.keys, temperature, program)
    rows = jax.lax.while_loop(
        lambda rows: jnp.sum(rows.over) < enough,
        lambda rows: passes.advance(ready, rows, draws, program),
        slots.rows,
    )
    return Slots(rows=rows, keys=slots.keys)
