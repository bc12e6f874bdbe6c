"""The routes: what is asked at each, who may ask, and what happens when something goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from pit_jax.core.errors import PitError
from pit_jax.serving.answers import Answer, Answerer
from pit_jax.serving.asked import Asked, Refusal
from pit_jax.serving.connection import ClientGone, event, read_body, send_events, unless_gone
from pit_jax.serving.engine import Engine
from pit_jax.serving.fields import read_object
from pit_jax.serving.metrics import Metrics
from pit_jax.serving.protocol import Abilities, Reader
from pit_jax.serving.replies import Reply
from pit_jax.serving.settings import Serving
from pit_jax.serving.work import EngineError

_LOG = logging.getLogger(__name__)
RETRY_AFTER = 1
LAST_WORDS = 5.0
"""Seconds for a client to take the reason why it is not answered."""
LARGE_BODY = 32_768
"""Bytes above which a body is read in a thread: tokenizing it would hold up the others."""


class Service:
    """What all requests share.

    Args:
      serving: the settings.
      able: what the run can do.
      engine: samples and scores.
      metrics: what is counted.
    """

    def __init__(self, serving: Serving, able: Abilities, engine: Engine, metrics: Metrics) -> None:
        self._serving, self._limits, self._able = serving, serving.limits, able
        self._engine, self._metrics = engine, metrics
        self._reader = Reader(able, serving)
        self._answerer = Answerer(engine, able.codec)
        self._active, self._started = 0, int(time.time())
        self.draining = False

    def app(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/v1/chat/completions", _Post(self, chat=True), methods=["POST"]),
            Route("/v1/completions", _Post(self, chat=False), methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._numbers),
        ]
        handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
            Refusal: _refused, 404: _nowhere, 405: _wrong_method, 500: _broken,
        }  # fmt: skip
        return Starlette(routes=routes, exception_handlers=handlers)  # pyright: ignore[reportArgumentType]

    async def answer(self, request: Request, send: Send, *, chat: bool) -> int:
        """Answer one request and return the status.

        Raises:
          Refusal: it is not answered. ClientGone: the client has left.
        """
        self.check_key(request)
        if self._engine.status != "ready" or self.draining:
            what = "still loading its models" if self._engine.status == "loading" else "stopping"
            raise Refusal(503, f"The server is {what}. Try again later.", code="not_ready", retry_after=5)
        if self._active >= self._limits.requests:
            message = f"{self._active} requests are being answered already. Try again in a moment."
            raise Refusal(429, message, code="rate_limit_exceeded", retry_after=RETRY_AFTER)
        self._active += 1
        self._metrics.active.set(self._active)
        try:
            async with asyncio.timeout(self._limits.seconds):
                await self._answer(request, send, chat=chat)
        except TimeoutError:
            message = f"The request took more than {self._limits.seconds:g} seconds. Ask for less, or try again."
            raise Refusal(504, message, code="timeout") from None
        finally:
            self._active -= 1
            self._metrics.active.set(self._active)
        return 200

    async def _answer(self, request: Request, send: Send, *, chat: bool) -> None:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # A page in a browser can send anything else to this machine without being allowed to.
            raise Refusal(415, "Send the header Content-Type: application/json.", code="invalid_content_type")
        body = await read_body(request, self._limits.body)
        headers = dict(request.headers)
        if len(body) > LARGE_BODY:
            asked = await asyncio.to_thread(self._read, body, headers, chat)
        else:
            asked = self._read(body, headers, chat)
        if asked.stream:
            await unless_gone(request.receive, self._stream(asked, send))
            return
        answers = await unless_gone(request.receive, self._answerer.whole(asked))
        self._count(answers)
        response = JSONResponse(Reply(asked).whole(answers))
        await response(request.scope, request.receive, send)

    def _read(self, body: bytes, headers: dict[str, str], chat: bool) -> Asked:
        return self._reader.read(read_object(body), headers, chat=chat)

    async def _stream(self, asked: Asked, send: Send) -> None:
        async with aclosing(self._events(asked)) as events:  # pyright: ignore[reportArgumentType]
            await send_events(send, events)

    async def _events(self, asked: Asked) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of a stream; what goes wrong now, after the status was sent, is an event of its own."""
        reply, answers = Reply(asked), list[Answer]()
        try:
            async with aclosing(self._answerer.pieces(asked)) as events:  # pyright: ignore[reportArgumentType]
                async for part in events:
                    if isinstance(part, Answer):
                        answers.append(part)
                    yield reply.chunk(part)
        except EngineError as error:
            yield Refusal(500, str(error), code="engine_error").body
            return
        self._count(answers)
        if asked.usage:
            yield reply.last(answers)

    def _count(self, answers: list[Answer]) -> None:
        for answer in answers:
            self._metrics.changed.labels(str(answer.changed).lower()).inc()

    def seen(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)

    def left(self) -> None:
        """Count a client that did not wait."""
        self._metrics.gone.inc()

    def check_key(self, request: Request) -> None:
        """Check the bearer token, if one is asked for.

        Raises:
          Refusal: it is missing or wrong.
        """
        if self._serving.api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Starlette reads headers as latin-1, which gives back the very bytes that were sent.
        same = hmac.compare_digest(given.strip().encode("latin-1"), self._serving.api_key.encode())
        if scheme.lower() != "bearer" or not same:
            message = "The API key is missing or wrong. Send it as Authorization: Bearer KEY."
            raise Refusal(401, message, code="invalid_api_key")

    async def _models(self, request: Request) -> Response:
        self.check_key(request)
        return JSONResponse({"object": "list", "data": [self._described(name) for name in self._able.models()]})

    async def _model(self, request: Request) -> Response:
        self.check_key(request)
        name = request.path_params["name"]
        if name not in self._able.models():
            raise Refusal(404, f"The model {name!r} does not exist.", param="model", code="model_not_found")
        return JSONResponse(self._described(name))

    def _described(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "pit_jax"}

    async def _health(self, request: Request) -> Response:
        status = self._engine.status
        return JSONResponse({"status": status}, 503 if status == "stopped" else 200)

    async def _ready(self, request: Request) -> Response:
        status = "draining" if self.draining else self._engine.status
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    async def _numbers(self, request: Request) -> Response:
        self.check_key(request)
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")


