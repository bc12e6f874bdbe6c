"""One answer from draft to end: the loop of `improve.loop` for one prompt, its batches shared with other requests."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from pit_jax.decode.batches import Response, as_reference
from pit_jax.improve.accept import Improve
from pit_jax.improve.loop import Step, Trajectory, choose
from pit_jax.serving.asked import Asked, Prompt
from pit_jax.serving.engine import Engine
from pit_jax.serving.loaded import Kind
from pit_jax.serving.work import Draw, Sampling, Scoring, Watch, Work
from pit_jax.text.codec import Codec, PromptRow


class Answering:
    """The making of one answer.

    The samples are those of `pit-jax improve` with the same seed, for line `number` of a file of such prompts.

    Args:
      engine: samples and scores.
      codec: makes the prompts.
      asked: the request.
      prompt: which of its prompts.
      number: of the answer in the request.
      watch: is told the ids of the last pass as they come, where nothing can revoke them any more.
    """

    def __init__(
        self, engine: Engine, codec: Codec, asked: Asked, prompt: Prompt, number: int, watch: Watch | None = None
    ) -> None:
        self._engine, self._codec, self._asked = engine, codec, asked
        self._prompt, self._number, self._watch = prompt, number, watch
        self._live: Sampling | None = None
        self.sampled = 0

    def enough(self) -> None:
        """End the pass that is watched: what has come of it is the answer."""
        if self._live is not None and not self._live.result.done():
            self._live.dropped = True
            self._live.result.set_result(Response(self._live.seen, True))

    async def run(self) -> Trajectory:
        """Return the draft and what became of it.

        Raises:
          EngineError: a batch failed, or the server stops.
        """
        improve, draft = self._asked.improve, self._prompt.draft
        if draft is None:
            [draft] = await self._sample("policy", self._codec.policy_prompt(self._prompt.ids), 0, 1, improve is None)
        trajectory = Trajectory(first=draft)
        if improve is None:
            return trajectory
        for iteration in range(improve.iterations):
            if trajectory.stopped:
                break
            step = await self._step(improve, iteration, trajectory.final)
            trajectory = dataclasses.replace(trajectory, steps=(*trajectory.steps, step))
        return trajectory

    async def _step(self, improve: Improve, iteration: int, present: Response) -> Step:
        """Return what is proposed for the present answer, and whether it is taken."""
        reference = as_reference(self._codec, present)
        row = self._codec.improver_prompt(self._prompt.ids, reference)
        last = iteration == improve.iterations - 1 and not improve.needs_gap
        proposals = await self._sample("improver", row, iteration, improve.candidates, last)
        if not improve.needs_gap:
            return Step(proposal=proposals[0], accepted=True, gap=None, zero=None)
        question = self._codec.gap_prompt(self._prompt.ids, reference)
        scores = await self._scores([question] * (len(proposals) + 1), [*proposals, present])
        return choose(improve, proposals, scores[:-1], scores[-1:])[0]

    async def _sample(self, kind: Kind, row: PromptRow, iteration: int, count: int, last: bool) -> list[Response]:
        stream = "answers" if kind == "policy" else "improve"
        rows = [
            Sampling(kind, row, self._draw(stream, iteration, candidate), self._watch if last else None)
            for candidate in range(count)
        ]
        if last:
            self._live = rows[0]
        try:
            await self._wait(rows)
            answers = [sampling.result.result() for sampling in rows]
        finally:
            self._live = None
        self.sampled += sum(len(answer.ids) + answer.finished for answer in answers)
        return answers

    async def _scores(self, rows: Sequence[PromptRow], answers: Sequence[Response]) -> np.ndarray:
        scoring = Scoring(rows, answers)
        await self._wait([scoring])
        return scoring.result.result()

    async def _wait(self, works: Sequence[Work]) -> None:
        """Wait for all works; none of them is computed any further if this request is given up."""
        self._engine.submit(works)
        try:
            results: list[asyncio.Future[Any]] = [work.result for work in works]
            await asyncio.gather(*results)
        finally:
            for work in works:
                work.drop()

    def _draw(self, stream: str, iteration: int, candidate: int) -> Draw:
        asked = self._asked
        return Draw(
            seed=asked.seed,
            stream=stream,
            iteration=iteration,
            number=self._number,
            candidate=candidate,
            temperature=asked.temperature,
            top_p=asked.top_p,
            limit=asked.limit,
        )
