"""Writing y, f and r in one go: a beginning may be given, and the temperature changes where y ends.

`decode.loop` draws a whole response at one temperature. SRT's second stage samples y and then goes on greedily, and
asks for feedback on a response that is given. For an encoder-decoder the beginning belongs to the decoder, not to the
prompt, so given tokens go through the model one by one, for every family alike.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from pit_jax.core.errors import DataError, invalid
from pit_jax.core.types import Params, Prompts
from pit_jax.decode.batches import Response, chunks
from pit_jax.decode.sampling import pick
from pit_jax.models.api import ConditionalLM
from pit_jax.sharding.place import fetch, put_batch
from pit_jax.sharding.rules import constrain
from pit_jax.text.codec import PromptRow, rows_to_prompts


class Temperatures(NamedTuple):
    """Of sampling before the first marker, and after it; 0 is greedy. A change does not recompile."""

    response: float
    rest: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writer:
    """A language model with everything that fixes how it writes.

    width: prompts are padded to this many tokens. max_new: most tokens, given ones and EOS included.
    marker: tokens that end y: from them on the second temperature holds.
    stop: tokens that end a text as EOS does; () where nothing else does. They are part of what is returned.
    batch_size: rows of the one compiled program. mesh: the devices that share them, None for one device.
    """

    lm: ConditionalLM
    width: int
    max_new: int
    marker: tuple[int, ...]
    stop: tuple[int, ...]
    eos_ids: tuple[int, ...]
    pad_id: int
    batch_size: int
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        """Check that there is a marker, and room for it."""
        if self.batch_size < 1:
            raise invalid("Writer.batch_size", self.batch_size, "be at least 1", "Give the rows of one batch.")
        if not self.marker or self.max_new <= len(self.marker):
            rule = f"be more than the marker's {len(self.marker)} tokens, of which there must be some"
            raise invalid("Writer.max_new", self.max_new, rule, "Raise SrtText.targets.")

    def write(
        self,
        params: Params,
        rows: Sequence[PromptRow],
        given: Sequence[Sequence[int]],
        keys: Key[Array, " N"],
        temperatures: Temperatures,
    ) -> list[Response]:
        """Return one text for each prompt row, beginning with what is given for it; `finished` if EOS came.

        Row n uses `keys[n]` only: its text does not depend on its batch mates or on the size of the batch.

        Raises:
          DataError: what is given leaves no room for one token.
        """
        if not rows:
            return []
        beginnings, lengths = self._beginnings(given)
        prompts = rows_to_prompts(rows, self.width, self.pad_id)
        heat = jnp.asarray(temperatures, jnp.float32)
        found: list[Response] = []
        for index, real in chunks(len(rows), self.batch_size):
            batch = jax.tree.map(lambda leaf, index=index: leaf[index], (prompts, beginnings, lengths, keys))
            placed = batch if self.mesh is None else put_batch(batch, self.mesh, row_axis=0)
            part, given_ids, given_count, streams = placed
            tokens, count, finished = fetch(self.draw(params, part, given_ids, given_count, streams, heat))
            found += [
                Response(tuple(tokens[row, : count[row] - bool(finished[row])].tolist()), bool(finished[row]))
                for row in range(real)
            ]
        return found

    def draw(
        self,
        params: Params,
        prompts: Prompts,
        given: Int[Array, "B T"],
        count: Int[Array, " B"],
        keys: Key[Array, " B"],
        heat: Float[Array, "2"],
    ) -> tuple[Int[Array, "B T"], Int[Array, " B"], Bool[Array, " B"]]:
        """Return tokens, numbers of tokens (EOS included) and where EOS came, for one batch: the compiled program.

        Args:
          params: the model's parameters.
          prompts: one a row.
          given: beginnings, padded to `max_new`. count: how many tokens of each are given.
          keys: one a row.
          heat: the two temperatures.
        """
        program = _Program(
            lm=self.lm, max_new=self.max_new, marker=self.marker, stop=self.stop, eos_ids=self.eos_ids,
            pad_id=self.pad_id,
        )  # fmt: skip
        return _run(params, prompts, given, count, keys, heat, program)

    def _beginnings(self, given: Sequence[Sequence[int]]) -> tuple[Int[np.ndarray, "N T"], Int[np.ndarray, " N"]]:
        lengths = np.array([len(ids) for ids in given], np.int32)
        worst = int(lengths.argmax())
        if lengths[worst] >= self.max_new:
            raise DataError(
                f"The beginning given for text {worst} has {lengths[worst]} tokens and must have less than "
                f"{self.max_new}. Shorten it, or raise SrtText.targets."
            )
        tokens = np.full((len(given), self.max_new), self.pad_id, np.int32)
        for row, ids in zip(tokens, given, strict=True):
            row[: len(ids)] = ids
        return tokens, lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Program:
    """Everything that decides which program is compiled; hashable, static under jit."""

    lm: ConditionalLM
    max_new: int
    marker: tuple[int, ...]
    stop: tuple[int, ...]
    eos_ids: tuple[int, ...]
    pad_id: int

    @property
    def memory(self) -> int:
        """Number of last tokens that markers are looked for in."""
        return max(len(self.marker), len(self.stop))


class _State(NamedTuple):
    """The loop after tokens 0..t-1 of every row; `recent` are the last of them, -1 before the first.

    passed: y has ended. over: nothing more is drawn. finished: EOS came.
    """

    t: Int[Array, ""]
    cache: Any
    recent: Int[Array, "B M"]
    passed: Bool[Array, " B"]
    over: Bool[Array, " B"]
    finished: Bool[Array, " B"]
    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]


class _Rows(NamedTuple):
    """What differs from row to row and stays as it is; heat is [temperature of y, of the rest]."""

    given: Int[Array, "B T"]
    count: Int[Array, " B"]
    keys: Key[Array, " B"]
    heat: Float[Array, "2"]


@functools.partial(jax.jit, static_argnames="program")
def _run(
    params: Params,
    prompts: Prompts,
    given: Int[Array, "B T"],
    count: Int[Array, " B"],
    keys: Key[Array, " B"],
    heat: Float[Array, "2"],
    program: _Program,
) -> tuple[Int[Array, "B T"], Int[Array, " B"], Bool[Array, " B"]]:
    rows, fixed = prompts.tokens.shape[0], _Rows(given, count, keys, heat)
    no = constrain(jnp.zeros(rows, bool), ("batch",))
    empty = _State(
        t=jnp.int32(0),
        cache=None,
        recent=constrain(jnp.full((rows, program.memory), -1, jnp.int32), ("batch", None)),
        passed=no,
        over=no,
        finished=no,
        tokens=constrain(jnp.full((rows, program.max_new), program.pad_id, jnp.int32), ("batch", None)),
        lengths=constrain(jnp.zeros(rows, jnp.int32), ("batch",)),
    )
    logits, cache = program.lm.prefill(params, prompts, program.max_new)
    first = _append(empty._replace(cache=cache), logits, fixed, program)

    ready = program.lm.ready(params)

    def advance(state: _State) -> _State:
        logits, cache = program.lm.step(ready, state.cache, state.recent[:, -1])
        return _append(state._replace(cache=cache), logits, fixed, program)

    def going(state: _State) -> Bool[Array, ""]:
        return (state.t < program.max_new) & ~jnp.all(state.over)

    last = jax.lax.while_loop(going, advance, first)
    return last.tokens, last.lengths, last.finished


def _append(state: _State, logits: Float[Array, "B V"], rows: _Rows, program: _Program) -> _State:
    """Take or draw token t of every row that is not over, write it down, and look for markers and EOS."""
    logits = logits.astype(jnp.float32)
    drawn = pick(logits, logits, rows.keys, state.t, jnp.where(state.passed, rows.heat[1], rows.heat[0])[:, None])
    going, free = ~state.over, state.t >= rows.count
    token = jnp.where(going, jnp.where(free, drawn, rows.given[:, state.t]), program.pad_id)
    recent = jnp.concatenate([state.recent[:, 1:], token[:, None]], axis=1)
    ends = going & free & jnp.isin(token, jnp.asarray(program.eos_ids, jnp.int32))
    stops = going & free & _ends_with(recent, program.stop)
    return _State(
        t=state.t + 1,
        cache=state.cache,
        recent=recent,
        passed=state.passed | _ends_with(recent, program.marker),
        over=state.over | ends | stops,
        finished=state.finished | ends,
        tokens=state.tokens.at[:, state.t].set(token),
        lengths=state.lengths + going.astype(jnp.int32),
    )


def _ends_with(recent: Int[Array, "B M"], marker: tuple[int, ...]) -> Bool[Array, " B"]:
    """Return where the last tokens are a marker; nowhere if there is none."""
    if not marker:
        return jnp.zeros(recent.shape[0], bool)
    return jnp.all(recent[:, -len(marker) :] == jnp.asarray(marker, jnp.int32)[None, :], axis=1)
