"""What requests ask of the engine: rows to be sampled, and responses to be scored."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from pit_jax.core.errors import PitError
from pit_jax.decode.batches import Response
from pit_jax.serving.loaded import Kind
from pit_jax.text.codec import PromptRow


class EngineError(PitError):
    """The engine could not compute a batch; other batches are not touched."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
    """How a row is sampled; its random numbers are those of `improve.loop.sample_keys`.

    stream: "answers" or "improve". number: of the answer in its request, as the number of the prompt there.
    limit: most tokens, EOS included.
    """

    seed: int
    stream: str
    iteration: int
    number: int
    candidate: int
    temperature: float
    top_p: float
    limit: int


Watch = Callable[[Sequence[int]], None]
"""Is told all ids of a row so far, its EOS left out; on the event loop."""


class Sampling:
    """A row that is to be sampled. Requests wait for `result`, and `drop` it when they no longer want it.

    `seen`: its ids so far.
    """

    def __init__(self, kind: Kind, row: PromptRow, draw: Draw, watch: Watch | None = None) -> None:
        self.kind: Kind = kind
        self.row, self.draw, self.watch = row, draw, watch
        self.result: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self.arrived = time.monotonic()
        self.seen: tuple[int, ...] = ()
        # Set by the event loop and read by the worker: one that reads it late samples a few tokens too many.
        self.dropped = False

    def drop(self) -> None:
        """Give the row up, if it is not over: the batch it is in goes on without it."""
        self.dropped = True
        self.result.cancel()


class Scoring:
    """Responses that are to be scored by the gap model, together."""

    def __init__(self, rows: Sequence[PromptRow], answers: Sequence[Response]) -> None:
        self.rows, self.answers = tuple(rows), tuple(answers)
        self.result: asyncio.Future[Float[np.ndarray, " N"]] = asyncio.get_running_loop().create_future()
        self.arrived = time.monotonic()
        self.dropped = False

    def drop(self) -> None:
        """Give the scores up, if they are not there."""
        self.dropped = True
        self.result.cancel()


Work = Sampling | Scoring
