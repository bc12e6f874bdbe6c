"""Rows under way: what sampling knows of each between two passes of the model, and what one pass adds.

A pass reads the newest token of every row and, after it, tokens that are only guessed (`decode.drafts`). The logits
after each of them give the token that the row draws there, with the key of that row and that place; as long as guesses
turn out to be those tokens, the logits behind them are right too. So a pass gives each row the tokens that as many
passes without guesses give it: the same tokens, not only the same distribution.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from pit_jax.core.types import Params, Prompts, Samples
from pit_jax.decode import drafts
from pit_jax.decode.drafts import Source
from pit_jax.decode.sampling import Sampling, draw
from pit_jax.models.api import ConditionalLM
from pit_jax.sharding.rules import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What decides which program is compiled, but for how tokens are drawn; hashable, static under jit.

    draft_tokens: of `Sampling`. max_new: most tokens of a row, EOS included.
    """

    lm: ConditionalLM
    draft_tokens: int
    max_new: int
    eos_ids: tuple[int, ...]
    pad_id: int


class Draws(Protocol):
    """How tokens are drawn."""

    @property
    def limit(self) -> Int[Array, " B"]:
        """Most tokens of each row, EOS included."""
        ...

    def draw(
        self, logits: Float[Array, "B Q V"], number: Int[Array, "B Q"]
    ) -> tuple[Int[Array, "B Q"], Float[Array, "B Q"]]:
        """Return each row's tokens of the given numbers, and their untempered, unfiltered log-probabilities."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledProgram(Program):
    """The same for rows that are drawn alike. top_k, top_p, draws: of `Sampling`."""

    top_k: int
    top_p: float
    draws: str

    @classmethod
    def of(cls, sampling: Sampling, **fields: Any) -> Self:
        """Return the program of a sampling; its temperature is an argument, so that no change of it recompiles."""
        taken = {name: value for name, value in vars(sampling).items() if name != "temperature"}
        return cls(**taken, **fields)


class Alike(NamedTuple):
    """Draws of rows that only their keys tell apart."""

    keys: Key[Array, " B"]
    temperature: Float[Array, ""]
    program: SampledProgram

    @property
    def limit(self) -> Int[Array, " B"]:
        """Most tokens of each row."""
        return jnp.full(self.keys.shape, self.program.max_new, jnp.int32)

    def draw(
        self, logits: Float[Array, "B Q V"], number: Int[Array, "B Q"]
    ) -> tuple[Int[Array, "B Q"], Float[Array, "B Q"]]:
        """Return tokens drawn by `sampling.draw`, and their log-probabilities."""
        program, keys = self.program, jnp.broadcast_to(self.keys[:, None], number.shape)
        drawn = draw(
            logits.reshape(-1, logits.shape[2]), keys.reshape(-1), number.reshape(-1), self.temperature,
            program.top_k, program.top_p, program.draws,
        )  # fmt: skip
        return drawn[0].reshape(number.shape), drawn[1].reshape(number.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of which `t` tokens are drawn each; `token` is the newest.

    over: nothing more is drawn: EOS came, the limit is reached, or the row was given up. finished: EOS came.
    passes: of the model, after the prompt's, in which the row was under way. source: of drafts, None without any.
    """

    cache: Any
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


def begin(params: Params, prompts: Prompts, draws: Draws, program: Program) -> Rows:
    """Read X prompts, each once for its B / X rows, and draw the first token of every row."""
    count = draws.limit.shape[0]
    samples, drafted = count // prompts.tokens.shape[0], program.draft_tokens
    logits, cache = program.lm.prefill(params, prompts, program.max_new, samples, drafted)
    source = drafts.source(prompts, samples, program.eos_ids[0]) if drafted else None
    rows = dataclasses.replace(empty(cache, count, source, program), over=draws.limit < 1)
    return cut(_append(rows, logits[:, None], jnp.zeros((count, 0), jnp.int32), draws, program)[0])


