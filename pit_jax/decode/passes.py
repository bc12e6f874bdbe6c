"""Rows under way: what sampling knows of each between two passes of the model, and what one pass adds.

A pass reads the newest token of every row and, after it, tokens that are only guessed (`decode.drafts`). The logits
after each of them give the token that the row draws there, with the key of that row and that place; as long as guesses
turn out to be those tokens, the logits behind them are right too. So a pass gives each row the tokens that as many
passes without guesses give it: the same tokens, not only the same distribution.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from pit_jax.core.types import Params, Prompts, Samples
from pit_jax.decode import drafts
from pit_jax.decode.drafts import Source
from pit_jax.decode.sampling import draw
from pit_jax.models.api import ConditionalLM
from pit_jax.sharding.rules import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Everything that decides which program is compiled; hashable, static under jit.

    top_k, top_p, draws, draft_tokens: of `Sampling`. max_new: most tokens of a row, EOS included.
    """

    lm: ConditionalLM
    top_k: int
    top_p: float
    draws: str
    draft_tokens: int
    max_new: int
    eos_ids: tuple[int, ...]
    pad_id: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of which `t` tokens are drawn each; `token` is the newest.

    keys: of each row's sample. over: nothing more is drawn. finished: EOS came. passes: of the model, after the
    prompt's, in which the row was under way. source: of drafts, None where none are made.
    """

    cache: Any
    keys: Key[Array, " B"]
    t: Int[Array, " B"]
    token: Int[Array, " B"]
    over: Bool[Array, " B"]
    finished: Bool[Array, " B"]
    tokens: Int[Array, "B T"]
    logp: Float[Array, "B T"]
    passes: Int[Array, " B"]
    source: Source | None

    @property
    def samples(self) -> Samples:
        """What is drawn."""
        mask = jnp.arange(self.tokens.shape[1])[None, :] < self.t[:, None]
        passes = None if self.source is None else self.passes
        return Samples(tokens=self.tokens, mask=mask, logp=self.logp, finished=self.finished, passes=passes)


def begin(
    params: Params, prompts: Prompts, keys: Key[Array, " B"], temperature: Float[Array, ""], program: Program
) -> Rows:
    """Read the prompts, each once for its B / X rows, and draw the first token of every row."""
    samples, drafted = keys.shape[0] // prompts.tokens.shape[0], program.draft_tokens
    logits, cache = program.lm.prefill(params, prompts, program.max_new, samples, drafted)
    source = drafts.source(prompts, samples, program.eos_ids[0]) if drafted else None
    rows = dataclasses.replace(empty(cache, keys, source, program), over=jnp.zeros(keys.shape[0], bool))
    return cut(_append(rows, logits[:, None], jnp.zeros((keys.shape[0], 0), jnp.int32), temperature, program)[0])


def empty(cache: Any, keys: Key[Array, " B"], source: Source | None, program: Program) -> Rows:
    """Return rows that have no token and are over."""
    rows, shape = keys.shape[0], (keys.shape[0], program.max_new)
    none = jnp.zeros(rows, jnp.int32)
    return cut(
        Rows(
            cache=cache,
            keys=keys,
            t=none,
            token=none,
            over=jnp.ones(rows, bool),
            finished=jnp.zeros(rows, bool),
            tokens=jnp.full(shape, program.pad_id, jnp.int32),
            logp=jnp.zeros(shape, jnp.float32),
            passes=none,
            source=source,
        )
    )


def advance(ready: Params, rows: Rows, temperature: Float[Array, ""], program: Program) -> Rows:
    """Pass once through the model, with its `ready` parameters, and write down what each row draws."""
    lm = program.lm
    rows = dataclasses.replace(rows, passes=rows.passes + ~rows.over)
    if rows.source is None:
        logits, cache = lm.step(ready, rows.cache, rows.token)
        drafted = jnp.zeros((rows.token.shape[0], 0), jnp.int32)
        return _append(dataclasses.replace(rows, cache=cache), logits[:, None], drafted, temperature, program)[0]
    drafted, found = drafts.propose(rows.source, rows.tokens, rows.t, program.draft_tokens, program.pad_id)
    logits, cache = lm.extend(ready, rows.cache, jnp.concatenate([rows.token[:, None], drafted], axis=1))
    rows, written = _append(rows, logits, drafted, temperature, program)
    return dataclasses.replace(
        rows, cache=lm.keep(cache, written), source=dataclasses.replace(rows.source, place=found + written)
    )


def _append(
    rows: Rows,
    logits: Float[Array, "B Q V"],
    drafted: Int[Array, "B K"],
    temperature: Float[Array, ""],
    program: Program,
) -> tuple[Rows, Int[Array, " B"]]:
    """Draw the next token, and those behind it as far as the drafts before them are what is drawn; write them down.

    Args:
      rows: the rows.
      logits: of the next Q = K + 1 tokens, if the drafts before them are right.
      drafted: what the first K of them were taken to be.
      temperature: of `Sampling`.
      program: the settings.

    Returns:
      The rows, and how many tokens each has been given; 0 where it was over.
    """
    (count, places, _), filters = logits.shape, (program.top_k, program.top_p, program.draws)
    number = rows.t[:, None] + jnp.arange(places, dtype=jnp.int32)[None, :]
    keys = jnp.broadcast_to(rows.keys[:, None], number.shape).reshape(-1)
    flat = draw(logits.reshape(count * places, -1), keys, number.reshape(-1), temperature, *filters)
    drawn, logp = (part.reshape(number.shape) for part in flat)
    ends = jnp.isin(drawn, jnp.asarray(program.eos_ids, jnp.int32))
    # A token behind a wrong guess is of another text, and one behind an EOS of none.
    right = jnp.cumprod((drawn[:, :-1] == drafted) & ~ends[:, :-1], axis=1, dtype=jnp.int32) > 0
    taken = jnp.pad(right, ((0, 0), (1, 0)), constant_values=True) & ~rows.over[:, None] & (number < program.max_new)
    tokens, kept, token = rows.tokens, rows.logp, jnp.full_like(rows.token, program.pad_id)
    columns = jnp.arange(program.max_new, dtype=jnp.int32)[None, :]
    for place in range(places):
        here = taken[:, place, None] & (columns == number[:, place, None])
        tokens, kept = (jnp.where(here, new[:, place, None], old) for old, new in ((tokens, drawn), (kept, logp)))
        token = jnp.where(taken[:, place], drawn[:, place], token)
    written = jnp.sum(taken, axis=1, dtype=jnp.int32)
    finished = rows.finished | jnp.any(taken & ends, axis=1)
    t = rows.t + written
    over = rows.over | finished | (t >= program.max_new)
    rows = dataclasses.replace(rows, t=t, token=token, over=over, finished=finished, tokens=tokens, logp=kept)
    return rows, written


def cut(rows: Rows) -> Rows:
    """Cut the rows over the mesh; the cache cuts itself."""
    parts = {
        field.name: constrain(value, ("batch", None)[: value.ndim])
        for field in dataclasses.fields(rows)
        if field.name not in ("cache", "keys", "source")
        for value in [vars(rows)[field.name]]
    }
    return dataclasses.replace(rows, **parts)
