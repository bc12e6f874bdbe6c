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
from pit_jax.decode.sampling import draw
from pit_jax.models.api import ConditionalLM
from pit_jax.sharding.place import fetch
from pit_jax.sharding.rules import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Everything that decides which programs are compiled; hashable, static under jit.

    rows: of the batch. top_k, top_p, draws: of `Sampling`. max_new: most tokens of a row, EOS included.
    """

    lm: ConditionalLM
    rows: int
    top_k: int
    top_p: float
    draws: str
    max_new: int
    eos_ids: tuple[int, ...]
    pad_id: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """The rows between two portions: `t` tokens are drawn of each; `token` is the newest.

    keys: of each row's sample. over: nothing more is drawn, and another prompt can take the place. finished: EOS came.
    """

    cache: Any
    keys: Key[Array, " B"]
    t: Int[Array, " B"]
    token: Int[Array, " B"]
    over: Bool[Array, " B"]
    finished: Bool[Array, " B"]
    tokens: Int[Array, "B T"]
    logp: Float[Array, "B T"]


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
        over = fetch(slots.over)
        found.take(slots, owner, over)
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


class _Found:
    """The samples that are there."""

    def __init__(self, count: int, program: Program) -> None:
        shape = (count, program.max_new)
        self.samples = Samples(
            tokens=np.full(shape, program.pad_id, np.int32),  # pyright: ignore[reportArgumentType]
            mask=np.zeros(shape, bool),  # pyright: ignore[reportArgumentType]
            logp=np.zeros(shape, np.float32),  # pyright: ignore[reportArgumentType]
            finished=np.zeros(count, bool),  # pyright: ignore[reportArgumentType]
        )

    def take(self, slots: Slots, owner: Int[np.ndarray, " B"], over: Bool[np.ndarray, " B"]) -> None:
        """Write down the rows that are over, for the samples that they were."""
        rows = np.flatnonzero(over & (owner >= 0))
        if not len(rows):
            return
        tokens, logp, lengths, finished = fetch((slots.tokens, slots.logp, slots.t, slots.finished))
        at, there = owner[rows], self.samples
        there.tokens[at], there.logp[at], there.finished[at] = tokens[rows], logp[rows], finished[rows]
        there.mask[at] = np.arange(tokens.shape[1])[None, :] < lengths[rows, None]


@functools.partial(jax.jit, static_argnames="program")
def _ready(params: Params, program: Program) -> Params:
    return program.lm.ready(params)


@functools.partial(jax.jit, static_argnames="program")
def _empty(params: Params, one: Prompts, keys: Key[Array, "X G"], program: Program) -> Slots:
    """Return rows of which none is anyone's; what their caches hold is of no importance."""
    rows, shape = program.rows, (program.rows, program.max_new)
    prompts = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows, *leaf.shape[1:])), one)
    cache = jax.eval_shape(lambda: program.lm.prefill(params, prompts, program.max_new)[1])
    none = jnp.zeros(rows, jnp.int32)
    return _cut(
        Slots(
            cache=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cache),
            keys=jnp.broadcast_to(keys[0, 0], (rows,)),
            t=none,
            token=none,
            over=jnp.ones(rows, bool),
            finished=jnp.zeros(rows, bool),
            tokens=jnp.full(shape, program.pad_id, jnp.int32),
            logp=jnp.zeros(shape, jnp.float32),
        )
    )


@functools.partial(jax.jit, static_argnames="program", donate_argnames="slots")
def _admit(
    params: Params,
    slots: Slots,
    prompts: Prompts,
    keys: Key[Array, " R"],
    rows: Int[Array, " R"],
    temperature: Float[Array, ""],
    program: Program,
) -> Slots:
    """Read prompts, put their samples into the given rows, and draw the first token of each."""
    samples = keys.shape[0] // prompts.tokens.shape[0]
    logits, new = program.lm.prefill(params, prompts, program.max_new, samples)
    token, logp = draw(logits, keys, 0, temperature, program.top_k, program.top_p, program.draws)
    ends = _is_eos(token, program)

    def put(old: Array, value: Any) -> Array:
        return old.at[rows].set(value, mode="drop")

    first = jnp.arange(program.max_new)[None, :] == 0
    return _cut(
        Slots(
            cache=program.lm.admit(slots.cache, new, rows),
            keys=put(slots.keys, keys),
            t=put(slots.t, 1),
            token=put(slots.token, token),
            over=put(slots.over, ends | (program.max_new == 1)),
            finished=put(slots.finished, ends),
            tokens=put(slots.tokens, jnp.where(first, token[:, None], program.pad_id)),
            logp=put(slots.logp, jnp.where(first, logp[:, None], 0.0)),
        )
    )


@functools.partial(jax.jit, static_argnames="program", donate_argnames="slots")
def _advance(
    ready: Params, slots: Slots, temperature: Float[Array, ""], enough: Int[Array, ""], program: Program
) -> Slots:
    """Draw tokens until `enough` rows are over."""

    def one(slots: Slots) -> Slots:
        logits, cache = program.lm.step(ready, slots.cache, slots.token)
        drawn, logp = draw(logits, slots.keys, slots.t, temperature, program.top_k, program.top_p, program.draws)
        going = ~slots.over
        ends = going & _is_eos(drawn, program)
        here = going[:, None] & (jnp.arange(program.max_new)[None, :] == slots.t[:, None])
        t = slots.t + going.astype(jnp.int32)
        return Slots(
            cache=cache,
            keys=slots.keys,
            t=t,
            token=jnp.where(going, drawn, program.pad_id),
            over=slots.over | ends | (t >= program.max_new),
            finished=slots.finished | ends,
            tokens=jnp.where(here, drawn[:, None], slots.tokens),
            logp=jnp.where(here, logp[:, None], slots.logp),
        )

    return jax.lax.while_loop(lambda slots: jnp.sum(slots.over) < enough, one, slots)


def _is_eos(token: Int[Array, " B"], program: Program) -> Bool[Array, " B"]:
    return jnp.isin(token, jnp.asarray(program.eos_ids, jnp.int32))


def _cut(slots: Slots) -> Slots:
    """Cut the rows over the mesh; the cache cuts itself."""
    rows = {
        field.name: constrain(value, ("batch", None)[: value.ndim])
        for field in dataclasses.fields(slots)
        if field.name not in ("cache", "keys")
        for value in [vars(slots)[field.name]]
    }
    return dataclasses.replace(slots, **rows)
