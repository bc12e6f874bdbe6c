"""The one thread that owns the devices: it takes what waits, samples and scores it in batches, and hands it back."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from typing import Literal

from pit_jax.core.errors import PitError
from pit_jax.decode.batches import Response
from pit_jax.serving.batch import Batch, Progress
from pit_jax.serving.loaded import Kind, Models, bucket
from pit_jax.serving.metrics import Metrics
from pit_jax.serving.settings import Batching
from pit_jax.serving.work import Draw, EngineError, Sampling, Scoring, Work
from pit_jax.sharding import rules
from pit_jax.text.codec import PromptRow

_LOG = logging.getLogger(__name__)
Status = Literal["loading", "ready", "stopped"]
MOST_LINGER = 10
"""A batch waits at most so many times `Batching.linger`, however steadily others arrive."""
PEAK_HALVES = 1.0
"""Seconds in which the memory of how much was under way at once fades by half."""


class Engine:
    """Samples and scores for all requests.

    `submit` is for the event loop that `start` was called on; everything else runs on the engine's own thread.
    """

    def __init__(self, models: Models, batching: Batching, metrics: Metrics) -> None:
        self._models, self._batching, self._metrics = models, batching, metrics
        self._condition = threading.Condition()
        self._waiting: list[Work] = []
        self._running: list[Batch] = []
        self._stopping = False
        self._last_arrival, self._peak, self._peak_seen = 0.0, 0.0, time.monotonic()
        self.status: Status = "loading"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._nobody: Sampling | None = None

    def start(self, *, warm_up: bool) -> None:
        """Start the thread; results go to the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._nobody = _nobody(self._models)
        self._thread = threading.Thread(target=self._work, args=(warm_up,), name="engine", daemon=True)
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Give up everything that waits or is under way; wait for the thread, which a compiler may keep for long.

        Args:
          seconds: how long to wait at most; the thread does not keep the process alive.
        """
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread is not None:
            self._thread.join(seconds)

    def submit(self, works: Sequence[Work]) -> None:
        """Put works into the queue; their results arrive in their futures.

        Raises:
          EngineError: the engine has stopped.
        """
        with self._condition:
            if self._stopping or self.status == "stopped":
                raise EngineError("The server is stopping. Send the request again later.")
            self._waiting += works
            self._last_arrival = time.monotonic()
            self._metrics.waiting.set(len(self._waiting))
            self._condition.notify()

    def _work(self, warm_up: bool) -> None:
        try:
            with rules.use(self._models.mesh, self._models.rules):
                if warm_up:
                    self._warm_up()
                self.status = "ready"
                while not self._stopping:
                    self._turn()
        finally:
            self._give_up()

    def _turn(self) -> None:
        """Start what is due, and take every batch under way one piece further."""
        taken = self._take()
        if taken:
            self._begin(taken)
        for batch in list(self._running):
            self._advance(batch)
        self._metrics.running.set(len(self._running))

    def _take(self) -> list[Work]:
        """Return works to be started together; wait for some where nothing is under way."""
        with self._condition:
            while not self._stopping:
                self._waiting = [work for work in self._waiting if not work.dropped]
                group = self._due()
                pause = self._pause(group) if group else None
                if pause == 0.0:
                    taken = set(map(id, group))
                    self._waiting = [work for work in self._waiting if id(work) not in taken]
                    self._metrics.waiting.set(len(self._waiting))
                    return group
                if self._running:
                    break
                self._condition.wait(pause)
        return []

    def _due(self) -> list[Work]:
        """Return the works that go together with the one that has waited longest, as many as a batch holds.

        Scores come first: they take one call, and requests go on with them.
        """
        scorings: list[Work] = [work for work in self._waiting if isinstance(work, Scoring)]
        if scorings:
            return scorings[: self._models.row_sizes[-1]]
        if not self._waiting or len(self._running) >= self._batching.running:
            return []
        wanted = self._group(self._waiting[0])
        return [work for work in self._waiting if self._group(work) == wanted][: self._models.row_sizes[-1]]

    def _group(self, work: Work) -> tuple[Kind, int] | None:
        if isinstance(work, Scoring):
            return None
        return work.kind, self._models.width([work.row])

    def _pause(self, group: Sequence[Work]) -> float:
        """Return for how many seconds a group is to wait for others that may come; 0 if it is due.

        Others are expected if more was under way at once a moment ago: they have their answers, and ask again.
        """
        now = time.monotonic()
        under_way = sum(batch.under_way for batch in self._running)
        outstanding = len(self._waiting) + under_way
        faded = self._peak * 0.5 ** ((now - self._peak_seen) / PEAK_HALVES)
        self._peak, self._peak_seen = max(faded, float(outstanding)), now
        if len(group) >= self._models.row_sizes[-1]:
            return 0.0
        if len(group) < under_way:
            # Rows of one batch end one after another: taken on one by one, they would hold up the many for the few.
            return max(0.0, group[0].arrived + self._batching.patience - now)
        if outstanding >= round(self._peak):
            return 0.0
        linger = self._batching.linger
        return max(0.0, min(self._last_arrival + linger, group[0].arrived + MOST_LINGER * linger) - now)

    def _begin(self, works: Sequence[Work]) -> None:
        try:
            scorings = [work for work in works if isinstance(work, Scoring)]
            if scorings:
                self._score(scorings)
                return
            self._running.append(self._batch([work for work in works if isinstance(work, Sampling)]))
        except (RuntimeError, MemoryError, PitError) as error:
            self._fail(works, error)

    def _batch(self, rows: Sequence[Sampling]) -> Batch:
        kind, models = rows[0].kind, self._models
        width, size = models.width([sampling.row for sampling in rows]), bucket(len(rows), models.row_sizes)
        self._metrics.rows.labels(kind).observe(len(rows))
        return Batch(models.speakers[kind], rows, width, size, models.mesh)

    def _score(self, scorings: Sequence[Scoring]) -> None:
        rows = [row for scoring in scorings for row in scoring.rows]
        self._metrics.rows.labels("gap").observe(len(rows))
        scores = self._models.score(rows, [answer for scoring in scorings for answer in scoring.answers])
        start = 0
        for scoring in scorings:
            self._later(_resolve, scoring.result, scores[start : start + len(scoring.rows)])
            start += len(scoring.rows)

    def _advance(self, batch: Batch) -> None:
        try:
            found, tokens = batch.advance(self._batching.piece)
        except (RuntimeError, MemoryError) as error:
            self._running.remove(batch)
            self._fail(batch.rows, error)
            return
        self._metrics.tokens.labels(batch.rows[0].kind).inc(tokens)
        self._later(_deliver, found)
        if batch.over:
            self._running.remove(batch)

    def _fail(self, works: Sequence[Work], error: Exception) -> None:
        _LOG.error("a batch of %d failed: %s", len(works), error)
        for work in works:
            self._later(_refuse, work.result, EngineError(f"The batch of this request failed: {error}"))

    def _give_up(self) -> None:
        with self._condition:
            self.status = "stopped"
            left = [*self._waiting, *(row for batch in self._running for row in batch.rows)]
            self._waiting, self._running = [], []
        for work in left:
            self._later(_refuse, work.result, EngineError("The server was stopped before the answer was complete."))

    def _later(self, function: object, *args: object) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)  # pyright: ignore[reportArgumentType]

    def _warm_up(self) -> None:
        """Compile every shape, so that no request has to wait for that."""
        models, nobody, started = self._models, self._nobody, time.monotonic()
        assert nobody is not None
        for size in models.row_sizes:
            for width in models.widths:
                for speaker in models.speakers.values():
                    if self._stopping:
                        return
                    Batch(speaker, [nobody], width, size, models.mesh).advance(0.0)
            if models.has_gap:
                self._warm_up_scores(size)
        count = len(models.row_sizes) * len(models.widths)
        _LOG.info("compiled %d shapes in %.0f s", count, time.monotonic() - started)

    def _warm_up_scores(self, size: int) -> None:
        models = self._models
        for width in models.widths:
            row = PromptRow((models.codec.pad_id,) * width, (0, 0))
            models.score([row] * size, [Response((), True)] * size)


def _nobody(models: Models) -> Sampling:
    """Return a row of one token that nobody waits for."""
    row = PromptRow((models.codec.pad_id,), (0, 0))
    draw = Draw(seed=0, stream="answers", iteration=0, number=0, candidate=0, temperature=1.0, top_p=1.0, limit=2)
    return Sampling("improver", row, draw)


def _deliver(found: Sequence[Progress]) -> None:
    loop = asyncio.get_running_loop()
    for progress in found:
        sampling = progress.sampling
        if sampling.dropped:
            continue
        sampling.seen = progress.ids
        if sampling.watch is not None:
            # Called by the loop, so that a fault in one request's watch cannot keep results from the others.
            loop.call_soon(sampling.watch, progress.ids)
        if progress.response is not None:
            _resolve(sampling.result, progress.response)


def _resolve(result: asyncio.Future, value: object) -> None:
    if not result.done():
        result.set_result(value)


def _refuse(result: asyncio.Future, error: EngineError) -> None:
    if not result.done():
        result.set_exception(error)
