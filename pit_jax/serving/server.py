"""The server's life: load, listen, warm up, serve, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from etils import epath

from pit_jax.core.errors import ConfigError
from pit_jax.serving.app import Service
from pit_jax.serving.engine import Engine
from pit_jax.serving.loaded import Models
from pit_jax.serving.metrics import Metrics
from pit_jax.serving.protocol import Abilities
from pit_jax.serving.settings import Serving
from pit_jax.serving.work import EngineError

_LOG = logging.getLogger(__name__)
WATCH_SECONDS = 0.25
IDLE_SECONDS = 75
BACKLOG = 2048


class _Uvicorn(uvicorn.Server):
    """Leaves signals to `Server`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class Server:
    """Serves one run; `run` returns when it was told to stop.

    Args:
      serving: the settings.
      models: the run, loaded.
    """

    def __init__(self, serving: Serving, models: Models) -> None:
        self._serving, self._models = serving, models
        self._metrics = Metrics()
        self._engine = Engine(models, serving.batching, self._metrics)
        name = serving.name or models.artifact.directory.parent.name or "pit"
        able = Abilities(
            codec=models.codec,
            chat=models.chat,
            name=name,
            has_gap=models.has_gap,
            has_policy="policy" in models.speakers,
        )
        self._service = Service(serving, able, self._engine, self._metrics)
        self._uvicorn: _Uvicorn | None = None

    async def run(self, listening: Callable[[int], None] | None = None) -> None:
        """Serve until `stop` is called.

        Args:
          listening: is told the port once clients can connect.

        Raises:
          EngineError: the engine has ended by itself.
          OSError: the address cannot be listened on.
        """
        listener = _listen(self._serving.host, self._serving.port)
        config = uvicorn.Config(
            self._service.app(),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=max(1, round(self._serving.drain)),
        )
        self._uvicorn = _Uvicorn(config)
        self._engine.start(warm_up=self._serving.warm_up)
        watching = asyncio.create_task(self._watch())
        if listening is not None:
            listening(listener.getsockname()[1])
        try:
            await self._uvicorn.serve(sockets=[listener])
        finally:
            watching.cancel()
            failed = self._engine.status == "stopped"
            await asyncio.to_thread(self._engine.stop, max(1.0, self._serving.drain))
            listener.close()
        if failed:
            raise EngineError("The engine has ended by itself; the log says why.")

    def stop(self) -> None:
        """Take no more requests, finish those under way, then return from `run`; called again, finish none."""
        if self._uvicorn is not None:
            self._uvicorn.force_exit = self._service.draining
            self._uvicorn.should_exit = True
        self._service.draining = True

    async def _watch(self) -> None:
        """Say when the models are ready, and stop if the engine ends: a server without one is better restarted."""
        while self._engine.status == "loading":
            await asyncio.sleep(WATCH_SECONDS)
        if self._engine.status == "ready":
            _LOG.info("ready")
        while self._engine.status != "stopped":
            await asyncio.sleep(WATCH_SECONDS)
        self.stop()


def _listen(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listener = socket.socket(found[0][0], socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(found[0][4])
    except OSError:
        listener.close()
        raise
    # From here on clients can connect; they are answered when uvicorn accepts.
    listener.listen(BACKLOG)
    return listener


def serve(serving: Serving) -> None:
    """`pit-jax serve`: load a run and serve it until Ctrl-C or SIGTERM.

    Raises:
      CheckpointError: there is no improver. OSError: the address cannot be listened on.
      EngineError: the engine has ended by itself.
    """
    if not serving.is_local and serving.api_key is None:
        _LOG.warning("%s can be reached by others, and no API key is asked for: anyone may use it", serving.host)
    models = Models(serving.checkpoint, serving.batching.max_batch, serving.draft_tokens)
    _check_defaults(serving, models)
    server = Server(serving, models)

    def listening(port: int) -> None:
        host = f"[{serving.host}]" if ":" in serving.host else serving.host
        _LOG.info("%s at http://%s:%d/v1", models.artifact.directory, host, port)

    async def run() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, server.stop)
        await server.run(listening)

    asyncio.run(run())


def _check_defaults(serving: Serving, models: Models) -> None:
    """Say at the start what would otherwise be said at every request."""
    if models.has_gap:
        return
    if serving.accept == "gap" or serving.candidates > 1:
        raise ConfigError(
            f"{epath.Path(serving.checkpoint)} has no gap model, which --accept=gap and --candidates above 1 need. "
            "Leave them out, or give a run that has one."
        )
    _LOG.warning("no gap reward model found: the accept rule is OFF, every proposal is taken")
