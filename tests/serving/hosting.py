"""Real servers for tests: in a thread of this process, on a free port of loopback."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from email.message import Message
from typing import Any

import pytest

from pit_jax.serving.batch import Batch
from pit_jax.serving.loaded import Models
from pit_jax.serving.server import Server
from pit_jax.serving.settings import Batching, Limits, Serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK = {"model": "nano", "messages": [{"role": "user", "content": "hello there"}], "seed": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """What a server has said."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The events of a stream; the last must be [DONE]."""
        lines = [line for line in self.body.decode().split("\n\n") if line and not line.startswith(":")]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


class Host:
    """A server under test."""

    def __init__(self, server: Server) -> None:
        self.server, self.port = server, 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listening = threading.Event()
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            await self.server.run(self._listens)

        try:
            self._ended.set_result(asyncio.run(main()))
        except Exception as error:  # noqa: BLE001 (handed to the test's own thread)
            self._ended.set_exception(error)

    def _listens(self, port: int) -> None:
        self.port = port
        self._listening.set()

    def start(self) -> None:
        self._thread.start()
        assert self._listening.wait(60)

    def stop(self) -> None:
        """Tell the server to stop, as SIGTERM does."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.server.stop)

    def wait(self) -> None:
        """Wait for the server's end; raises what it raised."""
        self._ended.result(60)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, **headers: str) -> Reply:
        return self._send(urllib.request.Request(self.url + path, headers=headers))

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return self._send(
            urllib.request.Request(self.url + path, data, {"content-type": "application/json"} | names, method="POST")
        )

    def _send(self, request: urllib.request.Request) -> Reply:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Reply(status=answer.status, headers=_lower(answer.headers), body=answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Reply(status=error.code, headers=_lower(error.headers), body=error.read())

    def metric(self, name: str) -> float:
        """Return the value of a metric, with its labels in `name` if it has some; 0 where it is not counted yet."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics").body.decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0


def _lower(headers: Message) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


@contextlib.contextmanager
def hosted(
    models: Models,
    *,
    batching: Batching | None = None,
    limits: Limits | None = None,
    ready: bool = True,
    **settings: Any,
) -> Iterator[Host]:
    """Serve models until the end of the `with`; `ready`: wait until requests are taken."""
    serving = Serving(
        checkpoint=str(models.artifact.directory),
        port=0,
        name="nano",
        batching=batching or Batching(max_batch=4),
        limits=limits or Limits(),
        **{"warm_up": False, **settings},
    )
    host = Host(Server(serving, models))
    host.start()
    try:
        if ready:
            until(lambda: host.get("/ready").status == 200)
        yield host
    finally:
        host.stop()
        host.wait()


def until(happens: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            if happens():
                return
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


SLOW = Batching(max_batch=4, piece=1e-6)
"""With `slow_pieces`: a token at a time."""


def slow_pieces(patch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let every piece of a batch take at least so long."""
    advance = Batch.advance

    def slowly(self: Batch, piece: float) -> Any:
        time.sleep(seconds)
        return advance(self, piece)

    patch.setattr(Batch, "advance", slowly)
