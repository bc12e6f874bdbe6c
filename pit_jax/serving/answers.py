"""Answers to a request, all made at the same time, whole or piece by piece."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from pit_jax.improve.loop import Trajectory
from pit_jax.serving.asked import Asked, Prompt
from pit_jax.serving.engine import Engine
from pit_jax.serving.improving import Answering
from pit_jax.serving.text import TextStream
from pit_jax.text.codec import Codec

Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One finished answer.

    number: its index in the request. cut: whether it ends for want of room rather than of words.
    prompt_tokens: of the prompt and the draft, if one was given. tokens: of the answer. sampled: of all samples.
    """

    number: int
    text: str
    cut: bool
    prompt_tokens: int
    tokens: int
    sampled: int
    original: str
    trajectory: Trajectory
    proposals: tuple[str, ...]

    @property
    def changed(self) -> bool:
        """Whether improvement changed the draft."""
        return self.trajectory.final != self.trajectory.first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of an answer's text that has become certain."""

    number: int
    text: str


class Answerer:
    """Answers requests with one engine.

    Args:
      engine: samples and scores.
      codec: texts to ids and back.
    """

    def __init__(self, engine: Engine, codec: Codec) -> None:
        self._engine, self._codec = engine, codec

    async def whole(self, asked: Asked) -> list[Answer]:
        """Return all answers.

        If one fails or the request is given up, the others are given up too.

        Raises:
          EngineError: a batch failed, or the server stops.
        """
        return await _together(self._makings(asked, None))

    async def pieces(self, asked: Asked) -> AsyncIterator[Piece | Answer]:
        """Yield the answers' pieces as they come; an `Answer` follows the last piece of each.

        Raises:
          EngineError: a batch failed, or the server stops.
        """
        queue: asyncio.Queue[Piece | Answer | None] = asyncio.Queue()

        async def one(making: Coroutine[Any, Any, Answer]) -> None:
            queue.put_nowait(await making)

        async def all_of_them() -> None:
            try:
                await _together([one(making) for making in self._makings(asked, queue.put_nowait)])
            finally:
                queue.put_nowait(None)

        task = asyncio.create_task(all_of_them())
        try:
            while (event := await queue.get()) is not None:
                yield event
            await task
        finally:
            task.cancel()

    def _makings(self, asked: Asked, emit: Callable[[Piece], None] | None) -> list[Coroutine[Any, Any, Answer]]:
        prompts = [prompt for prompt in asked.prompts for _ in range(asked.n)]
        return [self._make(asked, prompt, number, emit) for number, prompt in enumerate(prompts)]

    async def _make(self, asked: Asked, prompt: Prompt, number: int, emit: Callable[[Piece], None] | None) -> Answer:
        text = TextStream(self._codec, asked.stops)

        def send(piece: str) -> None:
            if emit is not None and piece:
                emit(Piece(number=number, text=piece))

        def watch(ids: Sequence[int]) -> None:
            send(text.feed(ids))
            if text.stopped:
                answering.enough()

        watched = watch if emit is not None or asked.stops else None
        answering = Answering(self._engine, self._codec, asked, prompt, number, watched)
        trajectory = await answering.run()
        final = trajectory.final
        ids, cut = final.ids[: asked.limit], len(final.ids) > asked.limit
        if final == trajectory.first and prompt.draft_text is not None and not cut:
            send(text.feed_text(prompt.draft_text, last=True))
        else:
            send(text.feed(ids, last=True))
        return self._answer(asked, prompt, trajectory, text, number=number, sampled=answering.sampled)

    def _answer(
        self, asked: Asked, prompt: Prompt, trajectory: Trajectory, text: TextStream, *, number: int, sampled: int
    ) -> Answer:
        final, codec = trajectory.final, self._codec
        whole = final.finished and len(final.ids) <= asked.limit
        draft = len(prompt.draft.ids) if prompt.draft is not None else 0
        return Answer(
            number=number,
            text=text.sent,
            cut=not (whole or text.stopped),
            prompt_tokens=len(codec.policy_prompt(prompt.ids).ids) + draft,
            tokens=min(len(final.ids) + final.finished, asked.limit),
            sampled=sampled,
            original=codec.text(trajectory.first.ids) if prompt.draft_text is None else prompt.draft_text,
            trajectory=trajectory,
            proposals=tuple(codec.text(step.proposal.ids) for step in trajectory.steps),
        )


async def _together(makings: Sequence[Coroutine[Any, Any, Made]]) -> list[Made]:
    """Return what coroutines return; the first that fails ends them all, and its error is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(making) for making in makings]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