class _Post:
    """A route that is answered at length: an ASGI application, for it must notice when the client leaves."""

    def __init__(self, service: Service, *, chat: bool) -> None:
        self._service, self._chat = service, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, sent = time.monotonic(), _Sent()

        async def noting(message: Message) -> None:
            sent.note(message)
            await send(message)

        request = Request(scope, receive)
        try:
            status = await self._service.answer(request, noting, chat=self._chat)
        except ClientGone:
            status = 499
            self._service.left()
        except PitError as error:
            refusal = error if isinstance(error, Refusal) else Refusal(500, str(error), code="engine_error")
            status = refusal.status
            await _say(refusal, sent, request, send)
        self._service.seen(scope["path"], status, time.monotonic() - started)


class _Sent:
    """What a request's client has been sent."""

    def __init__(self) -> None:
        self.begun = self.streams = False

    def note(self, message: Message) -> None:
        """Note a message on its way."""
        if message["type"] == "http.response.start":
            self.begun = True
            self.streams = any(value.startswith(b"text/event-stream") for _, value in message["headers"])


async def _say(refusal: Refusal, sent: _Sent, request: Request, send: Send) -> None:
    """Say why a request is not answered: by status, or in the stream where that was sent already.

    A client that does not read would hold this up for ever; it is left, and uvicorn closes the connection.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORDS):
            if not sent.begun:
                await (await _refused(request, refusal))(request.scope, request.receive, send)
            elif sent.streams:
                await send({"type": "http.response.body", "body": event(refusal.body), "more_body": False})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status == 413:
        headers["Connection"] = "close"
    return JSONResponse(error.body, error.status, headers=headers)


async def _nowhere(request: Request, error: Exception) -> Response:
    return await _refused(request, Refusal(404, f"There is nothing at {request.url.path}.", code="unknown_url"))


async def _broken(request: Request, error: Exception) -> Response:
    return await _refused(request, Refusal(500, "The server has a fault; its log says more.", code="internal_error"))


async def _wrong_method(request: Request, error: Exception) -> Response:
    message = f"{request.url.path} does not take {request.method}."
    return await _refused(request, Refusal(405, message, code="method_not_allowed"))
