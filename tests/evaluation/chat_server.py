"""A real HTTP server on the loopback interface that speaks OpenAI's chat protocol, and breaks it where a test asks."""

from __future__ import annotations

import collections
import http.server
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

KEY = "sk-loopback-1234567890"


class Call(NamedTuple):
    """A request that arrived."""

    body: dict[str, Any]
    headers: dict[str, str]
    at: float

    @property
    def text(self) -> str:
        """The words of the last message."""
        return self.body["messages"][-1]["content"]


class Turn(NamedTuple):
    """One try at a question: which it is, counted from 0, and the means to answer it."""

    call: Call
    attempt: int
    handler: Handler

    def reply(self, text: str | None, **more: Any) -> None:
        """Answer as a model would."""
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
        answer = {"object": "chat.completion", "model": "judge-2026", "choices": [choice], "usage": usage, **more}
        self.status(200, json.dumps(answer))

    def status(self, code: int, body: str, **headers: str) -> None:
        """Answer with a status and any body."""
        data = body.encode()
        self.handler.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.end_headers()
        self.handler.wfile.write(data)

    def cut(self) -> None:
        """Announce more than is sent, and hang up."""
        self.handler.send_response(200)
        self.handler.send_header("Content-Length", "1000")
        self.handler.end_headers()
        self.handler.wfile.write(b'{"choices": [{"mess')
        self.handler.close_connection = True

    def reset(self) -> None:
        """Reset the connection (RST) without a word."""
        self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.handler.connection.close()
        self.handler.close_connection = True

    def drip(self) -> None:
        """Send a byte now and then, for ever: no single wait is long."""
        self.handler.send_response(200)
        self.handler.send_header("Content-Length", "100000")
        self.handler.end_headers()
        while not self.handler.server.closing.wait(0.05):
            self.handler.wfile.write(b" ")

    def stall(self) -> None:
        """Say nothing until the server ends."""
        self.handler.server.closing.wait()


Script = Callable[[Turn], None]


class Handler(http.server.BaseHTTPRequestHandler):
    """Hands each request to the server's script."""

    protocol_version = "HTTP/1.1"
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        call = Call(body, {name.lower(): value for name, value in self.headers.items()}, time.monotonic())
        with self.server.mutex:
            attempt = self.server.seen[call.text]
            self.server.seen[call.text] += 1
            self.server.calls.append(call)
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
        try:
            if self.path != "/v1/chat/completions":
                self.send_error(404)
            else:
                self.server.script(Turn(call, attempt, self))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.server.mutex:
                self.server.busy -= 1

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class ChatServer(http.server.ThreadingHTTPServer):
    """The server; a context manager. `calls` are all requests in order, `seen` counts them by the last message."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, script: Script, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.script = script
        self.calls: list[Call] = []
        self.seen: collections.Counter[str] = collections.Counter()
        self.busy = self.busiest = 0
        self.mutex, self.closing = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        """Let clients hang up without a traceback."""

    def __enter__(self) -> ChatServer:
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()
        self._thread.join()