def empty(cache: Any, count: int, source: Source | None, program: Program) -> Rows:
    """Return rows that have no token and are over."""
    none, shape = jnp.zeros(count, jnp.int32), (count, program.max_new)
    return cut(
        Rows(
            cache=cache,
            t=none,
            token=none,
            over=jnp.ones(count, bool),
            finished=jnp.zeros(count, bool),
            tokens=jnp.full(shape, program.pad_id, jnp.int32),
            logp=jnp.zeros(shape, jnp.float32),
            passes=none,
            source=source,
        )
    )


def advance(ready: Params, rows: Rows, draws: Draws, program: Program) -> Rows:
    """Pass once through the model, with its `ready` parameters, and write down what each row draws."""
    lm = program.lm
    rows = dataclasses.replace(rows, passes=rows.passes + ~rows.over)
    if rows.source is None:
        logits, cache = lm.step(ready, rows.cache, rows.token)
        drafted = jnp.zeros((rows.token.shape[0], 0), jnp.int32)
        return _append(dataclasses.replace(rows, cache=cache), logits[:, None], drafted, draws, program)[0]
    drafted, found = drafts.propose(rows.source, rows.tokens, rows.t, program.draft_tokens, program.pad_id)
    logits, cache = lm.extend(ready, rows.cache, jnp.concatenate([rows.token[:, None], drafted], axis=1))
    rows, written = _append(rows, logits, drafted, draws, program)
    return dataclasses.replace(
        rows, cache=lm.keep(cache, written), source=dataclasses.replace(rows.source, place=found + written)
    )


def _append(
    rows: Rows, logits: Float[Array, "B Q V"], drafted: Int[Array, "B K"], draws: Draws, program: Program
) -> tuple[Rows, Int[Array, " B"]]:
    """Draw the next token, and those behind it as far as the drafts before them are what is drawn; write them down.

    Args:
      rows: the rows.
      logits: of the next Q = K + 1 tokens, if the drafts before them are right.
      drafted: what the first K of them were taken to be.
      draws: how they are drawn.
      program: the settings.

    Returns:
      The rows, and how many tokens each has been given; 0 where it was over.
    """
    number = rows.t[:, None] + jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :]
    drawn, logp = draws.draw(logits, number)
    ends = jnp.isin(drawn, jnp.asarray(program.eos_ids, jnp.int32))
    # A token behind a wrong guess is of another text, and one behind an EOS of none.
    right = jnp.cumprod((drawn[:, :-1] == drafted) & ~ends[:, :-1], axis=1, dtype=jnp.int32) > 0
    taken = jnp.pad(right, ((0, 0), (1, 0)), constant_values=True) & ~rows.over[:, None]
    taken = taken & (number < draws.limit[:, None])
    tokens, kept, token = rows.tokens, rows.logp, jnp.full_like(rows.token, program.pad_id)
    columns = jnp.arange(program.max_new, dtype=jnp.int32)[None, :]
    for place in range(number.shape[1]):
        here = taken[:, place, None] & (columns == number[:, place, None])
        tokens, kept = (jnp.where(here, new[:, place, None], old) for old, new in ((tokens, drawn), (kept, logp)))
        token = jnp.where(taken[:, place], drawn[:, place], token)
    written = jnp.sum(taken, axis=1, dtype=jnp.int32)
    finished = rows.finished | jnp.any(taken & ends, axis=1)
    t = rows.t + written
    over = rows.over | finished | (t >= draws.limit)
    rows = dataclasses.replace(rows, t=t, token=token, over=over, finished=finished, tokens=tokens, logp=kept)
    return rows, written


def cut(rows: Rows) -> Rows:
    """Cut the rows over the mesh; the cache cuts itself."""
    parts = {
        field.name: constrain(value, ("batch", None)[: value.ndim])
        for field in dataclasses.fields(rows)
        if field.name not in ("cache", "source")
        for value in [vars(rows)[field.name]]
    }
    return dataclasses.replace(rows, **parts)
