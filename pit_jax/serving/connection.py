"""The client's side of a request: its body within limits, its leaving, and a stream of events to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive, Send

from pit_jax.serving.asked import Refusal

Result = TypeVar("Result")
SIGN_OF_LIFE = 15.0
"""Seconds of silence after which a stream says that it is alive: proxies close those that say nothing."""


class ClientGone(Exception):
    """The client has closed the connection: there is nobody to answer."""


async def read_body(request: Request, most: int) -> bytes:
    """Return a request's body.

    Raises:
      Refusal: it has more than `most` bytes, which is found out before they are read.
      ClientGone: the client left before it was complete.
    """
    too_long = Refusal(413, f"The request has more than {most} bytes. Shorten it.", code="request_too_large")
    said = request.headers.get("content-length", "")
    if said.isdigit() and (len(said) > 18 or int(said) > most):
        raise too_long
    parts, size = [], 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise too_long
        if not message.get("more_body", False):
            return b"".join(parts)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Return what `work` returns, and give it up as soon as the client leaves.

    Raises:
      ClientGone: it has left.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait((working,))


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_events(send: Send, events: AsyncIterator[dict[str, Any]]) -> None:
    """Send objects as server-sent events, and `[DONE]` at their end."""
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    # For nginx, which would otherwise collect the events and pass them on in one piece.
    headers.append((b"x-accel-buffering", b"no"))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async with aclosing(_with_signs_of_life(events)) as lines:  # pyright: ignore[reportArgumentType]
        async for line in lines:
            await send({"type": "http.response.body", "body": line, "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def event(value: dict[str, Any]) -> bytes:
    """Return an object as one event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _with_signs_of_life(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Yield events, and a comment whenever there was none for a while."""
    coming: asyncio.Future[dict[str, Any]] | None = None
    try:
        while True:
            coming = asyncio.ensure_future(anext(events))  # pyright: ignore[reportArgumentType]
            while not (await asyncio.wait((coming,), timeout=SIGN_OF_LIFE))[0]:
                yield b": still at work\n\n"
            try:
                yield event(coming.result())
            except StopAsyncIteration:
                return
    finally:
        if coming is not None and not coming.done():
            coming.cancel()
            await asyncio.wait((coming,))
