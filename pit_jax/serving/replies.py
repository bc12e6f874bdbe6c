"""Answers as OpenAI's API writes them: whole objects, and chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from pit_jax.serving.answers import Answer, Piece
from pit_jax.serving.asked import Asked


class Reply:
    """The objects that answer one request; they share an id and a time.

    Args:
      asked: the request.
    """

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._id = ("chatcmpl-" if asked.chat else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())
        self._begun: set[int] = set()

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the one object of a reply that is not streamed."""
        return self._object(streamed=False) | {
            "choices": [self._choice(answer) for answer in answers],
            "usage": usage(self._asked, answers),
        }

    def chunk(self, event: Piece | Answer) -> dict[str, Any]:
        """Return the chunk of a stream that says a piece of an answer, or that it is complete."""
        made = self._object(streamed=True)
        made["choices"] = [self._delta(event) if self._asked.chat else self._text(event)]
        return made | ({"usage": None} if self._asked.usage else {})

    def last(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the chunk that says the usage, where it was asked for."""
        return self._object(streamed=True) | {"choices": [], "usage": usage(self._asked, answers)}

    def _object(self, *, streamed: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if streamed else "chat.completion") if self._asked.chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._asked.model}

    def _choice(self, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        content: dict[str, Any] = {"message": message} if self._asked.chat else {"text": answer.text}
        return {"index": answer.number, **content, "logprobs": None, **_end(answer)}

    def _delta(self, event: Piece | Answer) -> dict[str, Any]:
        delta: dict[str, Any] = {} if event.number in self._begun else {"role": "assistant"}
        self._begun.add(event.number)
        if isinstance(event, Piece):
            delta["content"] = event.text
        return {"index": event.number, "delta": delta, "logprobs": None, **_end(event)}

    def _text(self, event: Piece | Answer) -> dict[str, Any]:
        text = event.text if isinstance(event, Piece) else ""
        return {"index": event.number, "text": text, "logprobs": None, **_end(event)}


def _end(event: Piece | Answer) -> dict[str, Any]:
    """Return why an answer ends, and how it came about; nothing of both while it goes on."""
    if isinstance(event, Piece):
        return {"finish_reason": None}
    return {"finish_reason": "length" if event.cut else "stop", "pit": how(event)}


def how(answer: Answer) -> dict[str, Any]:
    """Return how an answer came about: `pit` of a choice, in the words of `pit-jax improve`'s output."""
    steps = zip(answer.trajectory.steps, answer.proposals, strict=True)
    return {
        "original": answer.original,
        "changed": answer.changed,
        "steps": [
            {"proposal": text, "accepted": step.accepted, "gap": step.gap, "zero": step.zero} for step, text in steps
        ],
        "sampled_tokens": answer.sampled,
    }


def usage(asked: Asked, answers: Sequence[Answer]) -> dict[str, int]:
    """Return the tokens of a request: each prompt counts once, however many answers it has."""
    prompts = sum(answer.prompt_tokens for answer in answers if answer.number % asked.n == 0)
    completions = sum(answer.tokens for answer in answers)
    return {"prompt_tokens": prompts, "completion_tokens": completions, "total_tokens": prompts + completions}
