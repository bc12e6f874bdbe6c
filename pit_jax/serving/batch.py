"""One batch on the devices: rows that are sampled together, piece by piece."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from pit_jax.core.rng import stream_id
from pit_jax.decode import chunks
from pit_jax.decode.batches import Response
from pit_jax.decode.chunks import Draws
from pit_jax.serving.loaded import Speaker
from pit_jax.serving.work import Draw, Sampling
from pit_jax.sharding.place import fetch, put_batch
from pit_jax.text.codec import rows_to_prompts

FIRST_PIECE, MOST_GROWTH = 4, 4


@jax.jit
def keys_of(names: Int[Array, "B 5"]) -> Key[Array, " B"]:
    """Return the key of every row from its (seed, stream, iteration, number, candidate).

    They are those of `improve.loop.sample_keys`, so a request gets the samples that `pit-jax improve` draws.
    """

    def one(name: Int[Array, "5"]) -> Key[Array, ""]:
        key = jax.random.key(name[0])
        for part in name[1:]:
            key = jax.random.fold_in(key, part)
        return key

    return jax.vmap(one)(names)


class Progress:
    """What became of a row in the last piece: all its ids so far, and the response if it is over."""

    def __init__(self, sampling: Sampling, ids: tuple[int, ...], over: bool, finished: bool) -> None:
        self.sampling, self.ids = sampling, ids
        self.response = Response(ids, finished) if over else None


class Batch:
    """Rows of one kind under way.

    Args:
      speaker: what samples.
      rows: what is to be sampled.
      width: the prompts' columns.
      size: the batch's rows; those above `rows` are filler.
      mesh: the devices that share the rows.
    """

    def __init__(self, speaker: Speaker, rows: Sequence[Sampling], width: int, size: int, mesh: Mesh) -> None:
        self._program, self._params = speaker.program, speaker.params
        self.rows = list(rows)
        prompts = rows_to_prompts([self._row(n).row for n in range(size)], width, self._program.pad_id)
        placed = put_batch((prompts, self._settings(size)), mesh, row_axis=0)
        self._mesh, self._draws = mesh, placed[1]
        self._state = chunks.begin(self._params, placed[0], self._draws, self._program)
        self._taken, self._piece = 1, FIRST_PIECE
        self._over, self._drawn = np.zeros(size, bool), 0

    def _row(self, number: int) -> Sampling:
        return self.rows[number if number < len(self.rows) else 0]

    def _settings(self, size: int) -> Draws:
        draws = [self._row(n).draw for n in range(size)]
        names = np.array([_name(draw) for draw in draws], np.uint32)
        limits = [min(draw.limit, self._program.max_new) * (n < len(self.rows)) for n, draw in enumerate(draws)]
        return Draws(
            keys=keys_of(names),
            temperature=np.array([draw.temperature for draw in draws], np.float32),  # pyright: ignore[reportArgumentType]
            top_p=np.array([draw.top_p for draw in draws], np.float32),  # pyright: ignore[reportArgumentType]
            limit=np.array(limits, np.int32),  # pyright: ignore[reportArgumentType]
        )

    @property
    def under_way(self) -> int:
        """Number of rows that go on."""
        return int((~self._over[: len(self.rows)]).sum())

    @property
    def over(self) -> bool:
        """Whether no row is under way any more."""
        return self.under_way == 0

    def advance(self, seconds: float) -> tuple[list[Progress], int]:
        """Sample for about `seconds`; return what became of the rows under way, and how many tokens were drawn."""
        started = time.monotonic()
        before = np.flatnonzero(~self._over[: len(self.rows)])
        wanted = np.array([n < len(self.rows) and not self.rows[n].dropped for n in range(len(self._over))])
        self._taken += self._piece
        until = jnp.asarray(min(self._taken, self._program.max_new), jnp.int32)
        given = put_batch(wanted, self._mesh, row_axis=0)
        self._state = chunks.advance(self._params, self._state, self._draws, given, until, self._program)
        tokens, lengths, over, finished = fetch(
            (self._state.tokens, self._state.t, self._state.over, self._state.finished)
        )
        self._over = over
        elapsed = max(time.monotonic() - started, 1e-6)
        self._piece = int(np.clip(self._piece * seconds / elapsed, 1, self._piece * MOST_GROWTH))
        found = []
        for n in before:
            length = int(lengths[n]) - int(finished[n])
            ids = tuple(tokens[n, :length].tolist())
            found.append(Progress(self.rows[n], ids, bool(over[n]), bool(finished[n])))
        drawn, self._drawn = int(lengths.sum()) - self._drawn, int(lengths.sum())
        return found, drawn


def _name(draw: Draw) -> tuple[int, int, int, int, int]:
    return draw.seed, stream_id(draw.stream), draw.iteration, draw.number, draw.candidate
