"""Sampling in pieces: the loop of `decode.loop`, halted after a few tokens, with settings of its own for every row.

A server needs what a trainer does not: to send tokens as they come, to end rows that nobody waits for any more, and to
serve rows of different temperatures from one program.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from pit_jax.core.errors import invalid
from pit_jax.core.types import Params, Prompts
from pit_jax.decode import passes
from pit_jax.decode.passes import Rows
from pit_jax.decode.sampling import keep_top_p, log_probability, pick, tempered


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program(passes.Program):
    """Everything that decides which programs are compiled; rows can have lower limits of their own than `max_new`."""

    draft_tokens: int = 0

    def __post_init__(self) -> None:
        """Check that a row can have a token and can end."""
        if self.max_new < 1:
            raise invalid("Program.max_new", self.max_new, "be at least 1", "Leave room for a response.")
        if not self.eos_ids:
            raise invalid("Program.eos_ids", self.eos_ids, "name at least one token", "Give the tokenizer's eos_ids.")
        if self.draft_tokens < 0:
            raise invalid("Program.draft_tokens", self.draft_tokens, "be at least 0", "Use 0 to guess no tokens.")


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

    def draw(
        self, logits: Float[Array, "B Q V"], number: Int[Array, "B Q"]
    ) -> tuple[Int[Array, "B Q"], Float[Array, "B Q"]]:
        """Draw as `sampling.draw` does, each row with its own temperature and top-p."""
        logits = logits.reshape(-1, logits.shape[2]).astype(jnp.float32)
        keys, temperature, top_p = (
            jnp.broadcast_to(part[:, None], number.shape).reshape(-1)
            for part in (self.keys, self.temperature, self.top_p)
        )
        scaled = tempered(logits, temperature[:, None])
        # Sorting a vocabulary costs more than all the rest, so it is done only where some row asks for it.
        nucleus = functools.partial(keep_top_p, p=top_p[:, None])
        kept = jax.lax.cond(jnp.all(self.top_p == 1.0), lambda scaled: scaled, nucleus, scaled)
        token = pick(logits, kept, keys, number.reshape(-1), temperature[:, None])
        return token.reshape(number.shape), log_probability(logits, token).reshape(number.shape)


@functools.partial(jax.jit, static_argnames="program")
def begin(params: Params, prompts: Prompts, draws: Draws, program: Program) -> Rows:
    """Read the prompts and draw the first token of every row.

    Row b is, token for token, what `decode.loop.generate` samples with the same key, temperature, top-p and limit.
    """
    return passes.begin(params, prompts, draws, program)


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def advance(
    params: Params, state: Rows, draws: Draws, wanted: Bool[Array, " B"], until: Int[Array, ""], program: Program
) -> Rows:
    """Draw tokens until `until` of them are drawn of every row that is not over; `state` is used up.

    Args:
      params: the parameters.
      state: what `begin` or `advance` returned.
      draws: as given to `begin`.
      wanted: rows outside are given up here; they keep the tokens they have.
      until: number of tokens, counted from the beginning of the response; no recompilation. With drafts rows may have
        more.
      program: as given to `begin`.
    """
    ready = program.lm.ready(params)
    return jax.lax.while_loop(
        lambda rows: jnp.any(~rows.over & (rows.t < until)),
        lambda rows: passes.advance(ready, rows, draws, program),
        dataclasses.replace(state, over=state.over | ~wanted),
    )
