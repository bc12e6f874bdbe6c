"""Sampling in pieces: the loop of `decode.loop`, halted after a few tokens, with settings of its own for every row.

A server needs what a trainer does not: to send tokens as they come, to end rows that nobody waits for any more, and to
serve rows of different temperatures from one program.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from pit_jax.core.errors import invalid
from pit_jax.core.types import Params, Prompts
from pit_jax.decode.sampling import keep_top_p, pick, tempered
from pit_jax.models.api import ConditionalLM


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Everything that decides which programs are compiled; hashable, static under jit.

    max_new: most tokens of a row, EOS included; rows can have lower limits of their own.
    """

    lm: ConditionalLM
    max_new: int
    eos_ids: tuple[int, ...]
    pad_id: int

    def __post_init__(self) -> None:
        """Check that a row can have a token and can end."""
        if self.max_new < 1:
            raise invalid("Program.max_new", self.max_new, "be at least 1", "Leave room for a response.")
        if not self.eos_ids:
            raise invalid("Program.eos_ids", self.eos_ids, "name at least one token", "Give the tokenizer's eos_ids.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
    """How each row is drawn.

    keys: row b uses `keys[b]` only. temperature: 0 is greedy. top_p: 1 switches it off.
    limit: most tokens, EOS included, at most `Program.max_new`; a row of limit 0 is filler, and never delays a batch.
    """

    keys: Key[Array, " B"]
    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    limit: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Halted:
    """The loop between two pieces: `t` tokens are drawn of every row that goes on; `token` is the newest.

    over: nothing more is drawn for the row: its EOS came, its limit is reached, or it was given up.
    finished: its EOS came. lengths: its tokens, EOS included; what follows them in `tokens` is padding.
    """

    t: Int[Array, ""]
    cache: Any
    token: Int[Array, " B"]
    over: Bool[Array, " B"]
    finished: Bool[Array, " B"]
    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]


@functools.partial(jax.jit, static_argnames="program")
def begin(params: Params, prompts: Prompts, draws: Draws, program: Program) -> Halted:
    """Read the prompts and draw the first token of every row.

    Row b is, token for token, what `decode.loop.generate` samples with the same key, temperature, top-p and limit.
    """
    rows = prompts.tokens.shape[0]
    logits, cache = program.lm.prefill(params, prompts, program.max_new)
    state = Halted(
        t=jnp.int32(0),
        cache=cache,
        token=jnp.zeros(rows, jnp.int32),
        over=draws.limit < 1,
        finished=jnp.zeros(rows, bool),
        tokens=jnp.full((rows, program.max_new), program.pad_id, jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
    )
    return _append(state, logits, draws, program)


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def advance(
    params: Params, state: Halted, draws: Draws, wanted: Bool[Array, " B"], until: Int[Array, ""], program: Program
) -> Halted:
    """Draw tokens until `until` of them are drawn or all rows are over; `state` is used up.

    Args:
      params: the parameters.
      state: what `begin` or `advance` returned.
      draws: as given to `begin`.
      wanted: rows outside are given up here; they keep the tokens they have.
      until: number of tokens, counted from the beginning of the response; no recompilation.
      program: as given to `begin`.
    """

    ready = program.lm.ready(params)

    def going(state: Halted) -> Bool[Array, ""]:
        return (state.t < until) & ~jnp.all(state.over)

    def one(state: Halted) -> Halted:
        logits, cache = program.lm.step(ready, state.cache, state.token)
        return _append(dataclasses.replace(state, cache=cache), logits, draws, program)

    return jax.lax.while_loop(going, one, dataclasses.replace(state, over=state.over | ~wanted))


def _append(state: Halted, logits: Float[Array, "B V"], draws: Draws, program: Program) -> Halted:
    """Draw token t of every row that is not over and write it down."""
    drawn = draw_rows(logits, draws, state.t)
    going = ~state.over
    token = jnp.where(going, drawn, program.pad_id)
    ends = going & jnp.isin(drawn, jnp.asarray(program.eos_ids, jnp.int32))
    return dataclasses.replace(
        state,
        t=state.t + 1,
        token=token,
        over=state.over | ends | (state.t + 1 >= draws.limit),
        finished=state.finished | ends,
        tokens=state.tokens.at[:, state.t].set(token),
        lengths=state.lengths + going.astype(jnp.int32),
    )


def draw_rows(logits: Float[Array, "B V"], draws: Draws, step: Int[Array, ""] | int) -> Int[Array, " B"]:
    """Draw one token for every row as `sampling.draw` does, each with its own temperature and top-p."""
    logits, temperature = logits.astype(jnp.float32), draws.temperature[:, None]
    scaled = tempered(logits, temperature)
    # Sorting a vocabulary costs more than all the rest, so it is done only where some row asks for it.
    nucleus = functools.partial(keep_top_p, p=draws.top_p[:, None])
    kept = jax.lax.cond(jnp.all(draws.top_p == 1.0), lambda scaled: scaled, nucleus, scaled)
    return pick(logits, kept, draws.keys, step, temperature)
